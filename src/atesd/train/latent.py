"""How latent codes are chosen and trained: search, selection, update (codes/steer.py says what they do).

N draws, T tokens of a completion, M chunks of a completion, or of all completions of an update, H hidden size, C codes.

    search:  a_1 ... a_N ~ p(a | x) = prod_m softmax(z_m)[a_m]       N code sequences for every completion, no gradient
    select:  a* = argmin over the drawn of sum_t KL(teacher || student steered by a)
    update:  one step on  KL(teacher || student) + KL(teacher || student steered by a*)
                          - router_coef log p(a* | x) + prior_coef KL(p_mean || prior)

The first term is the distillation loss as it is without codes, the second the same of the steered student: with the
weights, the divisor and the target of the first. log p(a* | x) is summed over chunks and divided by the update's scored
tokens; p_mean(c) is the mean of p(c) over all chunks of the update, prior(c) is proportional to 1 / c, c = 1 ... C.

Dynamic Latent Routing, arXiv 2605.14323, trains on -log p(x) - log[p(x | a*) / sg p(x)] with a* the likeliest drawn.
Ours: 1. its log-likelihoods of a text become minus the KL from the teacher on the student's own completion (the
divergence that `loss` names, unclipped, from the first teacher view); sg p(x) has no gradient and is left out; 2. a
plain Zipf prior stands for the paper's bi-Zipf, which is not known; 3. draws are at temperature 1; the first of equals
is chosen, as while all vectors are 0; 4. under the sampled-token loss the steered term has no importance weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from atesd.codes.config import CodesConfig
from atesd.codes.steer import Codes
from atesd.losses.divergence import Scored, TokenStreams, Use
from atesd.losses.target import Target
from atesd.seeds import derive_seed
from atesd.train.batch import Passage
from atesd.train.scorer import Scorer
from atesd.train.world import World
from atesd.transfer import numbers_of, sent


@dataclass(frozen=True, slots=True)
class Choice:
    """What the search found for the completions of a micro-batch."""

    codes: list[Tensor]
    """The chosen sequence of each completion, [M]."""
    sampled_logprob_N: Tensor
    """log p of the labels under the codes that steered the sampler."""


class CodeTraining:
    """Searches code sequences micro-batch by micro-batch, and trains the router on an update's choices."""

    def __init__(
        self, config: CodesConfig, codes: Codes, scorer: Scorer, seed: int, world: World | None = None
    ) -> None:
        self._config = config
        self._codes = codes
        self._scorer = scorer
        self._seed = seed
        self._world = world or World()
        self._read: list[Tensor] = []  # what the router read of each completion of the update, [M, H]
        self._chosen: list[Tensor] = []  # and its chosen sequence, [M]
        self._tokens = 0
        self._sums: dict[str, Tensor] = {}

    def choose(
        self,
        passages: Sequence[Passage],
        indices: Sequence[int],
        views: Sequence[Scored],
        target: Target,
        update: int,
    ) -> Choice:
        """Draw sequences for every completion and keep the nearest to the teacher.

        Draws depend on the seed, the update and a completion's index in the generation batch alone.
        """
        lengths = [len(each.completion) for each in passages]
        with torch.no_grad():
            with self._codes.noting() as noted:
                sampled_N = self._scorer.log_likelihood(passages, self._scorer.student_temperature)
            read = [noted[member] for member in range(len(passages))]
            drawn = [self._drawn(each, index, update) for each, index in zip(read, indices, strict=True)]
            chosen = [sequences_NM[0] for sequences_NM in drawn]
            if self._config.draws > 1:
                costs_BN = self._costs(passages, drawn, views, target, lengths)
                best_B1 = costs_BN.argmin(1, keepdim=True)
                chosen = [each_NM.index_select(0, place)[0] for each_NM, place in zip(drawn, best_B1, strict=True)]
                self._add("searched", (costs_BN.mean(1) - costs_BN.amin(1)).sum())
        self._read += read
        self._chosen += chosen
        self._tokens += sum(lengths)
        return Choice(chosen, sampled_N)

    def steered(
        self, choice: Choice, passages: Sequence[Passage], views: Sequence[Scored], target: Target, use: Use
    ) -> TokenStreams:
        """Return the streams of the student that the chosen sequences steer, differentiable."""
        with self._codes.following(choice.codes):
            return self._scorer.streams(passages, views, target, use=use)

    def compare(self, plain: TokenStreams, steered: TokenStreams) -> None:
        """Remember how much nearer to the teacher the chosen codes bring the student."""
        self._add("gain", (plain.stats.divergence - steered.stats.divergence).double().sum())

    def learn(self, backward: Callable[[Tensor], object]) -> tuple[float, dict[str, float]]:
        """Take the gradient of the router's own loss on the update's choices; return the loss, and what is logged.

        The choices are those of all processes, which add up their gradients afterwards: each takes its part of it.
        """
        self._meet()
        if not self._read:
            return 0.0, {}
        read_MH, chosen_M = torch.cat(self._read), torch.cat(self._chosen)
        logits_MC = self._codes.logits(read_MH)
        loss = router_loss(
            logits_MC, chosen_M, self._tokens, router_coef=self._config.router_coef, prior_coef=self._config.prior_coef
        )
        backward(loss / self._world.size)
        found = self._described(logits_MC.detach().double(), read_MH, chosen_M) | {"loss": loss.detach().double()}
        metrics = dict(zip(found, numbers_of(list(found.values())), strict=True))  # read together: the CPU waits once
        self._read, self._chosen, self._tokens, self._sums = [], [], 0, {}
        return metrics.pop("loss"), metrics

    def _meet(self) -> None:
        """Take over what all processes read, chose and added up."""
        if self._world.size == 1:
            return
        device = self._scorer.device
        mine = [[each.cpu() for each in hand] for hand in (self._read, self._chosen)]
        sums = {name: float(amount) for name, amount in self._sums.items()}
        known: list[Any] = self._world.collect((*mine, self._tokens, sums))
        self._read = [sent(each, device) for read, *_ in known for each in read]
        self._chosen = [sent(each, device) for _, chosen, *_ in known for each in chosen]
        self._tokens = sum(tokens for *_, tokens, _ in known)
        names = dict.fromkeys(name for *_, each in known for name in each)
        self._sums = {
            name: torch.tensor(sum(each.get(name, 0.0) for *_, each in known), dtype=torch.float64, device=device)
            for name in names
        }

    def _drawn(self, read_MH: Tensor, index: int, update: int) -> Tensor:
        """Return N independent sequences, [N, M]."""
        seed = derive_seed(derive_seed(self._seed, "codes", update), "completion", index)
        generator = torch.Generator().manual_seed(seed)
        uniform_NM = torch.rand(self._config.draws, len(read_MH), generator=generator, dtype=torch.float64)
        edges_MC = self._codes.logits(read_MH).double().softmax(-1).cumsum(-1)
        scaled_MN = (sent(uniform_NM, edges_MC.device).T * edges_MC[:, -1:]).contiguous()
        return torch.searchsorted(edges_MC, scaled_MN, right=True).clamp_(max=edges_MC.shape[-1] - 1).T

    def _costs(
        self,
        passages: Sequence[Passage],
        drawn: Sequence[Tensor],
        views: Sequence[Scored],
        target: Target,
        lengths: Sequence[int],
    ) -> Tensor:
        """Return the summed divergence of every completion under each of its sequences, [B, N]."""
        columns = []
        for place in range(self._config.draws):
            with self._codes.following([sequences_NM[place] for sequences_NM in drawn]):
                stats = self._scorer.streams(passages, views, target, use=Use(loss=False)).stats
            columns.append(
                torch.stack([part.sum() for part in stats.divergence.double().split_with_sizes(list(lengths))])
            )
        return torch.stack(columns, dim=1)

    def _add(self, name: str, amount: Tensor) -> None:
        self._sums[name] = self._sums[name] + amount if name in self._sums else amount

    def _described(self, logits_MC: Tensor, read_MH: Tensor, chosen_M: Tensor) -> dict[str, Tensor]:
        log_MC = logits_MC.log_softmax(-1)
        count = logits_MC.shape[-1]
        likeliest_M = logits_MC.argmax(-1)
        hits_C = logits_MC.new_zeros(count).scatter_add_(0, likeliest_M, torch.ones_like(logits_MC[:, 0]))
        sizes_M = self._codes.steps(chosen_M, read_MH).detach().double().norm(dim=-1)
        return {
            "codes/entropy": -(log_MC.exp() * log_MC).sum(-1).mean(),
            "codes/kl": divergence(log_MC.exp().mean(0), _prior(log_MC)),
            "codes/logprob": log_MC.gather(-1, chosen_M[:, None]).mean(),
            "codes/size": (sizes_M / read_MH.double().norm(dim=-1)).mean(),
            **{f"codes/{name}": amount / self._tokens for name, amount in self._sums.items()},
            **{f"codes/share/{code}": share for code, share in enumerate((hits_C.float() / len(logits_MC)).double())},
        }


def router_loss(logits_MC: Tensor, chosen_M: Tensor, tokens: int, *, router_coef: float, prior_coef: float) -> Tensor:
    """Return -router_coef (1/tokens) sum_m log p_m(a*_m) + prior_coef KL(mean_m p_m || Zipf)."""
    log_MC = logits_MC.log_softmax(-1)
    chosen = log_MC.gather(-1, chosen_M[:, None]).sum() / tokens
    mean_C = log_MC.exp().mean(0)
    return -router_coef * chosen + prior_coef * divergence(mean_C, _prior(log_MC))


def zipf(count: int) -> Tensor:
    """Return p_c = (1 / c) / sum_j (1 / j), c = 1 ... C, in float64."""
    weights_C = 1.0 / torch.arange(1, count + 1, dtype=torch.float64)
    return weights_C / weights_C.sum()


def _prior(log_MC: Tensor) -> Tensor:
    return sent(zipf(log_MC.shape[-1]).to(log_MC.dtype), log_MC.device)


def divergence(p_C: Tensor, prior_C: Tensor) -> Tensor:
    """Return KL(p || prior) in nats; a code of probability 0 adds nothing, with no gradient."""
    held_C = p_C > 0
    log_C = torch.where(held_C, p_C, 1).log()
    return torch.where(held_C, p_C * (log_C - prior_C.log()), 0).sum()
