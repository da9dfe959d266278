"""The Extrapolation Cliff: how far a target may be extrapolated before its fixed point leaves the clip-safe region.

    lambda*(p, b, c) = 1 + log(1 + (c - 1) / p) / (logit p - logit b)

p is the teacher's probability of the forced token at a contract position, b the base's, c the importance clip (arXiv
2605.08737; the formula is second-hand and re-derived). The extrapolated target's fixed point has logit q =
lambda logit p - (lambda - 1) logit b, and lambda* is where (1 - p) / (1 - q) = c.

Ours: 1. how p and b are measured: contract positions are tokens of forced form in the student's own
probe completions; per class the mean logit of the token that the teacher finds most probable there; 2. they are
measured on a grid of exposure ratios, fitted by a curve that does not fall (isotonic, on logits) and read off at the
ratio in force, so that lambda* follows the exposure between two measurements; b is the mean over the grid; 3. a run's
lambda* is the least over classes; 4. guard, router and closed-form exposure, which the paper does not have. With the
full-vocabulary divergence, which carries no importance weight, all of them are heuristics.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import exp, inf, isfinite, log, log1p
from typing import Annotated, Any, Self

import numpy as np
from pydantic import Field, model_validator

from atesd.types import Config, ContractPoint, Measurement, Observation, UserError

CLAMP = 1e-6
"""Measured probabilities are kept in [CLAMP, 1 - CLAMP]."""

Ratio = Annotated[float, Field(ge=0.0, le=1.0)]


def logit(p: float) -> float:
    """Return log(p / (1 - p))."""
    return log(p) - log1p(-p)


def threshold(p: float, b: float, c: float) -> float:
    """Return lambda*(p, b, c); infinity where the teacher is not above the base (p <= b), as nothing pushes it up.

    UserError outside 0 < p < 1, 0 < b < 1, c > 1.
    """
    _check_domain(p=p, b=b, c=c)
    return inf if p <= b else 1.0 + log1p((c - 1.0) / p) / (logit(p) - logit(b))


def largest_p(strength: float, b: float, c: float) -> float:
    """Return the p in (b, 1) with lambda*(p, b, c) = strength: teachers up to there are safe. UserError as above.

    lambda* falls from infinity at p = b to 1 at p = 1, so there is exactly one for a strength above 1. Where no float
    is as close to b or to 1 as that, the next float inside.
    """
    p = _probability(_largest_logit(strength, b, c))
    return min(max(p, float(np.nextafter(b, 1.0))), float(np.nextafter(1.0, 0.0)))


def _largest_logit(strength: float, b: float, c: float) -> float:
    """Return the logit of `largest_p`, which keeps its digits near p = 1: infinity where it exceeds 700."""
    _check_domain(p=b, b=b, c=c)
    if not (strength > 1.0 and isfinite(strength)):
        raise UserError(f"lambda = {strength} has no largest p: give a finite lambda above 1")
    low, high = logit(b), 700.0

    def excess(x: float) -> float:
        return 1.0 + log1p((c - 1.0) * (1.0 + exp(-x))) / (x - low) - strength

    if excess(high) >= 0.0:
        return inf
    from scipy.optimize import brentq  # a third of a second, which most recipes never need

    nearest = low + 1e-9
    return nearest if excess(nearest) <= 0.0 else float(brentq(excess, nearest, high, xtol=1e-12, rtol=1e-14))


def _check_domain(*, p: float, b: float, c: float) -> None:
    for name, value in (("p", p), ("b", b)):
        if not 0.0 < value < 1.0:
            raise UserError(
                f"lambda* needs 0 < {name} < 1, given {name} = {value}: pass a probability, not a percentage"
            )
    if not (c > 1.0 and isfinite(c)):
        raise UserError(f"lambda* needs an importance clip c > 1, given c = {c}: the ratio's bound itself, such as 5.0")


class CliffConfig(Config):
    """How lambda* is measured, and what guard and router make of it (all ours but c)."""

    contract: dict[str, str] = Field(default_factory=lambda: {"box": r"\\boxed\{", "brace": r"\\boxed\{[^{}]*(\})"})
    """Contract classes: name -> regular expression of text of forced form; its first group, if it has one, is what
    counts. Tokens of probe completions that overlap a match are the class's positions."""
    eos: bool = True
    """Whether the end token of finished completions is a class of its own, `eos`."""
    c: Annotated[float, Field(gt=1)] | None = None
    """Importance clip; unset, that of the sampled-token loss where it is in use, else 5."""
    kappa: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Share of the way from 1 to lambda* that a guarded lambda may go."""
    every: Annotated[int, Field(ge=1)] = 25
    """Steps between measurements."""
    grid: tuple[Ratio, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Exposure ratios at which p is measured."""
    min_hits: Annotated[int, Field(ge=1)] = 32
    """Positions that a class needs to count."""
    hysteresis: Annotated[float, Field(ge=0)] = 0.02
    """Router: how far lambda* must pass the wanted lambda before the route changes."""
    min_stay: Annotated[int, Field(ge=1)] = 5
    """Router: steps that a route stays at least."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name, pattern in self.contract.items():
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"cliff.contract.{name} = {pattern!r} is no regular expression ({error})") from error
        if "eos" in self.contract:
            raise ValueError("cliff.contract.eos: that name is taken by the end token; choose another")
        if not self.contract and not self.eos:
            raise ValueError("cliff.contract is empty and cliff.eos is false: name at least one forced form")
        if not self.grid or list(self.grid) != sorted(set(self.grid)):
            raise ValueError("cliff.grid needs ratios that rise, each once")
        return self


@dataclass(frozen=True, slots=True)
class ContractClass:
    """What is known of one class: logit p at rising ratios, not falling, and logit b."""

    name: str
    ratios: list[float]
    logit_p: list[float]
    logit_b: float

    def p(self, ratio: float) -> float:
        """Return p at a ratio: linear in the logit between grid points, constant beyond them."""
        return _probability(float(np.interp(ratio, self.ratios, self.logit_p)))

    @property
    def b(self) -> float:
        """The base's probability."""
        return _probability(self.logit_b)


class CliffMeter:
    """Asks for contract measurements and answers what they say about lambda. State is JSON-able."""

    def __init__(self, config: CliffConfig, c: float) -> None:
        self.config = config
        self.c = c
        self._classes: list[ContractClass] = []
        self._thin = 0
        self._stale = 0

    def wants(self, step: int) -> list[Measurement]:
        """Name the measurements of theta_step."""
        if step % self.config.every:
            return []
        return [Measurement("contract", ratio) for ratio in self.config.grid]

    def observe(self, observation: Observation) -> None:
        """Take in a measurement where this step brought one.

        A class with too few positions is not fitted anew. What was known of it before stays, so that losing the form,
        of which the bound warns, does not lift the bound.
        """
        if observation.step % self.config.every:
            return
        found: dict[str, dict[float, ContractPoint]] = {}
        for ratio in self.config.grid:
            for name, point in observation.table(Measurement("contract", ratio)).items():
                found.setdefault(name, {})[ratio] = point
        fitted = {
            name: contract_class(name, points)
            for name, points in found.items()
            if min(point.hits for point in points.values()) >= self.config.min_hits
        }
        self._thin = len(found) - len(fitted)
        known = {known.name: known for known in self._classes} | fitted
        self._stale = len(known) - len(fitted)
        self._classes = [known[name] for name in sorted(known)]

    def threshold(self, ratio: float) -> float:
        """Return lambda* at an exposure ratio: the least over classes; infinity where no class is known."""
        return min((threshold(known.p(ratio), known.b, self.c) for known in self._classes), default=inf)

    def largest_ratio(self, strength: float, low: float, high: float) -> float:
        """Return the largest ratio in [low, high] whose lambda* is at least `strength`; `low` if there is none.

        p does not fall with the ratio and lambda* falls with p: the ratio is where p crosses `largest_p`.
        """
        return max(low, min((_crossing(known, strength, self.c, high) for known in self._classes), default=high))

    def metrics(self, ratio: float) -> dict[str, float]:
        """Return lambda* at a ratio, and what it is made of."""
        numbers = {
            "cliff/classes": float(len(self._classes)),
            "cliff/thin_classes": float(self._thin),
            "cliff/stale_classes": float(self._stale),
        }
        least = self.threshold(ratio)
        if isfinite(least):
            numbers["cliff/lambda_star"] = least
        for known in self._classes:
            p, b = known.p(ratio), known.b
            numbers |= {f"cliff/p/{known.name}": p, f"cliff/b/{known.name}": b}
            numbers[f"cliff/teacher_not_above_base/{known.name}"] = float(p <= b)
        return numbers

    def state_dict(self) -> dict[str, Any]:
        """Return the known classes."""
        return {"classes": [asdict(known) for known in self._classes], "thin": self._thin, "stale": self._stale}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._classes = [ContractClass(**row) for row in state["classes"]]
        self._thin, self._stale = state["thin"], state["stale"]


def contract_class(name: str, points: Mapping[float, ContractPoint]) -> ContractClass:
    """Fit points at rising ratios: isotonic, non-decreasing logit p; the mean logit b."""
    from scipy.optimize import isotonic_regression

    fitted = isotonic_regression([logit(clamp(point.p)) for point in points.values()]).x
    base = float(np.mean([logit(clamp(point.b)) for point in points.values()]))
    return ContractClass(name, list(points), [float(value) for value in fitted], base)


def clamp(p: float) -> float:
    """Keep a probability in [CLAMP, 1 - CLAMP]."""
    return min(1.0 - CLAMP, max(CLAMP, p))


def _probability(value: float) -> float:
    return 1.0 / (1.0 + exp(-value))


def _crossing(known: ContractClass, strength: float, c: float, high: float) -> float:
    """Return the largest ratio up to `high` at which p <= largest_p; -infinity where there is none.

    Both are compared as logits, and the bound is not clamped as p was: a p that saturates its clamp is safe where the
    bound lies beyond the clamp, as `threshold` says too.
    """
    limit = _largest_logit(strength, known.b, c)
    ratios, values = known.ratios, known.logit_p
    if values[0] > limit:
        return -inf
    for index in range(len(values) - 1):
        if values[index + 1] > limit:
            share = (limit - values[index]) / (values[index + 1] - values[index])
            return min(high, ratios[index] + share * (ratios[index + 1] - ratios[index]))
    return high
