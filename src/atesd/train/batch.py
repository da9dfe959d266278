"""Align, pad and cut what the model scores into micro-batches.

B passages, L input positions, N scored tokens of the micro-batch, flattened passage by passage.

A passage is a prompt and a completion, both in ids. Its input is the prompt ids followed by the completion ids
verbatim, without the last one, which predicts nothing. The first completion token is predicted from the last prompt
token whatever the lengths of the others. Padding stands behind a passage, where no position of a causal model sees it:
no mask is needed, attention is plainly causal, and positions count from 0. What is scored comes from lengths, never
from comparing ids with the pad id.

A batch of passages is read in as many passes as save padding: those of like length together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from atesd.losses.target import View
from atesd.transfer import sent


class Veil(NamedTuple):
    """A hint within a prompt, of whose tokens attention reaches `keep` in every layer and head, or on average."""

    start: int
    """Where its tokens begin in the prompt, and, behind the last one, end."""
    stop: int
    keep: int
    kept: tuple[int, ...] | None = None
    """Which ones, counted from `start`; None where gates choose them."""


class Passage(NamedTuple):
    """What a model reads and scores: a prompt and the completion behind it, in ids, each of at least one token."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    veil: Veil | None = None
    """What of the prompt's hint is hidden; None where all is read."""

    @property
    def cost(self) -> int:
        """Input positions."""
        return len(self.prompt) + len(self.completion) - 1


@dataclass(frozen=True, slots=True)
class Row:
    """One sampled turn as both roles will read it."""

    prompt: tuple[int, ...]
    """The student's, as it was sampled from."""
    completion: tuple[int, ...]
    components: tuple[str, ...]
    """Loss components that the row feeds, of `distil`, `rl` and `nll`; empty for a row that is not trained on."""
    group: int
    """Index of the row's group in the generation batch."""
    ratio: float
    """Exposure ratio behind the teacher's prompt."""
    hint: str = ""
    """The hint that the teacher reads."""
    view_prompts: Mapping[View, tuple[int, ...]] = field(default_factory=dict)
    """Prompts of the target's teacher views; empty where nothing is distilled."""
    veils: Mapping[View, Veil] = field(default_factory=dict)
    """What of them is hidden, of the views where anything is."""
    sampler_logprobs: tuple[float, ...] = ()
    """Empty where the completion was not sampled (the supervised route)."""
    advantage: float = 0.0
    """Group-relative advantage of the row's attempt, for `rl`."""
    outcome: float = 0.0
    """The attempt's reward minus what was to be expected (train/outcomes.py); 0 where that is not known."""
    weight: float = 1.0
    """Weight of the problem in the distillation loss."""

    @property
    def student(self) -> Passage:
        """What the student reads."""
        return Passage(self.prompt, self.completion)

    def view(self, view: View) -> Passage:
        """Return what a view reads; the base reads the student's prompt."""
        prompt = self.prompt if view == "base" else self.view_prompts[view]
        return Passage(prompt, self.completion, self.veils.get(view))

    @property
    def cost(self) -> int:
        """Input positions of the student, whose pass is the one that keeps activations."""
        return self.student.cost


PASS_POSITIONS, PASS_POSITIONS_ON_GPU = 64, 1024
"""What one more pass costs, in input positions: launching every layer's operations, and reading all weights again."""


class Pass(NamedTuple):
    """What goes through the model together."""

    ids_BL: Tensor
    lengths: tuple[int, ...]
    """Positions of each passage; what stands behind them is padding."""
    prompts: tuple[int, ...]
    """Positions of each passage's prompt."""
    members: tuple[int, ...]
    """Which passages of the batch they are."""
    places_N: Tensor
    """Where, in [B L], the hidden states stand that predict completion tokens, passage by passage."""
    veiled: Mapping[int, Passage] = MappingProxyType({})
    """The passages with a veil, by row: none, or all."""

    def scored(self, output_BLX: Tensor) -> Tensor:
        """Return what stands at the scored positions, [N, X]."""
        return output_BLX.flatten(0, 1).index_select(0, self.places_N)


@dataclass(frozen=True, slots=True)
class ViewInput:
    """What one role's model reads of a batch, pass by pass."""

    passes: tuple[Pass, ...]
    order_N: Tensor | None
    """Where each scored token of the batch stands among those of all passes; None where it stands at its own place."""

    def scored(self, outputs: Sequence[Tensor]) -> Tensor:
        """Return the outputs [B, L, X] of all passes at the N scored positions, [N, X], in the batch's order."""
        return self.in_order([each.scored(output) for output, each in zip(outputs, self.passes, strict=True)])

    def in_order(self, parts: list[Tensor]) -> Tensor:
        """Return what all passes have at their scored positions, [N, X], in the batch's order."""
        whole_NX = parts[0] if len(parts) == 1 else torch.cat(parts)
        return whole_NX if self.order_N is None else whole_NX.index_select(0, self.order_N)


def view_input(
    passages: Sequence[Passage], pad_id: int, device: torch.device, budget: int | None = None, *, together: bool = False
) -> ViewInput:
    """Build the passes over a batch, each of at most `budget` padded positions, or of one passage.

    Passages with a veil go through the model apart: the others are to be what they are without any. `together`: one
    pass over all, none of which has a veil.
    """
    if together:
        return ViewInput((_pass(passages, range(len(passages)), pad_id, device),), None)
    overhead = PASS_POSITIONS if device.type == "cpu" else PASS_POSITIONS_ON_GPU
    alike = [[index for index, each in enumerate(passages) if (each.veil is None) == plain] for plain in (True, False)]
    members = [
        [same[place] for place in places]
        for same in alike
        if same
        for places in cheapest_passes([passages[index].cost for index in same], overhead, budget)
    ]
    read = [index for indices in members for index in indices]
    return ViewInput(
        passes=tuple(_pass(passages, indices, pad_id, device) for indices in members),
        order_N=None if read == sorted(read) else _order(read, [len(each.completion) for each in passages], device),
    )


def _pass(batch: Sequence[Passage], members: Sequence[int], pad_id: int, device: torch.device) -> Pass:
    passages = [batch[member] for member in members]
    width = max(passage.cost for passage in passages)
    ids = [[*each.prompt, *each.completion[:-1], *[pad_id] * (width - each.cost)] for each in passages]
    first = [row * width + len(each.prompt) - 1 for row, each in enumerate(passages)]
    places = [torch.arange(start, start + len(each.completion)) for start, each in zip(first, passages, strict=True)]
    lengths = tuple(each.cost for each in passages)
    prompts = tuple(len(each.prompt) for each in passages)
    veiled = {row: each for row, each in enumerate(passages) if each.veil is not None}
    read, scored = sent(torch.tensor(ids), device), sent(torch.cat(places), device)
    return Pass(read, lengths, prompts, tuple(members), scored, veiled)


def _order(read: Sequence[int], lengths: Sequence[int], device: torch.device) -> Tensor:
    """Return where each token stands when passages of these lengths are read in another order."""
    ends = np.cumsum([lengths[index] for index in read])
    start = {index: int(end) - lengths[index] for index, end in zip(read, ends, strict=True)}
    places = [torch.arange(start[index], start[index] + size) for index, size in enumerate(lengths)]
    return sent(torch.cat(places), device)


def cheapest_passes(costs: Sequence[int], overhead: int, budget: int | None = None) -> list[list[int]]:
    """Cut indices into passes so that padded positions plus `overhead` a pass are fewest, each pass within the budget.

    Only what is next to each other in length goes together; within a pass, and where one pass is best, indices keep
    their order. A single passage may exceed the budget.
    """
    order = sorted(range(len(costs)), key=lambda index: (-costs[index], index))
    cost_n = np.array([costs[index] for index in order], dtype=np.float64)
    best = np.zeros(len(order) + 1)  # of the first so many in that order
    begins = [0] * (len(order) + 1)  # where the last pass of the best cut begins
    for end in range(1, len(order) + 1):
        padded = cost_n[:end] * np.arange(end, 0, -1)
        total = best[:end] + padded + overhead
        if budget is not None:
            total[:-1][padded[:-1] > budget] = np.inf
        begins[end] = int(total.argmin())
        best[end] = total[begins[end]]
    passes, end = [], len(order)
    while end:
        passes.append(sorted(order[begins[end] : end]))
        end = begins[end]
    return passes[::-1]


def labels(passages: Sequence[Passage], device: torch.device) -> Tensor:
    """Return the N labels in the order of the scored positions."""
    return sent(torch.tensor([token for passage in passages for token in passage.completion]), device)


def spread(values: Sequence[float], passages: Sequence[Passage], like: Tensor) -> Tensor:
    """Give every scored token its passage's number, [N], on the device and of the type of another tensor."""
    sizes = torch.tensor([len(passage.completion) for passage in passages])
    return sent(torch.tensor(values, dtype=torch.float64).repeat_interleave(sizes).to(like.dtype), like.device)


def micro_batches(costs: Sequence[int], token_budget: int) -> Iterator[list[int]]:
    """Cut indices into micro-batches whose padded size stays within the budget, the most expensive first.

    What is of similar length goes together. One longer than the budget gets a micro-batch of its own. The result does
    not change the update: normalisation is global.
    """
    order = sorted(range(len(costs)), key=lambda index: (-costs[index], index))
    batch: list[int] = []
    for index in order:
        if batch and costs[batch[0]] * (len(batch) + 1) > token_budget:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
