"""Paired credit: the same completions under a little more and a little less exposure, compared on the probe.

    credit(alpha) = [l(step(g-)) - l(step(g+))] / (alpha+ - alpha-),   alpha+- = alpha +- delta

l is the student's hint-free probe NLL, or minus the advantage-weighted log-likelihood of the graded completions of the
steps before; g+- are the distillation gradients on the latest completions with the teacher at alpha+-; step(g) is where
the optimizer's next step on g would lead, moments included. Both steps are virtual: the weights are put back. Positive:
more exposure would help. At every window boundary alpha moves by rate * credit / (root mean square of the credits so
far), at most by rate.

Ours. Deviation: the real update is taken at alpha itself instead of with the mean of both gradients, so
that the step stays blind to the method. Measured by `train/credit.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from atesd.exposure.controller import Controller
from atesd.exposure.held import BoundedMethod, Held, Ratio
from atesd.exposure.window import step_counts
from atesd.facts import RunFacts
from atesd.types import Measurement, Observation


class Paired(BoundedMethod):
    """Exposure by the difference of two virtual steps at each hold window (ours)."""

    kind: Literal["paired"] = "paired"
    start: Ratio = 0.5
    """Exposure ratio before the first credit."""
    delta: Annotated[float, Field(gt=0, le=0.5)] = 0.15
    """How much more and less is compared."""
    rate: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Largest change of the ratio per window."""
    reference: Literal["probe", "reward"] = "probe"
    """What both steps are compared by: the NLL of the probe's references, or the reward of earlier completions."""

    measured: ClassVar[bool] = True
    reads_length: ClassVar[bool] = False

    @model_validator(mode="after")
    def _check_start(self) -> Self:
        if not self.low <= self.start <= self.high:
            raise ValueError(f"start {self.start} is outside [{self.low}, {self.high}]; move it or the bounds")
        return self

    def describe(self) -> str:
        """Name the credit."""
        return "a learned share: moved to the better of two virtual steps, with more and with less (paired credit)"

    def build(self, run: RunFacts) -> Controller:  # noqa: ARG002
        """Return the controller."""
        return PairedController(self)


class PairedController(Held):
    """Climbs the credit."""

    def __init__(self, config: Paired) -> None:
        super().__init__(config.hold, config.start)
        self._config = config
        self._credits = 0
        self._squares = 0.0
        self._latest: dict[str, float] = {}

    def wants(self, step: int) -> Sequence[Measurement]:
        """Ask for the effect of a step at either side of the ratio where the window may end."""
        if step == 0 or not self._clock.may_end:
            return []
        kind = "virtual_nll" if self._config.reference == "probe" else "virtual_reward"
        return [Measurement(kind, ratio) for ratio in self._sides]

    def observe(self, observation: Observation) -> None:
        """Move the ratio where both sides were measured and the window has ended, as only a step that counts does."""
        self._latest = {}
        wanted = self.wants(observation.step) if step_counts(observation.stats) else ()
        found = [observation.number(measurement) for measurement in wanted]
        self._count(observation)
        values = [value for value in found if value is not None]
        if len(values) == 2:
            low, high = self._sides
            self._move((values[0] - values[1]) / (high - low))
        elif wanted:
            self._latest = {"exposure/discarded": 1.0}

    def metrics(self) -> Mapping[str, float]:
        """Return the credit where one was measured."""
        return self._latest

    def state_dict(self) -> dict[str, Any]:
        """Return ratio, scale and open window."""
        return {
            "held": self._clock.held,
            "ratio": self._ratio,
            "count": self._credits,
            "squares": self._squares,
            "latest": self._latest,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._clock.held, self._ratio, self._latest = state["held"], state["ratio"], dict(state["latest"])
        self._credits, self._squares = state["count"], state["squares"]

    @property
    def _sides(self) -> tuple[float, float]:
        """A little less and a little more, within the bounds of exposure; never equal."""
        return max(0.0, self._ratio - self._config.delta), min(1.0, self._ratio + self._config.delta)

    def _move(self, credit: float) -> None:
        config = self._config
        self._credits += 1
        self._squares += credit * credit
        scale = sqrt(self._squares / self._credits)
        change = config.rate * max(-1.0, min(1.0, credit / scale)) if scale > 0 else 0.0
        self._ratio = min(config.high, max(config.low, self._ratio + change))
        self._latest = {"exposure/paired_credit": credit}
