"""Score: everything per token that loss, gates and logs read, and the gradient to logits, from rows of logits.

Shapes: N tokens, n tokens of a tile, r rows that are worked on together, V vocabulary, K support of a top-k divergence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.linalg import vecdot

from atesd.losses.summands import Summand, Summed, pair, summed
from atesd.losses.target import Target, asked
from atesd.losses.tiles import Role, slices

BLOCK, BLOCK_ON_GPU = 2**18, 2**24
"""Logits of a role that are worked on together: some twenty passes over them find them in a CPU's caches, and what they
make, some eight tensors of this size, stays small on a GPU."""
_STRETCH = 1024


@dataclass(frozen=True)
class Scoring:
    """What to score the student against, and how.

    `objective` "none" has no divergence to optimise, "label" nothing but the label's log-probability: all other scores
    are 0.
    """

    views: tuple[Role, ...]
    """Nothing where the labels alone are scored: then the student stands in for its teacher."""
    labels_N: Tensor
    target: Target
    summand: Summand
    objective: Literal["full", "top_k", "none", "label"]
    top_k: int
    support: Literal["target", "student"]
    """Whose `top_k` most probable entries."""
    tail: bool
    tau: float | None
    tile_logits: int


class Scores(NamedTuple):
    """Scores per token, all [N]."""

    loss: Tensor
    """The objective's divergence, pointwise clipped where that is asked for."""
    logprob: Tensor
    """log p_S(label)."""
    teacher_logprob: Tensor
    """log p of the label under the first view."""
    target_logprob: Tensor
    """The target's at the label, without its constant."""
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


class Wanted(NamedTuple):
    """Which gradients to logits are asked for."""

    loss: bool
    logprob: bool


class Slopes(NamedTuple):
    """Gradients of `loss` and `logprob` to the tempered, uncapped logits, [n, V]; None where not asked for."""

    loss: Tensor | None
    logprob: Tensor | None

    def weighed(self, loss_n: Tensor | None, logprob_n: Tensor | None) -> Tensor:
        """Return the gradient of sum(loss_n * loss + logprob_n * logprob); overwrites these."""
        parts = [
            slope.mul_(weight_n[:, None])
            for slope, weight_n in ((self.loss, loss_n), (self.logprob, logprob_n))
            if slope is not None and weight_n is not None
        ]
        return parts[0] if len(parts) == 1 else parts[0].add_(parts[1])


def score(
    logits: Sequence[Tensor], labels_n: Tensor, scoring: Scoring, wanted: Wanted, cap: float | None = None
) -> tuple[Scores, Slopes]:
    """Score a tile of logits, [n, V] a role, the student's first; the slopes are written over them.

    `cap` is what holds the student's logits: z = cap tanh(x / cap), so that dz/dx = 1 - (z / cap)^2.
    """
    tokens, vocabulary = logits[0].shape
    block = BLOCK_ON_GPU if logits[0].is_cuda else BLOCK
    together = max(torch.get_num_threads(), block // vocabulary)
    loss_nV = logits[0] if wanted.loss else None
    logprob_nV = logits[1 if wanted.loss else 0] if wanted.logprob else None
    parts = []
    for rows in slices(tokens, together):
        if scoring.objective == "label":
            scores, slopes = _score_label(logits[0][rows], labels_n[rows], is_wanted=wanted.logprob)
        else:
            room = logits[0][rows] if cap is None else None  # a cap's slope needs the logits to the end
            scores, slopes = _score([role[rows] for role in logits], labels_n[rows], scoring, wanted, room)
        parts.append(scores)
        slope_of_cap = None if cap is None or not any(wanted) else (logits[0][rows] / cap).square_().neg_().add_(1)
        for whole, part in ((loss_nV, slopes.loss), (logprob_nV, slopes.logprob)):
            if whole is not None and part is not None:
                slope = part if slope_of_cap is None else part.mul_(slope_of_cap)
                if slope.data_ptr() != whole[rows].data_ptr():  # else it was made in place
                    whole[rows] = slope
    return joined(parts), Slopes(loss_nV, logprob_nV)


def joined(parts: Sequence[Scores]) -> Scores:
    """Put the scores of several rows one behind the other."""
    return parts[0] if len(parts) == 1 else Scores(*map(torch.cat, zip(*parts, strict=True)))


def _score_label(z: Tensor, labels_r: Tensor, *, is_wanted: bool) -> tuple[Scores, Slopes]:
    """Score the label alone, in a few passes over the logits [r, V]."""
    is_label_r, labels_r1 = _labels(labels_r, z.shape[1])
    peak_r1 = z.amax(-1, keepdim=True)
    above_r1 = z.gather(1, labels_r1) - peak_r1
    weights = (z - peak_r1).exp_()
    mass_r1 = weights.sum(-1, keepdim=True)
    logprob_r = torch.where(is_label_r, (above_r1 - mass_r1.log())[:, 0], torch.nan)
    slope = _onehot_less(weights.div_(mass_r1), labels_r1) if is_wanted else None
    none_r = torch.zeros_like(logprob_r)
    unknown = dict.fromkeys(Scores._fields, none_r) | {"is_reversed": none_r > 0}
    alike = {name: logprob_r.clone() for name in ("teacher_logprob", "target_logprob")}
    scores = Scores(**unknown | {"logprob": logprob_r, **alike})
    return scores, Slopes(None, slope)


def _labels(labels_r: Tensor, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Return which labels lie in the vocabulary, and all of them, [r, 1], with 0 in place of the others."""
    is_label_r = (labels_r >= 0) & (labels_r < vocabulary)
    return is_label_r, torch.where(is_label_r, labels_r, 0)[:, None]


def _normalised(z: Tensor) -> tuple[Tensor, Tensor]:
    """Return log-probabilities and probabilities of logits [r, V].

    Probabilities are exp(log-probabilities), a second exponential: only so does `Pair.surplus` know of the rounding of
    the log-normaliser, and takes it out of small divergences.
    """
    log_p = z.log_softmax(-1)
    return log_p, log_p.exp()


def _argmax(x: Tensor) -> Tensor:
    """Return the first place of each row's largest number, [r, 1].

    On a CPU an argmax over all entries costs as much as an exponential; finding the largest of stretches, a sixth.
    """
    whole = x.shape[1] // _STRETCH * _STRETCH
    if x.is_cuda or whole < 4 * _STRETCH:
        return x.argmax(-1, keepdim=True)
    largest = x[:, :whole].reshape(len(x), -1, _STRETCH).amax(-1)
    if whole < x.shape[1]:
        largest = torch.cat([largest, x[:, whole:].amax(-1, keepdim=True)], dim=1)
    start_r1 = largest.argmax(-1, keepdim=True) * _STRETCH
    places_rs = (start_r1 + torch.arange(_STRETCH)).clamp_(max=x.shape[1] - 1)
    return start_r1 + x.gather(1, places_rs).argmax(-1, keepdim=True)


def _score(
    logits: Sequence[Tensor], labels_r: Tensor, scoring: Scoring, wanted: Wanted, room: Tensor | None
) -> tuple[Scores, Slopes]:
    """Score rows of logits. `room`, of their shape, may be overwritten once probabilities are made."""
    log_q, q = _normalised(logits[0])
    views = [_normalised(view) for view in logits[1:]] or [(log_q, q)]
    log_views = [log_view for log_view, _ in views]
    teacher = pair(log_views[0], log_q, views[0][1], q, room)
    is_first, is_full = scoring.target.is_first_view, scoring.objective == "full"
    plain = summed(scoring.summand, teacher, scoring.tau if is_first and is_full else None)
    is_label_r, labels_r1 = _labels(labels_r, log_q.shape[1])

    def at_label(log_p: Tensor) -> Tensor:
        # A label outside the vocabulary is NaN and stops the run, instead of scoring some other token.
        return torch.where(is_label_r, log_p.gather(1, labels_r1)[:, 0], torch.nan)

    log_p = asked(scoring.target, [*log_views, log_q] if scoring.target.reads_student else log_views)
    target_logprob_r = at_label(log_p)
    if not is_first:
        log_p = log_p.log_softmax(-1)
    if is_full:
        objective = _full(
            plain if is_first else summed(scoring.summand, pair(log_p, log_q, log_p.exp(), q), scoring.tau), log_p
        )
    else:
        objective = _top_k(scoring, log_p, log_q, q) if scoring.objective == "top_k" else _nothing(plain)
    student_top_r, teacher_top_r1 = log_q.amax(-1), _argmax(log_views[0])
    scores = Scores(
        loss=objective.loss,
        logprob=at_label(log_q),
        teacher_logprob=at_label(log_views[0]),
        target_logprob=target_logprob_r,
        divergence=plain.divergence.clamp(min=0),
        reverse_kl=(-vecdot(q, teacher.gap) - teacher.surplus).clamp(min=0),
        student_entropy=-vecdot(q, log_q),
        teacher_entropy=-vecdot(teacher.p, log_views[0]),
        student_max_prob=student_top_r.exp(),
        top1_agree=(log_q.gather(1, teacher_top_r1)[:, 0] == student_top_r).to(log_q.dtype),
        held_frac=objective.held_frac,
        held_mass=objective.held_mass,
        is_reversed=objective.is_reversed,
    )
    loss_rV = objective.gradient() if wanted.loss else None
    return scores, Slopes(loss_rV, _onehot_less(q, labels_r1) if wanted.logprob else None)


def _onehot_less(q: Tensor, labels_r1: Tensor) -> Tensor:
    """Return onehot(label) - q: the gradient of log q(label)."""
    return q.neg().scatter_add_(1, labels_r1, torch.ones_like(q[:, :1]))


class _Objective(NamedTuple):
    """The fields of `Scores` that depend on the objective, and its gradient to logits, [r, V]."""

    loss: Tensor
    held_frac: Tensor
    held_mass: Tensor
    is_reversed: Tensor
    gradient: Callable[[], Tensor]


def _nothing(plain: Summed) -> _Objective:
    """Nothing to optimise but the label's log-probability: no gradient is ever asked for."""
    none_r = torch.zeros_like(plain.loss)
    return _Objective(none_r, none_r, none_r, none_r > 0, plain.gradient)


def _full(target: Summed, log_p: Tensor) -> _Objective:
    is_reversed = target.is_reversed(lambda: log_p.argmax(-1, keepdim=True))
    return _Objective(target.loss, target.held / log_p.shape[1], target.held_mass, is_reversed, target.gradient)


def _top_k(scoring: Scoring, log_p: Tensor, log_q: Tensor, q: Tensor) -> _Objective:
    """Divergence on the support: renormalised, or with the rest of the vocabulary as one more entry.

    The gradient g to the logit of that entry spreads over the rest in proportion to q: `rest` is g over its
    probability.
    """
    k = scoring.top_k
    ids_rk = (log_q if scoring.support == "student" else log_p).topk(k).indices
    log_p_rk, log_q_rk = log_p.gather(1, ids_rk), log_q.gather(1, ids_rk)
    if scoring.tail:
        rests = [probability.scatter(1, ids_rk, 0).sum(-1, keepdim=True) for probability in (log_p.exp(), q)]
        tiny = torch.finfo(log_p.dtype).tiny
        log_p_rk, log_q_rk = (
            torch.cat([log_rk, rest.clamp(min=tiny).log()], -1)
            for log_rk, rest in zip((log_p_rk, log_q_rk), rests, strict=True)
        )
    else:
        log_p_rk, log_q_rk = log_p_rk.log_softmax(-1), log_q_rk.log_softmax(-1)
    support = summed(scoring.summand, pair(log_p_rk, log_q_rk, log_p_rk.exp(), log_q_rk.exp()), scoring.tau)

    def gradient() -> Tensor:
        gradient_rk = support.gradient()
        if not scoring.tail:
            return torch.zeros_like(q).scatter_(1, ids_rk, gradient_rk)
        rest_r1 = gradient_rk[:, k:] / support.pair.q[:, k:]
        return (q * rest_r1).scatter_(1, ids_rk, gradient_rk[:, :k])

    # Where the target's top entry lies outside the support, the tail's sign is its own; without a tail nothing moves.
    is_top_rk = ids_rk == log_p.argmax(-1, keepdim=True)
    is_inside_r1 = is_top_rk.any(-1, keepdim=True)

    def place() -> Tensor:
        return torch.where(is_inside_r1, is_top_rk.int().argmax(-1, keepdim=True), log_p_rk.shape[1] - 1)

    is_reversed = support.is_reversed(place) & (is_inside_r1[:, 0] | scoring.tail)
    return _Objective(support.loss, support.held / log_p_rk.shape[1], support.held_mass, is_reversed, gradient)
