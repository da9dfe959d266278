"""Gradients that credit compares: of distillation as it would be, of references, and of graded completions.

N scored tokens. All are gradients of losses, to be descended, for a given list of weights; the optimizer's own are not
touched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from atesd.gates.gate import Gate
from atesd.losses.divergence import Scored, Use
from atesd.losses.stats import TokenStats
from atesd.losses.target import Target
from atesd.routing.route import Route
from atesd.train.asked import gate_values, gate_weights
from atesd.train.batch import Passage, Row, micro_batches, spread
from atesd.train.outcomes import Graded
from atesd.train.rows import Rows
from atesd.train.scorer import Scorer
from atesd.train.stats import told
from atesd.train.teacher import Teachers
from atesd.types import Group

Gradient = list[Tensor]

FOLDS = 8
"""Parts at most into which graded completions (by problem) or references are split: for their direction's error."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Groups of a step, the ratios at which their teacher saw the solution, and what they were distilled to."""

    groups: Sequence[Group]
    ratios: Sequence[float]
    target: Target

    def at(self, ratio: float) -> Batch:
        """Return the batch at one ratio for all problems."""
        return Batch(self.groups, [ratio] * len(self.groups), self.target)

    def beyond(self, strength: float) -> Batch:
        """Return the batch with another lambda."""
        return Batch(self.groups, self.ratios, self.target.at(strength))


class Directions:
    """Takes gradients with the student's weights in place."""

    def __init__(self, *, scorer: Scorer, teachers: Teachers, rows: Rows, gate: Gate) -> None:
        self._scorer = scorer
        self._teachers = teachers
        self._rows = rows
        self._gate = gate

    def of_references(self, references: Sequence[Passage], weights: Sequence[nn.Parameter]) -> Gradient:
        """Return the gradient of the token-mean NLL of references."""
        count = sum(len(passage.completion) for passage in references)
        return self._of_labels(references, [1.0 / count] * len(references), weights, temperature=1.0)

    def of_references_by_fold(self, references: Sequence[Passage], weights: Sequence[nn.Parameter]) -> list[Gradient]:
        """Return each fold's gradient of the token-mean NLL of references, whose mean over folds is that of all."""
        folds = min(FOLDS, len(references))
        scale = folds / sum(len(passage.completion) for passage in references)
        parts = [references[fold::folds] for fold in range(folds)]
        return [self._of_labels(part, [scale] * len(part), weights, temperature=1.0) for part in parts]

    def of_rewards(self, graded: Sequence[Graded], weights: Sequence[nn.Parameter]) -> list[Gradient]:
        """Return each fold's gradient of -(1/tokens) sum A log p, whose mean over folds is that of all completions.

        None at all where every A is 0, or where they are of a single problem. Problems are dealt out in turn.
        """
        turns = {group: turn for turn, group in enumerate(sorted({each.group for each in graded}))}
        count = min(FOLDS, len(turns))
        if count < 2 or not any(each.advantage for each in graded):
            return []
        scale = count / sum(len(each.passage.completion) for each in graded)
        folds = []
        for fold in range(count):
            own = [each for each in graded if turns[each.group] % count == fold and each.advantage]
            factors = [scale * each.advantage for each in own]
            passages = [each.passage for each in own]
            folds.append(self._of_labels(passages, factors, weights, temperature=self._scorer.student_temperature))
        return folds

    def of_distillation(
        self, candidates: Sequence[Batch], weights: Sequence[nn.Parameter], *, by_level: bool = False
    ) -> list[dict[str, Gradient]] | None:
        """Return each candidate's gradient of the token-mean distillation loss, as the sum of its levels' parts.

        The candidates hold the same groups. Without `by_level` there is one part, named ``""``. None where no
        completion is distilled.
        """
        groups = candidates[0].groups
        routes = [Route.DISTIL] * len(groups)
        built = [self._rows.build(groups, routes, each.ratios, each.target.views) for each in candidates]
        by_row = [same for same in zip(*built, strict=True) if same[0].components]  # each row as every candidate's
        count = sum(len(same[0].completion) for same in by_row)
        if not count:
            return None
        levels = [groups[same[0].group].problem.level if by_level else "" for same in by_row]
        targets = [each.target for each in candidates]
        found: list[dict[str, Gradient]] = [{} for _ in candidates]
        for level in sorted(set(levels)):
            own = [same for same, name in zip(by_row, levels, strict=True) if name == level]
            for parts, total in zip(found, self._of_divergence(own, targets, weights, count), strict=True):
                parts[level] = total
        return found

    def _of_labels(
        self,
        passages: Sequence[Passage],
        factors: Sequence[float],
        weights: Sequence[nn.Parameter],
        *,
        temperature: float,
    ) -> Gradient:
        """Return the gradient of -sum over passages of factor * log p(completion)."""
        total = _nothing(weights)
        with self._recording(weights):
            for members in self._scorer.batches(passages):
                chosen = [passages[member] for member in members]
                logprob_N = self._scorer.log_likelihood(chosen, temperature)
                factor_N = spread([factors[member] for member in members], chosen, logprob_N)
                _add(total, torch.autograd.grad(-(factor_N * logprob_N).sum(), weights, allow_unused=True))
        return total

    def _of_divergence(
        self,
        by_row: Sequence[Sequence[Row]],
        targets: Sequence[Target],
        weights: Sequence[nn.Parameter],
        count: int,
    ) -> list[Gradient]:
        """Return each candidate's gradient of the summed losses over `count`. One student pass serves them all."""
        totals = [_nothing(weights) for _ in targets]
        costs = [same[0].cost for same in by_row]
        for members in micro_batches(costs, self._scorer.token_budget):
            variants = list(zip(*(by_row[member] for member in members), strict=True))  # the rows of each candidate
            passages = [row.student for row in variants[0]]
            teachers = self._teacher_views(variants)
            others = self._other_views(variants[0], targets)
            with self._recording(weights):
                student = self._scorer.hidden(passages)
                outcome_N = spread([row.outcome for row in variants[0]], passages, student.hidden_NH).float()
                use = self._use(outcome_N)
                for index, (total, teacher, target) in enumerate(zip(totals, teachers, targets, strict=True), start=1):
                    views = [teacher, *(others[view] for view in target.views[1:])]
                    streams = self._scorer.against(student, views, passages, target, use=use)
                    gate_N = gate_weights(self._gate, told(streams.stats, outcome_N))
                    loss = (gate_N * gate_values(self._gate, streams)).sum() / count
                    keep = index < len(targets)
                    _add(total, torch.autograd.grad(loss, weights, retain_graph=keep, allow_unused=True))
        return totals

    @contextmanager
    def _recording(self, weights: Sequence[nn.Parameter]) -> Iterator[None]:
        """Record gradients for these weights alone: what stands below them needs no graph, a head no gradient."""
        wanted = set(map(id, weights))
        others = [each for each in self._scorer.model.parameters() if each.requires_grad and id(each) not in wanted]
        try:
            for weight in others:
                weight.requires_grad_(False)
            with self._scorer.recording():
                yield
        finally:
            for weight in others:
                weight.requires_grad_(True)

    def _use(self, outcome_N: Tensor) -> Use:
        """Tell beforehand what will be asked of the streams."""
        heard = self._gate.reads_divergence

        def weights(stats: TokenStats, rows: slice) -> Tensor:
            return gate_weights(self._gate, told(stats, outcome_N[rows]))

        return Use(heard, not heard, weights)

    def _other_views(self, rows: Sequence[Row], targets: Sequence[Target]) -> dict[str, Scored]:
        """Score the views that do not depend on the ratio."""
        names = {view for target in targets for view in target.views[1:]}
        return {
            view: self._scorer.view([row.view(view) for row in rows], self._teachers.of(view)) for view in sorted(names)
        }

    def _teacher_views(self, variants: Sequence[Sequence[Row]]) -> list[Scored]:
        """Let the teacher read all candidates' prompts, in passes of their own."""
        whole = self._scorer.view([row.view("teacher") for rows in variants for row in rows], self._teachers.own)
        size = sum(len(row.completion) for row in variants[0])
        return [replace(whole, hidden_NH=piece) for piece in whole.hidden_NH.split_with_sizes([size] * len(variants))]


def _nothing(weights: Sequence[nn.Parameter]) -> Gradient:
    """Return zeros to add gradients to, in float32 for weights in half precision."""
    half = (torch.bfloat16, torch.float16)
    return [torch.zeros_like(each, dtype=torch.float32 if each.dtype in half else None) for each in weights]


def _add(total: Sequence[Tensor], parts: Sequence[Tensor | None]) -> None:
    for whole, part in zip(total, parts, strict=True):
        if part is not None:
            whole.add_(part)
