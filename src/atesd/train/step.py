"""One generation batch: forward passes of both roles, losses with global normalisation, backward, optimizer update.

N scored tokens of a micro-batch, L input positions, H hidden size.

The step knows no method. It turns rows into per-token streams, multiplies them by the gate's weights, and divides by
counts of the whole update, so cutting the batch into micro-batches changes nothing but memory. A gate that needs
statistics of the whole batch gets them from a score pass without gradient; otherwise there is one pass.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from atesd.config import RunConfig
from atesd.gates import Gate, Gated, OpenGate, apply_gate, gate_metrics
from atesd.losses.combine import Component, aggregate_weights, combine, selected_units
from atesd.losses.divergence import LossConfig, Scored, TokenStreams, token_streams
from atesd.losses.target import Plain, Target
from atesd.train.batch import Row, ViewInput, labels, micro_batches, view_input
from atesd.train.model import decoder, head
from atesd.train.stats import StepOutcome, concatenate, logprob_gap, split_rows, stream_metrics
from atesd.train.teacher import Teacher
from atesd.types import TokenStats


class NonFiniteError(RuntimeError):
    """The loss or the gradient norm is not a number; raised before the optimizer moves."""


class Student(nn.Module):
    """The trained model as one module from ids to per-token streams, so that wrappers see the whole forward pass."""

    def __init__(self, model: nn.Module, loss: LossConfig, target: Target, temperature: float) -> None:
        super().__init__()
        self.model = model
        self._loss = loss
        self._target = target
        self._temperature = temperature

    def forward(self, inputs: ViewInput, labels_N: Tensor, views: Sequence[Scored]) -> TokenStreams:
        """Return the divergence and log-probability streams against the teacher views.

        Without a view the log-probabilities are those of temperature 1, and the divergence is 0.
        """
        student = scored_hidden(self.model, inputs)
        if not views:
            return label_streams(student, labels_N, self._loss)
        return token_streams(student, views, labels_N, self._loss, target=self._target, temperature=self._temperature)


def label_streams(student: Scored, labels_N: Tensor, tiles: LossConfig) -> TokenStreams:
    """Score labels at temperature 1 without a teacher: the student itself stands in for the view."""
    plain = LossConfig(tile_tokens=tiles.tile_tokens, tile_vocab=tiles.tile_vocab)
    return token_streams(student, [student], labels_N, plain, target=Plain(), temperature=1.0)


def scored_hidden(model: nn.Module, inputs: ViewInput) -> Scored:
    """Run the decoder and keep the hidden states [N, H] of the scored positions: the head sees no other row."""
    hidden_BLH = decoder(model)(
        input_ids=inputs.input_ids_BL,
        attention_mask=inputs.attention_mask_BL,
        position_ids=inputs.position_ids_BL,
        use_cache=False,
    ).last_hidden_state
    head_VH, bias_V = head(model)
    return Scored(hidden_BLH[inputs.scored_BL], head_VH, bias_V)


def detached(scored: Scored) -> Scored:
    """Return a view that stays what it is when the teacher's weights give way to the student's."""
    return Scored(scored.hidden_NH, scored.head_VH.detach(), None if scored.bias_V is None else scored.bias_V.detach())


@dataclass(frozen=True, slots=True)
class _Batch:
    """Rows of one micro-batch, all of one component, by their index in the generation batch."""

    indices: tuple[int, ...]
    rows: tuple[Row, ...]

    @property
    def component(self) -> str:
        return self.rows[0].component

    @property
    def lengths(self) -> list[int]:
        return [len(row.completion) for row in self.rows]

    def numbering(self, device: torch.device) -> Tensor:
        """Number each token's row."""
        return torch.repeat_interleave(torch.tensor(self.lengths)).to(device)


class Stepper:
    """Owns what an update needs: the wrapped student, the teacher, the optimizer and its schedule."""

    def __init__(
        self,
        *,
        accelerator: Accelerator,
        student: nn.Module,
        teacher: Teacher,
        optimizer: Any,
        scheduler: torch.optim.lr_scheduler.LambdaLR,
        gate: Gate,
        config: RunConfig,
        pad_id: int,
    ) -> None:
        self._accelerator = accelerator
        self._student = student
        self._model = cast("Student", accelerator.unwrap_model(student)).model
        self._teacher = teacher
        self._optimizer = optimizer
        self._scheduler = scheduler
        self._gate = gate
        self._config = config
        self._pad_id = pad_id

    def optimize(self, rows: Sequence[Row]) -> StepOutcome:
        """Train on the rows of one generation batch. NonFiniteError stops before the weights move."""
        outcome = StepOutcome()
        # Dropout stays inactive (as in OPSD's code); only checkpointed activations need transformers' training mode.
        self._model.train(self._config.model.gradient_checkpointing)
        size = -(-len(rows) // self._config.step.updates_per_batch)
        for start in range(0, len(rows), size):
            batches = self._cut(rows, range(start, min(start + size, len(rows))))
            if batches:
                self._update(batches, outcome)
        outcome.metrics |= stream_metrics(rows, outcome.rows)
        if self._config.loss.temperature_student in (None, self._config.rollout.temperature):
            outcome.metrics |= logprob_gap(rows, outcome.rows)
        return outcome

    def _update(self, batches: Sequence[_Batch], outcome: StepOutcome) -> None:
        """Make one optimizer update. Every component is divided by its own count over all micro-batches."""
        gates = self._score(batches) if self._gate.needs_batch else [None] * len(batches)
        counts = self._normalisers(batches, gates)
        aggregate = self._config.loss.aggregate
        losses: dict[str, float] = {}
        listened: list[tuple[TokenStats, Gated]] = []
        for batch, scored in zip(batches, gates, strict=True):
            if not counts[batch.component]:
                continue
            streams = self._streams(batch)
            gated = scored or self._gated(batch, streams.stats)
            if batch.component == "distil":
                listened.append((streams.stats, gated))
            values_N = streams.divergence_N if batch.component == "distil" else -streams.logprob_N
            weights_N = aggregate_weights(
                gated.weights_N, gated.selection_N, batch.numbering(values_N.device), aggregate
            )
            loss = combine({batch.component: Component(values_N, weights_N, counts[batch.component])})
            self._accelerator.backward(loss)
            losses[batch.component] = losses.get(batch.component, 0.0) + float(loss.detach())
            outcome.rows |= zip(batch.indices, split_rows(streams.stats, gated.weights_N, batch.lengths), strict=True)
        outcome.add("optim/micro_batches", len(batches))
        if listened:
            outcome.metrics |= gate_metrics(self._gate, *_whole(listened))
        if losses:
            self._move(losses, outcome)
        else:
            outcome.add("optim/empty_updates", 1)

    def _move(self, losses: Mapping[str, float], outcome: StepOutcome) -> None:
        """Clip, check and step; nothing moves where the loss or the gradient is not finite."""
        total = sum(losses.values())
        limit = self._config.optim.max_grad_norm or math.inf
        norm = float(self._accelerator.clip_grad_norm_(self._model.parameters(), limit))
        if not (math.isfinite(total) and math.isfinite(norm)):
            raise NonFiniteError(f"loss {total}, gradient norm {norm}")
        outcome.metrics |= {f"loss/{name}": value for name, value in losses.items()}
        outcome.metrics |= {
            "loss/total": total,
            "optim/grad_norm": norm,
            "optim/lr": float(self._scheduler.get_last_lr()[0]),
        }
        self._optimizer.step()
        self._scheduler.step()
        self._optimizer.zero_grad()
        self._teacher.update()

    def _streams(self, batch: _Batch) -> TokenStreams:
        """Run the teacher, then the student, whose graph must not see the teacher's weights in place."""
        device = self._accelerator.device
        completions = [row.completion for row in batch.rows]
        views = []
        if batch.component == "distil":
            with self._teacher.in_place():
                prompts = [row.teacher_prompt for row in batch.rows]
                views = [detached(scored_hidden(self._model, view_input(prompts, completions, self._pad_id, device)))]
        inputs = view_input([row.student_prompt for row in batch.rows], completions, self._pad_id, device)
        streams: TokenStreams = self._student(inputs, labels(completions, device), views)
        return streams

    def _cut(self, rows: Sequence[Row], part: range) -> list[_Batch]:
        """Cut rows into micro-batches of one component each; rows on no component are left out."""
        batches = []
        for component in ("distil", "nll"):
            indices = [index for index in part if rows[index].component == component]
            chosen = [rows[index] for index in indices]
            for members in micro_batches(chosen, self._config.step.token_budget):
                batches.append(_Batch(tuple(indices[m] for m in members), tuple(chosen[m] for m in members)))
        return batches

    def _score(self, batches: Sequence[_Batch]) -> list[Gated | None]:
        """Take the gate over the statistics of all distilled tokens of the update, without gradient."""
        distilled = [batch for batch in batches if batch.component == "distil"]
        if not distilled:
            return [None] * len(batches)
        with torch.no_grad():
            whole = concatenate([self._streams(batch).stats for batch in distilled])
        gated = apply_gate(self._gate, whole)
        sizes = [sum(batch.lengths) for batch in distilled]
        pieces = zip(gated.selection_N.split_with_sizes(sizes), gated.weights_N.split_with_sizes(sizes), strict=True)
        gates = {batch.indices: Gated(*piece) for batch, piece in zip(distilled, pieces, strict=True)}
        return [gates.get(batch.indices) for batch in batches]

    def _gated(self, batch: _Batch, stats: TokenStats) -> Gated:
        """Gate a micro-batch by its own statistics. A gate that selects tokens needs the whole batch, so all count."""
        return apply_gate(self._gate if batch.component == "distil" else OpenGate(), stats)

    def _normalisers(self, batches: Sequence[_Batch], gates: Sequence[Gated | None]) -> dict[str, float]:
        """Count what each component is divided by: selected tokens, or sequences with a selected token."""
        counts: dict[str, float] = {}
        for batch, gated in zip(batches, gates, strict=True):
            selection_N = torch.ones(sum(batch.lengths)) if gated is None else gated.selection_N.cpu()
            count = selected_units(selection_N, batch.numbering(torch.device("cpu")), self._config.loss.aggregate)
            counts[batch.component] = counts.get(batch.component, 0.0) + count
        return counts


def _whole(parts: Sequence[tuple[TokenStats, Gated]]) -> tuple[TokenStats, Gated]:
    """Join statistics and gates of micro-batches."""
    gates = [gated for _, gated in parts]
    return concatenate([stats for stats, _ in parts]), Gated(
        torch.cat([gated.selection_N for gated in gates]), torch.cat([gated.weights_N for gated in gates])
    )
