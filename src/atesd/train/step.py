"""One generation batch: forward passes of all roles, losses with global normalisation, backward, optimizer update.

N scored tokens of a micro-batch, L input positions, H hidden size.

The step knows no method. It turns rows into per-token streams, multiplies them by selection, gate and problem weight,
and divides by counts of the whole update, so cutting the batch into micro-batches changes nothing but memory. There is
one pass of the student, and before it, without gradient, one more for each of these: a selection over the whole update,
log-probabilities of the weights that several updates begin with, and those of step 0 for a KL term.

Deviation: of several updates a batch each reads a live or an averaged teacher as it then is, not as the step began.

    loss = sum over components of coef * sum(weight * value) / count        components: distil, rl, nll

`count` is each component's own, or, where a router sends every group to one component only, that of all together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from atesd.codes.model import unsteered
from atesd.gates.gate import Gate
from atesd.gradients.rule import GradientRule
from atesd.losses.combine import Component, aggregate_weights, combine
from atesd.losses.divergence import LOSS_ALONE, Scored, TokenStreams, Use
from atesd.losses.policy import PolicyTokens, policy_values
from atesd.losses.stats import TokenStats
from atesd.losses.target import Plain, Target
from atesd.seeds import derive_seed
from atesd.selection import Selection
from atesd.train.asked import gate_values, gate_weights, selected
from atesd.train.batch import Row
from atesd.train.finite import Scales, cause, cause_in_gradient, refuse_broken_streams, refuse_broken_weights
from atesd.train.gap import GapRule
from atesd.train.latent import CodeTraining
from atesd.train.micro import Losses, MicroBatch, counts_of, cut, updates_of
from atesd.train.scorer import Scorer
from atesd.train.shard import Whole
from atesd.train.stats import (
    Listening,
    MicroScores,
    StepOutcome,
    concatenate,
    divided,
    fetched,
    listening_metrics,
    logprob_gap,
    policy_metrics,
    stream_metrics,
    told,
)
from atesd.train.teacher import Teachers
from atesd.train.world import World
from atesd.transfer import sent
from atesd.types import NonFiniteError


class Task(NamedTuple):
    """A micro-batch, and what is known of it before the student's pass with gradient."""

    batch: MicroBatch
    active: Sequence[str]
    """The components that move something."""
    selection_N: Tensor
    views: Sequence[Scored]
    reference_N: Tensor | None
    """Log-probabilities under the step-0 weights; None where nothing asks for them."""


def _summed(losses: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Add up the components of micro-batches."""
    total: dict[str, float] = {}
    for parts in losses:
        for name, value in parts.items():
            total[name] = total.get(name, 0.0) + value
    return total


class Stepper:
    """Owns what an update needs: the scorer, the teacher, the optimizer and its schedule, the rules of weighing."""

    def __init__(
        self,
        *,
        accelerator: Accelerator,
        scorer: Scorer,
        teachers: Teachers,
        optimizer: Any,
        scheduler: torch.optim.lr_scheduler.LambdaLR,
        gate: Gate,
        selection: Selection,
        rule: GradientRule,
        losses: Losses,
        updates_per_batch: int,
        max_grad_norm: float,
        seed: int,
        gap_rule: GapRule | None = None,
        codes: CodeTraining | None = None,
        world: World | None = None,
        shards: Whole | None = None,
    ) -> None:
        self._accelerator = accelerator
        self._scorer = scorer
        self._teachers = teachers
        self._optimizer = optimizer
        self._scheduler = scheduler
        self._gate = gate
        self._selection = selection
        self._rule = rule
        self._losses = losses
        self._world = world or World()
        self._shards = shards or Whole(self._world)
        self._updates_per_batch = updates_per_batch
        self._max_grad_norm = max_grad_norm or math.inf
        self._seed = seed
        self._gap_rule = gap_rule
        self._codes = codes
        self._target: Target = Plain()
        self._old: dict[int, Tensor] = {}

    def optimize(self, rows: Sequence[Row], target: Target, *, is_on_policy: bool = True) -> StepOutcome:
        """Train on the rows of one generation batch; `is_on_policy`: of the weights of now, as the gap rule asks.

        NonFiniteError stops before the weights move on a loss or gradient that is not finite, and after an update that
        leaves weights which are not.
        """
        outcome = StepOutcome()
        self._target = target
        self._scorer.training_mode()
        budget = self._scorer.token_budget
        parts = updates_of(rows, self._updates_per_batch, budget)
        shares = [cut(rows, self._world.share(part), budget) for part in parts]
        self._remember_old([batch for share in shares for batch in share])
        for part, share in zip(parts, shares, strict=True):
            if part:
                with unsteered(self._scorer.model):
                    self._update(part, share, outcome, rows if is_on_policy and part is parts[0] else ())
            else:
                outcome.add("optim/empty_updates", 1)
        outcome.metrics |= stream_metrics(rows, outcome.rows)
        if self._scorer.samples_as_scored:
            outcome.metrics |= logprob_gap(rows, outcome.rows)
        return outcome

    def _update(
        self, part: Sequence[int], batches: Sequence[MicroBatch], outcome: StepOutcome, fresh: Sequence[Row]
    ) -> None:
        """Make one optimizer update. Every component is divided by its count over all micro-batches of all processes.

        `part` are the update's rows in order, of which this process reads those in `batches`. `fresh` are the step's
        rows while the weights are still those that sampled them.
        """
        outcome.add("optim/micro_batches", sum(self._world.collect(len(batches))))
        with self._teachers.held():
            selections = self._select(part, batches)
            counts = counts_of(batches, selections, self._losses, self._world)
            tasks = self._tasks(batches, selections, counts)
            if self._shards.is_sharded:  # all of it before the weights are derived
                tasks = iter(list(tasks))
        own: list[MicroScores] = []
        read: list[MicroBatch] = []
        size = sum(any(counts.get(name) for name in batch.components) for batch in batches)
        with self._shards.deriving(size) as passes:
            for is_own in passes:
                if not is_own:
                    self._accelerator.backward(self._scorer.nothing())
                    continue
                task = next(tasks)
                with self._rule.attached(self._scorer.model):
                    scored = self._score(task, counts)
                    self._accelerator.backward(combine(scored.parts))
                own.append(scored.detached())
                read.append(task.batch)
        own = fetched(own) if own else []
        every = self._world.pool([batch.taken(scored).light() for batch, scored in zip(read, own, strict=True)])
        for each in every:
            outcome.rows |= each.rows()
        taken = [each.scored for each in every]
        heard = [scored.heard for scored in taken if scored.heard]
        outcome.note(listening_metrics(self._gate, self._target, heard))
        outcome.note(policy_metrics([scored.policy for scored in taken if scored.policy]))
        if self._gap_rule is not None and self._scorer.samples_as_scored and fresh:
            self._gap_rule.heed(logprob_gap(fresh, outcome.rows))
        if taken:
            self._move(own, taken, outcome)
        else:
            outcome.add("optim/empty_updates", 1)

    def _tasks(
        self, batches: Sequence[MicroBatch], selections: Sequence[Tensor], counts: Mapping[str, float]
    ) -> Iterator[Task]:
        """Yield micro-batches that move something, with what other weights than the student's make of them."""
        for batch, selection_N in zip(batches, selections, strict=True):
            active = [name for name in batch.components if counts.get(name)]
            if active:
                reference_N = self._reference(batch) if "rl" in active else None
                yield Task(batch, active, sent(selection_N, self._scorer.device), self._views(batch), reference_N)

    def _score(self, task: Task, counts: Mapping[str, float]) -> MicroScores:
        """Run a micro-batch and weigh its tokens in every active component."""
        batch, active, selection_N, views, reference_N = task
        streams = self._streams(batch, views, self._use(batch, active, selection_N))
        outcome_N = batch.outcomes(selection_N.device)
        streams = replace(streams, stats=told(streams.stats, outcome_N))
        every_N = torch.ones_like(selection_N)
        scored = MicroScores(streams.stats, every_N, {})
        if "distil" in active:
            gate_N = gate_weights(self._gate, streams.stats)
            scored.heard = Listening(streams.stats, selection_N, gate_N)
            scored.weight_N = gate_N * batch.weighed(selection_N) * self._sampler_weight(batch, streams.stats)
            values_N = gate_values(self._gate, streams)
            scored.parts["distil"] = self._component("distil", batch, values_N, scored.weight_N, selection_N, counts)
            if self._codes is not None:
                self._steer(self._codes, batch, views, streams, scored)
        if "rl" in active:
            tokens = self._policy_tokens(batch, streams, reference_N)
            scored.policy = policy_values(streams.logprob_N, tokens, self._losses.policy)
            scored.parts["rl"] = self._component("rl", batch, scored.policy.loss_N, every_N, every_N, counts)
        if "nll" in active:
            scored.parts["nll"] = self._component("nll", batch, -streams.logprob_N, every_N, every_N, counts)
        return scored

    def _steer(
        self,
        training: CodeTraining,
        batch: MicroBatch,
        views: Sequence[Scored],
        plain: TokenStreams,
        scored: MicroScores,
    ) -> None:
        """Add the loss of the student that the best of several code sequences steer, weighed as the plain one's."""
        part = scored.parts["distil"]
        choice = training.choose(batch.passages, batch.indices, views, self._target, self._scheduler.last_epoch)
        heard = self._gate.reads_divergence
        use = Use(heard, not heard, lambda _, rows: part.weights_N[rows])
        steered = training.steered(choice, batch.passages, views, self._target, use)
        training.compare(plain, steered)
        scored.parts["steered"] = replace(part, values_N=gate_values(self._gate, steered))
        scored.sampled_logprob_N = choice.sampled_logprob_N.float()

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
        aggregate = self._losses.aggregate_of(name)
        if aggregate != "constant":
            weights_N = aggregate_weights(weights_N, selection_N, batch.numbering(values_N.device), aggregate)
        return Component(values_N, self._losses.coefs.get(name, 1.0) * weights_N, counts[name])

    def _use(self, batch: MicroBatch, active: Sequence[str], selection_N: Tensor) -> Use:
        """Tell beforehand what will be asked of a micro-batch's streams: a gate sees one token at a time."""
        is_heard = "distil" in active
        of_label = any(name != "distil" for name in active)
        if not (is_heard and self._gate.reads_divergence):
            return Use(loss=False, logprob=of_label or is_heard)
        numbering_N = batch.numbering(selection_N.device)
        weight_N = batch.weighed(selection_N)
        weight_N = aggregate_weights(weight_N, selection_N, numbering_N, self._losses.aggregate)

        outcome_N = batch.outcomes(selection_N.device)

        def weights(stats: TokenStats, rows: slice) -> Tensor:
            gate_N = gate_weights(self._gate, told(stats, outcome_N[rows]))
            return weight_N[rows] * gate_N * self._sampler_weight(batch, stats, rows)

        return Use(logprob=of_label, weights=weights)

    def _move(self, own: Sequence[MicroScores], taken: Sequence[MicroScores], outcome: StepOutcome) -> None:
        """Add up gradients, clip, check and step; nothing moves where the loss or the gradient is not finite.

        `own` are this process's micro-batches, `taken` those of all.
        """
        losses = _summed([scored.losses for scored in taken])
        if self._codes is not None:
            losses["codes"], found = self._codes.learn(self._accelerator.backward)
            outcome.metrics |= found
        total = sum(losses.values())
        model = self._scorer.model
        self._shards.add_up(model)
        self._world.sum(getattr(self._rule, "watched", list)())
        self._rule.apply(model)
        norm = self._shards.clip(self._accelerator, model, self._max_grad_norm)
        if not (math.isfinite(total) and math.isfinite(norm)):
            self._shards.gather()
            scales = Scales(self._target, self._losses.coefs)
            causes = filter(None, self._world.collect(cause(model, own, scales)))
            why = next(causes, None) or cause_in_gradient(model, taken, scales)
            raise NonFiniteError(f"loss {total:g}, gradient norm {norm:g}: {why}")
        outcome.note({f"loss/{name}": value for name, value in losses.items()})
        outcome.note({"loss/total": total, "optim/grad_norm": norm})
        outcome.metrics["optim/lr"] = float(self._scheduler.get_last_lr()[0])
        self._optimizer.step()
        self._scheduler.step()
        self._optimizer.zero_grad()
        self._shards.gather()
        self._rule.mend(model)
        refuse_broken_weights(model)
        self._teachers.own.update()

    def _views(self, batch: MicroBatch) -> list[Scored]:
        """Run the teacher views, before the student, whose graph must not see the teacher's weights in place."""
        return [
            self._scorer.view([row.view(view) for row in batch.rows], self._teachers.of(view))
            for view in (self._target.views if batch.distils else ())
        ]

    def _streams(self, batch: MicroBatch, views: Sequence[Scored], use: Use = LOSS_ALONE) -> TokenStreams:
        """Run the student, as it is without codes."""
        if not batch.distils:
            temperature = 1.0 if batch.components == ("nll",) else None
            return self._scorer.streams(batch.passages, temperature=temperature, use=use)
        return self._scorer.streams(batch.passages, views, self._target, old_logprob_N=self._old_of(batch), use=use)

    def _remember_old(self, batches: Sequence[MicroBatch]) -> None:
        """Score the completions under the weights that the step begins with, where several updates follow."""
        self._old = {}
        if self._updates_per_batch == 1 or not self._losses.importance:
            return
        for batch in batches:
            self._old |= zip(batch.indices, self._logprobs(batch).split_with_sizes(batch.lengths), strict=True)

    def _old_of(self, batch: MicroBatch) -> Tensor | None:
        """Return what was remembered of a micro-batch; None where nothing is."""
        return torch.cat([self._old[index] for index in batch.indices]) if self._old else None

    def _logprobs(self, batch: MicroBatch) -> Tensor:
        """Return log-probabilities of the sampled tokens under the weights in place: no hint, codes or gradient."""
        with torch.no_grad(), unsteered(self._scorer.model):
            return self._scorer.log_likelihood(batch.passages, self._scorer.student_temperature)

    def _sampler_weight(self, batch: MicroBatch, stats: TokenStats, rows: slice = slice(None)) -> Tensor | float:
        """Return min(p_old / p_sampler, corrects) of some tokens; 1 where nothing is corrected."""
        known = all(row.sampler_logprobs for row in batch.rows)
        if self._losses.corrects is None or not self._scorer.samples_as_scored or not known:
            return 1.0
        now_N, old_N = stats.student_logprob.detach(), self._old_of(batch)
        old_N = now_N if old_N is None else old_N[rows].to(now_N)
        return (old_N - batch.sampled(now_N)[rows]).exp().clamp(max=self._losses.corrects)

    def _reference(self, batch: MicroBatch) -> Tensor | None:
        """Score the completions under the step-0 weights, where the reinforcement branch asks for it."""
        if not self._losses.policy.kl_coef:
            return None
        with self._teachers.of("base").in_place():
            return self._logprobs(batch)

    def _policy_tokens(self, batch: MicroBatch, streams: TokenStreams, reference_N: Tensor | None) -> PolicyTokens:
        """Collect what the reinforcement branch reads."""
        device = streams.logprob_N.device
        now_N, old_N = streams.logprob_N.detach(), self._old_of(batch)
        return PolicyTokens(
            advantage_N=batch.spread([row.advantage for row in batch.rows], device).to(now_N.dtype),
            old_logprob_N=now_N if old_N is None else old_N.to(now_N.dtype),
            sampler_logprob_N=batch.sampled(now_N),
            reference_logprob_N=None if reference_N is None else reference_N.to(now_N.dtype),
            teacher_logprob_N=streams.stats.teacher_logprob.to(now_N.dtype) if batch.distils else None,
            sequence_N=batch.numbering(device),
        )

    def _select(self, part: Sequence[int], batches: Sequence[MicroBatch]) -> list[Tensor]:
        """Choose tokens over the statistics of all distilled tokens of the update, in a pass without gradient.

        What is chosen is returned on the CPU, where it is counted.
        """
        every = [torch.ones(sum(batch.lengths)) for batch in batches]
        if not self._selection.needs_batch:
            return every
        known: dict[int, TokenStats] = {}
        with torch.no_grad():
            for batch in batches:
                if batch.distils:
                    stats = self._streams(batch, self._views(batch)).stats
                    stats = told(stats, batch.outcomes(self._scorer.device))
                    known |= zip(batch.indices, divided(stats, batch.lengths), strict=True)
        known = self._world.merged(known)
        if not known:
            return every
        order = [index for index in part if index in known]
        whole = concatenate([known[index] for index in order])
        refuse_broken_streams(self._scorer.model, whole)
        seed = derive_seed(self._seed, "selection", self._scheduler.last_epoch)
        chosen = selected(self._selection, whole, seed).cpu()
        lengths = [len(known[index].divergence) for index in order]
        pieces = dict(zip(order, chosen.split_with_sizes(lengths), strict=True))
        return [
            torch.cat([pieces[index] for index in batch.indices]) if batch.distils else ones
            for batch, ones in zip(batches, every, strict=True)
        ]
