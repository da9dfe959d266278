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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from atesd.config import RunConfig
from atesd.gates import Gate
from atesd.losses.divergence import Scored, token_streams
from atesd.losses.target import Target
from atesd.routing import Route
from atesd.train.batch import Row, labels, view_input
from atesd.train.forward import label_streams, scored_hidden
from atesd.train.hints import Hints
from atesd.train.step import MicroBatch, Stepper
from atesd.types import Group, UserError


class Credit:
    """Takes gradients of the latest generation batch. `references` are the probe's rows."""

    def __init__(
        self,
        *,
        model: nn.Module,
        stepper: Stepper,
        optimizer: Any,
        gate: Gate,
        hints: Hints,
        references: Callable[[], Sequence[Row]],
        config: RunConfig,
    ) -> None:
        self._model = model
        self._stepper = stepper
        self._optimizer = optimizer
        self._gate = gate
        self._hints = hints
        self._references = references
        self._config = config
        self._batch: tuple[list[Group], Target] | None = None

    def remember(self, groups: Sequence[Group], routes: Sequence[Route], target: Target) -> None:
        """Keep the groups that were distilled, up to `probe.credit_problems`, for the measurements after the update."""
        distilled = [group for group, route in zip(groups, routes, strict=True) if "distil" in route.components]
        distilled = distilled[: self._config.probe.credit_problems]
        self._batch = (distilled, target) if distilled else None

    def influence(self, ratios: Sequence[float]) -> list[float | None]:
        """Return the credit of each ratio; None before the first batch and where nothing was distilled."""
        weights = self._weights(self._config.probe.credit_parameters)
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
        limit = self._config.optim.max_grad_norm or math.inf
        found: list[float | None] = []
        for gradient in gradients:
            norm = math.sqrt(sum(float(part.double().square().sum()) for part in gradient))
            rate = self._config.optim.lr * min(1.0, limit / norm if norm > 0 else 1.0)
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
        named = [(name, weight) for name, weight in self._model.named_parameters() if weight.requires_grad]
        if which == "last_layer":
            depth = cast("Any", self._model).config.get_text_config().num_hidden_layers
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
        optim = self._config.optim
        corrected = state["exp_avg_sq"] / (1 - optim.betas[1] ** float(state["step"]))
        return cast("Tensor", 1 / (corrected.sqrt() + optim.eps))

    def _probe_gradient(self, weights: Sequence[nn.Parameter]) -> list[Tensor]:
        """Return the gradient of the token-mean NLL of the probe's references."""
        rows = self._references()
        count = sum(len(row.completion) for row in rows)
        total = [torch.zeros_like(weight) for weight in weights]
        with self._recording():
            for batch in self._stepper.cut(rows):
                student = scored_hidden(self._model, self._inputs(batch, [row.student_prompt for row in batch.rows]))
                streams = label_streams(student, self._labels(batch), self._config.loss)
                _add(total, torch.autograd.grad(-streams.logprob_N.sum() / count, weights, allow_unused=True))
        return total

    @contextmanager
    def _recording(self) -> Iterator[None]:
        """Record gradients, with the activation checkpointing of training where the recipe asks for it."""
        self._model.train(self._config.model.gradient_checkpointing)
        try:
            with torch.enable_grad():
                yield
        finally:
            self._model.eval()

    def _distil_gradients(self, ratios: Sequence[float], weights: Sequence[nn.Parameter]) -> list[list[Tensor]] | None:
        """Return the gradient of the distillation loss at each ratio; None where no completion is distilled."""
        if self._batch is None:
            return None
        groups, target = self._batch
        routes = [Route.DISTIL] * len(groups)
        by_ratio = [self._hints.rows(groups, routes, [ratio] * len(groups), target.views) for ratio in ratios]
        longest = [max(same, key=lambda row: len(row.teacher_prompt)) for same in zip(*by_ratio, strict=True)]
        count = sum(len(row.completion) for row in longest if row.components)
        if not count:
            return None
        totals = [[torch.zeros_like(weight) for weight in weights] for _ in ratios]
        for batch in self._stepper.cut(longest):
            variants = [[rows[index] for index in batch.indices] for rows in by_ratio]
            teachers = self._teachers(batch, variants)
            others = [self._stepper.view(batch, view) for view in target.views[1:]]
            with self._recording():
                student = scored_hidden(self._model, self._inputs(batch, [row.student_prompt for row in batch.rows]))
                for index, (total, teacher) in enumerate(zip(totals, teachers, strict=True), start=1):
                    streams = token_streams(
                        student,
                        [teacher, *others],
                        self._labels(batch),
                        self._config.loss,
                        target=target,
                        temperature=self._config.rollout.temperature,
                    )
                    loss = (self._gate.weights(streams.stats).detach() * self._gate.values(streams)).sum() / count
                    _add(total, torch.autograd.grad(loss, weights, retain_graph=index < len(ratios), allow_unused=True))
        return totals

    def _teachers(self, batch: MicroBatch, variants: Sequence[Sequence[Row]]) -> list[Scored]:
        """Let the teacher read all ratios' prompts, as many at once as the token budget holds."""
        padded = len(batch.rows) * max(row.cost for row in batch.rows)
        together = max(1, self._config.step.token_budget // padded)
        found = []
        for start in range(0, len(variants), together):
            rows = [row for variant in variants[start : start + together] for row in variant]
            whole = self._stepper.teacher_hidden([row.teacher_prompt for row in rows], [row.completion for row in rows])
            pieces = whole.hidden_NH.split_with_sizes([sum(batch.lengths)] * (len(rows) // len(batch.rows)))
            found += [Scored(piece, whole.head_VH, whole.bias_V) for piece in pieces]
        return found

    def _inputs(self, batch: MicroBatch, prompts: Sequence[Sequence[int]]) -> Any:
        return view_input(prompts, batch.completions, self._stepper.pad_id, self._device)

    def _labels(self, batch: MicroBatch) -> Tensor:
        return labels(batch.completions, self._device)

    @property
    def _device(self) -> torch.device:
        return next(self._model.parameters()).device


def _add(total: Sequence[Tensor], parts: Sequence[Tensor | None]) -> None:
    for whole, part in zip(total, parts, strict=True):
        if part is not None:
            whole.add_(part)


def _dot(left: Sequence[Tensor], right: Sequence[Tensor], scale: Sequence[Tensor]) -> float:
    """Return <left, P right> in float64."""
    return sum(float((a.double() * b.double() * p.double()).sum()) for a, b, p in zip(left, right, scale, strict=True))
