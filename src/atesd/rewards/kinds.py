"""The graders by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import Field

from atesd.rewards.exact import exact_reward
from atesd.rewards.math import MathReward
from atesd.types import Config

RewardFunction = Callable[..., list[float | None]]
"""TRL's signature: f(prompts, completions, **columns) -> one reward or None ("not gradable") a completion."""


class ExactConfig(Config):
    """The final answer must equal the gold one as text, but for white space, case and a closing full stop."""

    kind: Literal["exact"] = "exact"

    def build(self) -> RewardFunction:
        """Return the reward function."""
        return exact_reward


class MathConfig(Config):
    """The final answer must mean the same as the gold one, by math-verify: LaTeX, fractions, sets, plain numbers."""

    kind: Literal["math"] = "math"
    timeout_s: Annotated[float, Field(gt=0)] = 5.0
    """Seconds for one comparison; one that takes longer scores 0."""

    def build(self) -> RewardFunction:
        """Return the reward function; its verifier process starts with the first answer that needs it."""
        return MathReward(self.timeout_s)


RewardConfig = Annotated[ExactConfig | MathConfig, Field(discriminator="kind")]
