"""Summands of the divergences between a teacher p and a student q = softmax(z), entry by entry, with their gradients.

Shapes: n tokens, v entries (of a vocabulary tile or of a top-k support). Logs are natural, values in nats.

With l_i the summands, D = sum_i l_i, and u_i = q_i dD/dq_i, every divergence has dD/dz_j = u_j - q_j sum_i u_i. Adding
a multiple of q_i to u_i changes nothing, as q sums to 1; `slope` is u_i shifted so that it vanishes at p = q.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# exp(80) fits float32, and an entry whose p is exp(-80) of its q adds nothing that float64 could hold.
MAX_GAP = 80.0


class Pair(NamedTuple):
    """Teacher and student on the same entries, all [n, v]."""

    log_p: Tensor
    p: Tensor
    log_q: Tensor
    q: Tensor


class Entries(NamedTuple):
    """Summands of one divergence: `value` l_i, `slope` u_i + shift q_i, `shift` one of 1, -1, 0.

    `shift * sum(q - p)` is zero but for rounding; added to the sum of values it cancels, to first order, the rounding
    of both normalisers, which would otherwise make small divergences negative.
    """

    value: Tensor
    slope: Tensor
    shift: float


Summand = Callable[[Pair], Entries]


def forward_kl(pair: Pair) -> Entries:
    """Summands of KL(teacher || student): l = p log(p/q), u = -p."""
    return Entries(pair.p * (pair.log_p - pair.log_q), pair.q - pair.p, 1.0)


def reverse_kl(pair: Pair) -> Entries:
    """Summands of KL(student || teacher): l = q log(q/p), u = l + q."""
    value = pair.q * (pair.log_q - pair.log_p)
    return Entries(value, value, -1.0)


def jsd(beta: float) -> Summand:
    """Summands of b KL(p||m) + (1-b) KL(q||m), m = b p + (1-b) q: both terms added per entry, u = (1-b) q log(q/m).

    log(p/m) = -log(1 + (1-b) (q/p - 1)), which is exact near p = q.
    """

    def summand(pair: Pair) -> Entries:
        gap = (pair.log_q - pair.log_p).clamp(max=MAX_GAP)
        log_p_over_m = gap.expm1().mul_(1 - beta).log1p_().neg_()
        slope = gap.add_(log_p_over_m).mul_(pair.q).mul_(1 - beta)
        return Entries(log_p_over_m.mul_(pair.p).mul_(beta).add_(slope), slope, 0.0)

    return summand


class PairSums(NamedTuple):
    """Sums over the entries of one pair, each [n]; those of several tiles add up."""

    divergence: Tensor
    """D, unclipped."""
    loss: Tensor
    """sum_i min(l_i, tau), or D without a clip."""
    slope: Tensor
    """sum_i u_i of the loss, shifted."""
    plain_slope: Tensor
    """sum_i u_i of D, shifted."""
    held: Tensor
    """Number of entries with l_i >= tau."""
    held_mass: Tensor
    """Teacher probability on them."""
    log_p_mean: Tensor
    """sum_i p_i log p_i."""
    log_q_mean: Tensor
    """sum_i q_i log q_i."""
    reverse_kl: Tensor
    """sum_i q_i log(q_i / p_i), the rounding of both normalisers cancelled as above."""


def pair_sums(summand: Summand, pair: Pair, tau: float | None) -> PairSums:
    """Sum one tile of a pair. `tau` makes the loss the pointwise clip (docs/clip.md): an entry acts while l_i < tau."""
    value, slope, shift = summand(pair)
    divergence = value.sum(-1)
    if shift:
        divergence += shift * (pair.q - pair.p).sum(-1)
    log_p_mean, log_q_mean = (pair.p * pair.log_p).sum(-1), (pair.q * pair.log_q).sum(-1)
    reverse = divergence
    if summand is not reverse_kl:
        reverse = (pair.q * (pair.log_q - pair.log_p) + pair.p - pair.q).sum(-1)
    plain_slope = slope.sum(-1)
    if tau is None:
        none = torch.zeros_like(divergence)
        return PairSums(divergence, divergence, plain_slope, plain_slope, none, none, log_p_mean, log_q_mean, reverse)
    held = value >= tau
    return PairSums(
        divergence=divergence,
        loss=value.clamp(max=tau).sum(-1),
        slope=torch.where(held, shift * pair.q, slope).sum(-1),
        plain_slope=plain_slope,
        held=held.sum(-1).to(divergence.dtype),
        held_mass=(pair.p * held).sum(-1),
        log_p_mean=log_p_mean,
        log_q_mean=log_q_mean,
        reverse_kl=reverse,
    )


def clipped_slope(summand: Summand, pair: Pair, tau: float | None) -> Tensor:
    """Return the shifted slopes u_i of the loss, [n, v]; before the shift that of a held entry is 0."""
    value, slope, shift = summand(pair)
    return slope if tau is None else torch.where(value >= tau, shift * pair.q, slope)
