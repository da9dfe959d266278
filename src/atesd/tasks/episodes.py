"""Problems for environments that need no data: one text, and a seed a problem."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from atesd.facts import RunFacts
from atesd.rewards.kinds import ExactConfig, Grader
from atesd.tasks.base import Task, TaskMethod
from atesd.types import Problem


class EpisodesConfig(TaskMethod):
    """Numbered episodes of an environment, which opens each with its number as the seed. They have no expert: reinforce
    them, or show their teacher skills (reveal `skills`)."""

    kind: Literal["episodes"] = "episodes"
    text: Annotated[str, Field(min_length=1)]
    """What every problem says; the environment adds what it says first, the number tells problems apart."""
    train_size: Annotated[int, Field(ge=1)] = 256
    """Training episodes."""
    eval_size: Annotated[int, Field(ge=1)] = 32
    """Held-out episodes."""
    first_seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the first episode; held-out ones come behind the training ones."""

    def build(self, run: RunFacts) -> Task:  # noqa: ARG002
        """Return the task."""
        return EpisodesTask(self.text, self.first_seed, self.train_size, self.eval_size)


@dataclass(frozen=True, slots=True)
class EpisodesTask:
    """Seeds in two sets; there is no probe, for nothing could be read on it."""

    text: str
    first_seed: int
    train_size: int
    eval_size: int
    name: str = "episodes"
    default_reward: Grader = field(default_factory=ExactConfig)

    def train(self) -> list[Problem]:
        """Return the training episodes."""
        return [self._problem(number) for number in range(self.train_size)]

    def probe(self) -> list[Problem]:
        """Return nothing."""
        return []

    def evaluation(self) -> list[Problem]:
        """Return the held-out episodes."""
        return [self._problem(self.train_size + number) for number in range(self.eval_size)]

    def traits(self, problem: Problem, completion: str) -> dict[str, bool]:  # noqa: ARG002
        """Count nothing."""
        return {}

    def _problem(self, number: int) -> Problem:
        seed = self.first_seed + number
        text = f"{self.text}\nEpisode {seed}."
        return Problem(id=f"episode-{seed}", problem=text, solution=text, answer=self.text, extra={"seed": seed})
