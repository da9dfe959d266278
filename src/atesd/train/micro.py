"""Micro-batches of an update, and what its loss components are divided by. N tokens of a micro-batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from atesd.losses.combine import Aggregate, selected_units
from atesd.losses.policy import PolicyConfig
from atesd.train.batch import Passage, Row, micro_batches
from atesd.train.stats import MicroScores, Taken
from atesd.train.world import World
from atesd.transfer import sent


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Rows that go through the model together, all of the same components, by their index in the generation batch."""

    indices: tuple[int, ...]
    rows: tuple[Row, ...]

    @property
    def components(self) -> tuple[str, ...]:
        return self.rows[0].components

    @property
    def distils(self) -> bool:
        return "distil" in self.components

    @property
    def passages(self) -> list[Passage]:
        return [row.student for row in self.rows]

    @property
    def lengths(self) -> list[int]:
        return [len(row.completion) for row in self.rows]

    def taken(self, scored: MicroScores) -> Taken:
        """Return what it gave."""
        return Taken(self.indices, self.lengths, scored)

    def numbering(self, device: torch.device) -> Tensor:
        """Number each token's row."""
        return sent(torch.repeat_interleave(torch.tensor(self.lengths)), device)

    def spread(self, values: Sequence[float], device: torch.device) -> Tensor:
        """Give every token its row's number."""
        row_values, lengths = torch.tensor(values, dtype=torch.float32), torch.tensor(self.lengths)
        return sent(torch.repeat_interleave(row_values, lengths), device)

    def outcomes(self, device: torch.device) -> Tensor:
        """Give every token its attempt's outcome."""
        return self.spread([row.outcome for row in self.rows], device)

    def sampled(self, like_N: Tensor) -> Tensor:
        """Return the sampler's log-probabilities, on the device and of the type of another tensor."""
        values = [value for row in self.rows for value in row.sampler_logprobs]
        return sent(torch.tensor(values, dtype=like_N.dtype), like_N.device)

    def weighed(self, selection_N: Tensor) -> Tensor:
        """Return the selection times its rows' problem weights: what a token weighs before its gate."""
        return selection_N * self.spread([row.weight for row in self.rows], selection_N.device)


def cut(rows: Sequence[Row], part: Sequence[int], token_budget: int) -> list[MicroBatch]:
    """Cut a part of the rows into micro-batches of the same components; rows without one are left out."""
    batches = []
    for components in sorted({rows[index].components for index in part if rows[index].components}):
        indices = [index for index in part if rows[index].components == components]
        for members in micro_batches([rows[index].cost for index in indices], token_budget):
            chosen = tuple(indices[member] for member in members)
            batches.append(MicroBatch(chosen, tuple(rows[index] for index in chosen)))
    return batches


def updates_of(rows: Sequence[Row], updates: int, token_budget: int) -> list[list[int]]:
    """Divide a generation batch among its updates: equal numbers of groups, which are never split, in their order.

    Returns each update's rows in the order in which one process alone reads them, those without a component left out.
    """
    groups = 1 + max((row.group for row in rows), default=0)
    parts: list[list[int]] = [[] for _ in range(updates)]
    for index, row in enumerate(rows):
        parts[row.group * updates // groups].append(index)
    return [[index for batch in cut(rows, part, token_budget) for index in batch.indices] for part in parts]


@dataclass(frozen=True, slots=True)
class Losses:
    """What the update must know of the losses: sections and facts of the recipe, none of them a method."""

    policy: PolicyConfig
    coefs: Mapping[str, float]
    """Factor of each component where it is not 1."""
    shared: bool
    """Whether all components share one denominator."""
    longest: int
    """Longest allowed completion: the constant of `aggregate = "constant"`."""
    importance: bool
    """Whether a loss reads the probabilities of the weights that the step began with."""
    aggregate: Aggregate
    """What a mean over distilled or supervised tokens is taken over; of reinforced ones `policy` says."""
    corrects: float | None = None
    """Largest weight p_old / p_sampler of a distilled token; None where the sampler has the very weights that train, or
    the divergence does not depend on which token was sampled."""

    def aggregate_of(self, name: str) -> Literal["token", "sequence", "constant"]:
        """Return what a component's mean is taken over."""
        return self.policy.aggregate if name == "rl" else self.aggregate

    def units(self, name: str, batch: MicroBatch, selection_N: Tensor) -> float:
        """Return what a micro-batch adds to the count that a component is divided by. `selection_N` is on the CPU."""
        aggregate = self.aggregate_of(name)
        if aggregate == "constant":
            return float(len(batch.rows) * self.longest)
        counted_N = selection_N if name == "distil" else torch.ones(sum(batch.lengths))
        return selected_units(counted_N, batch.numbering(torch.device("cpu")), aggregate)

    def can_move(self, name: str, batch: MicroBatch) -> bool:
        """Tell whether a component of a micro-batch can have a gradient."""
        if self.coefs.get(name, 1.0) == 0:
            return False
        if name == "rl":
            return self.policy.kl_coef > 0 or any(row.advantage for row in batch.rows)
        return name == "nll" or any(row.weight for row in batch.rows)


def counts_of(
    batches: Sequence[MicroBatch], selections: Sequence[Tensor], losses: Losses, world: World
) -> dict[str, float]:
    """Count what each component is divided by; a component that could not move anything is left out.

    That is one without a selected token, without a problem of positive weight, with coefficient 0, or, for `rl`,
    without any advantage or KL term. `batches` are this process's, counts those of all.
    """
    counts: dict[str, float] = {}
    live: set[str] = set()
    for batch, selection_N in zip(batches, selections, strict=True):
        for name in batch.components:
            counts[name] = counts.get(name, 0.0) + losses.units(name, batch, selection_N)
            if losses.can_move(name, batch):
                live.add(name)
    counts = world.total(counts)
    live = set().union(*world.collect(live))
    if losses.shared:
        counts = dict.fromkeys(counts, sum(counts.values()))
    return {name: count for name, count in counts.items() if name in live}
