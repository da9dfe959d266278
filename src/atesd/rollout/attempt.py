"""One attempt under way, and what comes of an environment that fails in it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import index
from typing import TypeVar, cast

from atesd.envs.base import Elsewhere, Environment, Episode, EpisodeError
from atesd.types import Ending, Message, Problem, StopReason, Trajectory, Turn, UserError, one_line, shown

T = TypeVar("T")
LARGEST_REWARD = 1e9
"""Beyond it advantages overflow."""


@dataclass(slots=True)
class Attempt:
    """What the student reads next, and its turns so far.

    Every question to the episode is asked here, so that an exception, a hang or nonsense ends this attempt alone.
    """

    episode: Episode
    prompt: list[int] = field(default_factory=list)
    reference: Sequence[int] = ()
    """What the student might write: ids of the solution, or of all of an expert's replies."""
    turns: list[Turn] = field(default_factory=list)
    opening: str = ""
    said: list[str] = field(default_factory=list)
    """What the environment answered to each turn."""
    ended: Ending | None = None
    why: str = ""
    """What the environment failed at."""

    def begin(self, turn: Turn | None) -> None:
        """Let an episode in another process begin with what it is asked next: its reset, or a turn's step."""
        cut_off = turn is not None and turn.stop is StopReason.LENGTH
        if isinstance(self.episode, Elsewhere) and self.ended is None and not cut_off:
            self.guarded(lambda: cast("Elsewhere", self.episode).begin(None if turn is None else turn.text))

    def reset(self, prompt: Sequence[Message]) -> Sequence[Message]:
        """Return what the student reads first: the recipe's prompt alone where the environment fails at once."""
        said = self.guarded(lambda: messages_of(self.episode.reset(prompt)))
        if not said:
            self.fail(Ending.NOT_TEXT, "it says nothing at the reset")
            return prompt
        whole, last = prompt[-1]["content"], said[-1]["content"]
        if list(said[:-1]) == list(prompt[:-1]) and last.startswith(whole):
            self.opening = last[len(whole) :]
        else:
            self.fail(Ending.NOT_TEXT, "its reset does not begin with the recipe's prompt")
            return prompt
        return said

    def step(self, turn: Turn, limit: int) -> Sequence[Message]:
        """Take in a sampled turn and return what the student reads next; nothing where the attempt is over."""
        self.turns.append(turn)
        if self.ended is not None:
            return ()
        if turn.stop is StopReason.LENGTH:
            self.ended = Ending.LENGTH
            return ()
        said = self.guarded(lambda: messages_of(self.episode.step(turn.text)))
        if not said:
            self.ended = self.ended or Ending.OVER
            return ()
        self.said.append("\n".join(message["content"] for message in said))
        if len(self.turns) == limit:
            self.ended = Ending.LIMIT
            return ()
        return said

    def reward(self) -> float | None:
        """Ask for the reward: None where the environment failed."""
        if self.ended is not None and self.ended.failed:
            return None
        given = self.guarded(self.episode.reward)
        if given is None:
            return None
        try:
            number = float(given)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not abs(number) <= LARGEST_REWARD:
            self.fail(Ending.BAD_REWARD, f"its reward is {shown(given, 60)}")
            return None
        return number

    def close(self) -> Trajectory:
        """End the episode and return what came of it, not graded yet."""
        try:
            getattr(self.episode, "close", lambda: None)()
        except (Exception, SystemExit) as error:  # as in `guarded`, but an attempt that failed is closed as well
            self._raised(error)
        invalid = self._invalid()
        return Trajectory(
            tuple(self.turns),
            opening=self.opening,
            said=tuple(self.said),
            ended=self.ended or Ending.OVER,
            invalid=invalid,
        )

    def _invalid(self) -> int:
        """Return how many replies were no action; what is no such number is the environment's failure."""
        given = getattr(self.episode, "invalid", 0)
        try:
            count = index(given)
        except TypeError:
            count = -1
        if count < 0:
            self.fail(Ending.ERROR, f"its number of invalid replies is {shown(given, 60)}")
        return max(0, count)

    def fail(self, ending: Ending, why: str) -> None:
        """Note what the environment failed at; what failed first counts."""
        if self.ended is None or not self.ended.failed:
            self.ended, self.why = ending, one_line(why)[:200]

    def guarded(self, ask: Callable[[], T]) -> T | None:
        """Return what a question gives; None where it fails."""
        if self.ended is not None and self.ended.failed:
            return None
        try:
            return ask()
        except (Exception, SystemExit) as error:  # an environment is anybody's code
            self._raised(error)
        return None

    def _raised(self, error: BaseException) -> None:
        if isinstance(error, UserError):
            raise error
        if isinstance(error, EpisodeError):
            self.fail(error.ending, str(error))
            return
        first = (str(error).splitlines() or [""])[0]
        self.fail(Ending.ERROR, f"it raised {type(error).__name__}{first and ': '}{first}")


class _Unopened:
    """The episode of an environment that failed to open one: it fails at the reset, as that one would."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def reset(self, prompt: Sequence[Message]) -> Sequence[Message]:  # noqa: ARG002
        raise self._error

    def step(self, reply: str) -> Sequence[Message]:  # noqa: ARG002
        raise self._error

    def reward(self) -> float | None:
        raise self._error


def episode_of(environment: Environment, problem: Problem, seed: int) -> Episode:
    """Open an episode; one that cannot be opened ends its attempt alone, as one that fails later."""
    try:
        return environment.episode(problem, seed)
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # an environment is anybody's code
        return _Unopened(error)


def messages_of(said: object) -> Sequence[Message]:
    """Return an environment's messages. EpisodeError unless they are some of text."""
    if isinstance(said, str | bytes) or not isinstance(said, Sequence):
        raise EpisodeError(Ending.NOT_TEXT, f"it says {shown(said, 60)}, which is no list of messages")
    for message in said:
        is_text = isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
        if not is_text:
            raise EpisodeError(Ending.NOT_TEXT, f"it says {shown(message, 60)}, which is no message of text")
        if any("\ud800" <= character <= "\udfff" for character in message["content"]):  # no tokenizer reads it
            raise EpisodeError(Ending.NOT_TEXT, f"it says {shown(message, 60)}, with half of a surrogate pair")
    return cast("Sequence[Message]", said)
