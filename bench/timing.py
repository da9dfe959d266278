"""Interleaved timing: every round runs each arm once, so that a busy machine slows all of them alike."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from time import perf_counter

import numpy as np

Samples = dict[str, list[float]]

_START = perf_counter()


def interleaved(arms: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 1) -> Samples:
    """Return seconds of every arm in every round, A B A B ...; the warm-up rounds are not kept."""
    samples: Samples = {name: [] for name in arms}
    for turn in range(warm_up + rounds):
        for name, run in arms.items():
            start = perf_counter()
            run()
            if turn >= warm_up:
                samples[name].append(perf_counter() - start)
    return samples


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the median and both quartiles."""
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return {"median": float(middle), "low": float(low), "high": float(high)}


def ratio(slow: Sequence[float], fast: Sequence[float]) -> dict[str, float]:
    """Return the spread of slow / fast round by round: above 1 where the second is faster."""
    return spread([one / other for one, other in zip(slow, fast, strict=True)])


def progress(what: str) -> None:
    """Say on stderr what is done."""
    print(f"{perf_counter() - _START:6.0f} s  {what}", file=sys.stderr, flush=True)
