"""The student's own SDE rollouts, and what both roles see of a condition.

B trajectories, K transitions, D dimensions, C numbers of a condition; S = K B states, step by step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from atesd.flow.net import VelocityNet
from atesd.flow.sde import interpolate, mean_of, sigma_of, times
from atesd.rollout.weights import SHRINK
from atesd.sections import FlowConfig
from atesd.tasks.flows import Layout, Points
from atesd.types import NonFiniteError


@dataclass(frozen=True, slots=True)
class States:
    """States that a student visited, each with its transition, and the points whose conditions go with them.

    `at_S` are places in `points`; `trajectory_S` says which trajectory a state belongs to.
    """

    points: Points
    x_SD: Tensor
    t_S1: Tensor
    dt_S1: Tensor
    at_S: Tensor
    trajectory_S: Tensor

    def of(self, trajectories: Tensor) -> States:
        """Return the states of some trajectories, which are numbered anew in their order."""
        place = torch.full((int(self.trajectory_S.max()) + 1,), -1)
        place[trajectories] = torch.arange(len(trajectories))
        kept = place[self.trajectory_S] >= 0
        own = (self.x_SD[kept], self.t_S1[kept], self.dt_S1[kept], self.at_S[kept])
        return States(self.points, *own, place[self.trajectory_S][kept])


class Views:
    """What student and teacher read: the same network, with more of the condition visible to the teacher."""

    def __init__(self, net: VelocityNet, layout: Layout) -> None:
        self.net = net
        self.layout = layout
        self._student_C = torch.as_tensor(layout.student_C, dtype=torch.float32)

    def student(self, points: Points, at_B: Tensor, x_BD: Tensor, t_B1: Tensor) -> Tensor:
        """Return the student's velocities."""
        visible_BC = self._student_C.expand(len(x_BD), -1)
        return self._velocity(points, at_B, x_BD, t_B1, visible_BC)

    def teacher(self, points: Points, at_B: Tensor, x_BD: Tensor, t_B1: Tensor, ratios: Sequence[float]) -> Tensor:
        """Return the velocities with what a ratio for each point shows; the weights are those in place."""
        visible = self.layout.visible(points.rank_NM[at_B.numpy()], ratios)
        return self._velocity(points, at_B, x_BD, t_B1, torch.as_tensor(visible, dtype=torch.float32))

    def _velocity(self, points: Points, at_B: Tensor, x_BD: Tensor, t_B1: Tensor, visible_BC: Tensor) -> Tensor:
        condition_BC = torch.as_tensor(points.condition_NC)[at_B]
        return cast("Tensor", self.net(x_BD, t_B1, condition_BC, visible_BC))


@torch.no_grad()
def roll(
    views: Views, points: Points, at_B: Tensor, config: FlowConfig, random: torch.Generator, *, start: bool
) -> tuple[States, Tensor]:
    """Let the student go from noise, or with `start` from noised data, to the end; return its states and where it ends.

    NonFiniteError where a transition leaves the finite numbers.
    """
    dims = points.x_ND.shape[1]
    low, high = config.start if start else (0.0, 0.0)
    start_B1 = low + (high - low) * torch.rand(len(at_B), 1, generator=random)
    x_BD = interpolate(torch.randn(len(at_B), dims, generator=random), torch.as_tensor(points.x_ND)[at_B], start_B1)
    dt_B1 = (1.0 - start_B1) / config.steps
    visited: list[Tensor] = []
    moments = times(start_B1, config.steps)
    for number, t_B1 in enumerate(moments, start=1):
        visited.append(x_BD)
        velocity_BD = views.student(points, at_B, x_BD, t_B1)
        noise_BD = torch.randn(len(at_B), dims, generator=random)
        x_BD = mean_of(x_BD, velocity_BD, t_B1, dt_B1, config.eta) + sigma_of(t_B1, dt_B1, config.eta) * noise_BD
        if not bool(x_BD.isfinite().all()):
            raise NonFiniteError(
                f"transition {number} of {config.steps} of the student's rollout leads to numbers that are not finite: "
                f"{SHRINK}"
            )
    count = config.steps
    states = States(
        points,
        torch.cat(visited),
        torch.cat(moments),
        dt_B1.repeat(count, 1),
        at_B.repeat(count),
        torch.arange(len(at_B)).repeat(count),
    )
    return states, x_BD
