"""One generation batch: forward passes of all roles, losses with global normalisation, backward, optimizer update.

N scored tokens of a micro-batch, L input positions, H hidden size.

The step knows no method. It turns rows into per-token streams, multiplies them by selection, gate and problem weight,
and divides by counts of the whole update, so cutting the batch into micro-batches changes nothing but memory. A
selection that needs statistics of the whole update gets them from a score pass without gradient; otherwise there is one
pass.

    loss = sum over components of coef * sum(weight * value) / count        components: distil, rl, nll

`count` is each component's own, or, where a router sends every group to one component only, that of all together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from atesd.config import RunConfig
from atesd.gates import Gate
from atesd.losses.combine import Component, aggregate_weights, combine, selected_units
from atesd.losses.divergence import Scored, TokenStreams
from atesd.losses.policy import PolicyTokens, PolicyValues, policy_values
from atesd.losses.target import Plain, Target, View
from atesd.seeds import derive_seed
from atesd.selection import Selection
from atesd.train.batch import Row, labels, micro_batches, view_input
from atesd.train.forward import Student, detached, label_streams, scored_hidden
from atesd.train.stats import (
    Listening,
    StepOutcome,
    concatenate,
    listening_metrics,
    logprob_gap,
    policy_metrics,
    split_rows,
    stream_metrics,
)
from atesd.train.teacher import Teacher
from atesd.losses.stats import TokenStats


class NonFiniteError(RuntimeError):
    """The loss or the gradient norm is not a number; raised before the optimizer moves."""


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
    def completions(self) -> list[tuple[int, ...]]:
        return [row.completion for row in self.rows]

    @property
    def lengths(self) -> list[int]:
        return [len(row.completion) for row in self.rows]

    def numbering(self, device: torch.device) -> Tensor:
        """Number each token's row."""
        return torch.repeat_interleave(torch.tensor(self.lengths)).to(device)

    def spread(self, values: Sequence[float], device: torch.device) -> Tensor:
        """Give every token its row's number."""
        return torch.repeat_interleave(torch.tensor(values, dtype=torch.float32), torch.tensor(self.lengths)).to(device)


@dataclass(slots=True)
class _Scored:
    """What a micro-batch gave: its loss components with their graph, and what is logged of it."""

    stats: TokenStats
    weight_N: Tensor
    """Weight of each token in the distillation loss; 1 where nothing is distilled."""
    parts: dict[str, Component]
    heard: Listening | None = None
    policy: PolicyValues | None = None
    losses: dict[str, float] = field(default_factory=dict)

    def detached(self) -> _Scored:
        """Return it without the graph, its losses as numbers."""
        losses = {name: float(combine({name: part}).detach()) for name, part in self.parts.items()}
        policy = None if self.policy is None else replace(self.policy, loss_N=self.policy.loss_N.detach())
        return replace(self, parts={}, policy=policy, losses=losses)


def _summed(losses: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Add up the components of micro-batches."""
    total: dict[str, float] = {}
    for parts in losses:
        for name, value in parts.items():
            total[name] = total.get(name, 0.0) + value
    return total


class Stepper:
    """Owns what an update needs: the wrapped student, the teacher, the optimizer and its schedule."""

    def __init__(
        self,
        *,
        accelerator: Accelerator,
        student: nn.Module,
        teacher: Teacher,
        base: Teacher | None,
        optimizer: Any,
        scheduler: torch.optim.lr_scheduler.LambdaLR,
        gate: Gate,
        selection: Selection,
        config: RunConfig,
        pad_id: int,
    ) -> None:
        self._accelerator = accelerator
        self._student = student
        self._model = cast("Student", accelerator.unwrap_model(student)).model
        self._teacher = teacher
        self._base = base
        self._optimizer = optimizer
        self._scheduler = scheduler
        self._gate = gate
        self._selection = selection
        self._config = config
        self.pad_id = pad_id
        self._target: Target = Plain()
        self._old: dict[int, Tensor] = {}

    def optimize(self, rows: Sequence[Row], target: Target | None = None) -> StepOutcome:
        """Train on the rows of one generation batch. NonFiniteError stops before the weights move."""
        outcome = StepOutcome()
        self._target = self._config.target if target is None else target
        # Dropout stays inactive (as in OPSD's code); only checkpointed activations need transformers' training mode.
        self._model.train(self._config.model.gradient_checkpointing)
        size = -(-len(rows) // self._config.step.updates_per_batch)
        parts = [self.cut(rows, range(start, min(start + size, len(rows)))) for start in range(0, len(rows), size)]
        self._remember_old([batch for part in parts for batch in part])
        for part in parts:
            if part:
                self._update(part, outcome)
        outcome.metrics |= stream_metrics(rows, outcome.rows)
        if self._config.loss.temperature_student in (None, self._config.rollout.temperature):
            outcome.metrics |= logprob_gap(rows, outcome.rows)
        return outcome

    def _update(self, batches: Sequence[MicroBatch], outcome: StepOutcome) -> None:
        """Make one optimizer update. Every component is divided by its count over all micro-batches."""
        outcome.add("optim/micro_batches", len(batches))
        selections = self._select(batches)
        counts = self._counts(batches, selections)
        taken = []
        for batch, selection_N in zip(batches, selections, strict=True):
            active = [name for name in batch.components if counts.get(name)]
            if not active:
                continue
            scored = self._score(batch, active, selection_N, counts)
            self._accelerator.backward(combine(scored.parts))
            rows = split_rows(scored.stats, scored.weight_N, batch.lengths)
            outcome.rows |= zip(batch.indices, rows, strict=True)
            taken.append(scored.detached())
        outcome.metrics |= listening_metrics(self._gate, [scored.heard for scored in taken if scored.heard])
        outcome.metrics |= policy_metrics([scored.policy for scored in taken if scored.policy])
        if taken:
            self._move(_summed([scored.losses for scored in taken]), outcome)
        else:
            outcome.add("optim/empty_updates", 1)

    def _score(
        self, batch: MicroBatch, active: Sequence[str], selection_N: Tensor, counts: Mapping[str, float]
    ) -> _Scored:
        """Run a micro-batch and weigh its tokens in every active component."""
        streams = self._streams(batch)
        every_N = torch.ones_like(selection_N)
        scored = _Scored(streams.stats, every_N, {})
        if "distil" in active:
            gate_N = self._gate.weights(streams.stats).detach()
            scored.heard = Listening(streams.stats, selection_N, gate_N)
            scored.weight_N = selection_N * gate_N * batch.spread([row.weight for row in batch.rows], gate_N.device)
            values_N = self._gate.values(streams)
            scored.parts["distil"] = self._component("distil", batch, values_N, scored.weight_N, selection_N, counts)
        if "rl" in active:
            scored.policy = policy_values(streams.logprob_N, self._policy_tokens(batch, streams), self._config.rl)
            scored.parts["rl"] = self._component("rl", batch, scored.policy.loss_N, every_N, every_N, counts)
        if "nll" in active:
            scored.parts["nll"] = self._component("nll", batch, -streams.logprob_N, every_N, every_N, counts)
        return scored

    def _component(
        self,
        name: str,
        batch: MicroBatch,
        values_N: Tensor,
        weights_N: Tensor,
        selection_N: Tensor,
        counts: Mapping[str, float],
    ) -> Component:
        """Weigh one component's tokens by its aggregate and coefficient."""
        aggregate = self._config.rl.aggregate if name == "rl" else self._config.loss.aggregate
        if aggregate != "constant":
            weights_N = aggregate_weights(weights_N, selection_N, batch.numbering(values_N.device), aggregate)
        return Component(values_N, self._config.routing.coefs.get(name, 1.0) * weights_N, counts[name])

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

    def _streams(self, batch: MicroBatch) -> TokenStreams:
        """Run the teacher views, then the student, whose graph must not see the teacher's weights in place."""
        device = self._accelerator.device
        views = [self.view(batch, view) for view in self._target.views] if batch.distils else []
        inputs = view_input([row.student_prompt for row in batch.rows], batch.completions, self.pad_id, device)
        old_N = torch.cat([self._old[index] for index in batch.indices]) if self._old and batch.distils else None
        temperature = 1.0 if batch.components == ("nll",) else self._temperature(batch)
        streams: TokenStreams = self._student(
            inputs, labels(batch.completions, device), views, self._target, temperature, old_N
        )
        return streams

    def view(self, batch: MicroBatch, view: View) -> Scored:
        """Return what a view makes of the completions: the base reads no hint and has the step-0 weights."""
        weights = self._base if view == "base" else self._teacher
        assert weights is not None, "a target with a base view was built without the base weights"
        with weights.in_place():
            return detached(self._hidden([row.prompt(view) for row in batch.rows], batch.completions))

    def teacher_hidden(self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> Scored:
        """Run the teacher over any prompts."""
        with self._teacher.in_place():
            return detached(self._hidden(prompts, completions))

    def _hidden(self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> Scored:
        return scored_hidden(self._model, view_input(prompts, completions, self.pad_id, self._accelerator.device))

    def _temperature(self, batch: MicroBatch) -> float:
        """Return the sampling temperature; without a teacher the student's own, where one is set."""
        own = self._config.loss.temperature_student
        return self._config.rollout.temperature if batch.distils or own is None else own

    def _remember_old(self, batches: Sequence[MicroBatch]) -> None:
        """Score the completions under the weights that the step begins with, where several updates follow."""
        self._old = {}
        if len(batches) == 0 or self._config.step.updates_per_batch == 1:
            return
        if self._config.loss.divergence.kind != "sampled" and not self._config.routing.reinforces:
            return
        for batch in batches:
            logprob_N = self._logprobs(batch)
            self._old |= zip(batch.indices, logprob_N.split_with_sizes(batch.lengths), strict=True)

    def _logprobs(self, batch: MicroBatch) -> Tensor:
        """Return log-probabilities of the sampled tokens under the weights in place, without a hint or gradient."""
        temperature = self._config.loss.temperature_student or self._config.rollout.temperature
        label_N = labels(batch.completions, self._accelerator.device)
        with torch.no_grad():
            hidden = self._hidden([row.student_prompt for row in batch.rows], batch.completions)
            return label_streams(hidden, label_N, self._config.loss, temperature).stats.student_logprob

    def _policy_tokens(self, batch: MicroBatch, streams: TokenStreams) -> PolicyTokens:
        """Collect what the reinforcement branch reads."""
        device = streams.logprob_N.device
        now_N = streams.logprob_N.detach()
        old_N = torch.cat([self._old[index] for index in batch.indices]).to(now_N.dtype) if self._old else now_N
        sampled = [value for row in batch.rows for value in row.sampler_logprobs]
        reference_N = None
        if self._config.rl.kl_coef:
            assert self._base is not None, "a KL term was built without the base weights"
            with self._base.in_place():
                reference_N = self._logprobs(batch).to(now_N.dtype)
        return PolicyTokens(
            advantage_N=batch.spread([row.advantage for row in batch.rows], device).to(now_N.dtype),
            old_logprob_N=old_N,
            sampler_logprob_N=torch.tensor(sampled, dtype=now_N.dtype, device=device),
            reference_logprob_N=reference_N,
            sequence_N=batch.numbering(device),
        )

    def cut(self, rows: Sequence[Row], part: range | None = None) -> list[MicroBatch]:
        """Cut rows, or a part of them, into micro-batches of the same components; rows without one are left out."""
        part = range(len(rows)) if part is None else part
        batches = []
        kinds = sorted({rows[index].components for index in part if rows[index].components})
        for components in kinds:
            indices = [index for index in part if rows[index].components == components]
            chosen = [rows[index] for index in indices]
            for members in micro_batches(chosen, self._config.step.token_budget):
                batches.append(MicroBatch(tuple(indices[m] for m in members), tuple(chosen[m] for m in members)))
        return batches

    def _select(self, batches: Sequence[MicroBatch]) -> list[Tensor]:
        """Choose tokens over the statistics of all distilled tokens of the update, in a pass without gradient."""
        device = self._accelerator.device
        every = [torch.ones(sum(batch.lengths), device=device) for batch in batches]
        distilled = [index for index, batch in enumerate(batches) if batch.distils]
        if not distilled or not self._selection.needs_batch:
            return every
        with torch.no_grad():
            whole = concatenate([self._streams(batches[index]).stats for index in distilled])
        seed = derive_seed(self._config.seed, "selection", self._scheduler.last_epoch)
        selected = self._selection.select(whole, seed).detach()
        pieces = selected.split_with_sizes([sum(batches[index].lengths) for index in distilled])
        for index, piece in zip(distilled, pieces, strict=True):
            every[index] = piece
        return every

    def _counts(self, batches: Sequence[MicroBatch], selections: Sequence[Tensor]) -> dict[str, float]:
        """Count what each component is divided by; a component that could not move anything is left out.

        That is one without a selected token, without a problem of positive weight, with coefficient 0, or, for `rl`,
        without any advantage or KL term.
        """
        counts: dict[str, float] = {}
        live: set[str] = set()
        for batch, selection_N in zip(batches, selections, strict=True):
            for name in batch.components:
                counts[name] = counts.get(name, 0.0) + self._units(name, batch, selection_N)
                if self._can_move(name, batch):
                    live.add(name)
        if self._config.routing.shared:
            counts = dict.fromkeys(counts, sum(counts.values()))
        return {name: count for name, count in counts.items() if name in live}

    def _units(self, name: str, batch: MicroBatch, selection_N: Tensor) -> float:
        numbering = batch.numbering(torch.device("cpu"))
        if name == "distil":
            return selected_units(selection_N.cpu(), numbering, self._config.loss.aggregate)
        aggregate = self._config.rl.aggregate if name == "rl" else self._config.loss.aggregate
        if aggregate == "constant":
            return float(len(batch.rows) * self._config.rollout.max_new_tokens)
        return selected_units(torch.ones(sum(batch.lengths)), numbering, aggregate)

    def _can_move(self, name: str, batch: MicroBatch) -> bool:
        if self._config.routing.coefs.get(name, 1.0) == 0:
            return False
        if name == "rl":
            return self._config.rl.kl_coef > 0 or any(row.advantage for row in batch.rows)
        return name == "nll" or any(row.weight for row in batch.rows)
