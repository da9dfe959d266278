"""Score pass: everything per token that loss, gates and logs read, from tiles of logits.

Shapes: N tokens, n tokens of a tile, V vocabulary, v entries of a tile, K support of a top-k divergence, W views.

Two passes over the vocabulary: log-normalisers and top entries first, element-wise sums second; a target that is more
than the first view takes one more between them, for its own normaliser.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from atesd.losses.summands import Pair, PairSums, Summand, clipped_slope, pair_sums
from atesd.losses.target import Target
from atesd.losses.tiles import Normaliser, Role, RowTiles, compute_dtype, local_ids, log_tiles, pick, slices


@dataclass(frozen=True)
class Scoring:
    """What to score the student against, and how. `objective` "sampled" has no divergence of its own."""

    views: tuple[Role, ...]
    labels_N: Tensor
    target: Target
    summand: Summand
    objective: Literal["full", "top_k", "sampled"]
    top_k: int
    support: Literal["target", "student"]
    """Whose `top_k` most probable entries."""
    tail: bool
    tau: float | None
    tile_tokens: int
    tile_vocab: int


class Scores(NamedTuple):
    """Scores per token, all [N] but `support_NK`, `sparse_NK`, `view_norms_NW` and `view_logprobs_NW`."""

    loss: Tensor
    """The objective's divergence, pointwise clipped where that is asked for."""
    logprob: Tensor
    """log p_S(label)."""
    slope: Tensor
    """The objective's gradient to tempered logits is (full support: u) - slope q (top-k: + sparse at the support)."""
    support_NK: Tensor
    sparse_NK: Tensor
    student_norm: Tensor
    view_norms_NW: Tensor
    target_norm: Tensor
    view_logprobs_NW: Tensor
    """log-probability of the label under each view."""
    teacher_logprob: Tensor
    """The first view's."""
    divergence: Tensor
    """Unclipped, full vocabulary, first view against student."""
    reverse_kl: Tensor
    """KL(student || first view)."""
    student_entropy: Tensor
    teacher_entropy: Tensor
    student_max_prob: Tensor
    top1_agree: Tensor
    held_frac: Tensor
    held_mass: Tensor
    is_reversed: Tensor
    """Whether the clip turns round the gradient to the logit of the target's most probable entry: up becomes down."""


def score(student: Role, scoring: Scoring) -> Scores:
    """Score all tokens. No gradient is recorded: `losses/gradient.py` computes it."""
    dtype = compute_dtype(student, scoring.views)
    rows = slices(scoring.labels_N.shape[0], scoring.tile_tokens)
    parts = [_score_rows(student, scoring, part, dtype) for part in rows]
    return parts[0] if len(parts) == 1 else Scores(*map(torch.cat, zip(*parts, strict=True)))


def _score_rows(student: Role, scoring: Scoring, rows: slice, dtype: torch.dtype) -> Scores:
    """Score one tile of tokens."""
    tiles = RowTiles((student, *scoring.views), rows, scoring.tile_vocab, dtype)
    norms = _normalisers(tiles, scoring, scoring.labels_N[rows, None])
    sums = _sum_rows(tiles, scoring, norms)
    objective = _objective(scoring, sums)
    teacher = norms.views[0]
    return Scores(
        loss=objective.loss,
        logprob=norms.student.label_logprob,
        slope=objective.slope,
        support_NK=sums.ids_nk if scoring.objective == "top_k" else sums.ids_nk[:, :0],
        sparse_NK=objective.sparse_nk,
        student_norm=norms.student.log,
        view_norms_NW=torch.stack([norm.log for norm in norms.views], -1),
        target_norm=norms.target.log,
        view_logprobs_NW=torch.stack([norm.label_logprob for norm in norms.views], -1),
        teacher_logprob=teacher.label_logprob,
        divergence=sums.plain.divergence.clamp(min=0),
        reverse_kl=sums.plain.reverse_kl.clamp(min=0),
        student_entropy=-sums.plain.log_q_mean,
        teacher_entropy=-sums.plain.log_p_mean,
        student_max_prob=norms.student.top_logprobs_nk[:, 0].exp(),
        top1_agree=(norms.student.ids_nk[:, 0] == teacher.ids_nk[:, 0]).to(dtype),
        held_frac=objective.held_frac,
        held_mass=objective.held_mass,
        is_reversed=objective.is_reversed,
    )


class _Norms(NamedTuple):
    """First-pass results of each distribution. A plain target's is the first view's."""

    student: Normaliser
    views: list[Normaliser]
    target: Normaliser


def _normalisers(tiles: RowTiles, scoring: Scoring, labels_n1: Tensor) -> _Norms:
    """First pass, and the target's own where it is more than the first view."""
    target = scoring.target
    student_k, target_k = (scoring.top_k if scoring.support == side else 1 for side in ("student", "target"))
    ks = [student_k] + [target_k if target.is_first_view else 1] + [1] * (len(scoring.views) - 1)
    student, *views = norms = [Normaliser(k, labels_n1) for k in ks]
    for start, logits in tiles:
        for norm, logits_nv in zip(norms, logits, strict=True):
            norm.add(logits_nv, start)
    if target.is_first_view:
        return _Norms(student, views, views[0])
    mixed = Normaliser(target_k, labels_n1)
    for start, (_, *view_logits) in tiles:
        mixed.add(target.log_target(log_tiles(view_logits, [norm.log for norm in views])), start)
    return _Norms(student, views, mixed)


class _RowSums(NamedTuple):
    """Second-pass results: sums, and the entries of the support one by one: the target's or the student's `top_k`."""

    plain: PairSums
    """First view against student, unclipped unless it is the objective's pair too."""
    full: PairSums
    """Target against student over the whole vocabulary, as optimised; `plain` again where that is not asked for."""
    ids_nk: Tensor
    log_p_nk: Tensor
    log_q_nk: Tensor
    top_n1: Tensor
    """The target's most probable entry, inside the support or not."""
    tail_p_n: Tensor
    """Probability outside those entries; 0 where no tail is asked for."""
    tail_q_n: Tensor


def _sum_rows(tiles: RowTiles, scoring: Scoring, norms: _Norms) -> _RowSums:
    """Second pass."""
    ids_nk = (norms.student if scoring.support == "student" else norms.target).ids_nk
    top_n1 = norms.target.ids_nk[:, :1]
    log_p_nk = log_q_nk = torch.full_like(ids_nk, torch.nan, dtype=norms.target.log.dtype)
    tail_p_n = tail_q_n = torch.zeros_like(norms.target.log)
    is_plain, is_full = scoring.target.is_first_view, scoring.objective == "full"
    plain: PairSums | None = None
    mixed: PairSums | None = None
    for start, (logits_nv, *view_logits) in tiles:
        log_q = logits_nv - norms.student.log[:, None]
        log_views = log_tiles(view_logits, [norm.log for norm in norms.views])
        pair = Pair(log_views[0], log_views[0].exp(), log_q, log_q.exp())
        plain = _added(plain, pair_sums(scoring.summand, pair, scoring.tau if is_plain and is_full else None))
        if not is_plain:
            log_p = scoring.target.log_target(log_views) - norms.target.log[:, None]
            pair = Pair(log_p, log_p.exp(), pair.log_q, pair.q)
            if is_full:
                mixed = _added(mixed, pair_sums(scoring.summand, pair, scoring.tau))
        log_p_nk, log_q_nk = (
            pick(tile, ids_nk, start, known) for tile, known in ((pair.log_p, log_p_nk), (log_q, log_q_nk))
        )
        if scoring.tail:
            tail_p_n = tail_p_n + _outside(pair.p, ids_nk, start)
            tail_q_n = tail_q_n + _outside(pair.q, ids_nk, start)
    assert plain is not None
    return _RowSums(plain, mixed or plain, ids_nk, log_p_nk, log_q_nk, top_n1, tail_p_n, tail_q_n)


def _added(sums: PairSums | None, more: PairSums) -> PairSums:
    return more if sums is None else PairSums(*map(torch.add, sums, more))


def _outside(p_nv: Tensor, ids_nk: Tensor, start: int) -> Tensor:
    """Sum a tile of probabilities without the given entries: exactly 0 where they are all of it."""
    local_nk, inside_nk = local_ids(ids_nk, start, p_nv.shape[1])
    return p_nv.scatter_add(1, local_nk, -p_nv.gather(1, local_nk) * inside_nk).sum(-1)


class _Objective(NamedTuple):
    """The fields of `Scores` that depend on the objective."""

    loss: Tensor
    slope: Tensor
    sparse_nk: Tensor
    held_frac: Tensor
    held_mass: Tensor
    is_reversed: Tensor


def _objective(scoring: Scoring, sums: _RowSums) -> _Objective:
    match scoring.objective:
        case "full":
            return _full_objective(scoring, sums)
        case "top_k":
            return _top_k_objective(scoring, sums)
        case "sampled":
            zero_n = torch.zeros_like(sums.plain.loss)
            return _Objective(zero_n, zero_n, sums.log_q_nk[:, :0], zero_n, zero_n, zero_n > 0)


def _full_objective(scoring: Scoring, sums: _RowSums) -> _Objective:
    full = sums.full
    top = Pair(sums.log_p_nk, sums.log_p_nk.exp(), sums.log_q_nk, sums.log_q_nk.exp())
    top_n = (clipped_slope(scoring.summand, top, scoring.tau) - top.q * full.slope[:, None])[:, 0]
    plain_top_n = (clipped_slope(scoring.summand, top, None) - top.q * full.plain_slope[:, None])[:, 0]
    is_reversed_n = _is_reversed(top_n, plain_top_n)
    held_frac = full.held / scoring.views[0].head_VH.shape[0]
    return _Objective(_loss(full, scoring), full.slope, sums.log_q_nk[:, :0], held_frac, full.held_mass, is_reversed_n)


def _top_k_objective(scoring: Scoring, sums: _RowSums) -> _Objective:
    """Divergence on the support: renormalised, or with the rest of the vocabulary as one more entry.

    The logit gradient g of that entry spreads over the rest in proportion to q: `rest` is g over its probability.
    """
    log_p, log_q = sums.log_p_nk, sums.log_q_nk
    if scoring.tail:
        tiny = torch.finfo(log_p.dtype).tiny
        log_p = torch.cat([log_p, sums.tail_p_n[:, None].clamp(min=tiny).log()], -1)
        log_q = torch.cat([log_q, sums.tail_q_n[:, None].clamp(min=tiny).log()], -1)
    else:
        log_p, log_q = log_p.log_softmax(-1), log_q.log_softmax(-1)
    pair = Pair(log_p, log_p.exp(), log_q, log_q.exp())
    support = pair_sums(scoring.summand, pair, scoring.tau)
    gradient_nk = clipped_slope(scoring.summand, pair, scoring.tau) - pair.q * support.slope[:, None]
    plain_nk = clipped_slope(scoring.summand, pair, None) - pair.q * support.plain_slope[:, None]
    rest_n, sparse_nk = torch.zeros_like(support.loss), gradient_nk
    if scoring.tail:
        rest_n = gradient_nk[:, -1] / pair.q[:, -1]
        sparse_nk = gradient_nk[:, :-1] - pair.q[:, :-1] * rest_n[:, None]
    is_reversed_n = _is_reversed(_at_top(gradient_nk, sums, scoring.tail), _at_top(plain_nk, sums, scoring.tail))
    held_frac = support.held / log_p.shape[1]
    return _Objective(_loss(support, scoring), -rest_n, sparse_nk, held_frac, support.held_mass, is_reversed_n)


def _at_top(gradient_nk: Tensor, sums: _RowSums, tail: bool) -> Tensor:
    """Return the gradient at the target's top entry; outside the support the tail's sign is its own, without one 0."""
    is_top_nk = sums.ids_nk == sums.top_n1
    inside_n = torch.where(is_top_nk, gradient_nk[:, : is_top_nk.shape[1]], 0).sum(-1)
    outside_n = gradient_nk[:, -1] if tail else torch.zeros_like(inside_n)
    return torch.where(is_top_nk.any(-1), inside_n, outside_n)


def _is_reversed(gradient_n: Tensor, plain_n: Tensor) -> Tensor:
    return (gradient_n > 0) & (plain_n < 0)


def _loss(sums: PairSums, scoring: Scoring) -> Tensor:
    """Without a clip a divergence is never negative; only rounding can say otherwise."""
    return sums.loss.clamp(min=0) if scoring.tau is None else sums.loss
