"""One generation batch: forward passes of both roles, losses with global normalisation, backward, optimizer update.

N scored tokens of a micro-batch, L input positions, H hidden size.

The step knows no method. It turns rows into per-token streams, multiplies them by the gate's weights, and divides by
counts of the whole update, so cutting the batch into micro-batches changes nothing but memory. A gate that needs
statistics of the whole batch gets them from a score pass without gradient; otherwise there is one pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from atesd.config import RunConfig
from atesd.gates import Gate
from atesd.losses.combine import Component, aggregate_weights, combine
from atesd.losses.divergence import LossConfig, Scored, TokenStreams, token_streams
from atesd.losses.target import Target
from atesd.train.batch import Row, ViewInput, labels, micro_batches, view_input
from atesd.train.model import decoder, head
from atesd.train.stats import RowStats, StepOutcome, join, logprob_gap, split_rows, stream_metrics
from atesd.train.teacher import Teacher


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
        """Return the divergence and log-probability streams against the teacher views."""
        student = scored_hidden(self.model, inputs)
        return token_streams(student, views, labels_N, self._loss, target=self._target, temperature=self._temperature)


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
        size = -(-len(rows) // self._config.step.updates_per_batch)
        for start in range(0, len(rows), size):
            self._update(rows, range(start, min(start + size, len(rows))), outcome)
        outcome.metrics |= stream_metrics(rows, outcome.rows) | logprob_gap(rows, outcome.rows)
        return outcome

    def _update(self, rows: Sequence[Row], part: range, outcome: StepOutcome) -> None:
        """Make one optimizer update from the rows with the indices in `part`."""
        batches = self._cut(rows, part)
        if not batches:
            return
        weights, counts = self._weights(batches)
        losses: dict[str, float] = {}
        for batch in batches:
            streams = self._streams(batch)
            weights_N = weights(batch, streams)
            values_N = streams.divergence_N if batch.component == "distil" else -streams.logprob_N
            loss = combine({batch.component: Component(values_N, weights_N, counts[batch.component])})
            self._accelerator.backward(loss)
            losses[batch.component] = losses.get(batch.component, 0.0) + float(loss)
            outcome.rows |= zip(batch.indices, split_rows(streams.stats, weights_N, batch.lengths), strict=True)
        self._move(losses, outcome)
        outcome.metrics["optim/micro_batches"] = outcome.metrics.get("optim/micro_batches", 0) + len(batches)
