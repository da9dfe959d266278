"""Divergences between teacher and student per token, from hidden states: configuration and entry point.

Shapes: N valid completion tokens, V vocabulary, H hidden, K top-k. `losses/summands.py` holds the formulas,
`losses/scores.py` what is made of rows of logits, `losses/gradient.py` the way over all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from atesd.losses import summands
from atesd.losses.gradient import scores_with_gradient
from atesd.losses.scores import Scores, Scoring, Wanted
from atesd.losses.stats import TokenStats
from atesd.losses.target import Plain, Target
from atesd.losses.tiles import Role
from atesd.types import Config, UserError


class ForwardKL(Config):
    """KL(teacher || student) = sum_i p_i log(p_i / q_i); the setting of OPSD (2601.18734)."""

    kind: Literal["forward_kl"] = "forward_kl"


class ReverseKL(Config):
    """KL(student || teacher) = sum_i q_i log(q_i / p_i)."""

    kind: Literal["reverse_kl"] = "reverse_kl"


class JSD(Config):
    """Jensen-Shannon: beta KL(teacher || m) + (1 - beta) KL(student || m), m = beta teacher + (1 - beta) student.

    It vanishes at both ends: JSD / beta tends to forward KL, JSD / (1 - beta) to reverse KL. Hence 0 and 1 are refused.
    """

    kind: Literal["jsd"] = "jsd"
    beta: float = Field(0.5, gt=0, lt=1)
    """Weight of the teacher in the mixture; 0.5 as in SDPO (2601.20802). For 0 or 1 take forward_kl or reverse_kl."""


class SampledToken(Config):
    """-r_t A_t log p_S(y_t), A_t = log target(y_t) - log p_old(y_t): in expectation reverse KL's gradient.

    A_t and r_t are detached. p_old are the weights that the step began with, r_t = min(p_S / p_old, importance_clip);
    both matter only with step.updates_per_batch > 1, else A_t = log target - log p_S and r_t = 1. The target enters
    without its constant per token, as in G-OPD's code (2602.12125). The value is no estimate of a divergence;
    `TokenStats.divergence` holds the reverse KL.

    Where the engine samples from a copy of the weights, as a vLLM server does, the step multiplies a token's loss by
    w_t = min(p_old / p_sampler, importance_clip), as the reinforcement branch does with its own clip. Other divergences
    are sums over the vocabulary, in which the sampled token has no part: they take no such weight.
    """

    kind: Literal["sampled"] = "sampled"
    importance_clip: float = Field(5.0, gt=1)
    """Largest importance weight r_t of a token; the c of the Extrapolation Cliff (2605.08737)."""


Divergence = Annotated[ForwardKL | ReverseKL | JSD | SampledToken, Field(discriminator="kind")]


class LossConfig(Config):
    """The distillation loss of a token, and how tokens are averaged. Defaults: OPSD (2601.18734), but for its clip."""

    divergence: Divergence = ForwardKL()
    """How far the student is from the teacher at a token."""
    top_k: int | None = Field(None, ge=1)
    """Restrict the divergence to the k most probable entries of `top_k_support`, both sides renormalised; None = all.
    SDPO: 100 with a tail."""
    top_k_support: Literal["target", "student"] = "target"
    """Whose k most probable entries `top_k` keeps: the target's, or the student's (SDPO 2601.20802). The student's
    move with its weights; no gradient goes through the choice."""
    tail: bool = False
    """With `top_k`: keep the rest of the vocabulary as one more entry instead of renormalising."""
    clip: Literal["none", "token", "pointwise"] = "none"
    """Bound the divergence of a token (token), or each of its summands (pointwise, OPSD's code; may reverse signs)."""
    clip_tau: float = Field(0.05, gt=0)
    """Bound in nats that `clip` uses; OPSD uses 0.05 for 1.7B and 4B, 0.06 for 8B."""
    temperature_student: float | None = Field(None, gt=0)
    """Divides the student's logits; None = the sampling temperature, as OPSD's code does."""
    temperature_teacher: float | None = Field(None, gt=0)
    """Divides the teacher's logits; None = the sampling temperature, as OPSD's code does."""
    prompt_weight: Literal["none", "paced"] = "none"
    """`paced`: weigh every problem's loss by p (1 - p), p the mean reward of its attempts (PACED 2603.11178); problems
    that always or never succeed get 0, ungradable ones 1/4."""
    aggregate: Literal["token", "sequence"] = "token"
    """Average over all tokens alike (token), or first over each completion (sequence)."""
    tile_logits: int | None = Field(None, ge=1)
    """Logits of a role that exist at a time, as whole rows (at least one): more of them make larger products, and cost
    4 bytes each. None = 2^24 (64 MiB) on a CPU, 2^27 (512 MiB) on a GPU."""

    @property
    def importance_clip(self) -> float | None:
        """Largest importance weight of the sampled-token loss; None for divergences, which have none."""
        return self.divergence.importance_clip if isinstance(self.divergence, SampledToken) else None

    @model_validator(mode="after")
    def _refuse_what_would_be_ignored(self) -> LossConfig:
        sampled = self.divergence.kind == "sampled"
        if sampled and self.clip != "none":
            raise ValueError(f"clip={self.clip} with the sampled-token loss, which has no summands: set clip=none")
        if sampled and self.top_k is not None:
            raise ValueError(f"top_k={self.top_k} with the sampled-token loss, which looks at one token: drop top_k")
        if self.top_k_support != "target" and self.top_k is None:
            raise ValueError(f"top_k_support={self.top_k_support} without top_k: set top_k, or drop top_k_support")
        if self.tail and self.top_k is None:
            raise ValueError("tail=true without top_k: set top_k, or drop tail")
        if self.top_k == 1 and not self.tail:
            raise ValueError("top_k=1 renormalised is always 0: set tail=true, or a larger top_k")
        return self


_ROOM, _ROOM_ON_GPU = 2**24, 2**27


@dataclass(frozen=True, slots=True)
class Scored:
    """What makes a role's logits: z / temperature, z = cap tanh(y / cap) or y, y = scale (hidden @ head.T + bias)."""

    hidden_NH: Tensor
    head_VH: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    """Positive."""
    cap: float | None = None

    def detached(self) -> Scored:
        """Return it without gradients."""
        bias_V = None if self.bias_V is None else self.bias_V.detach()
        return replace(self, hidden_NH=self.hidden_NH.detach(), head_VH=self.head_VH.detach(), bias_V=bias_V)

    def at(self, temperature: float) -> Role:
        """Return the role at a temperature: scale and cap change places with it, and cost no pass of their own."""
        cap = None if self.cap is None else self.cap / temperature
        return Role(self.hidden_NH, self.head_VH, self.bias_V, temperature / self.scale, cap)


@dataclass(frozen=True, slots=True)
class TokenStreams:
    """Two streams that are differentiable with respect to the student, each [N], and detached statistics.

    `divergence_N` is the configured, clipped loss of a token in nats; `logprob_N` is log p_S(label) at the student's
    temperature.
    """

    divergence_N: Tensor
    logprob_N: Tensor
    stats: TokenStats


@dataclass(frozen=True, slots=True)
class Use:
    """What will be asked of streams: where a caller knows it, gradients are made beside the scores, once.

    A caller who is wrong about it waits longer for the same gradients (`losses/gradient.py`).
    """

    loss: bool = True
    """Whether `divergence_N` will be derived."""
    logprob: bool = False
    """Whether `logprob_N` will."""
    weights: Callable[[TokenStats, slice], Tensor] | None = None
    """From the statistics of some tokens, and which they are: the weights, [n], that their `divergence_N` will have in
    the loss, up to a factor common to all tokens; None: equal ones."""


LOSS_ALONE = Use()


def token_streams(
    student: Scored,
    views: Sequence[Scored],
    labels_N: Tensor,
    config: LossConfig,
    *,
    target: Target,
    temperature: float,
    old_logprob_N: Tensor | None = None,
    use: Use = LOSS_ALONE,
) -> TokenStreams:
    """Score N completion tokens; position t's hidden state predicts `labels_N[t]`.

    Formulas: docs/clip.md and `losses/summands.py` (2601.18734). Deviations from its code: 1. the clip is off by
    default; 2. logits of [N, V] never exist; 3. everything is computed in the wider of float32 and the inputs' dtypes,
    autocast or not; 4. the sampled-token loss refuses a clip instead of ignoring it.

    `old_logprob_N` are the labels' log-probabilities under the weights that the step began with; None where they are
    the present ones. Only the sampled-token loss reads them.

    `temperature` is the sampling temperature. Memory beyond inputs, gradients and per-token results is some multiple of
    `tile_logits`, whatever the vocabulary. No gradient reaches the views; second derivatives are not defined. Logits
    must be finite; a label outside the vocabulary gives NaN.

    `use` tells what will be made of the result: it saves time, and nothing else depends on it. Without views the labels
    are scored alone.

    UserError if `top_k` exceeds the vocabulary.
    """
    _check(student, views, labels_N, config, target)
    scoring = _scoring(views, labels_N, config, target, config.temperature_teacher or temperature)

    def weights(scores: Scores, rows: slice) -> Tensor:
        streams = _streams(scores, config, None)
        weight_n = torch.ones_like(scores.loss) if use.weights is None else use.weights(streams.stats, rows)
        return torch.where(streams.stats.clip_frac > 0, 0, weight_n) if config.clip == "token" else weight_n

    is_sampled, has_loss = config.divergence.kind == "sampled", scoring.objective != "none"
    scores = scores_with_gradient(
        student.at(config.temperature_student or temperature),
        scoring,
        Wanted(use.loss and has_loss, use.logprob or (use.loss and is_sampled)),
        weights,
    )
    return _streams(scores, config, old_logprob_N)


def label_logprobs(student: Scored, labels_N: Tensor, temperature: float, tile_logits: int | None = None) -> Tensor:
    """Return log p_S(label) of N tokens, [N], differentiable, and nothing else: cheaper than `token_streams`."""
    assert student.hidden_NH.shape[0] == labels_N.shape[0], "one hidden state per label"
    config = LossConfig(tile_logits=tile_logits)
    scoring = replace(_scoring((), labels_N, config, Plain(), temperature), objective="label")
    alone = Wanted(loss=False, logprob=True)
    return scores_with_gradient(student.at(temperature), scoring, alone, lambda scores, _: scores.loss).logprob


def _check(student: Scored, views: Sequence[Scored], labels_N: Tensor, config: LossConfig, target: Target) -> None:
    vocabulary = student.head_VH.shape[0]
    assert len(views) in (0, len(target.views)), f"the target reads {len(target.views)} views, not {len(views)}"
    for scored in (student, *views):
        assert scored.hidden_NH.shape[0] == labels_N.shape[0], "one hidden state per label"
        assert scored.hidden_NH.shape[1] == scored.head_VH.shape[1], "hidden size of states and head differ"
        assert scored.head_VH.shape[0] == vocabulary, "all roles share one vocabulary"
    if config.top_k is not None and config.top_k > vocabulary:
        raise UserError(f"loss.top_k={config.top_k} exceeds the vocabulary of {vocabulary}: lower it, or drop it")


def _scoring(
    views: Sequence[Scored], labels_N: Tensor, config: LossConfig, target: Target, temperature: float
) -> Scoring:
    full_or_top: Literal["full", "top_k"] = "full" if config.top_k is None else "top_k"
    room = _ROOM_ON_GPU if labels_N.is_cuda else _ROOM
    return Scoring(
        views=tuple(view.detached().at(temperature) for view in views),
        labels_N=labels_N,
        target=target,
        summand=_summand(config.divergence),
        objective="none" if config.divergence.kind == "sampled" or not views else full_or_top,
        top_k=config.top_k or 1,
        support=config.top_k_support,
        tail=config.tail,
        tau=config.clip_tau if config.clip == "pointwise" else None,
        tile_logits=config.tile_logits or room,
    )


def _summand(divergence: Divergence) -> summands.Summand:
    match divergence:
        case ForwardKL():
            return summands.forward_kl
        case JSD():
            return summands.jsd(divergence.beta)
        case ReverseKL() | SampledToken():
            return summands.reverse_kl


def _streams(scores: Scores, config: LossConfig, old_logprob_N: Tensor | None) -> TokenStreams:
    """Finish what needs no vocabulary: the sampled-token loss, the token clip, the statistics."""
    loss, held, held_mass = scores.loss, scores.held_frac, scores.held_mass
    if config.divergence.kind == "sampled":
        now = scores.logprob.detach()
        old = now if old_logprob_N is None else old_logprob_N.to(now.dtype)
        gap = scores.target_logprob - old
        ratio, limit = (now - old).exp(), config.divergence.importance_clip
        loss = -ratio.clamp(max=limit) * gap * scores.logprob
        held = (ratio > limit).to(now.dtype)
    elif config.clip == "token":
        is_held = loss.detach() >= config.clip_tau
        loss = torch.where(is_held, config.clip_tau, loss)
        held = held_mass = is_held.to(held.dtype)
    stats = TokenStats(
        divergence=scores.divergence.float(),
        student_logprob=scores.logprob.detach().float(),
        teacher_logprob=scores.teacher_logprob.float(),
        student_entropy=scores.student_entropy.float(),
        teacher_entropy=scores.teacher_entropy.float(),
        student_max_prob=scores.student_max_prob.float(),
        top1_agree=scores.top1_agree.float(),
        clip_frac=held.float(),
        clipped_mass=held_mass.float(),
        reverse_kl=scores.reverse_kl.float(),
        reversed=scores.is_reversed.float(),
        advantage=torch.zeros_like(scores.logprob, dtype=torch.float32, requires_grad=False),
    )
    return TokenStreams(loss, scores.logprob, stats)
