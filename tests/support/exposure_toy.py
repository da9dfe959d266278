"""A student reduced to one number: what an exposure controller sees of a run whose best ratio is known.

true progress of an update at ratio a:  l -= 1e-3 max(0, 1 - 4 (a - best)^2)
training loss of that update:           0.5 a + 0.1 l
grounded term of a teacher at ratio a:  g(a)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from atesd.exposure.controller import Controller
from atesd.types import Measurement, Observation


def seen(step: int, stats: Mapping[str, float] = {}, measured: Mapping[str, float] = {}) -> Observation:
    """Return an observation whose measurements are named by their keys: `probe_nll`, `gt_solution@0.5`."""
    readings = {}
    for key, value in measured.items():
        kind, at, ratio = key.partition("@")
        readings[Measurement(kind, float(ratio) if at else None)] = value
    return Observation(step, stats, readings)


@dataclass
class Toy:
    """A run in progress. `best` None means that nothing is ever learned."""

    controller: Controller
    best: float | None
    grounded: Callable[[float], float] = lambda ratio: ratio
    level: float = 2.0
    step: int = 0
    stats: dict[str, float] = field(default_factory=dict)
    ratios: list[float] = field(default_factory=list)
    means: list[float] = field(default_factory=list)

    def observe(self) -> None:
        """Measure what the controller asks for and hand it over with the last update's statistics."""
        measured = {}
        for measurement in self.controller.wants(self.step):
            ratio = measurement.ratio
            measured[measurement] = self.level if ratio is None else self.grounded(ratio)
        self.controller.observe(Observation(self.step, self.stats, measured))

    def update(self, distilled: bool = True) -> None:
        """Take one update at the proposed ratio."""
        (ratio,) = self.controller.propose(self.step, ["p"])
        self.ratios.append(ratio)
        self.means.append(self.controller.metrics().get("exposure/mean", ratio))
        self.stats = {"route/distil_groups": 0.0}
        if distilled:
            self.stats = {"loss/distil": 0.5 * ratio + 0.1 * self.level, "route/distil_groups": 1.0}
            if self.best is not None:
                self.level -= 1e-3 * max(0.0, 1.0 - 4.0 * (ratio - self.best) ** 2)
        self.step += 1

    def run(self, steps: int) -> Toy:
        """Observe and update that many times, then observe once more."""
        for _ in range(steps):
            self.observe()
            self.update()
        self.observe()
        return self


def final_mean(toy: Toy, share: float = 0.1) -> float:
    """Return the policy's mean exposure over the last part of a run."""
    last = toy.means[-max(1, int(len(toy.means) * share)) :]
    return sum(last) / len(last)


def average(numbers: Sequence[float]) -> float:
    """Return the mean."""
    return sum(numbers) / len(numbers)
