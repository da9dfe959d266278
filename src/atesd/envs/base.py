"""What a student acts in. Environments speak messages: they know neither tokens nor models.

An environment opens one episode an attempt. An episode is asked in this order: `reset` once, then `step` with every
complete reply of the student until it returns no message or the limit of turns is reached, then `reward` and `close`.
What goes wrong in an episode ends that attempt alone: an `EpisodeError`, or any other exception, is counted
(`types.Ending`), and the attempt is not graded. A `UserError` ends the run: it says that the recipe is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Protocol, runtime_checkable

from pydantic import Field

from atesd.types import Ending, Message, Method, Problem, UserError, one_line, shown


class EpisodeError(Exception):
    """What an environment failed at."""

    def __init__(self, ending: Ending, why: str) -> None:
        super().__init__(why)
        self.ending = ending


class Episode(Protocol):
    """One attempt at a problem.

    `invalid`, where an episode has it, counts the replies that were no action; `close`, where it has one, is called at
    the end of every attempt.
    """

    def reset(self, prompt: Sequence[Message]) -> Sequence[Message]:
        """Return what the student reads first: `prompt`, the recipe's own for the problem, and what is said behind it.

        What is said behind it is appended to the last message (`opened`), so that the teacher reads it as well.
        """
        ...

    def step(self, reply: str) -> Sequence[Message]:
        """Take the student's reply and return what it reads next; nothing where the episode is over."""
        ...

    def reward(self) -> float | None:
        """Return the attempt's reward, None where it cannot be graded; asked only where the environment grades."""
        ...


@runtime_checkable
class Elsewhere(Protocol):
    """An episode that runs in another process: what it is asked next can be begun before the answer is waited for."""

    def begin(self, reply: str | None) -> None:
        """Begin the reset (None) or the step that is asked next."""
        ...


class Environment(Protocol):
    """Opens episodes. Where it grades, it may have `invalid_penalty`: what a reply that was no action costs."""

    @property
    def limit(self) -> int:
        """Most turns of an attempt."""
        ...

    @property
    def grades(self) -> bool:
        """Whether episodes reward themselves; else the recipe's reward function grades the final reply."""
        ...

    def episode(self, problem: Problem, seed: int) -> Episode:
        """Open an episode; whatever is random in it follows from the seed."""
        ...


class EnvMethod(Method):
    """Base of environments' sections."""

    declares: ClassVar[tuple[str, ...]] = ("limit", "grades", "describe", "build")

    needs: ClassVar[str] = ""
    """Column of `Problem.extra` without which no episode can be opened; "" where any problem will do."""

    @property
    def code(self) -> str | None:
        """The user's own code that episodes run, as `FILE.py:NAME` or `MODULE:NAME`; None where there is none."""
        return None


class GradingMethod(EnvMethod):
    """Base of sections of environments that grade the attempts themselves."""

    invalid_penalty: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    """Taken off an attempt's reward for every reply that was no action, once the attempt is graded; SDAR's code has .1.
    Success in evaluation is what the environment says, without it."""

    grades: ClassVar[bool] = True


def opened(prompt: Sequence[Message], said: str) -> list[Message]:
    """Return a prompt with what an environment says first, behind its last message."""
    *before, last = prompt
    return [*before, Message(role=last["role"], content=f"{last['content']}\n{said}" if said else last["content"])]


def needed(problem: Problem, column: str, kind: str) -> object:
    """Return a column of a problem that an environment plays. UserError where the problem has none."""
    if column not in problem.extra:
        raise UserError(
            f'env.kind = "{kind}" plays problems with a {column!r}, which {problem.id!r} has not: take the task that '
            "makes them (docs/agents.md)"
        )
    return problem.extra[column]


def missed(environment: Environment, problem: Problem, seed: int = 0) -> str | None:
    """Play an expert's replies and say why they do not reach the goal, a reward of 1; None where they do."""
    place = 0
    try:
        episode = environment.episode(problem, seed)
        said = episode.reset([Message(role="user", content=problem.problem)])
        for turn in problem.expert:
            if not said or place == environment.limit:
                break
            said = episode.step(turn.reply)
            place += 1
        reward = episode.reward() if environment.grades else None
        getattr(episode, "close", lambda: None)()
    except UserError:
        raise
    except Exception as error:  # an environment is anybody's code
        return f"the environment fails at turn {place + 1}: {type(error).__name__}: {one_line(str(error))[:100]}"
    if reward == 1.0:
        return None
    left = len(problem.expert) - place
    rest = f", and {left} turns of the expert are left over" if left else ""
    return f"the reward is {shown(reward, 30)} after {place} turns{rest}"
