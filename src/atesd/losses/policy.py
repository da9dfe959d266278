"""The on-policy reinforcement branch: group-relative advantages and the clipped surrogate.

    A_i = (R_i - mean R) / (std R + eps)                                   one advantage a completion, 0 if std R is 0
    r_t = p_S(y_t) / p_old(y_t)
    loss_t = -w_t min(r_t A, clip(r_t, 1 - eps_low, 1 + eps_high) A) + kl_coef k3_t
    k3_t = exp(d) - d - 1,  d = log p_ref(y_t) - log p_S(y_t)              in expectation KL(p_S || p_ref)

GRPO 2402.03300; `scale = "none"` with `aggregate = "constant"`: Dr.GRPO 2503.20783; eps_high .28, `aggregate = "token"`
and `zero_variance = "drop"`: DAPO 2503.14476; `ratio = "sequence"`: GSPO 2507.18071; dual clip: 1912.09729.
w_t = min(p_old / p_sampler, importance_clip) corrects for a sampler whose probabilities differ from the trainer's.
p_old are the weights that the step began with. With GSPO r is one for a sequence, exp(mean_t log r_t), and w_t stays
each token's: the value weighs a sequence's term by its tokens' weights, and the gradient is that of the value, exactly,
whatever multiplies the loss per token (it goes through the mean, not through GSPO-token's identity, which would give
each token's gradient its own w_t). Exact up to what is held constant: A, w, p_old, p_ref; a clipped term has none.

Deviations: 1. `scale = "std"` divides by the std with ddof 0 plus 1e-6 (the GRPO paper names neither); TRL's ddof 1 and
1e-4 are `scale = "std_trl"`. In a group of G TRL's are smaller by sqrt((G - 1) / G), 6 % at G = 8, and by its eps where
rewards hardly differ; 2. w_t multiplies the policy term only.

With `teacher_credit` (RLSD, arXiv 2604.03128; formula and numbers of the code in github ZJU-REAL/SDAR) the reward says
which way a sequence moves, and the teacher who reads the hint how far each token does:

    A_t = A [(1 - share) + share clip(exp(sign(A) Delta_t), 1 - clip, 1 + clip)]
    Delta_t = log p_T(y_t) - log p_old(y_t)

A_t stands for A above, and is held constant as it is. Where no teacher reads a completion A_t = A. Deviation: 3. the
share stays; that code lets it fall to 0 over 50 steps.

Shapes: N tokens of one micro-batch, S its sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from atesd.losses.combine import numbered
from atesd.types import Config

Scale = Literal["std", "std_trl", "none"]


class TeacherCredit(Config):
    """RLSD (2604.03128): the reward says which way tokens move, the teacher how far. Numbers of SDAR's code."""

    share: Annotated[float, Field(gt=0, le=1)] = 0.5
    """How much of a token's advantage the teacher scales; with less than 1 the rest is the same for all tokens."""
    clip: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """By how much that scale may differ from 1."""


class PolicyConfig(Config):
    """Group-relative policy optimisation. Defaults: token-level mean, clips .2, no KL."""

    scale: Scale = "std"
    """Divide advantages by the group's standard deviation (GRPO), or not (Dr.GRPO). `std` has ddof 0 and adds 1e-6;
    `std_trl` is what TRL computes: ddof 1, plus 1e-4."""
    aggregate: Literal["token", "sequence", "constant"] = "token"
    """Mean over all tokens (DAPO), over sequences of their means (GRPO), or a sum divided by sequences times the
    longest allowed length (Dr.GRPO)."""
    zero_variance: Literal["keep", "drop"] = "keep"
    """Whether groups of equal rewards, whose advantage is 0, count in the mean (GRPO) or not (DAPO)."""
    eps_low: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """How far below 1 the ratio counts."""
    eps_high: Annotated[float, Field(gt=0)] = 0.2
    """How far above 1 the ratio counts; DAPO's clip-higher is .28."""
    dual_clip: Annotated[float, Field(gt=1)] | None = 3.0
    """Bound of the loss for A < 0: at most -A times this. SDAR's code: 3."""
    ratio: Literal["token", "sequence"] = "token"
    """Importance ratio of each token, or GSPO's of the sequence: exp of the mean log ratio."""
    kl_coef: Annotated[float, Field(ge=0)] = 0.0
    """Weight of k3 to the step-0 weights; SDAR uses .01."""
    importance_clip: Annotated[float, Field(ge=1)] | None = 2.0
    """Largest weight p_old / p_sampler of a token; unset, no correction."""
    teacher_credit: TeacherCredit | None = None
    """Let the teacher say how much of the advantage each token gets (RLSD); unset, all tokens get the same. For routers
    whose reinforced groups are distilled as well: RLSD is `routing = {kind = "both", coef = 0}` with this."""

    def describe(self) -> str:
        """Say what the teacher does to advantages."""
        if self.teacher_credit is None:
            return ""
        return (
            "The teacher scales every reinforced token's advantage between "
            f"{1 - self.teacher_credit.share * self.teacher_credit.clip:.3g} and "
            f"{1 + self.teacher_credit.share * self.teacher_credit.clip:.3g} (RLSD)"
        )


class PolicyTokens(NamedTuple):
    """What the branch needs of N tokens besides the student's log-probabilities; all detached."""

    advantage_N: Tensor
    old_logprob_N: Tensor
    sampler_logprob_N: Tensor
    reference_logprob_N: Tensor | None
    """Under the step-0 weights; only with kl_coef."""
    teacher_logprob_N: Tensor | None
    """Under the teacher; only where it reads the completions."""
    sequence_N: Tensor
    """Number of the token's sequence."""


@dataclass(frozen=True, slots=True)
class PolicyValues:
    """Loss per token, differentiable, and detached statistics, each [N]."""

    loss_N: Tensor
    ratio_N: Tensor
    clipped_N: Tensor
    """1 where a clip holds the policy term, whose gradient is then 0."""
    weight_N: Tensor
    kl_N: Tensor
    credit_N: Tensor
    """What the teacher multiplies the advantage with; 1 without `teacher_credit`."""


def group_advantages(rewards: Sequence[float], scale: Scale) -> list[float]:
    """Return A_i of one group; all 0 where the rewards are equal, so also in a group of one."""
    if len(set(rewards)) == 1:
        return [0.0] * len(rewards)  # exactly: the mean of equal numbers may differ from them in the last bit
    mean = sum(rewards) / len(rewards)
    ddof, eps = (1, 1e-4) if scale == "std_trl" else (0, 1e-6)
    std = sqrt(sum((reward - mean) ** 2 for reward in rewards) / (len(rewards) - ddof))
    return [(reward - mean) / (1.0 if scale == "none" else std + eps) for reward in rewards]


def policy_values(logprob_N: Tensor, tokens: PolicyTokens, config: PolicyConfig) -> PolicyValues:
    """Return the loss per token. `logprob_N` carries the gradient."""
    gap_N = logprob_N - tokens.old_logprob_N
    if config.ratio == "sequence":
        gap_N = _sequence_mean(gap_N, tokens.sequence_N)
    ratio_N = gap_N.exp()
    credit_N = _teacher_credit(tokens, config.teacher_credit)
    advantage_N = tokens.advantage_N * credit_N
    bounded_N = ratio_N.clamp(1 - config.eps_low, 1 + config.eps_high)
    gain_N = torch.minimum(ratio_N * advantage_N, bounded_N * advantage_N)
    clipped_N = (bounded_N * advantage_N).detach() < (ratio_N * advantage_N).detach()
    if config.dual_clip is not None:
        floor_N = config.dual_clip * advantage_N
        held_N = (advantage_N < 0) & (gain_N.detach() < floor_N)
        gain_N = torch.where(held_N, floor_N, gain_N)
        clipped_N = clipped_N | held_N
    weight_N = torch.ones_like(advantage_N)
    if config.importance_clip is not None:
        weight_N = (tokens.old_logprob_N - tokens.sampler_logprob_N).exp().clamp(max=config.importance_clip)
    kl_N = torch.zeros_like(advantage_N)
    if tokens.reference_logprob_N is not None:
        d_N = tokens.reference_logprob_N - logprob_N
        kl_N = d_N.exp() - d_N - 1
    return PolicyValues(
        loss_N=config.kl_coef * kl_N - weight_N * gain_N,
        ratio_N=ratio_N.detach(),
        clipped_N=clipped_N.to(advantage_N.dtype),
        weight_N=weight_N,
        kl_N=kl_N.detach(),
        credit_N=credit_N,
    )


def _teacher_credit(tokens: PolicyTokens, config: TeacherCredit | None) -> Tensor:
    """Return A_t / A: 1 where the teacher has no say."""
    if config is None or tokens.teacher_logprob_N is None:
        return torch.ones_like(tokens.advantage_N)
    gap_N = tokens.teacher_logprob_N - tokens.old_logprob_N
    scale_N = (tokens.advantage_N.sign() * gap_N).exp().clamp(1 - config.clip, 1 + config.clip)
    return 1 - config.share + config.share * scale_N


def _sequence_mean(values_N: Tensor, sequence_N: Tensor) -> Tensor:
    """Give every token the mean of its sequence; differentiable."""
    index_N = numbered(sequence_N)
    # Room for as many sequences as tokens: the device alone knows how many there are.
    ones_N = torch.ones_like(values_N)
    totals_N = torch.zeros_like(ones_N).scatter_add(0, index_N, values_N)
    counts_N = torch.zeros_like(ones_N).scatter_add_(0, index_N, ones_N)
    return (totals_N / counts_N.clamp(min=1))[index_N]
