"""Gradient pass: the student's gradients from recomputed tiles, and the autograd function around both passes.

Shapes: N tokens, n tokens of a tile, V vocabulary, v entries of a tile, H hidden, K support of a top-k divergence, W
views.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from atesd.losses.scores import Scores, Scoring, score
from atesd.losses.summands import Pair, clipped_slope
from atesd.losses.tiles import Role, compute_dtype, local_ids, log_tiles, logits_tile, product, product_dtype, slices


class Upstream(NamedTuple):
    """Gradients that arrive at the two differentiable outputs, each [N]; None where an output was not used."""

    loss: Tensor | None
    logprob: Tensor | None


class StudentGradients(NamedTuple):
    """Gradients of hidden states, head and bias; None where not asked for."""

    hidden_NH: Tensor | None
    head_VH: Tensor | None
    bias_V: Tensor | None


class Saved(NamedTuple):
    """What the score pass leaves for the gradient pass; as in `Scores`."""

    slope: Tensor
    support_NK: Tensor
    sparse_NK: Tensor
    student_norm: Tensor
    view_norms_NW: Tensor
    target_norm: Tensor


class TiledScores(torch.autograd.Function):
    """`score` with gradients of `loss` and `logprob` to the student's hidden states, head and bias; none to views."""

    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, head_VH: Tensor, bias_V: Tensor | None, temperature: float, scoring: Scoring
    ) -> tuple[Tensor, ...]:
        with torch.autocast(hidden_NH.device.type, enabled=False):
            scores = score(Role(hidden_NH, head_VH, bias_V, temperature), scoring)
        ctx.scoring, ctx.temperature = scoring, temperature
        ctx.save_for_backward(hidden_NH, head_VH, bias_V, *(getattr(scores, name) for name in Saved._fields))
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*scores[2:])
        return tuple(scores)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss_grad: Tensor | None, logprob_grad: Tensor | None, *_: None) -> tuple[Any, ...]:
        hidden_NH, head_VH, bias_V, *saved = ctx.saved_tensors
        student = Role(hidden_NH, head_VH, bias_V, ctx.temperature)
        with torch.autocast(hidden_NH.device.type, enabled=False):
            upstream = Upstream(loss_grad, logprob_grad)
            gradients = student_gradients(student, ctx.scoring, Saved(*saved), upstream, ctx.needs_input_grad[:3])
        return (*gradients, None, None)


def scores_with_gradient(student: Role, scoring: Scoring) -> Scores:
    """Score all tokens; `loss` and `logprob` of the result are differentiable with respect to the student."""
    return Scores(*TiledScores.apply(*student, scoring))  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class _Coefficients:
    """Gradient to tempered logits = entry * u - q * prob + label on the label's entry (+ sparse on the support)."""

    entry_N: Tensor | None
    prob_N: Tensor
    label_N: Tensor | None
    sparse_NK: Tensor | None


def _coefficients(scoring: Scoring, saved: Saved, upstream: Upstream) -> _Coefficients:
    prob_N = torch.zeros_like(saved.slope)
    if upstream.logprob is not None:
        prob_N = prob_N + upstream.logprob
    if upstream.loss is None:
        return _Coefficients(None, prob_N, upstream.logprob, None)
    prob_N = prob_N + upstream.loss * saved.slope
    if scoring.objective == "full":
        return _Coefficients(upstream.loss, prob_N, upstream.logprob, None)
    return _Coefficients(None, prob_N, upstream.logprob, saved.sparse_NK * upstream.loss[:, None])


@dataclass(frozen=True)
class _Backward:
    """Everything that one tile's gradient depends on."""

    student: Role
    scoring: Scoring
    saved: Saved
    coefficients: _Coefficients
    dtype: torch.dtype


def student_gradients(
    student: Role, scoring: Scoring, saved: Saved, upstream: Upstream, needs: tuple[bool, bool, bool]
) -> StudentGradients:
    """Recompute the tiles and add up gradients.

    The loop over the vocabulary is the outer one, so that the head's gradient is summed in the compute dtype a tile at
    a time. The hidden states' is summed in an [N, H] buffer of that dtype.
    """
    dtype = compute_dtype(student, scoring.views)
    operands = product_dtype(student, dtype)
    backward = _Backward(student, scoring, saved, _coefficients(scoring, saved, upstream), dtype)
    hidden_NH = torch.zeros_like(student.hidden_NH, dtype=dtype) if needs[0] else None
    head_VH = torch.empty_like(student.head_VH) if needs[1] else None
    bias_V = torch.empty_like(student.bias_V) if needs[2] and student.bias_V is not None else None
    all_rows = slices(student.hidden_NH.shape[0], scoring.tile_tokens)
    for columns in slices(student.head_VH.shape[0], scoring.tile_vocab):
        head_sum = bias_sum = torch.zeros((), dtype=dtype, device=student.hidden_NH.device)
        for rows in all_rows:
            gradient_nv = _tile_gradient(backward, rows, columns)
            if hidden_NH is not None:
                hidden_NH[rows] += product(gradient_nv, student.head_VH[columns], operands, dtype)
            if head_VH is not None:
                head_sum = head_sum + product(gradient_nv.T, student.hidden_NH[rows], operands, dtype)
            if bias_V is not None:
                bias_sum = bias_sum + gradient_nv.sum(0)
        if head_VH is not None:
            head_VH[columns] = head_sum
        if bias_V is not None:
            bias_V[columns] = bias_sum
    return StudentGradients(None if hidden_NH is None else hidden_NH.to(student.hidden_NH.dtype), head_VH, bias_V)


def _tile_gradient(backward: _Backward, rows: slice, columns: slice) -> Tensor:
    """Gradient to the student's logits before the division by its temperature, [n, v]."""
    student, scoring, saved = backward.student, backward.scoring, backward.saved
    coefficients = backward.coefficients
    log_q = logits_tile(student, rows, columns, backward.dtype).sub_(saved.student_norm[rows, None])
    q = log_q.exp()
    gradient_nv = q * -coefficients.prob_N[rows, None]
    if coefficients.entry_N is not None:
        logits = [logits_tile(view, rows, columns, backward.dtype) for view in scoring.views]
        log_p = scoring.target.log_target(log_tiles(logits, saved.view_norms_NW[rows].unbind(-1)))
        if not scoring.target.is_first_view:
            log_p = log_p - saved.target_norm[rows, None]
        slope = clipped_slope(scoring.summand, Pair(log_p, log_p.exp(), log_q, q), scoring.tau)
        gradient_nv.addcmul_(slope, coefficients.entry_N[rows, None])
    if coefficients.label_N is not None:
        _add_at(gradient_nv, scoring.labels_N[rows, None], columns.start, coefficients.label_N[rows, None])
    if coefficients.sparse_NK is not None:
        _add_at(gradient_nv, saved.support_NK[rows], columns.start, coefficients.sparse_NK[rows])
    return gradient_nv if student.temperature == 1 else gradient_nv.div_(student.temperature)


def _add_at(tile_nv: Tensor, ids_nk: Tensor, start: int, values_nk: Tensor) -> None:
    """Add values at those ids of each row that lie in the tile."""
    local_nk, inside_nk = local_ids(ids_nk, start, tile_nv.shape[1])
    tile_nv.scatter_add_(1, local_nk, values_nk * inside_nk)
