"""Exposure as a bandit: a curve fitted to all decisions so far, played by draws from what is known of it.

ATESD's reward, used better. The delayed reward of a Beta policy overlaps with its neighbours', is rectified, and is
spent on a few small gradient steps. Here a decision is scored by what its own window brought, with its sign, and every
decision of the run enters one regression, a Gaussian process over the ratio with a trend in time:

    R_j = l(t_j) - l(t_j + H)                                  windows do not overlap, negative progress counts
    y_j = c + f(a_j) + b t_j + e_j                             y: R standardised; t from -1 to 1 over the run so far
    f ~ GP(0, (1 - v) exp(-(a - a')^2 / 2 m^2)),  e ~ N(0, v),  c, b ~ N(0, 1)
    next ratio = argmax over the grid of f~,                   f~ = E f + width (draw of f | y - E f)

l is the progress metric, as in ATESD. The trend takes away that progress slows down whatever is shown. Length m and
share of noise v are those of the highest likelihood among LENGTHS and NOISES. The first `spread` decisions stand at
equal distances over the range, from the middle outwards. Draws narrow by themselves as decisions come in; `width = 0`
plays the estimate.

Ours (Thompson sampling). A best ratio that moves is followed slowly, since old decisions count like new ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from atesd.exposure.controller import Controller
from atesd.exposure.held import BoundedMethod, Held
from atesd.exposure.window import is_idle, step_counts
from atesd.facts import RunFacts
from atesd.types import Measurement, Observation

Array = NDArray[np.float64]
PLACES = np.linspace(0.0, 1.0, 101)
"""The grid, as places in the range of exposure."""
LENGTHS = (0.15, 0.3, 0.6)
NOISES = (0.02, 0.1, 0.3, 0.6, 0.9)


class Bandit(BoundedMethod):
    """Exposure by a regression of every window's progress on the ratio in force (ours)."""

    kind: Literal["bandit"] = "bandit"
    progress_metric: Literal["probe_nll", "probe_accuracy"] = "probe_nll"
    """What progress means: the fall of the student's hint-free NLL of references on the probe, or of its error rate."""
    spread: Annotated[int, Field(ge=2)] = 5
    """Decisions that are spread over the range before any is chosen."""
    width: Annotated[float, Field(ge=0, le=10)] = 1.0
    """How much of what is not known a draw keeps: 1 is Thompson sampling, 0 plays the estimate."""

    measured: ClassVar[bool] = True
    reads_length: ClassVar[bool] = False

    @model_validator(mode="after")
    def _check_choice(self) -> Bandit:
        if self.low == self.high:
            raise ValueError(f"low and high are both {self.low}, which leaves no choice: use exposure.kind = 'fixed'")
        return self

    def describe(self) -> str:
        """Name the regression."""
        return "a learned share: draws from a regression of every window's progress on the share shown (bandit)"

    def build(self, run: RunFacts) -> Controller:
        """Return the controller."""
        return BanditController(self, run.seed_for("exposure"))


class BanditController(Held):
    """Scores every window by its own progress and draws the next ratio from the posterior."""

    def __init__(self, config: Bandit, seed: int) -> None:
        super().__init__(config.hold, config.low)
        self._config = config
        self._seed = seed
        self._measurement = Measurement(config.progress_metric)
        self._sign = 1.0 if config.progress_metric == "probe_nll" else -1.0
        self._decisions: list[tuple[int, float, float]] = []  # step of its start, ratio, progress
        self._drawn = 0
        self._start: tuple[int, float | None] = (0, None)  # of the open window: step, l
        self._level: tuple[int, float | None] = (0, None)  # latest l, and when it was taken
        self._latest: dict[str, float] = {}

    def _renewed(self) -> float:
        self._start = self._level
        self._drawn += 1
        if self._drawn <= self._config.spread or len(self._decisions) < 2:
            return self._ratio_at(spread_place(self._drawn - 1, self._config.spread))
        mean, covariance = self._posterior()
        random = np.random.default_rng([self._seed, self._drawn])
        values, vectors = np.linalg.eigh(covariance)
        draw = vectors @ (np.sqrt(values.clip(min=0.0)) * random.standard_normal(len(PLACES)))
        return self._ratio_at(PLACES[(mean + self._config.width * draw).argmax()])

    def wants(self, step: int) -> Sequence[Measurement]:
        """Ask for the progress metric before the first update and where the window may end."""
        return [self._measurement] if step == 0 or self._clock.may_end else []

    def observe(self, observation: Observation) -> None:
        """Count the update; where the window has ended score its decision, unless one of its ends was not measured."""
        self._latest = {}
        level = observation.number(self._measurement) if self.wants(observation.step) else None
        self._count(observation)
        if observation.step and is_idle(observation.stats) and step_counts(observation.stats):
            self._start = self._start[0], None  # a part of the window taught nothing
        if not self._clock.ended:
            return
        self._level = observation.step, None if level is None else self._sign * level
        if observation.step:
            self._score(*self._start, self._level[1])

    def _score(self, begun: int, before: float | None, after: float | None) -> None:
        if before is None or after is None:
            self._latest = {"exposure/discarded": 1.0}
            return
        self._decisions.append((begun, self._ratio, before - after))
        self._latest = {"exposure/progress": before - after}
        if len(self._decisions) >= 2:
            self._latest["exposure/bandit_best"] = self._ratio_at(PLACES[self._posterior()[0].argmax()])

    def _posterior(self) -> tuple[Array, Array]:
        low, high = self._config.low, self._config.high
        return posterior([(step, (ratio - low) / (high - low), gain) for step, ratio, gain in self._decisions])

    def _ratio_at(self, place: float) -> float:
        return float(self._config.low + (self._config.high - self._config.low) * place)

    def metrics(self) -> Mapping[str, float]:
        """Return the progress of the window that has ended and the ratio that the regression finds best."""
        return self._latest

    def state_dict(self) -> dict[str, Any]:
        """Return all decisions and the open window."""
        return {
            "seed": self._seed,
            "decisions": [list(decision) for decision in self._decisions],
            "drawn": self._drawn,
            "start": list(self._start),
            "level": list(self._level),
            "held": self._clock.held,
            "ratio": self._ratio,
            "latest": self._latest,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._decisions = [(int(step), float(ratio), float(gain)) for step, ratio, gain in state["decisions"]]
        self._seed = state["seed"]
        self._drawn, self._ratio, self._latest = state["drawn"], state["ratio"], dict(state["latest"])
        self._start, self._level = tuple(state["start"]), tuple(state["level"])
        self._clock.held = state["held"]


def spread_place(index: int, count: int) -> float:
    """Return the place in [0, 1] of a spread decision: `count` equal distances, middle first, then outwards in turn."""
    middle = (count - 1) // 2
    turn = (index % count + 1) // 2 * (1 if index % 2 else -1)
    return float((middle + turn) % count) / (count - 1)


def posterior(decisions: Sequence[tuple[int, float, float]]) -> tuple[Array, Array]:
    """Return mean [G] and covariance [G, G] of f at PLACES, given decisions (step of their start, place, progress).

    K = (1 - v) k + 1 + t t' + v I over the decisions, k* = (1 - v) k between PLACES and decisions:
    mean = k* K^-1 y, covariance = (1 - v) k(PLACES) - k* K^-1 k*'. (m, v) maximise -y' K^-1 y - log det K.
    """
    steps, places, gains = (np.asarray(column, dtype=np.float64) for column in zip(*decisions, strict=True))
    t = 2.0 * steps / max(1.0, steps.max()) - 1.0
    spread = gains.std()
    y = (gains - gains.mean()) / (spread if spread > 1e-12 * abs(gains).max() else np.inf)
    shared = 1.0 + np.outer(t, t)

    def covariance(length: float, noise: float) -> Array:
        return np.asarray((1.0 - noise) * likeness(places, places, length) + shared + noise * np.eye(len(y)))

    def misfit(choice: tuple[float, float]) -> float:
        whole = covariance(*choice)
        return float(y @ np.linalg.solve(whole, y) + np.linalg.slogdet(whole).logabsdet)

    length, noise = min(product(LENGTHS, NOISES), key=misfit)
    cross = (1.0 - noise) * likeness(PLACES, places, length)
    weights = np.linalg.solve(covariance(length, noise), cross.T)
    return weights.T @ y, (1.0 - noise) * likeness(PLACES, PLACES, length) - cross @ weights


def likeness(first: Array, second: Array, length: float) -> Array:
    """Return exp(-(a - a')^2 / 2 m^2) for all pairs."""
    return np.asarray(np.exp(-((first[:, None] - second[None]) ** 2) / (2.0 * length**2)))
