"""Arithmetic of the learned controller: the hold clock, the delayed reward and the advantages, without any network.

ATESD, arXiv 2605.11458. l_t and g_t are measured at theta_t, before update t.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import isfinite, sqrt
from typing import Literal

Rectify = Literal["step", "window", "none"]
Baseline = Literal["batch", "leave_one_out"]


def discounted_progress(values: Sequence[float], gamma: float, rectify: Rectify, stride: int = 1) -> float:
    """Sum the discounted falls of l over a look-ahead.

    step:    sum_i gamma^((i-1) stride) max(0, l_(i-1) - l_i)      (the paper, with stride 1)
    window:  max(0, sum_i gamma^((i-1) stride) (l_(i-1) - l_i))
    none:    the same sum, which may be negative

    `values` are l at t0, t0 + stride, ..., t0 + L; each fall is discounted by the steps between t0 and its start.
    """
    falls = [before - after for before, after in pairwise(values)]
    if rectify == "step":
        falls = [max(0.0, fall) for fall in falls]
    total = sum(gamma ** (index * stride) * fall for index, fall in enumerate(falls))
    return max(0.0, total) if rectify == "window" else total


def discounted_mean(values: Sequence[float], gamma: float, stride: int = 1) -> float:
    """Average g over a look-ahead: sum_i gamma^((i-1) stride) g_i / sum_i gamma^((i-1) stride).

    `values` are g at t0 + stride, ..., t0 + L.
    """
    weights = [gamma ** (index * stride) for index in range(len(values))]
    return sum(weight * value for weight, value in zip(weights, values, strict=True)) / sum(weights)


def advantages(rewards: Sequence[float], baseline: Baseline, eps: float) -> list[float]:
    """Standardise rewards: A_j = (R_j - b_j) / (std + eps), std with ddof 1.

    b_j is the mean of all rewards, or of the others. One reward alone has no baseline: its advantage is 0.
    """
    count = len(rewards)
    if count < 2:
        return [0.0] * count
    mean = sum(rewards) / count
    std = sqrt(sum((reward - mean) ** 2 for reward in rewards) / (count - 1))
    factor = count / (count - 1) if baseline == "leave_one_out" else 1.0  # R_j - mean of others = factor (R_j - mean)
    return [factor * (reward - mean) / (std + eps) for reward in rewards]


def ramp(progress: float, start: float, final: float) -> float:
    """Return 0 until `start`, then a straight line to `final` at progress 1."""
    return final * min(1.0, max(0.0, (progress - start) / (1.0 - start)))


def finite(values: Mapping[str, float], key: str) -> float | None:
    """Return a number, or None where it is missing or not finite."""
    value = values.get(key)
    return float(value) if value is not None and isfinite(value) else None


@dataclass(slots=True)
class RunningScale:
    """Standard deviation (ddof 1) of all numbers seen so far, by Welford's update."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def add(self, value: float) -> None:
        """Take in one number."""
        self.count += 1
        delta = value - self.mean
        self.mean += delta / self.count
        self.squares += delta * (value - self.mean)

    @property
    def std(self) -> float:
        """The deviation; 1 while it is unknown or zero, so that dividing by it is harmless."""
        std = sqrt(self.squares / (self.count - 1)) if self.count > 1 else 0.0
        return std if std > 1e-12 else 1.0


@dataclass(slots=True)
class Average:
    """Exponential moving average that starts at its first value. `value` is None before that."""

    decay: float
    value: float | None = None
    first: float | None = None

    def add(self, number: float | None) -> None:
        """Take in one number; a missing one changes nothing."""
        if number is None:
            return
        if self.value is None:
            self.first = self.value = number
        self.value = self.decay * self.value + (1.0 - self.decay) * number

    @property
    def relative(self) -> float | None:
        """The average over its first value."""
        if self.value is None or not self.first:
            return self.value
        return self.value / self.first


def step_counts(stats: Mapping[str, float]) -> bool:
    """Tell whether a step counts in its hold window: it distilled, or its router reads the exposure.

    Such a router must see the exposure move, else it would never distil again once it has stopped at one.
    """
    return stats.get("route/paused", float(is_idle(stats))) == 0


def is_idle(stats: Mapping[str, float]) -> bool:
    """Tell whether a step took no distillation loss, so that no decision can be scored over it."""
    return stats.get("route/idle", float(stats.get("route/distil_groups", 1.0) == 0)) > 0


@dataclass(slots=True)
class HoldClock:
    """Counts the updates of a hold window, as `step_counts` says."""

    period: int
    held: int | None = None
    """Updates done in the present window; None before the first one."""

    @property
    def ended(self) -> bool:
        """Tell whether the next update belongs to a new window."""
        return self.held is None or self.held >= self.period

    @property
    def may_end(self) -> bool:
        """Tell whether the window ends with the update now under way, if that update counts."""
        return self.held is None or self.held + 1 >= self.period

    def start(self) -> None:
        """Open a window."""
        self.held = 0

    def tick(self) -> None:
        """Count one update."""
        if self.held is not None:
            self.held += 1


@dataclass(slots=True)
class Decision:
    """One sampled exposure on its way to a reward.

    `draw` is the policy's sample, which is scored; `ratio` is what the teacher saw. `progress` collects l at start,
    start + stride, ...; `grounded` collects g from start + stride on. `credit` is what graded rollouts say, where they
    are asked. `lp` and `gt` are the finished terms.
    """

    start: int
    draw: float
    ratio: float
    features: list[float]
    logprob: float
    progress: list[float] = field(default_factory=list)
    grounded: list[float] = field(default_factory=list)
    credit: float = 0.0
    lp: float = 0.0
    gt: float = 0.0
