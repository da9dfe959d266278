"""One credit for every control of the teacher's signal: would a step with it raise the reward of graded rollouts?
(Or lower the probe's NLL: `Source`.)

K candidates, J folds of the graded completions, N(m, C) a normal distribution.

To first order a step along -P g changes the expected reward by <g_R, P g>, where P is the optimizer's preconditioner, g
the gradient of what the control would train on, and -g_R the policy gradient of the completions that were graded in the
steps before. `train/credit.py` measures it by fold; here windows of it are added up and turned into decisions.

A window gives J credits a candidate: their mean m [K] and the covariance of that mean C [K, K]. Both are put into units
of the window's own error, e = sqrt(trace C / K), and added up with a decay d a window:

    S <- d S + m / e        Q <- d^2 Q + C / e^2        z_k = S_k / sqrt(Q_kk)

so that a window counts by how clearly it speaks, and no scale of gradients, losses or rewards matters. The candidate in
force is the one that is most probably the best under N(S, Q): errors that candidates share cancel.

Ours. Deviations from the derivation: 1. the gradients are those of `probe.credit_parameters`; 2. an attempt without
others at its problem is compared with the running mean of its level; 3. the error is that of g_R alone, the batch that
is credited is taken as it is; 4. windows count as independent, and those shorter than `probe.credit_steps` share
completions: with a window of one step z is some twice as wide as it says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from atesd.types import Measurement, Observation

Array = NDArray[np.float64]
By = Literal["none", "level"]
Source = Literal["reward", "probe"]
"""What a step is asked for: the reward of graded rollouts, or a lower NLL of the probe's references."""
DRAWS = 4096


def credit_at(ratio: float) -> Measurement:
    """Name the measurement of one ratio's credit over all problems."""
    return Measurement("reward_influence", ratio)


def over_error(credits_J: Sequence[float]) -> float:
    """Return the mean of a window's folds over its standard error; 0 where they do not differ."""
    error = float(np.std(credits_J, ddof=1)) / len(credits_J) ** 0.5
    return float(np.mean(credits_J)) / error if error > 0 else 0.0


class CreditSum:
    """What all windows together say of the candidates."""

    def __init__(self, candidates: int, decay: float) -> None:
        self._decay = decay
        self._mean = np.zeros(candidates)
        self._covariance = np.zeros((candidates, candidates))
        self._normals = np.random.default_rng(0).standard_normal((DRAWS, candidates))

    @property
    def known(self) -> bool:
        """Whether any window has spoken."""
        return bool(self._covariance.any())

    @property
    def z(self) -> Array:
        """Credits over their own standard errors, [K]; 0 before the first window."""
        error = np.sqrt(np.diag(self._covariance))
        return np.divide(self._mean, error, out=np.zeros_like(error), where=error > 0)

    def add(self, credits_KJ: Sequence[Sequence[float]]) -> bool:
        """Take in a window's credits by candidate and fold. False, and nothing changes, where they say nothing."""
        found = np.asarray(credits_KJ, dtype=float)
        covariance = np.atleast_2d(np.cov(found)) / found.shape[1]
        error = float(np.sqrt(np.trace(covariance) / len(found)))
        if not (np.isfinite(error) and error > 0):
            return False
        self._mean = self._decay * self._mean + found.mean(axis=1) / error
        self._covariance = self._decay**2 * self._covariance + covariance / error**2
        return True

    def best(self) -> int:
        """Return the candidate that is most probably the best one."""
        values, vectors = np.linalg.eigh(self._covariance)
        draws = self._mean + self._normals @ (vectors * np.sqrt(values.clip(min=0.0))).T
        return int(np.bincount(draws.argmax(axis=1), minlength=len(self._mean)).argmax())

    def gain(self, candidate: int, other: int) -> float:
        """Return how much better a candidate is than another, over the error of their difference; 0 where unknown."""
        both = [candidate, other]
        (own, shared), (_, others) = self._covariance[np.ix_(both, both)]
        error = float(np.sqrt(max(0.0, own + others - 2 * shared)))
        return float(self._mean[candidate] - self._mean[other]) / error if error > 0 else 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return both sums."""
        return {"mean": self._mean.tolist(), "covariance": self._covariance.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._mean = np.asarray(state["mean"], dtype=float)
        self._covariance = np.asarray(state["covariance"], dtype=float)


class Credits:
    """The credits of candidate ratios: one sum for all problems, or one a level of problems.

    Several sources enter the same sums as windows of their own: each counts by how clearly it speaks.
    """

    def __init__(
        self,
        grid: Sequence[float],
        *,
        decay: float,
        by: By,
        levels: Mapping[str, str],
        sources: Sequence[Source] = ("reward",),
    ) -> None:
        self._grid = tuple(grid)
        self._levels = levels if by == "level" else {}
        self._kinds = [f"{source}_influence{'' if by == 'none' else '_by_level'}" for source in sources]
        self._sums = {level: CreditSum(len(grid), decay) for level in sorted(set(self._levels.values())) or [""]}

    def __iter__(self) -> Iterator[tuple[str, CreditSum]]:
        return iter(self._sums.items())

    def of(self, problem_id: str) -> str:
        """Return the level under which a problem's credits are summed."""
        return self._levels.get(problem_id, "")

    def wanted(self) -> list[Measurement]:
        """Name the measurements of a window."""
        return [Measurement(kind, ratio) for kind in self._kinds for ratio in self._grid]

    def add(self, observation: Observation) -> bool:
        """Add a window up, level by level; False where none of its sources could be measured."""
        found = [[observation.table(Measurement(kind, ratio)) for ratio in self._grid] for kind in self._kinds]
        spoke = [tables for tables in found if all(tables)]
        for tables in spoke:
            for level, credits in self:
                names = [name for name in tables[0] if name.rpartition("/")[0] == level]
                if names:
                    credits.add([[table[name] for name in names] for table in tables])
        return bool(spoke)

    def metrics(self) -> dict[str, float]:
        """Return every candidate's credit over its error."""
        found: dict[str, float] = {}
        for level, credits in self:
            place = f"exposure/{level}/credit" if level else "exposure/credit"
            found |= {f"{place}/{ratio:g}": float(z) for ratio, z in zip(self._grid, credits.z, strict=True)}
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return all sums."""
        return {level: credits.state_dict() for level, credits in self}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        for level, saved in state.items():
            self._sums[level].load_state_dict(saved)
