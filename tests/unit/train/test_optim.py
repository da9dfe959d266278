"""Learning-rate factors at hand-worked points, and two AdamW steps by hand."""

from __future__ import annotations

from math import cos, pi, sqrt
from typing import Literal

import pytest
import torch
from torch import nn

from atesd.sections import OptimConfig
from atesd.train.optim import MasterAdamW, build_optimizer, learning_rate_factor

Schedule = Literal["constant", "linear", "cosine"]


def factors(schedule: Schedule, warmup: int, total: int, updates: range) -> list[float]:
    config = OptimConfig(schedule=schedule, warmup_steps=warmup)
    return [learning_rate_factor(config, update, total) for update in updates]


# Updates 0..3 warm up by quarters; of the 8 that follow, update 4 + n has done n eighths. 12 and 20 lie past the end.
@pytest.mark.parametrize(("schedule", "after"), [
    ("constant", [1, 1, 1, 1, 1, 1, 1, 1, 1]),
    ("linear", [1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8, 0]),
    # (1 + cos(n pi / 8)) / 2; cos(pi / 4) = sqrt(1 / 2)
    ("cosine", [1, (1 + cos(pi / 8)) / 2, (1 + sqrt(0.5)) / 2, (1 + cos(3 * pi / 8)) / 2, 1 / 2,
                (1 - cos(3 * pi / 8)) / 2, (1 - sqrt(0.5)) / 2, (1 - cos(pi / 8)) / 2, 0]),
])  # fmt: skip
def test_factors_with_a_warm_up_of_4_in_12_updates(schedule: Schedule, after: list[float]) -> None:
    assert factors(schedule, 4, 12, range(4)) == [0.25, 0.5, 0.75, 1.0]
    assert factors(schedule, 4, 12, range(4, 13)) == pytest.approx(after, abs=1e-12)
    assert factors(schedule, 4, 12, range(20, 21)) == pytest.approx(after[-1:], abs=1e-12)


@pytest.mark.parametrize(("schedule", "expected"), [
    ("constant", [1, 1, 1]),
    ("linear", [1, 2 / 3, 1 / 3]),
    ("cosine", [1, 3 / 4, 1 / 4]),  # cos(pi / 3) = 1/2
])  # fmt: skip
def test_without_a_warm_up_the_first_update_has_the_whole_rate(schedule: Schedule, expected: list[float]) -> None:
    assert factors(schedule, 0, 3, range(3)) == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_a_run_that_ends_in_its_warm_up_never_reaches_the_whole_rate(schedule: Schedule) -> None:
    assert factors(schedule, 5, 3, range(3)) == pytest.approx([1 / 5, 2 / 5, 3 / 5])
    assert factors(schedule, 3, 3, range(3)) == pytest.approx([1 / 3, 2 / 3, 1])


def test_two_steps_by_hand() -> None:
    """One weight of 2 with gradients 3 and 1, so that rate, decay, both betas and eps all show."""
    config = OptimConfig(lr=0.1, betas=(0.5, 0.75), eps=1.0, weight_decay=0.5)
    model = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    nn.init.constant_(model.weight, 2.0)
    optimizer = build_optimizer(config, model)
    model.weight.grad = torch.full((1, 1), 3.0, dtype=torch.float64)
    optimizer.step()
    # Unbiased moments of one gradient are itself: 2 (1 - .1 * .5) - .1 * 3 / (3 + 1)
    assert model.weight.item() == pytest.approx(1.825, abs=1e-12)
    model.weight.grad.fill_(1.0)
    optimizer.step()
    # m = .5 * 1.5 + .5 * 1 = 1.25, over 1 - .5^2: 5/3; v = .75 * 2.25 + .25 * 1 = 1.9375, over 1 - .75^2: 31/7
    assert model.weight.item() == pytest.approx(1.825 * 0.95 - 0.1 * (5 / 3) / (sqrt(31 / 7) + 1), abs=1e-12)


def test_every_weight_that_trains_and_no_other_is_moved() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Linear(2, 1))
    for weight in model[0].parameters():
        weight.requires_grad_(False)
    trained = [weight for name, weight in model.named_parameters() if not name.startswith("0.")]
    optimizer = build_optimizer(OptimConfig(lr=0.5, weight_decay=0.25), model)
    moved = [weight for group in optimizer.param_groups for weight in group["params"]]
    assert {id(weight) for weight in moved} == {id(weight) for weight in trained}
    assert len(moved) == 4
    assert {(group["lr"], group["weight_decay"]) for group in optimizer.param_groups} == {(0.5, 0.25)}


def halved(*values: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=torch.bfloat16))


def moved(weight: nn.Parameter, gradients: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
        optimizer.zero_grad()


def test_weights_in_half_precision_are_their_float32_masters_rounded() -> None:
    """Thirty steps of AdamW in float32, of which each alone would be lost in bfloat16."""
    config = OptimConfig(lr=1e-4, weight_decay=0.1)
    half, plain = halved(1.0, -2.0, 0.5), nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))
    model, reference = nn.Module(), nn.Module()
    model.weight, reference.weight = half, plain
    ours, theirs = build_optimizer(config, model), build_optimizer(config, reference)
    assert isinstance(ours, MasterAdamW)
    assert type(theirs) is torch.optim.AdamW
    gradients = torch.randn(30, 3, generator=torch.Generator().manual_seed(0)) + 1
    for count, gradient in enumerate(gradients, 1):
        moved(half, gradient[None], ours)
        moved(plain, gradient[None], theirs)
        assert torch.equal(ours.state[half]["master"], plain.detach())
        assert torch.equal(half.detach(), plain.detach().bfloat16())
        assert int(ours.state[half]["step"]) == count
    for slot in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(ours.state[half][slot], theirs.state[plain][slot])
    assert half.tolist()[2] != 0.5
    lost = halved(0.5)
    moved(lost, gradients[:, 2:].bfloat16(), torch.optim.AdamW([lost], lr=1e-4, weight_decay=0.1))
    assert lost.tolist() == [0.5], "without a master every step is lost"


def test_gradients_of_weights_in_half_precision_add_up_in_float32() -> None:
    """256 times 1 is 256 in bfloat16, and 257 is no number of it."""
    weight = halved(1.0)
    MasterAdamW([weight], lr=0.1)
    for _ in range(257):
        (weight * 1.0).sum().backward()
    assert weight.grad is not None
    assert (weight.grad.dtype, float(weight.grad)) == (torch.float32, 257.0)


def test_masters_go_on_from_a_saved_state() -> None:
    gradients = torch.randn(8, 2, generator=torch.Generator().manual_seed(1))
    whole, cut = halved(1.0, 3.0), halved(1.0, 3.0)
    uncut, before = MasterAdamW([whole], lr=1e-4), MasterAdamW([cut], lr=1e-4)
    moved(whole, gradients, uncut)
    moved(cut, gradients[:3], before)
    saved = before.state_dict()
    again = nn.Parameter(cut.detach().clone())
    after = MasterAdamW([again], lr=1e-4)
    after.load_state_dict({"state": saved["state"], "param_groups": after.state_dict()["param_groups"]})
    assert {value.dtype for value in after.state[again].values()} == {torch.float32}
    moved(again, gradients[3:], after)
    assert torch.equal(after.state[again]["master"], uncut.state[whole]["master"])
    assert torch.equal(again, whole)
    assert not torch.equal(before.state[cut]["master"], after.state[again]["master"]), "the saved one is left alone"


def test_what_others_write_into_a_weight_counts() -> None:
    """Only where it is no longer the master, rounded."""
    weight, nothing = halved(1.0, 1.0), torch.zeros(1, 2)
    optimizer = MasterAdamW([weight], lr=1e-4, weight_decay=0.0)
    moved(weight, torch.ones(1, 2), optimizer)
    master = optimizer.state[weight]["master"].clone()
    assert float(weight[0].detach()) == 1.0 != float(master[0])
    with torch.no_grad():
        weight[1] = 2.0
    optimizer.state[weight]["exp_avg"].zero_()
    moved(weight, nothing, optimizer)
    assert optimizer.state[weight]["master"].tolist() == [float(master[0]), 2.0]
    assert weight.tolist() == [1.0, 2.0]


def test_weights_in_float32_beside_them_move_as_ever() -> None:
    half, plain, still = halved(1.0), nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(1))
    alone = nn.Parameter(torch.ones(2))
    both, adamw = MasterAdamW([half, plain, still], lr=1e-2), torch.optim.AdamW([alone], lr=1e-2)
    for factor in (1.0, -3.0):
        half.grad, plain.grad, alone.grad = torch.ones(1), torch.full((2,), factor), torch.full((2,), factor)
        both.step()
        adamw.step()
    assert torch.equal(plain, alone)
    assert set(both.state[plain]) == {"step", "exp_avg", "exp_avg_sq"}
    assert still.tolist() == [1.0]
    assert still not in both.state
