"""One learned exposure policy per difficulty: easy, medium and hard problems may want different hints.

ATESD's own figure says that easy problems want full exposure and hard ones the least (2605.11458); still
the paper shows all problems the same share. Ours: n Beta controllers, one a bin, each with draws, windows
and features of its own, all scored by the same probe, so that each sees the others' effect as noise. Bins are

    pass_rate      thirds (n-ths) of [0, 1] by the mean reward of the problem's attempts in this step: bin 0 is easiest
    reference_ppl  quantiles of the reference's perplexity under the student at step 0

A problem whose difficulty is not known counts as medium.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from atesd.exposure.beta_controller import BetaConfig, BetaController
from atesd.exposure.controller import Controller, ExposureMethod
from atesd.facts import RunFacts
from atesd.types import Measurement, Observation

_REFERENCES = Measurement("reference_nll")


class Difficulty(ExposureMethod):
    """A Beta policy per difficulty bin (ours)."""

    kind: Literal["difficulty"] = "difficulty"
    by: Literal["pass_rate", "reference_ppl"] = "pass_rate"
    """What makes a problem difficult; the pass rate is coarse unless `rollout.group_size` is several."""
    bins: Annotated[int, Field(ge=2, le=9)] = 3
    """Number of bins."""
    policy: BetaConfig = BetaConfig()
    """Settings of every bin's policy."""

    measured: ClassVar[bool] = True
    reads_length: ClassVar[bool] = True

    @property
    def reads_rewards(self) -> bool:
        """By the pass rate."""
        return self.by == "pass_rate"

    @property
    def reads_hidden(self) -> bool:
        """As the policies do."""
        return self.policy.reads_hidden

    @property
    def reads_base(self) -> bool:
        """As the policies do."""
        return self.policy.reads_base

    @property
    def without_rewards(self) -> str:
        """Take the references' perplexity."""
        return 'set exposure.by = "reference_ppl"'

    def describe(self) -> str:
        """Name the number of policies."""
        return f"learned shares: a Beta policy for each of {self.bins} difficulties of problems"

    def build(self, run: RunFacts) -> Controller:
        """Return the controller."""
        return DifficultyController(self, run)


class DifficultyController:
    """Sends every problem to the controller of its bin."""

    def __init__(self, config: Difficulty, run: RunFacts) -> None:
        self._config = config
        seed = run.seed_for("exposure")
        self._parts = [
            BetaController(config.policy, run.total_steps, seed + 1000 * (number + 1), run.teacher_frozen)
            for number in range(config.bins)
        ]
        self._edges: list[float] = []
        self._levels: dict[str, float] = {}
        self._shares = [0.0] * config.bins

    def propose(
        self, step: int, problem_ids: Sequence[str], pass_rates: Sequence[float | None] = ()
    ) -> Sequence[float]:
        """Return each problem's ratio by its bin."""
        rates = pass_rates or [None] * len(problem_ids)
        ratios = [part.propose(step, [""])[0] for part in self._parts]
        bins = [self._bin(problem, rate) for problem, rate in zip(problem_ids, rates, strict=True)]
        self._shares = [bins.count(number) / len(bins) for number in range(self._config.bins)]
        return [ratios[number] for number in bins]

    def wants(self, step: int) -> Sequence[Measurement]:
        """Ask for what the policies want, and once for the references' perplexity."""
        wanted = [measurement for part in self._parts for measurement in part.wants(step)]
        if step == 0 and self._config.by == "reference_ppl":
            wanted.append(_REFERENCES)
        return wanted

    def observe(self, observation: Observation) -> None:
        """Hand on to every bin; fix the bins' edges at step 0."""
        scores = observation.table(_REFERENCES)
        if scores and not self._levels and self._config.by == "reference_ppl":
            self._levels = dict(scores)
            inner = np.arange(1, self._config.bins) / self._config.bins
            self._edges = [float(edge) for edge in np.quantile(list(scores.values()), inner)]
        for part in self._parts:
            part.observe(observation)

    def metrics(self) -> Mapping[str, float]:
        """Return each bin's numbers under its own name, and its share of the latest problems."""
        numbers: dict[str, float] = {}
        for number, part in enumerate(self._parts):
            numbers |= {key.replace("exposure/", f"exposure/bin{number}/", 1): v for key, v in part.metrics().items()}
            numbers[f"exposure/bin{number}/share"] = self._shares[number]
        return numbers

    def state_dict(self) -> dict[str, Any]:
        """Return every bin's state, and the bins themselves."""
        return {
            "parts": [part.state_dict() for part in self._parts],
            "edges": self._edges,
            "levels": self._levels,
            "shares": self._shares,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        for part, saved in zip(self._parts, state["parts"], strict=True):
            part.load_state_dict(saved)
        self._edges, self._levels = list(state["edges"]), dict(state["levels"])
        self._shares = list(state["shares"])

    def _bin(self, problem: str, rate: float | None) -> int:
        """Return the bin, 0 the easiest."""
        bins = self._config.bins
        if self._config.by == "pass_rate":
            return bins // 2 if rate is None else min(bins - 1, max(0, int((1.0 - rate) * bins + 1e-9)))
        level = self._levels.get(problem)
        return bins // 2 if level is None else bisect_right(self._edges, level)
