"""Why a loss or a gradient is not finite: where the first such number appeared, and what mends it.

Looked into after the failure alone. The order is that of the computation: weights, log-probabilities of student and
teacher, the tokens' values and weights in each loss component, its sum, the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from atesd.losses.stats import TokenStats
from atesd.losses.target import Target
from atesd.rollout.weights import SHRINK, largest_weight
from atesd.train.stats import MicroScores, concatenate
from atesd.types import NonFiniteError

_STREAMS = {
    "student": ("student_logprob", "student_entropy"),
    "teacher": ("teacher_logprob", "teacher_entropy"),
}

_OUTGROWN = 1e4
"""No weight of a working model is as large."""


@dataclass(frozen=True, slots=True)
class Scales:
    """What the recipe multiplies losses with."""

    target: Target
    coefs: Mapping[str, float]
    """Factor of each component where it is not 1."""

    def remedy(self, component: str) -> str:
        """Say which factor to lower for a component that overflows."""
        if component == "rl":
            return "scale the rewards, or lower rl.kl_coef"
        if abs(self.coefs.get(component, 1.0)) > 1:
            return f"lower routing.coef = {self.coefs[component]:g}"
        if not self.target.is_first_view:
            return self.target_remedy()
        return SHRINK

    def target_remedy(self) -> str:
        """Say how to bring the target nearer to the teacher."""
        if self.target.strength != 1:
            return f"bring target.lambda_x = {self.target.strength:g} nearer to 1"
        return 'lower the scale of the target, or set target = {kind = "plain"}'


def cause(model: nn.Module, batches: Sequence[MicroScores], scales: Scales) -> str | None:
    """Return the first place with a number that is not finite, and the remedy; None where it is the gradient."""
    found = _of_streams(model, concatenate([batch.stats for batch in batches])) if batches else None
    for batch in batches:
        for component in batch.parts:
            found = found or _of_component(component, batch, scales)
    return found


def cause_in_gradient(model: nn.Module, batches: Sequence[MicroScores], scales: Scales) -> str:
    """Return the same of a gradient, where all losses are finite."""
    return f"the gradient is not finite, though all losses are: {_remedy_of_gradient(model, batches, scales)}"


def refuse_broken_streams(model: nn.Module, stats: TokenStats) -> None:
    """NonFiniteError for log-probabilities that are not finite."""
    values = [getattr(stats, column) for columns in _STREAMS.values() for column in columns]
    if not _finite(torch.stack(values)):
        raise NonFiniteError(_of_streams(model, stats))


def refuse_broken_weights(model: nn.Module) -> None:
    """NonFiniteError if an update has left trained weights that are not finite."""
    trained = [weight.detach() for weight in model.parameters() if weight.requires_grad]
    if math.isfinite(float(torch.nn.utils.get_total_norm(trained))):
        return
    name, size = largest_weight(model)  # finite weights, too, may have a norm beyond float32
    if not math.isfinite(size):
        raise NonFiniteError(f"the update left weights that are not finite (first {name}): {SHRINK}")


def _of_streams(model: nn.Module, stats: TokenStats) -> str | None:
    """Tell of weights and log-probabilities."""
    name, size = largest_weight(model)
    if not math.isfinite(size):
        return f"the weights are not finite (first {name}): {SHRINK}"
    for role, columns in _STREAMS.items():
        finite_N = torch.stack([getattr(stats, column).isfinite() for column in columns]).all(0)
        if not bool(finite_N.all()):
            tokens = f"{int((~finite_N).sum())} of {finite_N.numel()} tokens"
            largest = f"though the weights are (largest {size:.3g} in {name})"
            remedy = SHRINK if role == "student" else f"raise loss.temperature_teacher, or {SHRINK}"
            return f"the {role}'s log-probabilities are not finite in {tokens}, {largest}: {remedy}"
    return None


def _of_component(name: str, batch: MicroScores, scales: Scales) -> str | None:
    part = batch.parts[name]
    if not _finite(part.values_N):
        return _of_policy(batch) if name == "rl" else _of_divergence(name, batch, scales)
    if batch.heard is not None and not _finite(batch.heard.gate_N):
        return "the gate's weights are not finite: lower gate.beta, or mend a gate of your own"
    largest = float(part.values_N.abs().max()) if part.values_N.numel() else 0.0
    if not _finite(part.weights_N) or not math.isfinite(batch.losses[name]):
        return f"the loss component {name} overflows (its largest value is {largest:.3g}): {scales.remedy(name)}"
    return None


def _of_divergence(name: str, batch: MicroScores, scales: Scales) -> str:
    if scales.target.is_first_view or not _finite(batch.stats.divergence):
        return (
            f"the loss component {name} is not finite, though student and teacher are: raise the temperatures of loss"
        )
    return f"the target is not finite, though student and teacher are: {scales.target_remedy()}"


def _of_policy(batch: MicroScores) -> str:
    policy = batch.policy
    if policy is not None and not _finite(policy.kl_N):
        return "the KL term to the step-0 weights is not finite, so far has the student moved: lower optim.lr"
    if policy is not None and (not _finite(policy.ratio_N) or not _finite(policy.weight_N)):
        return (
            "importance ratios are not finite, so far has the student moved within a step: lower optim.lr or "
            "step.updates_per_batch"
        )
    return "the reinforcement loss is not finite: scale the rewards"


def _remedy_of_gradient(model: nn.Module, batches: Sequence[MicroScores], scales: Scales) -> str:
    """Blame what multiplies the largest component, unless the weights themselves are out of range."""
    totals: dict[str, float] = {}
    for batch in batches:
        for name, value in batch.losses.items():
            totals[name] = totals.get(name, 0.0) + abs(value)
    return SHRINK if largest_weight(model)[1] > _OUTGROWN else scales.remedy(max(totals, key=lambda name: totals[name]))


def _finite(values: Tensor) -> bool:
    return bool(values.isfinite().all())
