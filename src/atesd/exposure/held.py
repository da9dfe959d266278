"""What controllers share that show all problems one ratio and renew it at every window boundary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Self

from pydantic import Field, model_validator

from atesd.exposure.controller import ExposureMethod
from atesd.exposure.window import HoldClock, step_counts
from atesd.types import Observation

Ratio = Annotated[float, Field(ge=0.0, le=1.0)]


class HeldMethod(ExposureMethod):
    """Base of their sections."""

    hold: int = Field(default=5, ge=1)
    """Updates that share one ratio; a step without a distilled group counts where the router reads the exposure."""


class BoundedMethod(HeldMethod):
    """Base of those that move between two bounds."""

    low: Ratio = 0.0
    """Smallest exposure ratio."""
    high: Ratio = 1.0
    """Largest exposure ratio."""

    @model_validator(mode="after")
    def _check_range(self) -> Self:
        if self.low > self.high:
            raise ValueError(f"low {self.low} is above high {self.high}; swap them")
        return self


class Held:
    """One ratio for all problems, held for a window of updates."""

    def __init__(self, hold: int, ratio: float) -> None:
        self._clock = HoldClock(hold)
        self._ratio = ratio

    def propose(
        self,
        step: int,  # noqa: ARG002
        problem_ids: Sequence[str],
        pass_rates: Sequence[float | None] = (),  # noqa: ARG002
    ) -> Sequence[float]:
        """Return the held ratio, renewed first if the window has ended."""
        if self._clock.ended:
            self._ratio = self._renewed()
            self._clock.start()
        return [self._ratio] * len(problem_ids)

    def _renewed(self) -> float:
        """Return the ratio of a new window."""
        return self._ratio

    def _count(self, observation: Observation) -> None:
        """Count an update, unless the step does not count in its window."""
        if step_counts(observation.stats):
            self._clock.tick()
