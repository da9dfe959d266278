"""Exposure that is not learned: fixed, scheduled, or drawn at random.

`Fixed` at 1 is OPSD. `random` is the control of the learned controller: the same hold windows, no learning.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from math import cos, pi
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from atesd.exposure.controller import Controller, ExposureMethod
from atesd.exposure.held import BoundedMethod, Held, Ratio
from atesd.facts import RunFacts
from atesd.types import Observation, Stateless


class Fixed(ExposureMethod):
    """The same exposure at every step. OPSD shows the whole solution: ratio 1."""

    kind: Literal["fixed"] = "fixed"
    ratio: Ratio = 1.0
    """Exposure ratio: 0 shows the answer only, 1 the whole solution."""

    measured: ClassVar[bool] = False
    reads_length: ClassVar[bool] = False

    def describe(self) -> str:
        """Name the share, and OPSD."""
        if self.ratio == 1.0:
            return "the whole solution (OPSD)"
        return (
            "the final answer only"
            if self.ratio == 0.0
            else f"the first {_percent(self.ratio)} of the solution, always"
        )

    def build(self, run: RunFacts) -> Controller:  # noqa: ARG002
        """Return the controller."""
        return Schedule(lambda step: self.ratio)  # noqa: ARG005


class Moving(ExposureMethod):
    """Base of schedules from `start` at update 0 to `end` at update `steps` - 1, then constant. Our choice of ends."""

    start: Ratio = 1.0
    """Exposure ratio of the first update."""
    end: Ratio = 0.0
    """Exposure ratio of the last update."""
    steps: int | None = Field(default=None, ge=1)
    """Updates that the change takes; unset, the whole run."""

    measured: ClassVar[bool] = False

    @property
    def reads_length(self) -> bool:
        """Where it takes the whole run."""
        return self.steps is None

    def build(self, run: RunFacts) -> Controller:
        """Return the controller."""
        steps = self.steps or run.total_steps
        return Schedule(lambda step: self.start + (self.end - self.start) * self.share(share_done(step, steps)))

    @abstractmethod
    def share(self, done: float) -> float:
        """Return the share of the way that is behind, where a share `done` of the updates is."""

    def _moving(self, shape: str) -> str:
        return f"a share moving from {_percent(self.start)} to {_percent(self.end)} ({shape})"


class Linear(Moving):
    """A straight line from `start` at update 0 to `end` at update `steps` - 1, then constant. Our choice of ends."""

    kind: Literal["linear"] = "linear"

    def describe(self) -> str:
        """Name both ends."""
        return self._moving("linear")

    def share(self, done: float) -> float:
        """Return it unchanged."""
        return done


class Cosine(Moving):
    """Half a cosine from `start` at update 0 to `end` at update `steps` - 1, then constant. Our choice of ends."""

    kind: Literal["cosine"] = "cosine"

    def describe(self) -> str:
        """Name both ends."""
        return self._moving("cosine")

    def share(self, done: float) -> float:
        """Return (1 - cos(pi f)) / 2."""
        return (1.0 - cos(pi * done)) / 2.0


class Steps(ExposureMethod):
    """Piecewise constant exposure: values[i] from update boundaries[i-1] on."""

    kind: Literal["steps"] = "steps"
    values: tuple[Ratio, ...] = Field(min_length=1)
    """Exposure ratios, in order."""
    boundaries: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Updates at which the next value begins, rising; one fewer than `values`."""

    measured: ClassVar[bool] = False
    reads_length: ClassVar[bool] = False

    def describe(self) -> str:
        """Name all shares."""
        return "shares set in advance: " + ", then ".join(_percent(value) for value in self.values)

    @model_validator(mode="after")
    def _check_boundaries(self) -> Self:
        if len(self.boundaries) != len(self.values) - 1:
            raise ValueError(
                f"{len(self.values)} values with {len(self.boundaries)} boundaries; give one boundary fewer than values"
            )
        if any(later <= earlier for earlier, later in pairwise(self.boundaries)):
            raise ValueError(f"boundaries {self.boundaries} do not rise; list them in order, each once")
        return self

    def build(self, run: RunFacts) -> Controller:  # noqa: ARG002
        """Return the controller."""
        return Schedule(lambda step: self.values[sum(1 for boundary in self.boundaries if boundary <= step)])


class Uniform(BoundedMethod):
    """One uniform draw per hold window, for all problems. The paper's `random` arm; its range is our choice."""

    kind: Literal["random"] = "random"

    measured: ClassVar[bool] = False
    reads_length: ClassVar[bool] = False

    def describe(self) -> str:
        """Name range and window."""
        return f"a random share between {_percent(self.low)} and {_percent(self.high)}, kept for {self.hold} steps"

    def build(self, run: RunFacts) -> Controller:
        """Return the controller."""
        return UniformController(self, run.seed_for("exposure"))


def share_done(step: int, steps: int) -> float:
    """Return how much of a change is done at an update: 0 at the first, 1 from update `steps` - 1 on."""
    return min(1.0, step / max(1, steps - 1))


def _percent(ratio: float) -> str:
    return f"{100 * ratio:.3g} %"


class Schedule(Stateless):
    """A controller whose exposure depends on the step alone."""

    def __init__(self, ratio_at: Callable[[int], float]) -> None:
        self._ratio_at = ratio_at

    def propose(
        self,
        step: int,
        problem_ids: Sequence[str],
        pass_rates: Sequence[float | None] = (),  # noqa: ARG002
    ) -> Sequence[float]:
        """Return the step's ratio for every problem."""
        return [self._ratio_at(step)] * len(problem_ids)


class UniformController(Held, Stateless):
    """A controller that draws anew at every window boundary and learns nothing."""

    def __init__(self, config: Uniform, seed: int) -> None:
        super().__init__(config.hold, config.low)
        self._config = config
        self._random = np.random.default_rng([seed, 2])

    def _renewed(self) -> float:
        return float(self._random.uniform(self._config.low, self._config.high))

    def observe(self, observation: Observation) -> None:
        """Count the update unless nothing was distilled in it."""
        self._count(observation)

    def state_dict(self) -> dict[str, Any]:
        """Return the generator's state and the open window."""
        return {"random": self._random.bit_generator.state, "held": self._clock.held, "ratio": self._ratio}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._random.bit_generator.state = state["random"]
        self._clock.held = state["held"]
        self._ratio = state["ratio"]
