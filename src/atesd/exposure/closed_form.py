"""Closed-form exposure: the largest ratio that keeps the wanted lambda on the safe side of the Extrapolation Cliff.

    alpha = max {alpha : lambda*(p(alpha), b, c) >= lambda}

Ours, on the formula of 2605.08737: `cliff.py` says how p and b are measured and interpolated. Where no
ratio is safe the least one is shown (and the target should be guarded); where all are, or no contract position occurs,
the largest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from atesd.cliff import CliffMeter
from atesd.exposure.controller import Controller
from atesd.exposure.held import BoundedMethod, Held
from atesd.facts import RunFacts
from atesd.types import Measurement, Observation


class ClosedForm(BoundedMethod):
    """The largest exposure at which the target's lambda is safe, by the section `cliff`; nothing is learned."""

    kind: Literal["closed_form"] = "closed_form"

    measured: ClassVar[bool] = True
    reads_length: ClassVar[bool] = False
    reads_lambda: ClassVar[bool] = True

    def describe(self) -> str:
        """Name the rule."""
        return "the largest share at which the target's λ is safe by the measured λ*"

    def build(self, run: RunFacts) -> Controller:
        """Return the controller."""
        return ClosedFormController(self, run)


class ClosedFormController(Held):
    """Reads the ratio off the measured curve at every window boundary."""

    def __init__(self, config: ClosedForm, run: RunFacts) -> None:
        super().__init__(config.hold, config.high)
        self._config = config
        self._strength = run.strength
        self._meter = CliffMeter(run.cliff, run.c)

    def _renewed(self) -> float:
        return self._meter.largest_ratio(self._strength, self._config.low, self._config.high)

    def wants(self, step: int) -> Sequence[Measurement]:
        """Ask for the contract on its cadence."""
        return self._meter.wants(step)

    def observe(self, observation: Observation) -> None:
        """Take in the contract; count the update unless nothing was distilled in it."""
        self._meter.observe(observation)
        self._count(observation)

    def metrics(self) -> Mapping[str, float]:
        """Return what the cliff says at the ratio in force."""
        return self._meter.metrics(self._ratio)

    def state_dict(self) -> dict[str, Any]:
        """Return the curve and the open window."""
        return {"meter": self._meter.state_dict(), "held": self._clock.held, "ratio": self._ratio}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._meter.load_state_dict(state["meter"])
        self._clock.held, self._ratio = state["held"], state["ratio"]
