"""Align, pad and cut what the model scores into micro-batches.

B passages, L input positions, N scored tokens of the micro-batch, flattened passage by passage.

A passage is a prompt and a completion, both in ids. Its input is the prompt ids followed by the completion ids
verbatim, without the last one, which predicts nothing. Passages are padded on the left, so the scored positions of one
are its last `len(completion)`: the first completion token is predicted from the last prompt token whatever the lengths
of the others. Masks come from lengths, never from comparing ids with the pad id.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from atesd.losses.target import View


class Passage(NamedTuple):
    """What a model reads and scores: a prompt and the completion behind it, in ids, each of at least one token."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]

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
        return Passage(self.prompt if view == "base" else self.view_prompts[view], self.completion)

    @property
    def cost(self) -> int:
        """Input positions of the longest role."""
        return max(len(prompt) for prompt in (self.prompt, *self.view_prompts.values())) + len(self.completion) - 1


@dataclass(frozen=True, slots=True)
class ViewInput:
    """What one role's forward pass takes, and where its scored positions are."""

    input_ids_BL: Tensor
    attention_mask_BL: Tensor
    position_ids_BL: Tensor
    scored_BL: Tensor
    """True where the hidden state predicts a completion token; passage by passage these are the N scored positions."""


def view_input(passages: Sequence[Passage], pad_id: int, device: torch.device) -> ViewInput:
    """Build left-padded inputs."""
    width = max(passage.cost for passage in passages)
    ids = [[pad_id] * (width - each.cost) + [*each.prompt, *each.completion[:-1]] for each in passages]
    column_L = torch.arange(width)
    start_B1 = torch.tensor([width - passage.cost for passage in passages])[:, None]
    first_scored_B1 = torch.tensor([width - len(passage.completion) for passage in passages])[:, None]
    mask_BL = column_L >= start_B1
    return ViewInput(
        input_ids_BL=torch.tensor(ids).to(device),
        attention_mask_BL=mask_BL.long().to(device),
        position_ids_BL=(column_L - start_B1).clamp_min(0).to(device),
        scored_BL=(column_L >= first_scored_B1).to(device),
    )


def labels(passages: Sequence[Passage], device: torch.device) -> Tensor:
    """Return the N labels in the order of the scored positions."""
    return torch.tensor([token for passage in passages for token in passage.completion]).to(device)


def spread(values: Sequence[float], passages: Sequence[Passage], like: Tensor) -> Tensor:
    """Give every scored token its passage's number, [N], on the device and of the type of another tensor."""
    sizes = torch.tensor([len(passage.completion) for passage in passages])
    return torch.tensor(values, dtype=torch.float64).repeat_interleave(sizes).to(like)


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
