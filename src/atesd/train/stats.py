"""Numbers for the log from the detached statistics of every scored token of a step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import islice

import torch
from torch import Tensor

from atesd.gates.gate import Gate
from atesd.losses.combine import Component, combine
from atesd.losses.policy import PolicyValues
from atesd.losses.stats import TokenStats
from atesd.losses.target import Target
from atesd.train.asked import numbers_of
from atesd.train.batch import Row

_BIN_EDGES = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True, slots=True)
class RowStats:
    """The tokens of one row: statistics [T] and the weight that each token had in the loss."""

    stats: TokenStats
    weight_T: Tensor
    sampled_logprob_T: Tensor | None = None
    """log p_S of the tokens as the sampler saw the student, where the statistics are of another: without its codes."""

    @property
    def as_sampled(self) -> Tensor:
        """log p_S of the tokens under what they were sampled from."""
        return self.stats.student_logprob if self.sampled_logprob_T is None else self.sampled_logprob_T


@dataclass(frozen=True, slots=True)
class Listening:
    """How the distilled tokens of a micro-batch listen, each [N]: selection, 0 where not chosen, and gate."""

    stats: TokenStats
    selection_N: Tensor
    gate_N: Tensor


@dataclass(slots=True)
class MicroScores:
    """What a micro-batch gave: its loss components with their graph, and what is logged of it."""

    stats: TokenStats
    weight_N: Tensor
    """Weight of each token in the distillation loss; 1 where nothing is distilled."""
    parts: dict[str, Component]
    heard: Listening | None = None
    policy: PolicyValues | None = None
    sampled_logprob_N: Tensor | None = None
    """As `RowStats.sampled_logprob_T`."""
    losses: dict[str, float] = field(default_factory=dict)

    def detached(self) -> MicroScores:
        """Return it without the graph."""
        parts = {name: replace(part, values_N=part.values_N.detach()) for name, part in self.parts.items()}
        policy = None if self.policy is None else replace(self.policy, loss_N=self.policy.loss_N.detach())
        return replace(self, parts=parts, policy=policy)


def fetched(taken: Sequence[MicroScores]) -> list[MicroScores]:
    """Bring all that is logged of an update to the CPU, and its losses as numbers.

    In one transfer, as each makes the CPU wait until the device has done all its work. `parts` stay where they are.
    """
    sent = [tensor for scored in taken for tensor in _logged_of(scored)]
    # In the widest of their types: what is narrower comes back as it was.
    whole = torch.cat([tensor.flatten() for tensor in sent]).cpu()
    pieces = whole.split_with_sizes([tensor.numel() for tensor in sent])
    there = iter([piece.view(tensor.shape).to(tensor.dtype) for piece, tensor in zip(pieces, sent, strict=True)])
    return [_rebuilt(scored, there) for scored in taken]


def _logged_of(scored: MicroScores) -> Iterator[Tensor]:
    yield from (getattr(scored.stats, each.name) for each in fields(TokenStats))
    yield scored.weight_N
    if scored.sampled_logprob_N is not None:
        yield scored.sampled_logprob_N
    if scored.heard is not None:
        yield from (scored.heard.selection_N, scored.heard.gate_N)
    if scored.policy is not None:
        yield from (getattr(scored.policy, each.name).detach() for each in fields(PolicyValues))
    yield from (combine({name: part}).detach() for name, part in scored.parts.items())


def _rebuilt(scored: MicroScores, there: Iterator[Tensor]) -> MicroScores:
    """Put together what `_logged_of` took apart, in its order."""
    stats = TokenStats(*islice(there, len(fields(TokenStats))))
    weight_N = next(there)
    sampled_N = None if scored.sampled_logprob_N is None else next(there)
    heard = None if scored.heard is None else Listening(stats, next(there), next(there))
    policy = None if scored.policy is None else PolicyValues(*islice(there, len(fields(PolicyValues))))
    losses = {name: float(next(there)) for name in scored.parts}
    return replace(
        scored,
        stats=stats,
        weight_N=weight_N,
        sampled_logprob_N=sampled_N,
        heard=heard,
        policy=policy,
        losses=losses,
    )


@dataclass(frozen=True, slots=True)
class Taken:
    """A micro-batch that went through the model: which rows of the generation batch, and what it gave."""

    indices: tuple[int, ...]
    lengths: Sequence[int]
    scored: MicroScores

    def light(self) -> Taken:
        """Return it without what stays on the device."""
        return replace(self, scored=replace(self.scored, parts={}))

    def rows(self) -> dict[int, RowStats]:
        """Return the statistics of its rows by their index."""
        return dict(zip(self.indices, split_rows(self.scored, self.lengths), strict=True))


@dataclass(slots=True)
class StepOutcome:
    """What a step leaves behind: numbers for the log, and the token statistics of the rows by their index."""

    metrics: dict[str, float] = field(default_factory=dict)
    rows: dict[int, RowStats] = field(default_factory=dict)

    _noted: dict[str, list[float]] = field(default_factory=dict)

    def add(self, key: str, amount: float) -> None:
        """Add to a number that several updates of the step contribute to."""
        self.metrics[key] = self.metrics.get(key, 0.0) + amount

    def note(self, found: Mapping[str, float]) -> None:
        """Take in numbers of one update; those of the step are the means over the updates that have them."""
        for key, value in found.items():
            self._noted.setdefault(key, []).append(value)
            self.metrics[key] = sum(self._noted[key]) / len(self._noted[key])


def split_rows(scored: MicroScores, lengths: Sequence[int]) -> list[RowStats]:
    """Cut the statistics of a micro-batch back into its rows."""
    sampled = (
        [None] * len(lengths)
        if scored.sampled_logprob_N is None
        else scored.sampled_logprob_N.split_with_sizes(list(lengths))
    )
    pieces = divided(scored.stats, lengths)
    return [
        RowStats(pieces[index], weight_T, sampled[index])
        for index, weight_T in enumerate(scored.weight_N.split_with_sizes(list(lengths)))
    ]


def divided(stats: TokenStats, lengths: Sequence[int]) -> list[TokenStats]:
    """Cut the statistics of a micro-batch into its rows'."""
    columns = [getattr(stats, name.name).split_with_sizes(list(lengths)) for name in fields(TokenStats)]
    return [TokenStats(*(column[index] for column in columns)) for index in range(len(lengths))]


def told(stats: TokenStats, outcome_N: Tensor) -> TokenStats:
    """Return the statistics with what became of each token's attempt."""
    return replace(stats, advantage=outcome_N.to(stats.student_logprob))


def concatenate(parts: Sequence[TokenStats]) -> TokenStats:
    """Join statistics of consecutive tokens."""
    return TokenStats(*(torch.cat([getattr(part, name.name) for part in parts]) for name in fields(TokenStats)))


def listening_metrics(gate: Gate, target: Target, parts: Sequence[Listening]) -> dict[str, float]:
    """Describe selection, gate and target over all distilled tokens of an update."""
    if not parts:
        return {}
    stats = concatenate([part.stats for part in parts])
    selection_N, gate_N = (torch.cat([getattr(part, name) for part in parts]) for name in ("selection_N", "gate_N"))
    return {
        "gate/kept_frac": _mean((selection_N > 0).double()),
        "gate/mean": _mean(selection_N * gate_N),
        **numbers_of(gate, gate.metrics(stats)),
        **numbers_of(target, target.metrics(stats)),
    }


def policy_metrics(parts: Sequence[PolicyValues]) -> dict[str, float]:
    """Describe ratios, clips and corrections over all reinforced tokens of an update."""
    if not parts:
        return {}
    return {
        f"rl/{name}": _mean(torch.cat([getattr(part, column) for part in parts]))
        for name, column in (
            ("ratio", "ratio_N"),
            ("clip_frac", "clipped_N"),
            ("sampler_weight", "weight_N"),
            ("kl", "kl_N"),
            ("credit", "credit_N"),
        )
    }


def stream_metrics(rows: Sequence[Row], scored: Mapping[int, RowStats]) -> dict[str, float]:
    """Summarise the student over all scored tokens, and the distilled ones in all and per exposure bin."""
    if not scored:
        return {}
    stats = concatenate([scored[index].stats for index in sorted(scored)])
    metrics = {"student/entropy": _mean(stats.student_entropy), "student/confidence": _mean(stats.student_max_prob)}
    distilled = [index for index in sorted(scored) if "distil" in rows[index].components]
    if not distilled:
        return metrics
    stats = concatenate([scored[index].stats for index in distilled])
    first = torch.stack([scored[index].stats.divergence[0] for index in distilled])
    metrics |= {
        "loss/clip_frac": _mean(stats.clip_frac),
        "loss/clipped_mass": _mean(stats.clipped_mass),
        "loss/reversed_frac": _mean(stats.reversed),
        "loss/first_token": _mean(first),
        "divergence/mean": _mean(stats.divergence),
        "divergence/p99": _upper_tail(stats.divergence),
        "mismatch/top1": 1.0 - _mean(stats.top1_agree),
        "teacher/entropy": _mean(stats.teacher_entropy),
    }
    return metrics | _bin_metrics(rows, scored, distilled)


def logprob_gap(rows: Sequence[Row], scored: Mapping[int, RowStats]) -> dict[str, float]:
    """Compare the sampler's log-probabilities with the trainer's: about 0 unless they use different weights."""
    gaps = [
        (row.as_sampled - torch.tensor(rows[index].sampler_logprobs)).abs()
        for index, row in scored.items()
        if rows[index].sampler_logprobs
    ]
    return {"rollout/logprob_gap": _mean(torch.cat(gaps))} if gaps else {}


def _bin_metrics(rows: Sequence[Row], scored: Mapping[int, RowStats], distilled: Sequence[int]) -> dict[str, float]:
    bins: dict[str, list[TokenStats]] = {}
    for index in distilled:
        bins.setdefault(ratio_bin(rows[index].ratio), []).append(scored[index].stats)
    metrics = {}
    for name, members in sorted(bins.items()):
        stats = concatenate(members)
        metrics[f"bin/{name}/divergence"] = _mean(stats.divergence)
        metrics[f"bin/{name}/p99"] = _upper_tail(stats.divergence)
        metrics[f"bin/{name}/mismatch"] = 1.0 - _mean(stats.top1_agree)
        metrics[f"bin/{name}/clip_frac"] = _mean(stats.clip_frac)
    return metrics


def ratio_bin(ratio: float) -> str:
    """Name the quarter that a ratio lies in: `0.25-0.50` holds .25 <= ratio < .5, the last one 1 as well."""
    low = min(int(ratio * 4), 3)
    return f"{_BIN_EDGES[low]:.2f}-{_BIN_EDGES[low + 1]:.2f}"


def _mean(values: Tensor) -> float:
    return float(values.double().mean())


def _upper_tail(values: Tensor) -> float:
    """Return the 99th percentile, as the smallest value that at least 99 % of the tokens do not exceed."""
    rank = max(1, -(-99 * values.numel() // 100))
    return float(values.kthvalue(rank).values)
