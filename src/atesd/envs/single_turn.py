"""One prompt, one completion: the smallest environment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from atesd.envs.base import Environment, EnvMethod
from atesd.facts import RunFacts
from atesd.types import Message, Problem


class SingleTurn(EnvMethod):
    """Ask the problem once; the recipe's reward function grades the reply."""

    kind: Literal["single_turn"] = "single_turn"

    limit: ClassVar[int] = 1
    grades: ClassVar[bool] = False

    def describe(self) -> str:
        """Nothing to say."""
        return ""

    def build(self, run: RunFacts) -> Environment:  # noqa: ARG002
        """Return the environment."""
        return self

    def episode(self, problem: Problem, seed: int) -> OneReply:  # noqa: ARG002
        """Open an episode."""
        return OneReply()


class OneReply:
    """An episode that is over after the first reply."""

    def reset(self, prompt: Sequence[Message]) -> Sequence[Message]:
        """Ask the problem as the recipe words it."""
        return prompt

    def step(self, reply: str) -> Sequence[Message]:  # noqa: ARG002
        """End."""
        return ()

    def reward(self) -> float | None:
        """Leave it to the grader."""
        return None
