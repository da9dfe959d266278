"""Retirement of the teacher: both losses until the mismatch stops shrinking, then reinforcement alone.

After RetireOPD, arXiv 2609.20784. Where a group cannot be graded it is distilled before the retirement, skipped after.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from atesd.facts import RunFacts
from atesd.routing.route import Route, Router, RoutingMethod
from atesd.types import Group, Observation, Stateless


class Retire(RoutingMethod):
    """Both losses, and reinforcement alone once the mismatch has stopped shrinking.

    After RetireOPD (2609.20784), second-hand. Deviation: its second condition, a set share of the teacher's success, is
    left out, as it needs rollouts of the teacher.
    """

    kind: Literal["retire"] = "retire"
    coef: Annotated[float, Field(ge=0, le=1e6)] = 1.0
    """Factor of the distillation loss while it lasts, at most a million."""
    patience: Annotated[int, Field(ge=1)] = 20
    """Steps without a new least mismatch before the teacher retires."""
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the mismatch's moving average."""
    min_fall: Annotated[float, Field(ge=0)] = 0.0
    """How much lower a new least mismatch must be."""

    reinforces: ClassVar[bool] = True
    distils: ClassVar[bool] = True

    @property
    def coefs(self) -> dict[str, float]:
        """The distillation loss is scaled."""
        return {"distil": self.coef}

    def describe(self) -> str:
        """Name the coefficient and the end."""
        return (
            f"Groups are reinforced and distilled (times {self.coef:g}) until the mismatch stops shrinking, "
            "then only reinforced"
        )

    def build(self, run: RunFacts) -> Router:  # noqa: ARG002
        """Return the router."""
        return Retirement(self)


class Retirement(Stateless):
    """Follows the mismatch: its moving average, the least of it, and how many steps ago that was."""

    capped: ClassVar[bool] = False

    def __init__(self, config: Retire) -> None:
        self._config = config
        self._average: float | None = None
        self._least: float | None = None
        self._stale = 0
        self._retired_at: int | None = None

    def route(self, groups: Sequence[Group], ratio: float) -> list[Route]:  # noqa: ARG002
        """Return both before the teacher's retirement, reinforcement after it."""
        graded, ungraded = (Route.BOTH, Route.DISTIL) if self._retired_at is None else (Route.RL, Route.SKIP)
        return [graded if group.rewards else ungraded for group in groups]

    def observe(self, observation: Observation) -> None:
        """Follow `mismatch/top1`."""
        mismatch = observation.stats.get("mismatch/top1")
        if self._retired_at is not None or mismatch is None:
            return
        decay = self._config.decay
        self._average = mismatch if self._average is None else decay * self._average + (1 - decay) * mismatch
        if self._least is None or self._average < self._least - self._config.min_fall:
            self._least, self._stale = self._average, 0
        else:
            self._stale += 1
        if self._stale >= self._config.patience:
            self._retired_at = observation.step

    def metrics(self) -> Mapping[str, float]:
        """Say whether the teacher still teaches."""
        numbers = {"route/retired": float(self._retired_at is not None)}
        return numbers if self._average is None else numbers | {"route/mismatch_ema": self._average}

    def state_dict(self) -> dict[str, Any]:
        """Return everything."""
        return {
            "average": self._average,
            "least": self._least,
            "stale": self._stale,
            "retired_at": self._retired_at,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._average, self._least = state["average"], state["least"]
        self._stale, self._retired_at = state["stale"], state["retired_at"]
