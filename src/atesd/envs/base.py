"""What a student acts in. Environments speak messages: they know neither tokens nor models.

An environment opens one episode an attempt. An episode is asked in this order: `reset` once, then `step` with every
complete reply of the student until it returns no message or the limit of turns is reached.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Protocol

from atesd.types import Message, Method, Problem


class Episode(Protocol):
    """One attempt at a problem."""

    def reset(self, prompt: Sequence[Message]) -> Sequence[Message]:
        """Return what the student reads first; `prompt` is the recipe's own prompt for the problem."""
        ...

    def step(self, reply: str) -> Sequence[Message]:
        """Take the student's reply and return what it reads next; nothing where the episode is over."""
        ...

    def reward(self) -> float | None:
        """Return the attempt's reward, None where it cannot be graded; asked only where the environment grades."""
        ...


class Environment(Protocol):
    """Opens episodes."""

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
