"""What is known of each scored token: the detached statistics that gates, selections and logs read."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class TokenStats:
    """Detached statistics of N scored completion tokens, each [N] in float32; what gates and logs read.

    All come from the unclipped, unextrapolated pair of student and first teacher view. Entropies and divergences in
    nats; `top1_agree`, `clip_frac`, `clipped_mass`, `reversed` in [0, 1].
    """

    divergence: Tensor
    """Unclipped divergence D_t."""
    student_logprob: Tensor
    """log p_S(y_t) of the sampled token."""
    teacher_logprob: Tensor
    """log p_T(y_t) of the sampled token; Delta_t = teacher_logprob - student_logprob."""
    student_entropy: Tensor
    teacher_entropy: Tensor
    student_max_prob: Tensor
    top1_agree: Tensor
    clip_frac: Tensor
    """Share of the position's vocabulary entries (pointwise) or 0/1 for the token (token; importance weight of the
    sampled-token loss) that the clip holds."""
    clipped_mass: Tensor
    """Teacher probability on clipped entries."""
    reverse_kl: Tensor
    """KL(student || teacher), whatever divergence is configured."""
    reversed: Tensor
    """1 where the clipped derivative on the teacher's top entry is positive: descent pushes it down."""
    advantage: Tensor
    """The attempt's reward minus what was to be expected, the same for all its tokens; 0 where it is not known."""
