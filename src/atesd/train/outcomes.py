"""Graded completions of the steps before: what is known of which answers are right, to ask the teacher's signal by.

A_i, an attempt's advantage, is its reward minus what was to be expected:

    several graded attempts at the problem     the mean of the others
    a single one                               the running mean of the problem's level; of all, without levels

The running mean of a level starts at its first step's mean and then moves by (1 - decay) a step; an attempt is compared
with the mean before its own step, but for the first. Ungradable attempts are left out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from atesd.train.batch import Passage
from atesd.types import Group

DECAY = 0.9


class Graded(NamedTuple):
    """One sampled turn of a graded attempt."""

    passage: Passage
    advantage: float
    group: int
    """Which problem of its step it answers."""


class Outcomes:
    """Keeps the graded turns of the latest steps, the newest apart: that one is what is asked about."""

    def __init__(self, steps: int) -> None:
        self._kept: deque[list[Graded]] = deque(maxlen=steps)
        self._newest: list[Graded] | None = None
        self._means: dict[str, float] = {}
        self._expected: dict[str, float] = {}

    def of(self, group: Group) -> list[float | None]:
        """Return the advantage of each attempt of a group of the newest step; None where it is not graded."""
        return advantages(group, self._expected.get(group.problem.level))

    def add(self, groups: Sequence[Group]) -> None:
        """Take in a step's groups; the step before joins those that are kept."""
        if self._newest is not None:
            self._kept.append(self._newest)
        rewards: dict[str, list[float]] = {}
        for group in groups:
            rewards.setdefault(group.problem.level, []).extend(group.rewards)
        now = {level: sum(values) / len(values) for level, values in rewards.items() if values}
        self._expected = expected = now | self._means
        self._newest = [
            Graded(Passage(turn.prompt_ids, turn.completion_ids), advantage, index)
            for index, group in enumerate(groups)
            for attempt, advantage in zip(
                group.trajectories, advantages(group, expected.get(group.problem.level)), strict=True
            )
            if advantage is not None
            for turn in attempt.turns
        ]
        for level, mean in now.items():
            self._means[level] = DECAY * expected[level] + (1 - DECAY) * mean

    def earlier(self) -> list[Graded]:
        """Return what is kept of the steps before the latest, their problems numbered through."""
        found: list[Graded] = []
        for step in self._kept:
            begin = found[-1].group + 1 if found else 0
            found += [graded._replace(group=begin + graded.group) for graded in step]
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return everything, as JSON-able values."""
        return {"kept": list(self._kept), "newest": self._newest, "means": self._means}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._kept.clear()
        self._kept.extend(_restored(step) for step in state["kept"])
        self._newest = None if state["newest"] is None else _restored(state["newest"])
        self._means = dict(state["means"])


def advantages(group: Group, expected: float | None) -> list[float | None]:
    """Return the attempts' advantages; `expected` is for one without other graded attempts at its problem."""
    count, total = len(group.rewards), sum(group.rewards)
    found: list[float | None] = []
    for attempt in group.trajectories:
        others = (total - (attempt.reward or 0.0)) / (count - 1) if count > 1 else expected
        found.append(None if attempt.reward is None or others is None else attempt.reward - others)
    return found


def _restored(step: Sequence[Sequence[Any]]) -> list[Graded]:
    return [
        Graded(Passage(tuple(prompt), tuple(reply)), advantage, group) for (prompt, reply, *_), advantage, group in step
    ]
