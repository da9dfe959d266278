"""Exposure controllers on a run whose best ratio is known: the share of the possible progress that each one makes.

    python repro/bandit_toy.py [STEPS]      prints a Markdown table; 20 seeds, a minute

The toy is that of docs/exposure.md: an update at ratio a lowers l by 1e-3 max(0, 1 - 4 (a - best)^2); the best ratio
would lower it by 1e-3 in every step. `noise` is the standard deviation of what is added to each measurement of l.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from atesd.facts import RunFacts
from atesd.kinds import ExposureSection
from atesd.types import Measurement, Observation

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support.exposure_toy import Toy

CONTROLLERS: dict[str, dict[str, Any]] = {
    "fixed .5": {"kind": "fixed", "ratio": 0.5},
    "`random`": {"kind": "random"},
    "`beta`": {"kind": "beta"},
    "`beta`, no grounded term": {"kind": "beta", "lambda_gt": 0.0},
    "`beta`, never trained": {"kind": "beta", "learning_rate": 0.0},
    "`bandit`": {"kind": "bandit"},
    "`bandit`, width 0": {"kind": "bandit", "width": 0.0},
}
BEST, NOISES, SEEDS = (0.2, 0.5, 0.8), (0.0, 1e-3), 20


class Noisy:
    """A controller whose probe is measured with noise."""

    def __init__(self, controller: Any, noise: float, seed: int) -> None:
        self._inner, self._noise, self._random = controller, noise, np.random.default_rng(seed)

    def observe(self, observation: Observation) -> None:
        def noisy(measurement: Measurement, value: Any) -> Any:
            probe = measurement.kind == "probe_nll"
            return value + self._noise * self._random.standard_normal() if probe else value

        measured: Mapping[Measurement, Any] = {key: noisy(key, value) for key, value in observation.measured.items()}
        self._inner.observe(Observation(observation.step, observation.stats, measured))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def gained(fields: Mapping[str, Any], best: float, noise: float, seed: int, steps: int) -> float:
    """Return the progress of one run over that of the best ratio."""
    section = TypeAdapter(ExposureSection).validate_python(dict(fields))
    controller = section.build(RunFacts(seed=seed, total_steps=steps))
    toy = Toy(Noisy(controller, noise, seed), best=best, level=2.0)
    toy.run(steps)
    return (2.0 - toy.level) / (1e-3 * steps)


def main(arguments: Sequence[str]) -> None:
    """Print the table."""
    steps = int(arguments[0]) if arguments else 100
    heads = [f"best {best:g}, noise {noise:g}" for noise in NOISES for best in BEST]
    print(f"| {steps} steps | {' | '.join(heads)} |\n|---|{'---|' * len(heads)}")
    for name, fields in CONTROLLERS.items():
        cells = []
        for noise in NOISES:
            for best in BEST:
                shares = [gained(fields, best, noise, seed, steps) for seed in range(SEEDS)]
                cells.append(f"{np.mean(shares):.2f} ± {np.std(shares, ddof=1) / SEEDS**0.5:.2f}")
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main(sys.argv[1:])
