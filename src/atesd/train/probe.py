"""Measurements that policies ask for, taken on the probe set without gradient.

    probe_nll             token-mean NLL of the reference under the student, without any hint
    probe_kl              mean KL(teacher at ratio 1 || student) on completions stored at step 0
    probe_accuracy        mean reward of hint-free completions, the same sampling seed every time
    gt_solution@r         token-mean log-probability that the teacher at ratio r gives the reference solution
    gt_answer@r           the same of the final answer alone
    gt_hidden_only@r      the same of the segments that ratio r does not reveal: no credit for copying

Probe problems are never trained on, so the exposure reaches these numbers only through learning (METHOD 2.4).
N scored tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from atesd.config import RunConfig
from atesd.exposure.reveal import reveal
from atesd.losses.divergence import LossConfig, Scored, token_streams
from atesd.losses.target import Plain
from atesd.rollout.driver import Driver
from atesd.rollout.render import Renderer
from atesd.seeds import derive_seed
from atesd.train.batch import Row, labels, micro_batches, view_input
from atesd.train.hints import Hints
from atesd.train.step import detached, label_streams, scored_hidden
from atesd.train.teacher import Teacher
from atesd.types import Measurement, Problem, UserError


class Probe:
    """The probe set, and how to measure the model with it."""

    def __init__(
        self,
        problems: Sequence[Problem],
        *,
        model: nn.Module,
        teacher: Teacher,
        hints: Hints,
        renderer: Renderer,
        driver: Driver,
        config: RunConfig,
    ) -> None:
        self._problems = problems
        self._model = model
        self._teacher = teacher
        self._hints = hints
        self._renderer = renderer
        self._driver = driver
        self._config = config
        self._stored: list[tuple[int, ...]] | None = None
        self._references: list[Row] = []

    def state_dict(self) -> dict[str, Any]:
        """Return the stored completions, which later weights could not sample again."""
        return {"stored": self._stored}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        stored = state["stored"]
        self._stored = None if stored is None else [tuple(ids) for ids in stored]

    def measure(self, wanted: Iterable[Measurement]) -> dict[str, float]:
        """Take each distinct measurement once, by key; one that cannot be taken is absent.

        UserError where the task has no probe problems.
        """
        distinct = {measurement.key: measurement for measurement in wanted}
        if distinct and not self._problems:
            raise UserError(
                f"the run measures {', '.join(distinct)} but the task has no probe problems: give it some (probe_size)"
            )
        self._model.eval()
        with torch.no_grad():
            taken = {key: self._take(measurement) for key, measurement in distinct.items()}
        return {key: value for key, value in taken.items() if value is not None}

    def _take(self, measurement: Measurement) -> float | None:
        ratio = 1.0 if measurement.ratio is None else measurement.ratio
        match measurement.kind:
            case "probe_nll":
                return -self._mean_logprob(self._reference_rows())
            case "probe_kl":
                return self._mean_divergence()
            case "probe_accuracy":
                return self._accuracy()
            case "gt_solution":
                return self._teacher_logprob(ratio, [problem.solution for problem in self._problems])
            case "gt_answer":
                return self._teacher_logprob(ratio, [problem.answer or "" for problem in self._problems])
            case "gt_hidden_only":
                return self._teacher_logprob(ratio, [self._unrevealed(problem, ratio) for problem in self._problems])
        raise UserError(f"no measurement is called {measurement.kind!r}")

    def _teacher_logprob(self, ratio: float, texts: Sequence[str]) -> float | None:
        """Return the token-mean log-probability of the texts under the teacher; None where no text is left to score."""
        rows = [
            _row(self._hints.teacher_ids(problem, ratio), self._reference(text))
            for problem, text in zip(self._problems, texts, strict=True)
            if text.strip()
        ]
        with self._teacher.in_place():
            return self._mean_logprob(rows) if rows else None

    def _reference_rows(self) -> list[Row]:
        """Return the reference solutions behind the student's prompts, rendered once."""
        if not self._references:
            self._references = [
                _row(self._hints.student_ids(problem), self._reference(problem.solution)) for problem in self._problems
            ]
        return self._references

    def _reference(self, text: str) -> tuple[int, ...]:
        return tuple(self._renderer.solution_ids(text, self._config.probe.max_tokens))

    def _unrevealed(self, problem: Problem, ratio: float) -> str:
        """Return the hidden segments, joined."""
        shown = reveal(problem.solution, ratio, self._config.reveal, seed_key=problem.id)
        return "".join(problem.solution[start:end] for start, end in shown.hidden_spans)

    def _mean_logprob(self, rows: Sequence[Row]) -> float:
        """Return the mean over tokens of log p(completion | student_prompt) under the weights in place."""

        def score(chosen: Sequence[Row]) -> Tensor:
            return label_streams(self._hidden(chosen), self._labels(chosen), self._config.loss).stats.student_logprob

        return self._token_mean(rows, score)

    def _mean_divergence(self) -> float:
        """Return the token-mean forward KL(teacher at ratio 1 || student) on the stored completions."""
        rows = [
            _row(self._hints.student_ids(problem), completion, self._hints.teacher_ids(problem, 1.0))
            for problem, completion in zip(self._problems, self._stored_completions(), strict=True)
        ]
        plain = LossConfig(tile_tokens=self._config.loss.tile_tokens, tile_vocab=self._config.loss.tile_vocab)

        def score(chosen: Sequence[Row]) -> Tensor:
            with self._teacher.in_place():
                view = detached(self._hidden([replace(row, student_prompt=row.teacher_prompt) for row in chosen]))
            streams = token_streams(
                self._hidden(chosen), [view], self._labels(chosen), plain, target=Plain(), temperature=1.0
            )
            return streams.divergence_N

        return self._token_mean(rows, score)

    def _accuracy(self) -> float | None:
        """Return the mean reward of gradable completions; None where none is."""
        sampling = self._config.rollout.model_copy(update={"group_size": self._config.probe.sampling_k})
        groups = self._driver.rollout(self._problems, sampling, seed=derive_seed(self._config.seed, "probe"))
        rewards = [attempt.reward for group in groups for attempt in group.trajectories if attempt.reward is not None]
        return float(np.mean(rewards)) if rewards else None

    def _stored_completions(self) -> list[tuple[int, ...]]:
        """Return one completion a problem, sampled when first asked for: at step 0."""
        if self._stored is None:
            sampling = self._config.rollout.model_copy(update={"group_size": 1})
            groups = self._driver.rollout(self._problems, sampling, seed=derive_seed(self._config.seed, "probe_kl"))
            self._stored = [group.trajectories[0].turns[-1].completion_ids for group in groups]
        return self._stored

    def _token_mean(self, rows: Sequence[Row], score: Callable[[Sequence[Row]], Tensor]) -> float:
        """Average a per-token score over all tokens of the rows, in micro-batches of the step's budget."""
        total, count = 0.0, 0
        for members in micro_batches(rows, self._config.step.token_budget):
            values_N = score([rows[member] for member in members])
            total += float(values_N.double().sum())
            count += values_N.numel()
        return total / count

    def _hidden(self, rows: Sequence[Row]) -> Scored:
        prompts = [row.student_prompt for row in rows]
        inputs = view_input(prompts, [row.completion for row in rows], self._renderer.pad_id, self._device)
        return scored_hidden(self._model, inputs)

    def _labels(self, rows: Sequence[Row]) -> Tensor:
        return labels([row.completion for row in rows], self._device)

    @property
    def _device(self) -> torch.device:
        return next(self._model.parameters()).device


def _row(prompt: tuple[int, ...], completion: tuple[int, ...], teacher_prompt: tuple[int, ...] = ()) -> Row:
    return Row(
        student_prompt=prompt,
        teacher_prompt=teacher_prompt,
        completion=completion,
        sampler_logprobs=(),
        component="",
        ratio=0.0,
        group=0,
    )
