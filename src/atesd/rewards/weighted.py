"""Several rewards as one: their weighted sum.

    total = sum of weight_i * reward_i over the rewards i that graded the completion; None where none did

As in TRL. A reward of None therefore lowers no total, but totals of problems that different rewards grade are on
different scales: within a group, where advantages compare, all completions belong to one problem. One of several may
return None for a whole batch, as rewards that each grade one domain do; the only one may not (`rewards/own.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from atesd.facts import RunFacts
from atesd.rewards.kinds import Grader, NamedGrader, RewardFunction
from atesd.rewards.own import OwnReward
from atesd.types import UserError, shown


class WeightedReward:
    """Grades with every reward, and remembers none of it; see the module for the sum."""

    def __init__(self, functions: Mapping[str, RewardFunction], weights: Mapping[str, float]) -> None:
        self._functions = functions
        self._weights = weights

    @property
    def timeouts(self) -> int:
        """Answers that graders gave up on since the process began."""
        return sum(getattr(function, "timeouts", 0) for function in self._functions.values())

    def by_shares(self) -> WeightedReward:
        """Return it as it grades shares of rounds, of which the whole is given to `judge`."""
        return WeightedReward({name: _by_shares(each) for name, each in self._functions.items()}, self._weights)

    def judge(self, rewards: Sequence[float | None], answers: Sequence[str | None]) -> None:
        """Take in the rewards of a whole round. UserError where the only reward has graded nothing so far."""
        for function in self._functions.values():
            if isinstance(function, OwnReward):
                function.judge(rewards, answers)

    def __call__(self, prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float | None]:
        """Grade a batch, in TRL's signature."""
        return self.total(self.parts(prompts=prompts, completions=completions, **columns))

    def parts(self, **columns: Any) -> dict[str, list[float | None]]:
        """Return what each reward gives, by its name."""
        return {name: function(**columns) for name, function in self._functions.items()}

    def total(self, parts: Mapping[str, Sequence[float | None]]) -> list[float | None]:
        """Return the weighted sum of each completion."""
        return [self._sum(dict(zip(parts, given, strict=True))) for given in zip(*parts.values(), strict=True)]

    def _sum(self, given: Mapping[str, float | None]) -> float | None:
        graded = [self._weights[name] * reward for name, reward in given.items() if reward is not None]
        return sum(graded) if graded else None


def _by_shares(function: RewardFunction) -> RewardFunction:
    return function.by_shares() if isinstance(function, OwnReward) else function


def build_reward(section: NamedGrader | Sequence[NamedGrader] | None, default: Grader, run: RunFacts) -> RewardFunction:
    """Return the reward function of a recipe's `reward`: one table, a list of them, or none (the task's default).

    One reward of weight 1 without a name of its own is itself; everything else is weighted, and logged by name.
    """
    if section is None:
        return _built(default, run)
    if not isinstance(section, Sequence):
        if section.weight == 1 and section.name is None:
            return _built(section, run)
        section = [section]
    functions = {each.called: _built(each, run) for each in section}
    if len(functions) > 1:
        functions = {name: each.as_part() if isinstance(each, OwnReward) else each for name, each in functions.items()}
    return WeightedReward(functions, {each.called: each.weight for each in section})


def _built(section: Grader, run: RunFacts) -> RewardFunction:
    function = section.build(run)
    if not callable(function):
        raise UserError(
            f"{type(section).__name__}.build returned {shown(function, 60)}: return a function of prompts, completions "
            "and **columns (docs/data.md)"
        )
    return function
