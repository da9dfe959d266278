"""The warm start: flow matching with random parts of the condition hidden, so that one network serves both roles.

    loss = mean ||v(x_t, t | visible) - (x_1 - z)||^2,   t ~ U(0, 1)

A share `blind` of the samples shows what the student sees; the others what a teacher sees, with the number of pieces
drawn evenly from one to all. Rebuilt from the run's seed at every start: seconds.
"""

from __future__ import annotations

import torch

from atesd.flow.net import VelocityNet
from atesd.flow.sde import interpolate
from atesd.sections import FlowConfig
from atesd.seeds import derive_seed
from atesd.tasks.flows import FlowTask


def warm_start(task: FlowTask, config: FlowConfig, seed: int) -> VelocityNet:
    """Return the trained network; the same for the same seed and number of threads."""
    random = torch.Generator().manual_seed(derive_seed(seed, "flow warm start"))
    points, layout = task.train, task.layout
    net = VelocityNet(points.x_ND.shape[1], len(layout.piece_C), config.width, config.depth)
    net.draw(random)
    optimizer = torch.optim.AdamW(net.parameters(), lr=config.warm_lr)
    x1_ND, condition_NC = torch.as_tensor(points.x_ND), torch.as_tensor(points.condition_NC)
    piece_C, student_C = torch.as_tensor(layout.piece_C), torch.as_tensor(layout.student_C)
    rank_NM = torch.as_tensor(points.rank_NM)
    for step in range(config.warm_steps):
        for group in optimizer.param_groups:
            group["lr"] = config.warm_lr * (1.0 - step / config.warm_steps)
        at_B = torch.randint(0, len(points), (config.warm_batch,), generator=random)
        shown_B1 = torch.randint(1, layout.pieces + 1, (len(at_B), 1), generator=random)
        told_BC = (piece_C < 0) | (rank_NM[at_B][:, piece_C.clamp(min=0)] < shown_B1)
        is_blind_B1 = torch.rand(len(at_B), 1, generator=random) < config.blind
        visible_BC = torch.where(is_blind_B1, student_C.expand_as(told_BC), told_BC).float()
        t_B1 = torch.rand(len(at_B), 1, generator=random)
        z_BD = torch.randn(len(at_B), x1_ND.shape[1], generator=random)
        velocity_BD = net(interpolate(z_BD, x1_ND[at_B], t_B1), t_B1, condition_NC[at_B], visible_BC)
        loss = (velocity_BD - (x1_ND[at_B] - z_BD)).square().sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net
