"""Accuracy over k samples a problem, and intervals. Pure NumPy.

Shapes: P problems, K samples a problem, S seeds. Correctness is 0 or 1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from math import comb
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

FEW_SEEDS = 5
"""Below so many seeds a bootstrap interval is not to be read alone: see `t_interval`."""

_RESAMPLES = 10_000
_RESAMPLES_NESTED = 4_000
_DRAWN = 4_000_000  # problems at a time: some 64 MB for places and values


class Interval(NamedTuple):
    """Bounds of a 95 % percentile-bootstrap interval."""

    low: float
    high: float


class Difference(NamedTuple):
    """A paired difference of two arms with its 95 % bootstrap interval, and over few seeds the t interval as well."""

    difference: float
    low: float
    high: float
    seeds: int
    t_low: float | None = None
    t_high: float | None = None

    @property
    def sign(self) -> int:
        """1 where every interval that is given lies above 0, -1 where below, 0 where the arms are not told apart."""
        lows = [bound for bound in (self.low, self.t_low) if bound is not None]
        highs = [bound for bound in (self.high, self.t_high) if bound is not None]
        return int(min(lows) > 0) - int(max(highs) < 0)


def avg_at_k(correct_PK: NDArray[np.bool_] | Array) -> float:
    """Return Average@k: the mean over problems of the share of correct samples."""
    return float(np.mean(correct_PK))


def pass_at_k(correct_PK: NDArray[np.bool_] | Array, k: int) -> Array:
    """Return the unbiased pass@k of each problem, [P]: 1 - C(n - c, k) / C(n, k), n samples of which c are correct.

    ValueError if k exceeds the number of samples.
    """
    n = correct_PK.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs at least {k} samples a problem, there are {n}: sample more, or lower k")
    correct_P = np.asarray(correct_PK).sum(axis=1).astype(int)
    return np.array([1.0 - comb(n - c, k) / comb(n, k) for c in correct_P])


def maj_at_k(answers_PK: Sequence[Sequence[str | None]], correct_PK: NDArray[np.bool_] | Array) -> Array:
    """Return the expected accuracy of each problem's most frequent answer, [P].

    Votes count an answer's wording: 1/2 and 0.5 are two answers. Samples without an answer have no vote; a problem
    without any answer is wrong, so that where no problem has one the result says nothing (`have_answers`). Tied answers
    count by the mean of their correctness, and so do samples that share a wording but not a grade.
    """
    return np.array([_majority(answers, row) for answers, row in zip(answers_PK, correct_PK, strict=True)])


def have_answers(answers_PK: Sequence[Sequence[str | None]]) -> bool:
    """Tell whether any sample has an answer that could be voted for: actions and free text have none."""
    return any(answer is not None for answers in answers_PK for answer in answers)


def _majority(answers_K: Sequence[str | None], correct_K: NDArray[np.bool_] | Array) -> float:
    votes = Counter(answer for answer in answers_K if answer is not None)
    if not votes:
        return 0.0
    most = max(votes.values())
    winners = [answer for answer, count in votes.items() if count == most]
    return float(np.mean([np.mean([c for a, c in zip(answers_K, correct_K, strict=True) if a == w]) for w in winners]))


def bootstrap_interval(values_P: Array, *, resamples: int = _RESAMPLES, seed: int = 0) -> Interval:
    """Return the 95 % percentile interval of the mean, resampling problems. A single problem gives (mean, mean)."""
    values_P = np.asarray(values_P, dtype=np.float64)
    draws = _draws(np.random.default_rng(seed), len(values_P), resamples)
    return _percentiles(np.concatenate([values_P[picks_RP].mean(axis=1) for _, picks_RP in draws]))


def arm_interval(
    accuracy_SP: Array, *, shared: bool = False, resamples: int = _RESAMPLES_NESTED, seed: int = 0
) -> Interval:
    """Return the 95 % interval of one arm's mean accuracy, resampled like `paired_difference`."""
    return _percentiles(_resampled_means(np.asarray(accuracy_SP, dtype=np.float64), shared, resamples, seed))


def paired_difference(
    first_SP: Array, second_SP: Array, *, shared: bool = False, resamples: int = _RESAMPLES_NESTED, seed: int = 0
) -> Difference:
    """Return mean(first - second) with a 95 % interval that resamples seeds and, within them, problems.

    Seed s of both arms shares its training problems, their order, the sampling seeds and the evaluation problems, so
    the difference is taken within each (seed, problem) first. One resample draws S seeds, and P problems for each
    drawn seed. Treating the S P differences as independent would ignore that those of one seed move together, and
    be too optimistic. `shared` says that all seeds were evaluated on the same problems: then one drawn set of problems
    serves every drawn seed, since their differences move together as well. Over fewer than `FEW_SEEDS` seeds the
    interval over seeds alone stands beside it (`t_interval`).

    ValueError if the shapes differ.
    """
    if first_SP.shape != second_SP.shape:
        raise ValueError(f"paired arms need equal seeds and problems: {first_SP.shape} against {second_SP.shape}")
    gap_SP = np.asarray(first_SP, dtype=np.float64) - second_SP
    bounds = _percentiles(_resampled_means(gap_SP, shared, resamples, seed))
    return Difference(float(gap_SP.mean()), *bounds, len(gap_SP), *(few_seeds_interval(gap_SP) or (None, None)))


def t_interval(values_S: Array) -> Interval:
    """Return Student's 95 % interval of the mean over seeds, mean +- t(.975, S - 1) std / sqrt(S), std with ddof 1.

    With S seeds a percentile bootstrap over seeds is too narrow, by sqrt((S - 1) / S) and by the normal's quantile in
    place of t's: where seeds differ and little else does, its 95 % cover .5 for S = 2, .75 for 3 and about .8 for 4.
    This one covers 95 % for normal seed means and any S from 2 on, at the price of width: t is 12.7 for two seeds, 2.8
    for five.

    ValueError below two seeds.
    """
    count = len(values_S)
    if count < 2:
        raise ValueError(f"an interval over seeds needs at least two of them, there are {count}: run more seeds")
    from scipy.special import stdtrit  # a quarter of a second, which most commands do not need

    mean = float(np.mean(values_S))
    reach = float(stdtrit(count - 1, 0.975) * np.std(values_S, ddof=1) / np.sqrt(count))
    return Interval(mean - reach, mean + reach)


def few_seeds_interval(values_SP: Array) -> Interval | None:
    """Return the t interval over the means of two to four seeds; None for one seed, and where seeds are many."""
    means_S = np.asarray(values_SP, dtype=np.float64).mean(axis=1)
    return t_interval(means_S) if 2 <= len(means_S) < FEW_SEEDS else None


def _resampled_means(values_SP: Array, shared: bool, resamples: int, seed: int) -> Array:
    """Return bootstrap means; drawn problems serve every drawn seed where they are shared, else one seed."""
    rng = np.random.default_rng(seed)
    num_seeds, num_problems = values_SP.shape
    seeds_RS = rng.integers(0, num_seeds, size=(resamples, num_seeds))
    total_R = np.zeros(resamples)
    for part, problems_RP in _draws(rng, num_problems, resamples):  # unshared they only move the generator on
        for drawn_R in seeds_RS[part].T if shared else ():
            total_R[part] += values_SP[drawn_R[:, None], problems_RP].mean(axis=1)
    for drawn_R in () if shared else seeds_RS.T:
        for part, problems_RP in _draws(rng, num_problems, resamples):
            total_R[part] += values_SP[drawn_R[part, None], problems_RP].mean(axis=1)
    means_R: Array = total_R / num_seeds
    return means_R


def _draws(rng: np.random.Generator, num_problems: int, resamples: int) -> Iterator[tuple[slice, NDArray[np.int64]]]:
    """Yield which resamples are drawn, and their problems, [r, P]: in parts, whose numbers are those of one draw."""
    rows = max(1, _DRAWN // num_problems)
    for start in range(0, resamples, rows):
        part = slice(start, min(start + rows, resamples))
        yield part, rng.integers(0, num_problems, size=(part.stop - part.start, num_problems))


def _percentiles(means_R: Array) -> Interval:
    low, high = np.quantile(means_R, [0.025, 0.975])
    return Interval(float(low), float(high))
