"""The probe set: fixed problems, never trained on, on which the student's progress and the teacher's use are measured.

The exposure reaches these numbers only through learning. Each method returns a number, or None where there is nothing
to measure; `train/measure.py` says under which name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from atesd.losses.target import Plain
from atesd.rollout.driver import Driver
from atesd.rollout.sampler import SamplingConfig
from atesd.seeds import derive_seed
from atesd.train.batch import Passage
from atesd.train.hints import Hints
from atesd.train.scorer import Scorer
from atesd.train.teacher import Teacher
from atesd.types import Group, Problem


class Probe:
    """The probe set, and how the model does on it."""

    def __init__(
        self,
        problems: Sequence[Problem],
        *,
        scorer: Scorer,
        teacher: Teacher,
        hints: Hints,
        driver: Driver,
        sampling: SamplingConfig,
        completions: int,
        max_tokens: int,
        seed: int,
    ) -> None:
        self.problems = problems
        self.hints = hints
        self._scorer = scorer
        self._teacher = teacher
        self._driver = driver
        self._sampling = sampling
        self._completions = completions
        self._max_tokens = max_tokens
        self._seed = seed
        self._stored: list[Passage] | None = None
        self._groups: list[Group] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the stored completions, which later weights could not sample again."""
        return {"stored": self._stored}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        stored = state["stored"]
        self._stored = None if stored is None else [Passage(*map(tuple, passage)) for passage in stored]

    def forget(self) -> None:
        """Drop the samples of weights that have moved on."""
        self._groups = None

    @cached_property
    def references(self) -> list[Passage]:
        """The reference solutions behind the student's prompts."""
        return [self._reference(problem) for problem in self.problems]

    def nll(self) -> float:
        """Return the token-mean NLL of the references under the student, without any hint."""
        return -self._mean_log_likelihood(self.references)

    def nll_of(self, problems: Sequence[Problem]) -> dict[str, float]:
        """Return the token-mean NLL of any problems' references under the student, hint-free, by problem id."""
        passages = [self._reference(problem) for problem in problems]
        with torch.no_grad():
            tokens = self._scorer.each(passages, self._scorer.log_likelihood)
        return {problem.id: -float(each.double().mean()) for problem, each in zip(problems, tokens, strict=True)}

    def kl(self) -> float:
        """Return the token-mean KL(teacher at ratio 1 || student) on completions kept since it was first taken."""
        hinted = {
            passage: Passage(self.hints.teacher_ids(problem, 1.0), passage.completion)
            for problem, passage in zip(self.problems, self._stored_passages(), strict=True)
        }

        def divergence(chosen: Sequence[Passage]) -> Tensor:
            view = self._scorer.view([hinted[passage] for passage in chosen], self._teacher)
            return self._scorer.against(self._scorer.hidden(chosen), [view], chosen, Plain(), plain=True).divergence_N

        return self._scorer.mean(self._stored_passages(), divergence)

    def accuracy(self) -> float | None:
        """Return the mean reward of hint-free completions, with one sampling seed; None if none is graded."""
        rewards = [reward for group in self.samples() for reward in group.rewards]
        return float(np.mean(rewards)) if rewards else None

    def teacher_log_likelihood(self, ratio: float, text_of: Callable[[Problem], str]) -> float | None:
        """Return the token-mean log-probability of texts under the teacher at a ratio; None where no text is left."""
        texts = [(problem, text_of(problem)) for problem in self.problems]
        passages = [
            Passage(self.hints.teacher_ids(problem, ratio), self._ids(text)) for problem, text in texts if text.strip()
        ]
        if not passages:
            return None
        with self._teacher.in_place():
            return self._mean_log_likelihood(passages)

    def unrevealed(self, problem: Problem, ratio: float) -> str:
        """Return the hidden segments of a solution, joined."""
        return "".join(problem.solution[start:end] for start, end in self.hints.shown(problem, ratio).hidden_spans)

    def samples(self) -> list[Group]:
        """Return hint-free completions of the probe problems, the same seed every time, until they are forgotten."""
        if self._groups is None:
            sampling = self._sampling.model_copy(update={"group_size": self._completions})
            self._groups = self._driver.rollout(self.problems, sampling, seed=derive_seed(self._seed, "probe"))
        return self._groups

    def _mean_log_likelihood(self, passages: Sequence[Passage]) -> float:
        return self._scorer.mean(passages, self._scorer.log_likelihood)

    def _stored_passages(self) -> list[Passage]:
        """Return one completion a problem, sampled when first asked for: at step 0."""
        if self._stored is None:
            sampling = self._sampling.model_copy(update={"group_size": 1})
            groups = self._driver.rollout(self.problems, sampling, seed=derive_seed(self._seed, "probe_kl"))
            finals = [group.trajectories[0].final for group in groups]
            self._stored = [Passage(turn.prompt_ids, turn.completion_ids) for turn in finals]
        return self._stored

    def _reference(self, problem: Problem) -> Passage:
        return Passage(self.hints.student_ids(problem), self._ids(problem.solution))

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(self._driver.renderer.solution_ids(text, self._max_tokens))
