"""Gradients of the scores to the student's hidden states, head and bias, without keeping logits.

Shapes: N tokens, n tokens of a tile, V vocabulary, H hidden.

What arrives from above is a weight per token, known only after all tokens are scored. So that logits need not be made a
second time,

- one tile that holds all tokens keeps its gradients to logits until the weights arrive;
- where only hidden states train (LoRA, a frozen head), each token's own gradient is made beside its score, [N, H], and
  weighed later;
- where the head trains too, gradients are summed under the weights that are expected. If others arrive, up to one
  factor for all tokens, the sums are thrown away, and everything is made again under those: an expectation can cost
  time, never correctness.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from atesd.losses.scores import Scores, Scoring, Slopes, Wanted, joined, score
from atesd.losses.tiles import Role, Sums, Tile, compute_dtype, slices

Expected = Callable[[Scores, slice], Tensor]
"""From the scores of some tokens, and which they are: the gradient that will arrive at `loss`, [n]."""

SAME = 1e-6
"""Largest relative difference between weights that count as equal: what float32 makes of them on another way."""


class Upstream(NamedTuple):
    """Gradients that arrive at the two differentiable outputs, each [N]; None where an output was not used."""

    loss: Tensor | None
    logprob: Tensor | None

    def at(self, rows: slice) -> Upstream:
        """Return those of some tokens."""
        return Upstream(*(None if weight_N is None else weight_N[rows] for weight_N in self))


def scores_with_gradient(student: Role, scoring: Scoring, wanted: Wanted, expected: Expected) -> Scores:
    """Score all tokens; `loss` and `logprob` of the result are differentiable with respect to the student.

    `wanted` are the outputs that a gradient is expected to arrive at; it may arrive at others, and costs more then.
    """
    trains = torch.is_grad_enabled() and any(part.requires_grad for part in student[:3] if part is not None)
    if not trains:
        with torch.no_grad():
            return Scores(*_Pass(student, scoring, (False, False, False)).scores())
    return Scores(*TiledScores.apply(*student, scoring, wanted, expected))  # type: ignore[no-untyped-call]


class TiledScores(torch.autograd.Function):
    """`score` over all tiles, with gradients of `loss` and `logprob`; none to views."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        head_VH: Tensor,
        bias_V: Tensor | None,
        temperature: float,
        cap: float | None,
        scoring: Scoring,
        wanted: Wanted,
        expected: Expected,
    ) -> tuple[Tensor, ...]:
        needs = ctx.needs_input_grad[:3]
        run = _Pass(Role(hidden_NH, head_VH, bias_V, temperature, cap), scoring, needs)
        with torch.autocast(hidden_NH.device.type, enabled=False):
            if len(run.tiles) == 1:
                scores, ctx.found = run.kept(wanted)
            elif not any(needs[1:]):
                scores, ctx.found = run.by_token(wanted)
            elif wanted == Wanted(loss=True, logprob=False):
                scores, ctx.found = run.under(expected)
            else:
                scores, ctx.found = run.scores(), None
        ctx.scoring, ctx.temperature, ctx.cap = scoring, temperature, cap
        ctx.save_for_backward(hidden_NH, head_VH, bias_V)
        ctx.set_materialize_grads(False)
        fixed = scores[2:] if scoring.objective in ("full", "top_k") else (scores.loss, *scores[2:])
        ctx.mark_non_differentiable(*fixed)
        return tuple(scores)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss_N: Tensor | None, logprob_N: Tensor | None, *_: None) -> tuple[Any, ...]:
        upstream = Upstream(loss_N, logprob_N)
        if loss_N is None and logprob_N is None:
            return (None,) * 8
        found, ctx.found = ctx.found, None  # used up; a second pass over the same graph makes it again
        with torch.autocast(ctx.saved_tensors[0].device.type, enabled=False):
            gradients = found(upstream) if found is not None else None
            if gradients is None:
                scoring = ctx.scoring if loss_N is not None else replace(ctx.scoring, views=())
                hidden_NH, head_VH, bias_V = ctx.saved_tensors
                student = Role(hidden_NH, head_VH, bias_V, ctx.temperature, ctx.cap)
                run = _Pass(student, scoring, ctx.needs_input_grad[:3])
                gradients = run.again(upstream)
        return (*gradients, None, None, None, None, None)


Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
Found = Callable[[Upstream], Gradients | None]
"""From the weights that arrived: the gradients of hidden states, head and bias, or None where others were expected."""


@dataclass
class _Pass:
    """One way over all tokens."""

    student: Role
    scoring: Scoring
    needs: tuple[bool, bool, bool]

    def __post_init__(self) -> None:
        total, vocabulary = self.student.hidden_NH.shape[0], self.student.head_VH.shape[0]
        size = max(1, self.scoring.tile_logits // vocabulary)
        self.tiles = slices(total, size)
        self._dtype = compute_dtype(self.student, self.scoring.views)
        self._tile = Tile(self.student, self.scoring.views, min(size, total))

    def scores(self) -> Scores:
        """Score without any gradient."""
        return joined([self._score(rows, Wanted(loss=False, logprob=False))[0] for rows in self.tiles])

    def kept(self, wanted: Wanted) -> tuple[Scores, Found]:
        """Score in one tile, and keep its slopes."""
        (rows,) = self.tiles
        scores, slopes = self._score(rows, wanted)

        def found(upstream: Upstream) -> Gradients | None:
            if _missing(upstream, wanted):
                return None
            sums = self._sums()
            sums.add(slopes.weighed(*upstream), rows)
            return self._gradients(sums)

        return scores, found

    def by_token(self, wanted: Wanted) -> tuple[Scores, Found]:
        """Score, and give each token the gradient that it would have with weight 1."""
        parts, own = [], [self._sums() if is_wanted else None for is_wanted in wanted]
        for rows in self.tiles:
            scores, slopes = self._score(rows, wanted)
            parts.append(scores)
            for sums, slope in zip(own, slopes, strict=True):
                if sums is not None and slope is not None:
                    sums.add(slope, rows)

        def found(upstream: Upstream) -> Gradients | None:
            if _missing(upstream, wanted):
                return None
            weighed = [
                sums.hidden_NH.mul_(weight_N[:, None])
                for sums, weight_N in zip(own, upstream, strict=True)
                if sums is not None and sums.hidden_NH is not None and weight_N is not None
            ]
            return sum(weighed[1:], weighed[0]).to(self.student.hidden_NH.dtype), None, None

        return joined(parts), found

    def under(self, expected: Expected) -> tuple[Scores, Found]:
        """Score, and sum gradients under the weights that are expected."""
        parts, weights, sums = [], [], self._sums()
        for rows in self.tiles:
            scores, slopes = self._score(rows, Wanted(loss=True, logprob=False))
            parts.append(scores)
            weights.append(expected(scores, rows).to(self._dtype))
            sums.add(slopes.weighed(weights[-1], None), rows)
        expected_N = torch.cat(weights)

        def found(upstream: Upstream) -> Gradients | None:
            if upstream.loss is None or upstream.logprob is not None:
                return None
            factor = _factor(upstream.loss.to(self._dtype), expected_N)
            if factor is None:
                return None
            for part in (sums.hidden_NH, sums.head_VH, sums.bias_V):
                if part is not None and factor != 1:
                    part.mul_(factor)
            return self._gradients(sums)

        return joined(parts), found

    def again(self, upstream: Upstream) -> Gradients:
        """Make all gradients under the weights that arrived."""
        wanted, sums = Wanted(*(weight_N is not None for weight_N in upstream)), self._sums()
        for rows in self.tiles:
            slopes = self._score(rows, wanted)[1]
            sums.add(slopes.weighed(*upstream.at(rows)), rows)
        return self._gradients(sums)

    def _score(self, rows: slice, wanted: Wanted) -> tuple[Scores, Slopes]:
        return score(self._tile.logits(rows), self.scoring.labels_N[rows], self.scoring, wanted, self.student.cap)

    def _sums(self) -> Sums:
        return Sums(self.student, self._dtype, self.needs)

    def _gradients(self, sums: Sums) -> Gradients:
        student = self.student
        return (
            None if sums.hidden_NH is None else sums.hidden_NH.to(student.hidden_NH.dtype),
            None if sums.head_VH is None else sums.head_VH.to(student.head_VH.dtype),
            None if sums.bias_V is None or student.bias_V is None else sums.bias_V.to(student.bias_V.dtype),
        )


def _missing(upstream: Upstream, wanted: Wanted) -> bool:
    """Tell whether a gradient arrived that was not wanted."""
    return any(weight_N is not None and not had for weight_N, had in zip(upstream, wanted, strict=True))


def _factor(found_N: Tensor, expected_N: Tensor) -> float | None:
    """Return by what number all weights differ from the expected ones; None where it is not one number."""
    largest = expected_N.abs().argmax()
    expected = expected_N.take(largest)  # an index in brackets would be read first
    factor = found_N.take(largest) / expected
    gap = (found_N - factor * expected_N).abs().max()
    # One transfer: each of them waits for the device.
    size, ratio, apart, found = torch.stack((expected.abs(), factor, gap, found_N.abs().max())).tolist()
    if not size:
        return None if found else 1.0
    return ratio if apart <= SAME * abs(ratio) * size else None
