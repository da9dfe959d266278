"""Credit of exposure ratios from gradients: what a step at each ratio would do to the probe.

    influence@r     <g_probe, P g_r> / sqrt(<g_probe, P g_probe> <g_r, P g_r>)
    virtual_nll@r   probe NLL at theta - lr P g_r

g_probe is the gradient of the student's hint-free probe NLL, g_r that of the distillation loss on the completions of
the latest step with the teacher at ratio r, as a mean over tokens: target and gate are included; selection, problem
weights, `loss.aggregate` and the router's coefficient are not. P = 1 / (sqrt(v) + eps) is Adam's preconditioner, 1
before the first update; lr is the recipe's, before its schedule. One student pass serves all ratios, and the teacher
reads as many of them in one pass as the token budget holds. Weights come back bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from atesd.gates.gate import Gate
from atesd.losses.divergence import Scored, Use
from atesd.losses.target import Target
from atesd.routing.route import Route
from atesd.sections import OptimConfig
from atesd.train.batch import Passage, Row, micro_batches
from atesd.train.rows import Rows
from atesd.train.scorer import Scorer
from atesd.train.teacher import Teachers
from atesd.types import Group, UserError


@dataclass(frozen=True, slots=True)
class Latest:
    """The distilled groups of the latest step, and the target that they were distilled to."""

    groups: Sequence[Group]
    target: Target


class Credit:
    """Takes gradients of the latest generation batch, on at most `problems` of its distilled groups."""

    def __init__(
        self,
        *,
        scorer: Scorer,
        teachers: Teachers,
        rows: Rows,
        gate: Gate,
        optimizer: Any,
        optim: OptimConfig,
        references: Sequence[Passage],
        parameters: Literal["last_layer", "all"],
        problems: int,
    ) -> None:
        self._scorer = scorer
        self._teachers = teachers
        self._rows = rows
        self._gate = gate
        self._optimizer = optimizer
        self._optim = optim
        self._references = references
        self._parameters = parameters
        self._problems = problems
        self._latest: Latest | None = None

    def remember(self, groups: Sequence[Group], routes: Sequence[Route], target: Target) -> None:
        """Keep the groups that were distilled for the measurements after the update."""
        distilled = [group for group, route in zip(groups, routes, strict=True) if "distil" in route.components]
        self._latest = Latest(distilled[: self._problems], target) if distilled else None

    def influence(self, ratios: Sequence[float]) -> list[float | None]:
        """Return the credit of each ratio; None before the first batch and where nothing was distilled."""
        weights = self._weights(self._parameters)
        gradients = self._distil_gradients(ratios, weights)
        if gradients is None:
            return [None] * len(ratios)
        scale = [self._preconditioner(weight) for weight in weights]
        probe = self._probe_gradient(weights)
        norm = math.sqrt(_dot(probe, probe, scale))
        found: list[float | None] = []
        for gradient in gradients:
            size = norm * math.sqrt(_dot(gradient, gradient, scale))
            found.append(_dot(probe, gradient, scale) / size if size > 0 else 0.0)
        return found

    def virtual(self, ratios: Sequence[float], measure: Callable[[], float]) -> list[float | None]:
        """Return what `measure` gives after a virtual step at each ratio; None as above."""
        weights = self._weights("all")
        gradients = self._distil_gradients(ratios, weights)
        if gradients is None:
            return [None] * len(ratios)
        scale = [self._preconditioner(weight) for weight in weights]
        limit = self._optim.max_grad_norm or math.inf
        found: list[float | None] = []
        for gradient in gradients:
            norm = math.sqrt(sum(float(part.double().square().sum()) for part in gradient))
            rate = self._optim.lr * min(1.0, limit / norm if norm > 0 else 1.0)
            before = [weight.detach().clone() for weight in weights]
            try:
                with torch.no_grad():
                    for weight, part, factor in zip(weights, gradient, scale, strict=True):
                        weight.sub_(rate * factor * part)
                    found.append(measure())
            finally:
                with torch.no_grad():
                    for weight, value in zip(weights, before, strict=True):
                        weight.copy_(value)
        return found

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

    def _preconditioner(self, weight: nn.Parameter) -> Tensor:
        """Return 1 / (sqrt(v) + eps) with v bias-corrected, as the next update will use it but for its own gradient."""
        state = getattr(self._optimizer, "optimizer", self._optimizer).state.get(weight, {})
        if not state:
            return torch.ones_like(weight)
        corrected = state["exp_avg_sq"] / (1 - self._optim.betas[1] ** float(state["step"]))
        return cast("Tensor", 1 / (corrected.sqrt() + self._optim.eps))

    def _probe_gradient(self, weights: Sequence[nn.Parameter]) -> list[Tensor]:
        """Return the gradient of the token-mean NLL of the probe's references."""
        count = sum(len(passage.completion) for passage in self._references)
        total = [torch.zeros_like(weight) for weight in weights]
        with self._scorer.recording():
            for members in self._scorer.batches(self._references):
                logprob_N = self._scorer.log_likelihood([self._references[member] for member in members])
                _add(total, torch.autograd.grad(-logprob_N.sum() / count, weights, allow_unused=True))
        return total

    def _distil_gradients(self, ratios: Sequence[float], weights: Sequence[nn.Parameter]) -> list[list[Tensor]] | None:
        """Return the gradient of the distillation loss at each ratio; None where no completion is distilled."""
        if self._latest is None:
            return None
        groups, target = self._latest.groups, self._latest.target
        routes = [Route.DISTIL] * len(groups)
        built = [self._rows.build(groups, routes, [ratio] * len(groups), target.views) for ratio in ratios]
        by_row = [same for same in zip(*built, strict=True) if same[0].components]  # each row at every ratio
        count = sum(len(same[0].completion) for same in by_row)
        if not count:
            return None
        totals = [[torch.zeros_like(weight) for weight in weights] for _ in ratios]
        costs = [max(row.cost for row in same) for same in by_row]
        for members in micro_batches(costs, self._scorer.token_budget):
            variants = list(zip(*(by_row[member] for member in members), strict=True))  # the rows at each ratio
            passages = [row.student for row in variants[0]]
            teachers = self._at_all_ratios(variants, max(costs[member] for member in members))
            others = [
                self._scorer.view([row.view(view) for row in variants[0]], self._teachers.of(view))
                for view in target.views[1:]
            ]
            with self._scorer.recording():
                student = self._scorer.hidden(passages)
                use = Use(
                    self._gate.reads_divergence,
                    not self._gate.reads_divergence,
                    lambda stats, _: self._gate.weights(stats).detach(),
                )
                for index, (total, teacher) in enumerate(zip(totals, teachers, strict=True), start=1):
                    streams = self._scorer.against(student, [teacher, *others], passages, target, use=use)
                    loss = (self._gate.weights(streams.stats).detach() * self._gate.values(streams)).sum() / count
                    _add(total, torch.autograd.grad(loss, weights, retain_graph=index < len(ratios), allow_unused=True))
        return totals

    def _at_all_ratios(self, variants: Sequence[Sequence[Row]], cost: int) -> list[Scored]:
        """Let the teacher read all ratios' prompts, as many at once as the token budget holds."""
        together = max(1, self._scorer.token_budget // (len(variants[0]) * cost))
        found = []
        for start in range(0, len(variants), together):
            part = variants[start : start + together]
            whole = self._scorer.view([row.view("teacher") for rows in part for row in rows], self._teachers.own)
            size = sum(len(row.completion) for row in part[0])
            pieces = whole.hidden_NH.split_with_sizes([size] * len(part))
            found += [replace(whole, hidden_NH=piece) for piece in pieces]
        return found


def _add(total: Sequence[Tensor], parts: Sequence[Tensor | None]) -> None:
    for whole, part in zip(total, parts, strict=True):
        if part is not None:
            whole.add_(part)


def _dot(left: Sequence[Tensor], right: Sequence[Tensor], scale: Sequence[Tensor]) -> float:
    """Return <left, P right> in float64."""
    return sum(float((a.double() * b.double() * p.double()).sum()) for a, b, p in zip(left, right, scale, strict=True))
