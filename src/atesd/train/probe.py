"""The probe set: fixed problems, never trained on, on which the student's progress and the teacher's use are measured.

The exposure reaches these numbers only through learning. Each method returns a number, or None where there is nothing
to measure; `train/measure.py` says under which name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import accumulate
from typing import Any, Literal, NamedTuple

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
from atesd.transfer import numbers_of
from atesd.types import Group, Problem

Part = Literal["solution", "answer", "hidden"]
"""What of a reference the teacher is asked about: all of it, its answer, or what the ratio hides."""


class Told(NamedTuple):
    """A turn of a probe problem's conversation, as any role can be put before it."""

    problem: int
    """Its place in the probe set."""
    opening: str
    """What the environment said first."""
    told: tuple[int, ...]
    """What stands between the first prompt and the reply, in ids: nothing in a first turn."""
    student: Passage


class Probe:
    """The probe set, and how the model does on it."""

    def __init__(
        self,
        problems: Sequence[Problem],
        *,
        scorer: Scorer,
        teacher: Teacher,
        base: Teacher | None = None,
        hints: Hints,
        driver: Driver,
        sampling: SamplingConfig,
        completions: int,
        max_tokens: int,
        context: int | None,
        seed: int,
    ) -> None:
        self.problems = problems
        self.hints = hints
        self._scorer = scorer
        self._teacher = teacher
        self._base = base or teacher
        self._driver = driver
        self._sampling = sampling
        self._completions = completions
        self._max_tokens = max_tokens
        self._context = context
        self._seed = seed
        self._stored: list[Told] | None = None
        self._groups: list[Group] | None = None
        self._experts: dict[str, list[Told]] = {}

    def state_dict(self) -> dict[str, Any]:
        """Return the stored completions, which later weights could not sample again."""
        return {"stored": self._stored}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        stored = state["stored"]
        self._stored = (
            None
            if stored is None
            else [
                Told(place, opening, tuple(told), Passage(tuple(prompt), tuple(reply)))
                for place, opening, told, (prompt, reply, *_) in stored
            ]
        )

    def forget(self) -> None:
        """Drop the samples of weights that have moved on."""
        self._groups = None

    @cached_property
    def references(self) -> list[Passage]:
        """The reference solutions behind the student's prompts; an expert's replies in their conversations."""
        return [passage for problem in self.problems for passage in self._reference(problem)]

    def nll(self) -> float:
        """Return the token-mean NLL of the references under the student, without any hint."""
        return -self._mean_log_likelihood(self.references)

    def nll_of(self, problems: Sequence[Problem]) -> dict[str, float]:
        """Return the token-mean NLL of any problems' references under the student, hint-free, by problem id."""
        own = self._scorer.world.share(problems)
        passages = [(problem.id, passage) for problem in own for passage in self._reference(problem)]
        with torch.no_grad():
            tokens = self._scorer.each([passage for _, passage in passages], self._scorer.log_likelihood)
        scores: dict[str, list[Tensor]] = {}
        for (name, _), each in zip(passages, tokens, strict=True):
            scores.setdefault(name, []).append(each)
        means = numbers_of([torch.cat(each).double().mean() for each in scores.values()])
        found = {name: -mean for name, mean in zip(scores, means, strict=True)}
        known = {name: value for hand in self._scorer.world.collect(found) for name, value in hand.items()}
        return {problem.id: known[problem.id] for problem in problems}

    def kl(self) -> float:
        """Return the token-mean KL(teacher at ratio 1 || student) on completions kept since it was first taken.

        The teacher is that of step 0 where its weights are kept, so that what moves is the student.
        """
        stored = self._stored_turns()
        hinted = {each.student: self.hinted(each, 1.0) for each in stored}

        def divergence(chosen: Sequence[Passage]) -> Tensor:
            view = self._scorer.view([hinted[passage] for passage in chosen], self._base)
            return self._scorer.against(self._scorer.hidden(chosen), [view], chosen, Plain(), plain=True).divergence_N

        return self._scorer.mean([each.student for each in stored], divergence)

    def accuracy(self) -> float | None:
        """Return the mean reward of hint-free completions, with one sampling seed; None if none is graded."""
        return _mean_reward(self.samples())

    def teacher_accuracy(self, ratio: float) -> float | None:
        """Return the mean reward of the teacher's own completions with its hint at a ratio, sampled as `accuracy`'s."""
        driver = replace(
            self._driver,
            student_messages=lambda problem: self.hints.teacher_messages(problem, ratio),
            of_teacher=True,
        )
        with self._teacher.in_place():
            groups = driver.rollout(self.problems, self._probing, seed=derive_seed(self._seed, "probe"))
        return _mean_reward(groups)

    def hinted(self, turn: Told, ratio: float) -> Passage:
        """Return a turn as the teacher reads it at a ratio, whatever the rollout."""
        hint = self.hints.hint(self.problems[turn.problem], ratio, opening=turn.opening)
        return Passage(hint.prompt_ids + turn.told, turn.student.completion, hint.veil)

    def teacher_log_likelihood(self, ratio: float, part: Part) -> float | None:
        """Return the token-mean log-probability of a part of the references under the teacher at a ratio.

        An expert's answer is its last turn. None where nothing of any reference is left.
        """
        passages = [
            passage
            for place, problem in enumerate(self.problems)
            for passage in self._part(place, problem, ratio, part)
        ]
        if not passages:
            return None
        with self._teacher.in_place():
            return self._mean_log_likelihood(passages)

    def _part(self, place: int, problem: Problem, ratio: float, part: Part) -> list[Passage]:
        """Return what is asked of one problem, behind the teacher's prompt."""
        if problem.expert:
            turns = self._replayed(problem)
            spans = self.hints.shown(problem, ratio).hidden_spans
            starts = accumulate((len(turn.text) for turn in problem.expert), initial=0)
            hidden = [any(low <= start < high for low, high in spans) for start, _ in zip(starts, turns, strict=False)]
            chosen = {
                "solution": turns,
                "answer": turns[-1:],
                "hidden": [turn for turn, hides in zip(turns, hidden, strict=True) if hides],
            }[part]
            return [self.hinted(turn._replace(problem=place), ratio) for turn in chosen]
        text = {
            "solution": problem.solution,
            "answer": problem.answer or "",
            "hidden": self.unrevealed(problem, ratio),
        }[part]
        hint = self.hints.hint(problem, ratio)
        return [Passage(hint.prompt_ids, self._ids(problem, text), hint.veil)] if text.strip() else []

    def unrevealed(self, problem: Problem, ratio: float) -> str:
        """Return the hidden segments of a solution, joined."""
        return "".join(problem.solution[start:end] for start, end in self.hints.shown(problem, ratio).hidden_spans)

    def turns_of_samples(self) -> list[Told]:
        """Return every turn of the hint-free completions, problem by problem."""
        return [turn for place, group in enumerate(self.samples()) for turn in _told(place, group)]

    def samples(self) -> list[Group]:
        """Return hint-free completions of the probe problems, the same seed every time, until they are forgotten."""
        if self._groups is None:
            self._groups = self._driver.rollout(self.problems, self._probing, seed=derive_seed(self._seed, "probe"))
        return self._groups

    @property
    def _probing(self) -> SamplingConfig:
        """How probe problems are answered."""
        return self._sampling.model_copy(update={"group_size": self._completions})

    def _mean_log_likelihood(self, passages: Sequence[Passage]) -> float:
        return self._scorer.mean(passages, self._scorer.log_likelihood)

    def _stored_turns(self) -> list[Told]:
        """Return the turns of one attempt at each problem, sampled when first asked for: at step 0."""
        if self._stored is None:
            sampling = self._sampling.model_copy(update={"group_size": 1})
            groups = self._driver.rollout(self.problems, sampling, seed=derive_seed(self._seed, "probe_kl"))
            self._stored = [turn for place, group in enumerate(groups) for turn in _told(place, group)]
        return self._stored

    def _reference(self, problem: Problem) -> list[Passage]:
        if problem.expert:
            return [turn.student for turn in self._replayed(problem)]
        return [Passage(self.hints.student_ids(problem), self._ids(problem, problem.solution))]

    def _replayed(self, problem: Problem) -> list[Told]:
        """Return the expert's turns, played in the environment once."""
        if problem.id not in self._experts:
            (group,) = self._driver.replay([problem])
            self._experts[problem.id] = _told(0, group)
        return self._experts[problem.id]

    def _ids(self, problem: Problem, text: str) -> tuple[int, ...]:
        """Return the first tokens of a text: as many at every ratio as fit the context behind the longest prompt."""
        ids = tuple(self._driver.renderer.solution_ids(text, self._max_tokens))
        if self._context is None or len(ids) <= self._sampling.max_new_tokens:  # which fit: others were left out
            return ids
        return ids[: max(0, self._context - self.hints.longest(problem))]


def _mean_reward(groups: Sequence[Group]) -> float | None:
    rewards = [reward for group in groups for reward in group.rewards]
    return float(np.mean(rewards)) if rewards else None


def _told(place: int, group: Group) -> list[Told]:
    """Return the turns of a group's attempts."""
    return [
        Told(place, attempt.opening, attempt.told(turn), Passage(turn.prompt_ids, turn.completion_ids))
        for attempt in group.trajectories
        for turn in attempt.turns
    ]
