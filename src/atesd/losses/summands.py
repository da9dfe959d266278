"""Summands of the divergences between a teacher p and a student q = softmax(z), entry by entry, with their gradients.

Shapes: n tokens, v entries (of the vocabulary or of a top-k support). Logs are natural, values in nats.

With l_i the summands, D = sum_i l_i, and u_i = q_i dD/dq_i, every divergence has dD/dz_j = u_j - q_j sum_i u_i. Adding
a multiple of q_i to u_i changes nothing, as q sums to 1; `slope` is u_i shifted so that it vanishes at p = q.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.linalg import vecdot

# exp(80) fits float32, and an entry whose p is exp(-80) of its q adds nothing that float64 could hold.
MAX_GAP = 80.0


class Pair(NamedTuple):
    """Teacher and student on the same entries, all [n, v] but `surplus`."""

    p: Tensor
    q: Tensor
    gap: Tensor
    """log p - log q."""
    excess: Tensor
    """q - p."""
    surplus: Tensor
    """sum_i (q_i - p_i), [n]: 0 but for the rounding of both normalisers."""


def pair(log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor, room: Tensor | None = None) -> Pair:
    """Build a pair from log-probabilities and probabilities; `room` may be given to be overwritten by the excess."""
    excess = q - p if room is None else torch.sub(q, p, out=room)
    return Pair(p, q, log_p - log_q, excess, excess.sum(-1))


class Entries(NamedTuple):
    """Summands of one divergence: `value` l_i, `slope` u_i + shift q_i, `shift` one of 1, -1, 0.

    `shift * surplus` is zero but for rounding; added to the sum of values it cancels, to first order, the rounding of
    both normalisers, which would otherwise make small divergences negative.
    """

    value: Callable[[], Tensor]
    """Returns l_i, [n, v]."""
    total: Tensor
    """sum_i l_i, [n]."""
    slope: Tensor
    shift: float


Summand = Callable[[Pair], Entries]


def forward_kl(pair: Pair) -> Entries:
    """Summands of KL(teacher || student): l = p log(p/q), u = -p."""
    return Entries(lambda: pair.p * pair.gap, vecdot(pair.p, pair.gap), pair.excess, 1.0)


def reverse_kl(pair: Pair) -> Entries:
    """Summands of KL(student || teacher): l = q log(q/p), u = l + q."""
    value = (pair.q * pair.gap).neg_()
    return Entries(lambda: value, value.sum(-1), value, -1.0)


def jsd(beta: float) -> Summand:
    """Summands of b KL(p||m) + (1-b) KL(q||m), m = b p + (1-b) q: both terms added per entry, u = (1-b) q log(q/m).

    log(p/m) = -log(1 + (1-b) (q/p - 1)), which is exact near p = q.
    """

    def summand(pair: Pair) -> Entries:
        gap = pair.gap.neg().clamp_(max=MAX_GAP)
        log_p_over_m = gap.expm1().mul_(1 - beta).log1p_().neg_()
        slope = gap.add_(log_p_over_m).mul_(pair.q).mul_(1 - beta)
        value = log_p_over_m.mul_(pair.p).mul_(beta).add_(slope)
        return Entries(lambda: value, value.sum(-1), slope, 0.0)

    return summand


class Summed(NamedTuple):
    """A divergence, and what its gradient is made of: [n], but the slopes [n, v]."""

    divergence: Tensor
    """D, unclipped."""
    loss: Tensor
    """sum_i min(l_i, tau), or D without a clip."""
    held: Tensor
    """Number of entries with l_i >= tau; 0 without a clip."""
    held_mass: Tensor
    """Teacher probability on them."""
    slope: Tensor
    """u_i of the loss, shifted."""
    plain_slope: Tensor
    """u_i of D, shifted; `slope` itself without a clip."""
    pair: Pair

    def gradient(self) -> Tensor:
        """Return dloss/dz = u - q sum u, [n, v]."""
        if self.slope is self.pair.excess:
            return self.slope  # whose sum is 0
        return torch.addcmul(self.slope, self.pair.q, self.slope.sum(-1, keepdim=True), value=-1)

    def is_reversed(self, entry: Callable[[], Tensor]) -> Tensor:
        """Tell whether the clip turns round the gradient to an entry [n, 1], so that up becomes down; [n]."""
        if self.slope is self.plain_slope:
            return torch.zeros_like(self.loss, dtype=torch.bool)
        ids_n1 = entry()
        q_n1 = self.pair.q.gather(1, ids_n1)
        clipped_n1, plain_n1 = (
            slope.gather(1, ids_n1) - q_n1 * slope.sum(-1, keepdim=True) for slope in (self.slope, self.plain_slope)
        )
        return ((clipped_n1 > 0) & (plain_n1 < 0))[:, 0]


def summed(summand: Summand, pair: Pair, tau: float | None) -> Summed:
    """Sum a pair. `tau` makes the loss the pointwise clip (docs/clip.md): an entry acts while l_i < tau."""
    entries = summand(pair)
    divergence = entries.total + entries.shift * pair.surplus
    if tau is None:
        none = torch.zeros_like(divergence)
        # Without a clip a divergence is never negative; only rounding can say otherwise.
        return Summed(divergence, divergence.clamp(min=0), none, none, entries.slope, entries.slope, pair)
    value = entries.value()
    held = value >= tau
    return Summed(
        divergence=divergence,
        loss=value.clamp(max=tau).sum(-1),
        held=held.sum(-1).to(divergence.dtype),
        held_mass=(pair.p * held).sum(-1),
        slope=torch.where(held, entries.shift * pair.q, entries.slope),
        plain_slope=entries.slope,
        pair=pair,
    )
