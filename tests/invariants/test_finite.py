"""A number that is not finite: each cause, planted alone, is named with the remedy that fits it, and nothing moves."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from atesd.losses.stats import TokenStats
from atesd.losses.target import AnchorMix, Extrapolate, Target
from atesd.recipe import build_config
from atesd.rollout.weights import largest_weight
from atesd.routing.route import Route
from atesd.train.outcomes import Outcomes
from atesd.train.rows import Rows
from atesd.types import Group, NonFiniteError, Problem, StopReason, Trajectory, Turn

from support.models import ragged_rows, tiny_model
from support.steppers import Stepping, make_stepper

SHRINK = "start again with a lower optim.lr or optim.weight_decay"


def failure(stepper: Stepping, components: tuple[str, ...] = ("distil",), *, advantage: float = 0.0, **how: Any) -> str:
    """Return why an update is refused, having seen that it moved no weight."""
    model = stepper._scorer.model
    rows = [
        replace(row, advantage=advantage, sampler_logprobs=(-3.0,) * len(row.completion))
        for row in ragged_rows(4, components=components)
    ]
    before = [weight.detach().clone() for weight in model.parameters()]
    with pytest.raises(NonFiniteError) as caught:
        stepper.optimize(rows, **how)
    assert all(
        torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True) if old.isfinite().all()
    )
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("components", [("distil",), ("rl",), ("nll",), ("distil", "rl")])
def test_broken_weights_are_named_before_anything_else(components: tuple[str, ...]) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = float("inf")
        model.model.norm.weight[0] = float("nan")
    stepper, _ = make_stepper(model)
    message = failure(stepper, components, advantage=1.0)
    assert message.startswith(
        "loss nan, gradient norm nan: the weights are not finite (first model.layers.0.mlp.down_pr"
    )
    assert SHRINK in message


def test_a_student_beyond_float32_is_told_from_broken_weights() -> None:
    model = tiny_model(tied=False)
    stepper, _ = make_stepper(model, teacher={"weights": "frozen"})
    with torch.no_grad():  # after the teacher's weights were kept
        model.model.norm.weight.fill_(1e30)
        model.lm_head.weight.mul_(1e25)
    message = failure(stepper)
    count = sum(len(row.completion) for row in ragged_rows(4))
    assert (
        f"the student's log-probabilities are not finite in {count} of {count} tokens, though the weights are"
        in message
    )
    assert "(largest 1e+30 in model.norm.weight)" in message
    assert SHRINK in message


def test_a_broken_teacher_is_not_blamed_on_the_student() -> None:
    stepper, teacher = make_stepper(tiny_model(), teacher={"weights": "frozen"})
    teacher._weights["model.norm.weight"][0] = float("nan")
    message = failure(stepper)
    assert "the teacher's log-probabilities are not finite" in message
    assert "raise loss.temperature_teacher" in message


@pytest.mark.parametrize(("target", "remedy"), [
    (Extrapolate.model_construct(lambda_x=1e38), "bring target.lambda_x = 1e+38 nearer to 1"),
    (AnchorMix.model_construct(weight=float("inf")), 'lower the scale of the target, or set target = {kind = "plain"}'),
])  # fmt: skip
def test_a_target_that_overflows_is_named_by_what_stretches_it(target: Target, remedy: str) -> None:
    message = failure(make_stepper(tiny_model())[0], target=target)
    assert f"the target is not finite, though student and teacher are: {remedy}" in message


class BrokenGate:
    """Weighs one token by NaN."""

    reads_divergence = True

    def values(self, streams: Any) -> Tensor:
        return streams.divergence_N  # type: ignore[no-any-return]

    def weights(self, stats: TokenStats) -> Tensor:
        weights = torch.ones_like(stats.divergence)
        weights[0] = float("nan")
        return weights

    def metrics(self, stats: TokenStats) -> dict[str, float]:
        return {}


def test_a_broken_gate_is_named() -> None:
    stepper, _ = make_stepper(tiny_model(), BrokenGate())
    assert "the gate's weights are not finite: lower gate.beta" in failure(stepper)


@pytest.mark.parametrize("coef", [1e38, 1e30])
def test_a_coefficient_is_blamed_where_its_component_or_its_gradient_overflows(coef: float) -> None:
    """1e38 times a sum of divergences is beyond float32; at 1e30 the loss is finite, but not its gradient's norm."""
    stepper, _ = make_stepper(tiny_model())
    stepper._losses = replace(stepper._losses, coefs={"distil": coef})
    message = failure(stepper)
    where = (
        "the loss component distil overflows" if coef > 1e37 else "the gradient is not finite, though all losses are"
    )
    assert where in message
    assert message.endswith(f": lower routing.coef = {coef:g}")


def test_rewards_are_blamed_for_a_reinforcement_that_overflows() -> None:
    stepper, _ = make_stepper(tiny_model())
    message = failure(stepper, ("rl",), advantage=1e38)
    assert "the loss component rl overflows (its largest value is" in message or "reinforcement loss is not" in message
    assert "scale the rewards" in message


class BreakingRule:
    """Changes the model before clipping or after the update."""

    def __init__(
        self, apply: Callable[[torch.nn.Module], None] = id, mend: Callable[[torch.nn.Module], None] = id
    ) -> None:  # type: ignore[assignment]
        self.apply, self.mend = apply, mend

    def attached(self, model: torch.nn.Module) -> Any:
        return nullcontext()


def broken_gradient(model: torch.nn.Module) -> None:
    next(model.parameters()).grad[0, 0] = float("nan")  # type: ignore[index]


def broken_weight(model: torch.nn.Module) -> None:
    with torch.no_grad():
        model.get_parameter("model.norm.weight")[3] = float("inf")


def test_a_gradient_alone_that_is_not_finite_is_said_to_be_it() -> None:
    stepper, _ = make_stepper(tiny_model(), rule=BreakingRule(apply=broken_gradient))  # type: ignore[arg-type]
    assert f"the gradient is not finite, though all losses are: {SHRINK}" in failure(stepper)


def test_an_update_that_breaks_the_weights_is_named_at_once() -> None:
    stepper, _ = make_stepper(tiny_model(), rule=BreakingRule(mend=broken_weight))  # type: ignore[arg-type]
    with pytest.raises(
        NonFiniteError, match=r"the update left weights that are not finite \(first model\.norm\.weight\): sta"
    ):
        stepper.optimize(ragged_rows(3))


def test_an_update_to_large_but_finite_weights_is_none() -> None:
    """Weights of 1e30 are finite, though the sum of their squares is not."""
    model = tiny_model()
    stepper, _ = make_stepper(model)
    for group in stepper._optimizer.param_groups:
        group["lr"] = 1e30
    stepper.optimize(ragged_rows(3))
    assert 1e29 < largest_weight(model)[1] < 1e31


class NeedsBatch:
    """A selection that must not see broken statistics."""

    needs_batch = True

    def select(self, stats: TokenStats, seed: int) -> Tensor:
        pytest.fail("it was shown statistics that are not finite")


def test_a_selection_is_not_shown_broken_statistics() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    stepper, _ = make_stepper(model, None, NeedsBatch())  # type: ignore[arg-type]
    assert failure(stepper).startswith("the weights are not finite (first model.norm.weight)")


def test_the_largest_weight_is_the_first_broken_one_where_there_is_one() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2, bias=False))
    model.register_parameter("empty", torch.nn.Parameter(torch.empty(0)))
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(0.5)
        model[1].weight[0, 1] = -7.0
        assert largest_weight(model) == ("1.weight", 7.0)
        model[0].bias[1] = -torch.inf
        model[1].weight[0, 0] = torch.nan
    assert largest_weight(model) == ("0.bias", float("inf"))


def test_advantages_beyond_all_bounds_are_named_by_their_problem() -> None:
    """1e308 - (-1e308) has no float64; a driver refuses such rewards, a caller of `Rows` may not."""
    turn = Turn((1,), (2,), (-1.0,), "x", StopReason.EOS, 0)
    group = Group(Problem("p7", "q", "s"), tuple(Trajectory((turn,), reward) for reward in (1.7e308, 1.7e308, 0.0)))
    rows = Rows(None, outcomes=Outcomes(1), policy=build_config({}).rl)  # type: ignore[arg-type]
    with pytest.raises(
        NonFiniteError, match=r"advantages of problem 'p7' are not finite \(largest reward 1\.7e\+308\): scale"
    ):
        rows.build([group], [Route.RL], [1.0], ["teacher"])
