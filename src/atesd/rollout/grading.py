"""From what a reward function or an environment returned to the grades of attempts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, cast, runtime_checkable

from atesd.rollout.attempt import LARGEST_REWARD
from atesd.types import Group, Trajectory, UserError, shown

RewardFunction = Callable[..., list[float | None]]
"""TRL's signature: f(prompts, completions, **columns) -> one reward or None ("not gradable") a completion."""


@runtime_checkable
class Composite(Protocol):
    """A reward function made of several, whose parts are wanted by name."""

    def parts(self, **columns: Any) -> Mapping[str, Sequence[float | None]]:
        """Return what each part gives."""
        ...

    def total(self, parts: Mapping[str, Sequence[float | None]]) -> list[float | None]:
        """Return the rewards that follow."""
        ...


@runtime_checkable
class Judging(Protocol):
    """A reward function that wants to know of whole rounds, also where it grades but shares of them."""

    def by_shares(self) -> RewardFunction:
        """Return it as it grades shares of rounds."""
        ...

    def judge(self, rewards: Sequence[float | None], answers: Sequence[str | None]) -> None:
        """Take in the rewards of a whole round. UserError where it should have graded something."""
        ...


def with_rewards(groups: Sequence[Group], rewards: Sequence[float | None]) -> list[Group]:
    """Fill in the grades of all attempts, group by group."""
    given = iter(rewards)
    return [
        replace(group, trajectories=tuple(_graded(attempt, next(given)) for attempt in group.trajectories))
        for group in groups
    ]


def _graded(attempt: Trajectory, reward: float | None) -> Trajectory:
    """Return an attempt with its grade: none where the environment failed in it, 0 where it was cut off."""
    is_graded = reward is not None and not attempt.ended.failed
    return replace(attempt, reward=None if not is_graded else 0.0 if attempt.truncated else reward)


def penalised(groups: Sequence[Group], penalty: float) -> list[Group]:
    """Take the penalty for replies that were no action off every grade; both parts are kept by name, success first.

    r = r_env - penalty * invalid, also where the attempt was cut off and r_env is 0 for that.
    """
    if not penalty:
        return list(groups)
    return [replace(group, trajectories=tuple(_less(each, penalty) for each in group.trajectories)) for group in groups]


def _less(attempt: Trajectory, penalty: float) -> Trajectory:
    given, taken = attempt.reward, 0.0 - penalty * attempt.invalid
    if given is None:
        return replace(attempt, rewards={"env": None, "invalid": None})
    return replace(attempt, reward=given + taken, rewards={"env": given, "invalid": taken})


def with_parts(groups: Sequence[Group], parts: Sequence[Mapping[str, float | None]]) -> list[Group]:
    """Fill in what each part of the reward gave; as with the whole, an attempt that was cut off is wrong."""
    given = iter(parts)
    return [
        replace(group, trajectories=tuple(_parts_of(attempt, next(given)) for attempt in group.trajectories))
        for group in groups
    ]


def _parts_of(attempt: Trajectory, parts: Mapping[str, float | None]) -> Trajectory:
    return replace(attempt, rewards={name: _graded(attempt, reward).reward for name, reward in parts.items()})


def plain_rewards(returned: object, completions: int) -> list[float | None]:
    """Return what a reward function returned as plain numbers. UserError says what else it was."""
    remedy = "return one a completion, None where it cannot be graded"
    if isinstance(returned, str | bytes | Mapping) or not (
        hasattr(returned, "__len__") and hasattr(returned, "__iter__")
    ):
        raise UserError(f"the reward function returned {shown(returned)} for {completions} completions: {remedy}")
    try:
        rewards = list(cast("Iterable[object]", returned))
    except TypeError as error:  # an array of no dimension has a length, but none that can be asked for
        raise UserError(f"the reward function returned {shown(returned)}, which is no list: {remedy}") from error
    if len(rewards) != completions:
        raise UserError(f"the reward function returned {len(rewards)} rewards for {completions} completions: {remedy}")
    return [None if reward is None else _plain_number(reward) for reward in rewards]


def _plain_number(reward: object) -> float:
    if not hasattr(reward, "__float__"):
        raise UserError(f"the reward function returned {shown(reward)}: return a number, or None for no grade")
    try:
        number = float(cast("float", reward))
    except (TypeError, ValueError, RuntimeError):  # an array of several numbers
        raise UserError(
            f"the reward function returned {shown(reward)}: return a number, or None for no grade"
        ) from None
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise UserError(f"the reward function returned {number}: return a finite number, or None for no grade")
    if abs(number) > LARGEST_REWARD:
        raise UserError(
            f"the reward function returned {number:g}, beyond {LARGEST_REWARD:g}, where advantages overflow: scale it"
        )
    return number
