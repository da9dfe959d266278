"""Retirement of the teacher: both losses until it has nothing more to add, then reinforcement alone.

After RetireOPD, arXiv 2609.20784: the student drops the teacher once their discrepancy stops shrinking and the student
reaches a set fraction of the teacher's success rate (abstract). Where a group cannot be graded it is distilled before
the retirement, skipped after.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from atesd.facts import RunFacts
from atesd.routing.route import Route, Router, RoutingMethod
from atesd.types import Group, Measurement, Observation

_STUDENT = Measurement("probe_accuracy")


class Retire(RoutingMethod):
    """Both losses, and reinforcement alone once the mismatch has stopped shrinking and the student is good enough.

    After RetireOPD (2609.20784). Deviations: 1. discrepancy is the top-1 mismatch on the student's completions; 2. both
    successes are those on the probe, the teacher's with its hint at the exposure in force, and are measured only while
    the mismatch does not shrink; 3. the paper's fraction is not known to us, so that its second condition has to be
    asked for.
    """

    kind: Literal["retire"] = "retire"
    coef: Annotated[float, Field(ge=0, le=1e6)] = 1.0
    """Factor of the distillation loss while it lasts, at most a million."""
    patience: Annotated[int, Field(ge=1)] = 20
    """Steps without a new least mismatch before the teacher may retire."""
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the mismatch's moving average."""
    min_fall: Annotated[float, Field(ge=0)] = 0.0
    """How much lower a new least mismatch must be."""
    teacher_share: Annotated[float, Field(gt=0, le=10)] | None = None
    """Share of the teacher's own success that the student must reach as well: the paper's second condition. It costs
    completions of both on the probe. Unset, the mismatch alone decides."""
    every: Annotated[int, Field(ge=1)] = 5
    """With `teacher_share`: steps between measurements of both successes, while the mismatch does not shrink."""

    reinforces: ClassVar[bool] = True
    distils: ClassVar[bool] = True
    teaches_reinforced: ClassVar[bool] = True

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.teacher_share is None and self.every != type(self).model_fields["every"].default:
            raise ValueError(
                f"routing.every = {self.every} says how often successes are measured, which nothing asks for: set "
                "routing.teacher_share, such as 0.9, or remove routing.every"
            )
        return self

    @property
    def asks_teacher(self) -> bool:
        """For its own success, where that counts."""
        return self.teacher_share is not None

    @property
    def coefs(self) -> dict[str, float]:
        """The distillation loss is scaled."""
        return {"distil": self.coef}

    def describe(self) -> str:
        """Name the coefficient and the end."""
        share = self.teacher_share
        reached = "" if share is None else f" and the student reaches {100 * share:.3g} % of the teacher's success"
        return (
            f"Groups are reinforced and distilled (times {self.coef:g}) until the mismatch stops shrinking{reached}, "
            "then only reinforced"
        )

    def build(self, run: RunFacts) -> Router:  # noqa: ARG002
        """Return the router."""
        return Retirement(self)


class Retirement:
    """Follows the mismatch: its moving average, the least of it, how many steps ago that was; then the successes."""

    capped: ClassVar[bool] = False

    def __init__(self, config: Retire) -> None:
        self._config = config
        self._average: float | None = None
        self._least: float | None = None
        self._stale = 0
        self._ratio = 1.0
        self._retired_at: int | None = None

    def route(self, groups: Sequence[Group], ratio: float) -> list[Route]:
        """Return both before the teacher's retirement, reinforcement after it."""
        self._ratio = ratio
        graded, ungraded = (Route.BOTH, Route.DISTIL) if self._retired_at is None else (Route.RL, Route.SKIP)
        return [graded if group.rewards else ungraded for group in groups]

    def wants(self, step: int) -> Sequence[Measurement]:
        """Ask for both successes where they alone keep the teacher."""
        asks = self._config.teacher_share is not None and self._retired_at is None and self._stopped
        return [_STUDENT, self._of_teacher] if asks and step % self._config.every == 0 else []

    def observe(self, observation: Observation) -> None:
        """Follow `mismatch/top1`, and compare successes where they were asked for."""
        asked = bool(self.wants(observation.step))
        mismatch = observation.stats.get("mismatch/top1")
        if self._retired_at is not None:
            return
        if mismatch is not None:
            self._follow(mismatch)
        if self._stopped and (self._config.teacher_share is None or (asked and self._reached(observation))):
            self._retired_at = observation.step

    @property
    def _stopped(self) -> bool:
        """Whether the mismatch has stopped shrinking."""
        return self._stale >= self._config.patience

    @property
    def _of_teacher(self) -> Measurement:
        return Measurement("teacher_accuracy", self._ratio)

    def _follow(self, mismatch: float) -> None:
        decay = self._config.decay
        self._average = mismatch if self._average is None else decay * self._average + (1 - decay) * mismatch
        if self._least is None or self._average < self._least - self._config.min_fall:
            self._least, self._stale = self._average, 0
        else:
            self._stale += 1

    def _reached(self, observation: Observation) -> bool:
        """Tell whether the student's success is that share of the teacher's; not where one is unknown."""
        student, teacher = observation.number(_STUDENT), observation.number(self._of_teacher)
        if student is None or teacher is None or self._config.teacher_share is None:
            return False
        return student >= self._config.teacher_share * teacher

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
            "ratio": self._ratio,
            "retired_at": self._retired_at,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._average, self._least = state["average"], state["least"]
        self._stale, self._ratio = state["stale"], state["ratio"]
        self._retired_at = state["retired_at"]
