"""Selection: which tokens of the student's completions are distilled at all. The loss is a mean over those.

A selection is 0 where a token is left out, and the token's weight elsewhere: 1, unless the draw is to be made good. The
loss of an update is sum_t s_t w_t D_t / K, K the number of tokens with s_t > 0.

Shapes: N valid completion tokens of all distilled completions of an update; padding never gets here.

TIP, arXiv 2604.14084: with h^ and d^ the student's entropy (cut at its 98th percentile) and
KL(student || teacher), each min-max normalised over the batch,

    entropy      the rho N tokens of largest h^
    q3           the same by (1 - h^) d^            overconfident and wrong
    soft_or      the same by h^ + d^ - h^ d^
    multinomial  rho N tokens drawn without replacement, in proportion to h_norm^a (JSD / ln 2)^g

`multinomial` is biased: tokens of high score are drawn more often and then count alike, so the expected mean is not
that of all tokens. With `weighting = "importance"` (ours) it is. The K tokens of least E_t / v_t are kept, E_t standard
exponential and v_t the token's draw weight: the same draw, one after another without replacement. With tau the (K+1)-th
least of these numbers,

    s_t = (K / N) / (1 - exp(-v_t tau))      E [sum_t s_t x_t / K] = mean_t x_t      for any x, exactly

since, given the other tokens' numbers, token t is kept with that probability (the argument of priority sampling,
cs/0509026). Scores are detached. Where all scores are equal the normalised ones are 0 and the first tokens win.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal, Protocol, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from atesd.losses.stats import TokenStats
from atesd.transfer import sent
from atesd.types import Method

_SCORES = {
    "soft_or": "those of high entropy or high divergence",
    "entropy": "those of high student entropy",
    "q3": "those where the student is sure and the teacher disagrees",
    "multinomial": "drawn at random, more often at high entropy and divergence",
}


class Selection(Protocol):
    """A rule from the statistics of a whole update to a choice, 0/1 or with weights."""

    @property
    def needs_batch(self) -> bool:
        """Whether a token's answer depends on others: a score pass over the whole update then precedes the gradient."""
        ...

    def select(self, stats: TokenStats, seed: int) -> Tensor:
        """Return 0 per token that is left out, [N], else its weight, above 0: 1 but where a draw is made good.

        The loss is divided by the number of tokens above 0, so weights should be 1 in the mean. The same statistics and
        seed give the same answer.
        """
        ...


class SelectionMethod(Method):
    """Base of selections."""

    declares: ClassVar[tuple[str, ...]] = ("needs_batch", "select", "describe")


class SelectAll(SelectionMethod):
    """Every token."""

    kind: Literal["all"] = "all"

    needs_batch: ClassVar[bool] = False

    def describe(self) -> str:
        """Nothing to say."""
        return ""

    def select(self, stats: TokenStats, seed: int) -> Tensor:  # noqa: ARG002
        """Select everything."""
        return torch.ones_like(stats.student_logprob)


class TipSelection(SelectionMethod):
    """TIP's informative tokens (2604.14084). Ours: the score `q3`, as the paper's thresholds are not published.

    Deviations: 1. the second factor of `multinomial` is the configured divergence, cut at ln 2: the released code's
    with `loss.divergence.kind = "jsd"`; 2. ties go to the first tokens; 3. `weighting = "importance"`, under which the
    loss is an unbiased estimate of the mean over all tokens, where `multinomial` is not. The estimate is unbiased with
    `loss.aggregate = "token"`; with "sequence" each completion's mean is the ratio of both weighted sums, and
    completions without a selected token are left out.
    """

    kind: Literal["tip"] = "tip"
    score: Literal["soft_or", "entropy", "q3", "multinomial"] = "soft_or"
    """By what tokens are ranked, or drawn."""
    ratio: Annotated[float, Field(gt=0, le=1)] = 0.5
    """rho: share of the tokens that is kept, at least one; the paper reports .5 and .2."""
    percentile: Annotated[float, Field(gt=0, le=1)] = 0.98
    """Quantile at which entropies are cut before they are normalised; 1 cuts nothing."""
    entropy_power: Annotated[float, Field(ge=0)] = 1.0
    """a of `multinomial`."""
    divergence_power: Annotated[float, Field(ge=0)] = 1.0
    """g of `multinomial`; 0 draws by entropy alone."""
    weighting: Literal["none", "importance"] = "none"
    """Whether tokens that `multinomial` drew count alike (TIP's code), or weigh the inverse of how likely they were
    drawn, so that the loss is in expectation the mean over all tokens (ours)."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.score == "multinomial" and self.entropy_power == self.divergence_power == 0:
            raise ValueError("multinomial with both powers 0 draws at random: raise entropy_power or divergence_power")
        if self.weighting == "importance" and self.score != "multinomial":
            raise ValueError(
                f'weighting = "importance" makes good a random draw, but score = "{self.score}" ranks: '
                'set score = "multinomial", or remove weighting'
            )
        return self

    @property
    def needs_batch(self) -> bool:
        """A ratio of 1 keeps everything and needs no ranking."""
        return self.ratio < 1

    def describe(self) -> str:
        """Name share and score."""
        if not self.needs_batch:
            return ""
        made_good = ", weighed by the inverse of that chance" if self.weighting == "importance" else ""
        return f"Of the tokens {100 * self.ratio:.3g} % are distilled, {_SCORES[self.score]}{made_good} (TIP)"

    def select(self, stats: TokenStats, seed: int) -> Tensor:
        """Keep max(1, floor(rho N)) tokens, K."""
        count = stats.student_logprob.numel()
        if count == 0 or self.ratio == 1:
            return torch.ones_like(stats.student_logprob)
        kept = max(1, math.floor(count * self.ratio + 1e-9))
        if kept == count:
            return torch.ones_like(stats.student_logprob)
        if self.weighting == "importance":
            return self._weighed(stats, kept, seed)
        selected = torch.zeros_like(stats.student_logprob)
        selected[self._chosen(stats, kept, seed)] = 1.0
        return selected

    def _chosen(self, stats: TokenStats, kept: int, seed: int) -> Tensor:
        if self.score != "multinomial":
            return self.scores(stats).argsort(descending=True, stable=True)[:kept]
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.multinomial(self._positive(stats), kept, replacement=False, generator=generator)
        return sent(chosen, stats.student_logprob.device)

    def _weighed(self, stats: TokenStats, kept: int, seed: int) -> Tensor:
        """Draw as `multinomial` does, each token with the weight of the module's docstring; `kept` < N."""
        weights = self._positive(stats)
        numbers = torch.empty_like(weights).exponential_(generator=torch.Generator().manual_seed(seed)) / weights
        least = numbers.argsort(stable=True)
        chosen, bound = least[:kept], numbers[least[kept]]
        selected = torch.zeros_like(weights)
        selected[chosen] = kept / len(weights) / -torch.expm1(-weights[chosen] * bound)
        return selected.to(stats.student_logprob)

    def _positive(self, stats: TokenStats) -> Tensor:
        """Return the draw weights in float64 on the CPU, above 0: a zero weight may still have to be drawn."""
        return self._draw_weights(stats).double().cpu() + 1e-12

    def scores(self, stats: TokenStats) -> Tensor:
        """Return what tokens are ranked by, [N], in [0, 1]."""
        h = min_max(_cut(stats.student_entropy, self.percentile))
        d = min_max(stats.reverse_kl)
        match self.score:
            case "entropy":
                return h
            case "q3":
                return (1 - h) * d
            case _:
                return h + d - h * d

    def _draw_weights(self, stats: TokenStats) -> Tensor:
        largest = stats.student_entropy.max().clamp_min(torch.finfo(torch.float32).tiny)
        h = (stats.student_entropy / largest).clamp(0, 1)
        d = (stats.divergence if self.divergence_power else torch.ones_like(h)) / math.log(2)
        return h**self.entropy_power * d.clamp(0, 1) ** self.divergence_power


def min_max(values: Tensor) -> Tensor:
    """Stretch values to [0, 1]; 0 where all are equal."""
    low, high = values.min(), values.max()
    return torch.where(high > low, (values - low) / (high - low), 0)


def _cut(values: Tensor, percentile: float) -> Tensor:
    """Cut values at the smallest one that a share `percentile` of them does not exceed."""
    rank = max(1, math.ceil(percentile * values.numel() - 1e-9))
    return values.clamp(max=values.kthvalue(rank).values)
