"""A user's reward function behind checks, so that its mistakes end a run in one line that names it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from atesd.rewards.limit import OutOfTime, within
from atesd.types import UserError, first_line

_LARGEST = 1e6


class OwnReward:
    """Calls a reward function within its time limit and checks what it returns.

    UserError, which names the function, where it takes longer, raises, or does not return one finite number or None a
    completion, of at most a million in size (our choice: squares of larger ones drown in rounding); also where it has
    graded nothing so far although gold answers exist, unless it is one of several.
    """

    def __init__(self, place: str, function: Callable[..., Any], timeout_s: float, *, is_part: bool = False) -> None:
        self._place = place
        self._function = function
        self._timeout_s = timeout_s
        self._has_graded = is_part
        self._sees_all = True
        """Whether a call grades a whole round, and is judged by what it graded."""

    def as_part(self) -> OwnReward:
        """Return it as one of several rewards, which may have nothing to say about a whole batch."""
        return OwnReward(self._place, self._function, self._timeout_s, is_part=True)

    def by_shares(self) -> OwnReward:
        """Return it as it grades shares of rounds, of which the whole is given to `judge`."""
        other = OwnReward(self._place, self._function, self._timeout_s, is_part=self._has_graded)
        other._sees_all = False
        return other

    def judge(self, rewards: Sequence[float | None], answers: Sequence[str | None]) -> None:
        """Take in the rewards of a whole round. UserError where nothing is graded so far."""
        self._has_graded = self._has_graded or any(reward is not None for reward in rewards)
        if not self._has_graded and any(gold is not None for gold in answers):
            raise self._error(
                f"returned None for all {len(rewards)} completions, though there are gold answers to grade by",
                "return a number wherever it can grade",
            )

    def __call__(self, prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float | None]:
        """Grade a batch, in TRL's signature."""
        given = {"prompts": prompts, "completions": completions, **columns}
        copies = {name: list(values) for name, values in given.items()}  # it may edit them, and other rewards read them
        returned = self._call(partial(self._function, **copies), completions)
        rewards = self._checked(returned, len(completions))
        if self._sees_all:
            self.judge(rewards, columns.get("answer", ()))
        return rewards

    def _call(self, call: Callable[[], Any], completions: Sequence[str]) -> Any:
        try:
            return within(self._timeout_s, call)
        except OutOfTime as error:
            raise self._error(
                f"took more than {self._timeout_s:g} s for {len(completions)} completions",
                "mend what it waits for, or raise reward.timeout_s",
            ) from error
        except (Exception, SystemExit) as error:
            said = f": {first_line(error)}" if str(error).strip() else ""
            raise self._error(
                f"raised {type(error).__name__}{said}",
                "mend it, or let it return None for a completion that it cannot grade",
            ) from error

    def _checked(self, returned: Any, completions: int) -> list[float | None]:
        rewards = _listed(returned)
        if rewards is None:
            raise self._error(f"returned {_shown(returned)}", "return a list with one number or None a completion")
        if len(rewards) != completions:
            raise self._error(
                f"returned {len(rewards)} rewards for {completions} completions",
                "return one a completion, None where it cannot be graded",
            )
        return [None if reward is None else self._number(reward) for reward in rewards]

    def _number(self, reward: Any) -> float:
        number = _float(reward)
        if number is None or not abs(number) <= _LARGEST:
            raise self._error(
                f"returned {_shown(reward)} for a completion",
                f"return a finite number of at most {_LARGEST:g} in size, or None for no grade",
            )
        return number

    def _error(self, what: str, remedy: str) -> UserError:
        return UserError(f"reward.function = {self._place!r} {what}: {remedy}")


def _listed(returned: Any) -> list[Any] | None:
    """Return a list, an array or a tensor as a list; None for what is no sequence, text and scalar arrays included."""
    if isinstance(returned, str | bytes | Mapping) or not hasattr(returned, "__getitem__"):
        return None
    try:
        return list(returned)
    except TypeError:
        return None


def _float(reward: Any) -> float | None:
    if isinstance(reward, str | bytes):
        return None
    try:
        return float(reward)
    except (TypeError, ValueError, OverflowError):
        return None


def _shown(value: Any) -> str:
    return " ".join(repr(value).split())[:80]
