"""The lambda in force: how far beyond the teacher the target reaches in a step.

    lambda_eff = min(lambda, 1 + kappa (lambda* - 1))        where the target or the step's router asks for the cap

lambda* as in cliff.py (2605.08737); the cap is ours. So is asking graded rollouts: then lambda_eff is lambda where a
step to that target would raise the reward more than one to the teacher itself (alignment.py), else 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any, Protocol

from atesd.alignment import CreditSum
from atesd.cliff import CliffMeter
from atesd.facts import RunFacts
from atesd.types import Measurement, Observation, Policy, Stateless


class Strength(Policy, Protocol):
    """Answers what lambda a step's target has."""

    def at(self, ratio: float, *, capped: bool) -> float:
        """Return lambda. `ratio` is the step's largest exposure; `capped` says that the router asks for the cap."""
        ...


class Constant(Stateless):
    """The target's own lambda at every step."""

    def __init__(self, run: RunFacts) -> None:
        self._wanted = run.strength

    def at(self, ratio: float, *, capped: bool) -> float:  # noqa: ARG002
        """Return the wanted lambda."""
        return self._wanted


class Aligned:
    """Reaches beyond the teacher while that has the higher credit; asks every `every` steps. Begins at 1."""

    def __init__(self, run: RunFacts, *, every: int = 5, decay: float = 0.8) -> None:
        self._candidates = (1.0, run.strength)
        self._credits = CreditSum(len(self._candidates), decay)
        self._every = every
        self._fresh = False

    def at(self, ratio: float, *, capped: bool) -> float:  # noqa: ARG002
        """Return 1 or the wanted lambda."""
        return self._candidates[self._credits.best()] if self._credits.known else 1.0

    def wants(self, step: int) -> Sequence[Measurement]:
        """Ask for both candidates' credits on the cadence."""
        if not step or step % self._every:
            return []
        return [Measurement("reward_influence_lambda", strength) for strength in self._candidates]

    def observe(self, observation: Observation) -> None:
        """Add the credits up."""
        tables = [observation.table(measurement) for measurement in self.wants(observation.step)]
        self._fresh = bool(tables) and all(tables)
        if self._fresh:
            self._credits.add([list(table.values()) for table in tables])

    def metrics(self) -> Mapping[str, float]:
        """Return what lambda gains over its error where it was asked for, and the lambda in force."""
        if not self._fresh:
            return {}
        return {"target/lambda_credit": self._credits.gain(1, 0), "target/lambda": self.at(1.0, capped=False)}

    def state_dict(self) -> dict[str, Any]:
        """Return the credits."""
        return {"credits": self._credits.state_dict(), "fresh": self._fresh}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._credits.load_state_dict(state["credits"])
        self._fresh = state["fresh"]


class Guard:
    """Caps lambda by the measured lambda*: at every step (`always`), or where the router asks for it."""

    def __init__(self, run: RunFacts, *, always: bool) -> None:
        self._wanted = run.strength
        self._always = always
        self._kappa = run.cliff.kappa
        self._meter = CliffMeter(run.cliff, run.c)
        self._ratio = 1.0
        self._latest: float | None = None

    def at(self, ratio: float, *, capped: bool) -> float:
        """Return lambda, capped or as wanted."""
        self._ratio = ratio
        least = self._meter.threshold(ratio)
        self._latest = guarded(self._wanted, least, self._kappa) if capped or self._always else self._wanted
        return self._latest

    def wants(self, step: int) -> Sequence[Measurement]:
        """Ask for the contract on its cadence."""
        return self._meter.wants(step)

    def observe(self, observation: Observation) -> None:
        """Take in the contract."""
        self._meter.observe(observation)

    def metrics(self) -> Mapping[str, float]:
        """Return lambda* and the lambda in force."""
        numbers = self._meter.metrics(self._ratio)
        return numbers if self._latest is None else numbers | {"cliff/lambda": self._latest}

    def state_dict(self) -> dict[str, Any]:
        """Return everything."""
        return {"meter": self._meter.state_dict(), "ratio": self._ratio, "latest": self._latest}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._meter.load_state_dict(state["meter"])
        self._ratio, self._latest = state["ratio"], state["latest"]


def guarded(wanted: float, least: float, kappa: float) -> float:
    """Return min(wanted, 1 + kappa (lambda* - 1))."""
    return min(wanted, 1.0 + kappa * (least - 1.0)) if isfinite(least) else wanted
