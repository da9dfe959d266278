"""The embedded environment: doors in a row, each behind a lock that only a look shows (`tasks/synthetic/doors.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, cast

from pydantic import Field

from atesd.envs.base import Environment, GradingMethod, needed, opened
from atesd.facts import RunFacts
from atesd.types import Message, Problem

LOOK, SHUT = "*", "-"


class Doors(GradingMethod):
    """Doors in a row. Success, the goal reached within the limit of turns, is a reward of 1, all else 0.

    A reply that is neither a look nor one digit is no action: the door stays shut.
    """

    kind: Literal["doors"] = "doors"
    limit: Annotated[int, Field(ge=1)] = 9
    """Most turns; an expert needs two a door."""

    needs: ClassVar[str] = "doors"

    def describe(self) -> str:
        """Say what the student acts in."""
        return f"The student opens a row of doors whose locks only a look shows, in at most {self.limit} turns"

    def build(self, run: RunFacts) -> Environment:  # noqa: ARG002
        """Return the environment."""
        return self

    def episode(self, problem: Problem, seed: int) -> Row:  # noqa: ARG002
        """Open an episode."""
        return Row(cast("list[list[Any]]", needed(problem, self.needs, self.kind)))


class Row:
    """One attempt at a row of doors, each a name, a lock and the key that opens it."""

    def __init__(self, doors: Sequence[Sequence[Any]]) -> None:
        self._doors = [(str(name), str(lock), str(key)) for name, lock, key in doors]
        self._place = 0
        self.invalid = 0

    def reset(self, prompt: Sequence[Message]) -> Sequence[Message]:
        """Stand before the first door."""
        return opened(prompt, self._doors[0][0])

    def step(self, reply: str) -> Sequence[Message]:
        """Look, or try a key."""
        name, lock, key = self._doors[self._place]
        if reply == LOOK:
            return (Message(role="user", content=name + lock),)
        if reply == key:
            self._place += 1
            over = self._place == len(self._doors)
            return () if over else (Message(role="user", content=self._doors[self._place][0]),)
        self.invalid += not (len(reply) == 1 and reply.isdecimal())
        return (Message(role="user", content=name + SHUT),)

    def reward(self) -> float | None:
        """Return 1 at the goal."""
        return float(self._place == len(self._doors))
