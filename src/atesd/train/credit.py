"""Credit of what the teacher's signal could be: what a step with it would do to the probe, or to the reward.

    influence@r                 s_r <g_probe, P g_r> / sqrt(<g_probe, P g_probe>)
    virtual_nll@r               probe NLL after the optimizer's own next step on g_r
    virtual_reward@r            -(1/tokens) sum A log p of earlier completions after that step
    reward_influence@r          s_r <g_R, P g_r> by fold of g_R; ..._by_level: by level of the problems as well
    reward_influence_lambda@l   the same of the target's lambda l, at the ratios in force
    probe_influence@r           s_r <g_probe, P g_r> by fold of g_probe; ..._by_level as above

g_probe is the gradient of the student's hint-free probe NLL; g_R that of -(1/tokens) sum A log p over the graded
completions of the steps before the latest one (train/outcomes.py); g_r that of the distillation loss on the completions
of the latest step with the teacher at ratio r, as a mean over tokens: target and gate are included; selection, problem
weights, `loss.aggregate` and the router's coefficient are not. P = 1 / (sqrt(v) + eps) is Adam's preconditioner, 1
before the first update; s_r = min(1, max_grad_norm / ||g_r||), over the credited weights, is what clipping leaves. The
virtual step is AdamW's with its two moments, weight decay and present rate. Weights come back bit for bit.

Where tables by fold are asked, all groups of the step are looked at, whatever their route: what would distillation do
there?
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from atesd.losses.target import Target
from atesd.routing.route import Route
from atesd.sections import OptimConfig
from atesd.train.batch import Passage, spread
from atesd.train.directions import Batch, Directions, Gradient
from atesd.train.optim import MASTER
from atesd.train.outcomes import Outcomes
from atesd.train.scorer import Scorer
from atesd.transfer import numbers_of
from atesd.types import Group, UserError


class Credit:
    """Compares gradients on at most `problems` groups of the latest generation batch."""

    def __init__(
        self,
        *,
        scorer: Scorer,
        directions: Directions,
        outcomes: Outcomes,
        optimizer: Any,
        optim: OptimConfig,
        references: Sequence[Passage],
        parameters: Literal["last_layer", "all"],
        problems: int,
    ) -> None:
        self.outcomes = outcomes
        self._scorer = scorer
        self._directions = directions
        self._optimizer = optimizer
        self._optim = optim
        self._references = references
        self._parameters = parameters
        self._problems = problems
        self._distilled: Batch | None = None
        self._every: Batch | None = None

    def remember(
        self, groups: Sequence[Group], routes: Sequence[Route], ratios: Sequence[float], target: Target
    ) -> None:
        """Keep the step's groups for the measurements after the update, and how they were graded."""
        self.outcomes.add(groups)
        part = slice(self._problems)
        chosen = [index for index, route in enumerate(routes) if "distil" in route.components][part]
        self._every = Batch(groups[part], ratios[part], target)
        self._distilled = None
        if chosen:
            self._distilled = Batch([groups[index] for index in chosen], [ratios[index] for index in chosen], target)

    @property
    def distilled(self) -> Batch | None:
        """The distilled groups of the latest batch that credit is taken on; None where there are none."""
        return self._distilled

    def influence(self, ratios: Sequence[float]) -> list[float | None]:
        """Return the credit of each ratio; None before the first batch and where nothing was distilled."""
        weights = self._weights(self._parameters)
        gradients = self._distil_gradients(ratios, weights)
        if gradients is None:
            return [None] * len(ratios)
        scale = self._preconditioners(weights)
        probe = self._directions.of_references(self._references, weights)
        norm = math.sqrt(_dot(probe, probe, scale))
        return [
            self._clip(gradient) * _dot(probe, gradient, scale) / norm if norm > 0 else 0.0 for gradient in gradients
        ]

    def reward_influence(self, ratios: Sequence[float], *, by_level: bool) -> list[dict[str, float] | None]:
        """Return each ratio's table of credits by level and fold, `LEVEL/FOLD`; None where nothing can be said."""
        return self._tables(self._at(ratios), ratios, self._reward_folds, by_level)

    def probe_influence(self, ratios: Sequence[float], *, by_level: bool) -> list[dict[str, float] | None]:
        """Return the same tables with the probe's NLL in the place of minus the reward, by fold of its references.

        None with a single reference as well.
        """
        return self._tables(self._at(ratios), ratios, self._probe_folds, by_level)

    def reward_influence_lambda(self, strengths: Sequence[float]) -> list[dict[str, float] | None]:
        """Return the table of each lambda, as above, at the ratios in force."""
        candidates = [self._every.beyond(each) for each in strengths] if self._every else []
        return self._tables(candidates, strengths, self._reward_folds, by_level=False)

    def _at(self, ratios: Sequence[float]) -> list[Batch]:
        return [self._every.at(ratio) for ratio in ratios] if self._every else []

    def _reward_folds(self, weights: Sequence[nn.Parameter]) -> list[Gradient]:
        return self._directions.of_rewards(self.outcomes.earlier(), weights)

    def _probe_folds(self, weights: Sequence[nn.Parameter]) -> list[Gradient]:
        if len(self._references) < 2:  # a single fold knows nothing of its error
            return []
        return self._directions.of_references_by_fold(self._references, weights)

    def _tables(
        self,
        candidates: Sequence[Batch],
        asked: Sequence[float],
        reference: Callable[[Sequence[nn.Parameter]], list[Gradient]],
        by_level: bool,
    ) -> list[dict[str, float] | None]:
        weights = self._weights(self._parameters)
        folds = reference(weights) if candidates else []
        found = self._directions.of_distillation(candidates, weights, by_level=by_level) if folds else None
        if found is None:
            return [None] * len(asked)
        scale = self._preconditioners(weights)
        tables: list[dict[str, float] | None] = []
        for levels in found:
            clip = self._clip([sum(parts[1:], parts[0]) for parts in zip(*levels.values(), strict=True)])
            credit_LJ = clip * _products(list(levels.values()), folds, scale)
            tables.append(
                {
                    f"{level}/{number}": credit
                    for level, credit_J in zip(levels, credit_LJ.tolist(), strict=True)
                    for number, credit in enumerate(credit_J)
                }
            )
        return tables

    def virtual(self, ratios: Sequence[float], measure: Callable[[], float | None]) -> list[float | None]:
        """Return what `measure` gives after a virtual step at each ratio; None as for influence."""
        weights = self._weights("all")
        gradients = self._distil_gradients(ratios, weights)
        if gradients is None:
            return [None] * len(ratios)
        found = []
        for gradient in gradients:
            with self._stepped(weights, gradient):
                found.append(measure())
        return found

    def virtual_reward(self, ratios: Sequence[float]) -> list[float | None]:
        """Return -(1/tokens) sum A log p of earlier completions after a virtual step; None where every A is 0."""
        return self.virtual(ratios, self._reward_loss)

    def _reward_loss(self) -> float | None:
        graded = [each for each in self.outcomes.earlier() if each.advantage]
        if not graded:
            return None
        sums: list[Tensor] = []
        passages = [each.passage for each in graded]
        with torch.no_grad():
            for members in self._scorer.batches(passages):
                chosen = [passages[member] for member in members]
                logprob_N = self._scorer.log_likelihood(chosen, self._scorer.student_temperature).double()
                advantage_N = spread([graded[member].advantage for member in members], chosen, logprob_N)
                sums.append((advantage_N * logprob_N).sum())
        return -sum(numbers_of(sums)) / sum(len(each.passage.completion) for each in self.outcomes.earlier())

    def _distil_gradients(self, ratios: Sequence[float], weights: Sequence[nn.Parameter]) -> list[Gradient] | None:
        """Return the gradient of the distillation loss at each ratio; None where no completion is distilled."""
        if self._distilled is None:
            return None
        found = self._directions.of_distillation([self._distilled.at(ratio) for ratio in ratios], weights)
        return None if found is None else [levels[""] for levels in found]

    @contextmanager
    def _stepped(self, weights: Sequence[nn.Parameter], gradient: Gradient) -> Iterator[None]:
        """Put the weights where AdamW's next step on this gradient would, inside the block."""
        before = [weight.detach().clone() for weight in weights]
        clip, (rate, decay) = self._clip(gradient), (self._rate, self._optim.weight_decay)
        try:
            with torch.no_grad():
                for weight, part, count in zip(weights, gradient, self._counts(weights), strict=True):
                    move = self._adam(weight, clip * part, count + 1)
                    exact = self._state(weight).get(MASTER, weight)  # of weights that are kept rounded
                    weight.copy_(exact * (1 - rate * decay) - rate * move)
            yield
        finally:
            with torch.no_grad():
                for weight, value in zip(weights, before, strict=True):
                    weight.copy_(value)

    def _adam(self, weight: nn.Parameter, gradient: Tensor, count: float) -> Tensor:
        """Return Adam's direction for the `count`-th gradient of a weight, from the moments so far."""
        state, (first, second) = self._state(weight), self._optim.betas
        gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        mean = (state["exp_avg"] if state else torch.zeros_like(gradient)).lerp(gradient, 1 - first)
        square = (state["exp_avg_sq"] if state else torch.zeros_like(gradient)) * second
        square = square.addcmul(gradient, gradient, value=1 - second)
        scale = (square / (1 - second**count)).sqrt() + self._optim.eps
        return cast("Tensor", mean / (1 - first**count) / scale)

    @property
    def _rate(self) -> float:
        """The optimizer's present learning rate."""
        return float(self._optimizer.param_groups[0]["lr"])

    def _clip(self, gradient: Sequence[Tensor]) -> float:
        """Return what gradient clipping leaves of a gradient of these weights."""
        norm = math.sqrt(sum(numbers_of([part.double().square().sum() for part in gradient])))
        return min(1.0, (self._optim.max_grad_norm or math.inf) / norm) if norm > 0 else 1.0

    def _weights(self, which: str) -> list[nn.Parameter]:
        """Return the trained weights, or those of the last decoder layer. UserError if its weights have other names."""
        model = self._scorer.model
        named = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
        if which == "last_layer":
            depth = cast("Any", model).config.get_text_config().num_hidden_layers
            named = [(name, weight) for name, weight in named if f"layers.{depth - 1}." in name]
            if not named:
                raise UserError(
                    f'no trained weight is called layers.{depth - 1}...: set probe.credit_parameters = "all" to take '
                    "credit on all of them"
                )
        return [weight for _, weight in named]

    def _state(self, weight: nn.Parameter) -> dict[str, Any]:
        """Return the optimizer's state of a weight; empty before the first update."""
        return cast("dict[str, Any]", getattr(self._optimizer, "optimizer", self._optimizer).state.get(weight, {}))

    def _counts(self, weights: Sequence[nn.Parameter]) -> list[float]:
        """Return how often the optimizer has moved each weight."""
        known = [weight for weight in weights if self._state(weight)]
        counts = dict(zip(map(id, known), numbers_of([self._state(weight)["step"] for weight in known]), strict=True))
        return [counts.get(id(weight), 0.0) for weight in weights]

    def _preconditioners(self, weights: Sequence[nn.Parameter]) -> list[Tensor]:
        """Return 1 / (sqrt(v) + eps) with v bias-corrected, as the next update will use it but for its own gradient."""
        counts = self._counts(weights)
        return [self._preconditioner(weight, count) for weight, count in zip(weights, counts, strict=True)]

    def _preconditioner(self, weight: nn.Parameter, count: float) -> Tensor:
        if not count:
            return torch.ones_like(weight)
        corrected = self._state(weight)["exp_avg_sq"] / (1 - self._optim.betas[1] ** count)
        return cast("Tensor", 1 / (corrected.sqrt() + self._optim.eps))


def _dot(left: Gradient, right: Gradient, scale: Sequence[Tensor]) -> float:
    """Return <left, P right> in float64."""
    return float(_products([left], [right], scale))


def _products(left: Sequence[Gradient], right: Sequence[Gradient], scale: Sequence[Tensor]) -> Tensor:
    """Return <left_a, P right_b> for all pairs, [A, B], in float64; converted weight by weight."""
    total_AB = scale[0].new_zeros(len(left), len(right), dtype=torch.float64)
    for index, factor in enumerate(scale):
        left_AD = torch.stack([gradient[index].flatten() for gradient in left]).double() * factor.flatten().double()
        right_BD = torch.stack([gradient[index].flatten() for gradient in right]).double()
        total_AB += left_AD @ right_BD.T
    return total_AB
