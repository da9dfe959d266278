"""Align, pad and cut a generation batch into micro-batches.

B sequences, L input positions, N scored tokens of the micro-batch, flattened row by row.

A view's input is its prompt ids followed by the completion ids verbatim, without the last one, which predicts nothing.
Sequences are padded on the left, so the scored positions of a row are its last `len(completion)` ones: the first
completion token is predicted from the last prompt token whatever the lengths of the other rows. Masks come from
lengths, never from comparing ids with the pad id.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from atesd.losses.target import View


@dataclass(frozen=True, slots=True)
class Row:
    """One completion as both roles will read it."""

    student_prompt: tuple[int, ...]
    teacher_prompt: tuple[int, ...]
    completion: tuple[int, ...]
    sampler_logprobs: tuple[float, ...]
    """Empty where the completion was not sampled (the supervised route)."""
    components: tuple[str, ...]
    """Loss components that the row feeds, of `distil`, `rl` and `nll`; empty for a row that is not trained on."""
    ratio: float
    """Exposure ratio behind `teacher_prompt`."""
    group: int
    """Index of the row's group in the generation batch."""
    other_prompts: Mapping[View, tuple[int, ...]] = field(default_factory=dict)
    """Prompts of the target's further teacher views, by view."""
    advantage: float = 0.0
    """Group-relative advantage, for `rl`."""
    weight: float = 1.0
    """Weight of the problem in the distillation loss."""

    def prompt(self, view: View) -> tuple[int, ...]:
        """Return the prompt that a view reads."""
        if view == "teacher":
            return self.teacher_prompt
        return self.student_prompt if view == "base" else self.other_prompts[view]

    @property
    def cost(self) -> int:
        """Input positions of the longest role."""
        prompts = (self.student_prompt, self.teacher_prompt, *self.other_prompts.values())
        return max(len(prompt) for prompt in prompts) + len(self.completion) - 1


@dataclass(frozen=True, slots=True)
class ViewInput:
    """What one role's forward pass takes, and where its scored positions are."""

    input_ids_BL: Tensor
    attention_mask_BL: Tensor
    position_ids_BL: Tensor
    scored_BL: Tensor
    """True where the hidden state predicts a completion token; row by row these are the N scored positions."""


def view_input(
    prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], pad_id: int, device: torch.device
) -> ViewInput:
    """Build left-padded inputs. Every prompt and completion has at least one token."""
    lengths = [len(p) + len(c) - 1 for p, c in zip(prompts, completions, strict=True)]
    width = max(lengths)
    ids = [
        [pad_id] * (width - n) + list(p) + list(c)[:-1] for p, c, n in zip(prompts, completions, lengths, strict=True)
    ]
    column_L = torch.arange(width)
    start_B1 = torch.tensor([width - n for n in lengths])[:, None]
    first_scored_B1 = torch.tensor([width - len(c) for c in completions])[:, None]
    mask_BL = column_L >= start_B1
    return ViewInput(
        input_ids_BL=torch.tensor(ids).to(device),
        attention_mask_BL=mask_BL.long().to(device),
        position_ids_BL=(column_L - start_B1).clamp_min(0).to(device),
        scored_BL=(column_L >= first_scored_B1).to(device),
    )


def labels(completions: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Return the N labels in the order of the scored positions."""
    return torch.tensor([token for completion in completions for token in completion]).to(device)


def micro_batches(rows: Sequence[Row], token_budget: int) -> Iterator[list[int]]:
    """Cut row indices into micro-batches whose padded size stays within the budget, longest rows first.

    Rows of similar length go together. A row longer than the budget gets a micro-batch of its own. The result does
    not change the update: normalisation is global.
    """
    order = sorted(range(len(rows)), key=lambda index: (-rows[index].cost, index))
    batch: list[int] = []
    for index in order:
        if batch and rows[batch[0]].cost * (len(batch) + 1) > token_budget:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
