"""Average@k, pass@k, maj@k against enumeration; bootstrap intervals against exact laws and analytic errors."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from collections.abc import Sequence
from itertools import combinations, permutations, product
from math import sqrt
from statistics import NormalDist, fmean

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atesd.evaluate import metrics
from atesd.evaluate.metrics import (
    Array,
    Difference,
    Interval,
    arm_interval,
    avg_at_k,
    bootstrap_interval,
    few_seeds_interval,
    maj_at_k,
    paired_difference,
    pass_at_k,
    t_interval,
)

# Problem 0 has 1 of 4 right, problem 1 has 3, problem 2 none.
CORRECT = np.array([[0, 1, 0, 0], [1, 1, 0, 1], [0, 0, 0, 0]], dtype=np.float64)
WIDTH = 2 * NormalDist().inv_cdf(0.975)  # of a 95 % interval, in standard errors


def width(bounds: Interval | Difference) -> float:
    """Return high - low."""
    return bounds.high - bounds.low


def test_average_at_k_is_the_share_of_correct_samples() -> None:
    assert avg_at_k(CORRECT) == pytest.approx((1 / 4 + 3 / 4 + 0) / 3, abs=1e-15)
    assert avg_at_k(CORRECT.astype(bool)) == pytest.approx(1 / 3, abs=1e-15)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(k: int) -> None:
    rows = list(product([0, 1], repeat=5))
    expected = [fmean(any(subset) for subset in combinations(row, k)) for row in rows]
    np.testing.assert_allclose(pass_at_k(np.array(rows, dtype=bool), k), expected, atol=1e-12)


def test_pass_at_1_averages_to_average_at_k() -> None:
    assert pass_at_k(CORRECT, 1).tolist() == pytest.approx([1 / 4, 3 / 4, 0])


@pytest.mark.parametrize("k", [0, 5])
def test_pass_at_k_needs_k_samples(k: int) -> None:
    with pytest.raises(ValueError, match=f"pass@{k} needs at least {k} samples a problem, there are 4"):
        pass_at_k(CORRECT, k)


def majority_by_orderings(answers: Sequence[str | None], correct: Sequence[bool]) -> float:
    """Grade of the first sample that gives the winner, mean over all orders; ties go to the answer that came first."""
    grades = []
    for order in permutations(range(len(answers))):
        said = [answers[place] for place in order if answers[place] is not None]
        winner = Counter(said).most_common(1)[0][0] if said else None
        first = next((place for place in order if said and answers[place] == winner), None)
        grades.append(0.0 if first is None else float(correct[first]))
    return fmean(grades)


@given(st.lists(st.tuples(st.sampled_from(["1", "2", "3", None]), st.booleans()), min_size=1, max_size=5))
def test_majority_is_the_mean_over_all_orderings(samples: list[tuple[str | None, bool]]) -> None:
    answers, correct = [answer for answer, _ in samples], [grade for _, grade in samples]
    found = maj_at_k([answers], np.array([correct]))
    assert found.tolist() == pytest.approx([majority_by_orderings(answers, correct)])


@pytest.mark.parametrize(("answers", "correct", "expected"), [
    (["4", "4", "7"], [1, 1, 0], 1.0),
    (["4", "7", "7"], [1, 0, 0], 0.0),
    (["4", "4", "7", "7", "9"], [1, 1, 0, 0, 0], 1 / 2),  # 4 and 7 tie, 9 is out of it
    (["4", "7", "9"], [1, 0, 0], 1 / 3),
    (["4", "4", "4.0"], [1, 0, 1], 1 / 2),  # one wording, two grades
    ([None, None, "4"], [0, 0, 1], 1.0),  # no answer is no vote, or the two would win
    ([None, None, None], [0, 0, 0], 0.0),
])  # fmt: skip
def test_majority_by_hand(answers: list[str | None], correct: list[int], expected: float) -> None:
    assert maj_at_k([answers], np.array([correct], dtype=np.float64)).tolist() == pytest.approx([expected])


def test_the_interval_has_the_width_of_the_standard_error() -> None:
    # 300 of 1000 are right: the mean's error is sqrt(.3 * .7 / 1000) = .01449, its interval .3 -+ .0284
    low, high = bootstrap_interval(np.repeat([1.0, 0.0], [300, 700]))
    error = sqrt(0.3 * 0.7 / 1000)
    assert (low + high) / 2 == pytest.approx(0.3, abs=0.001)
    assert high - low == pytest.approx(WIDTH * error, rel=0.03)


def test_the_interval_covers_the_true_mean_in_95_of_100_samples() -> None:
    rng = np.random.default_rng(1)
    intervals = [bootstrap_interval(rng.normal(7.0, 3.0, size=60), resamples=1000) for _ in range(400)]
    # The error of a share of .95 over 400 samples is .011.
    assert fmean(low <= 7.0 <= high for low, high in intervals) == pytest.approx(0.95, abs=0.03)


@pytest.mark.parametrize("drawn", [1, 70, 10**9])
def test_drawing_in_parts_draws_the_same(drawn: int, monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(2).normal(size=(3, 30))
    whole = bootstrap_interval(values[0]), arm_interval(values), arm_interval(values, shared=True)
    picks = np.random.default_rng(0).integers(0, 30, size=(10_000, 30))
    assert whole[0] == tuple(np.quantile(values[0][picks].mean(axis=1), [0.025, 0.975]))
    monkeypatch.setattr(metrics, "_DRAWN", drawn)
    assert (bootstrap_interval(values[0]), arm_interval(values), arm_interval(values, shared=True)) == whole


def test_intervals_over_many_problems_need_little_memory() -> None:
    """At 8000 problems 4000 resamples are 32 million draws: 512 MB of places and values, held at once."""
    values = np.random.default_rng(2).normal(size=(1, 8000))
    tracemalloc.start()
    try:
        for interval in (
            lambda: bootstrap_interval(values[0], resamples=4000),
            lambda: arm_interval(values),
            lambda: arm_interval(values, shared=True),
        ):
            tracemalloc.reset_peak()
            interval()
            assert tracemalloc.get_traced_memory()[1] < 100e6
    finally:
        tracemalloc.stop()


def test_the_seed_fixes_the_interval() -> None:
    values = np.random.default_rng(2).normal(size=30)
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)
    assert bootstrap_interval(values, seed=3) != bootstrap_interval(values, seed=4)


def test_one_problem_has_no_spread() -> None:
    assert bootstrap_interval(np.array([0.25])) == (0.25, 0.25)


def test_pairing_removes_what_both_arms_share() -> None:
    """Problems differ by 10, the arms by .5 on half of the problems: only the latter is resampled."""
    difficulty = np.linspace(0.0, 10.0, 400)[None].repeat(30, axis=0)
    gain = np.tile([0.0, 0.5], 200)
    found = paired_difference(difficulty + gain, difficulty)
    assert found.difference == pytest.approx(0.25)
    # Each of 30 seeds draws its 400 problems: sqrt(.25^2 / (30 * 400)); the arms alone have sqrt(8.35 / 12000).
    assert width(found) == pytest.approx(WIDTH * 0.25 / sqrt(12_000), rel=0.05)


def test_the_difference_is_first_minus_second() -> None:
    assert paired_difference(np.full((2, 3), 0.75), np.full((2, 3), 0.5)) == (0.25, 0.25, 0.25, 2, 0.25, 0.25)


SEED_EFFECT = np.random.default_rng(4).normal(0.0, 0.5, size=(40, 1))
PROBLEM_EFFECT = np.random.default_rng(5).normal(0.0, 1.0, size=(1, 50))
NOISE = np.random.default_rng(6).normal(0.0, 1.0, size=(40, 50))


@pytest.mark.parametrize("shared", [False, True])
def test_intervals_add_the_variances_of_seeds_and_problems(shared: bool) -> None:
    """Known effects of 40 seeds and 50 problems, and noise without row or column means."""
    noise = NOISE - NOISE.mean(axis=0) - NOISE.mean(axis=1, keepdims=True) + NOISE.mean()
    values = SEED_EFFECT + PROBLEM_EFFECT + noise
    # A problem's effect is averaged over 50 draws if one set of problems serves all seeds, else over 40 times 50.
    draws = 50 if shared else 40 * 50
    error = sqrt(SEED_EFFECT.var() / 40 + PROBLEM_EFFECT.var() / draws + noise.var() / (40 * 50))
    interval = arm_interval(values, shared=shared)
    assert width(interval) == pytest.approx(WIDTH * error, rel=0.05)
    assert paired_difference(values + 3.0, np.full(values.shape, 3.0), shared=shared)[1:3] == pytest.approx(interval)


def exact_interval(values_SP: Array, *, shared: bool) -> tuple[float, float]:
    """Enumerate every resample with its equal probability; the bounds are the 2.5 % and 97.5 % points of their law."""
    seeds, problems = values_SP.shape
    draws = list(product(range(problems), repeat=problems))
    means = []
    for drawn in product(range(seeds), repeat=seeds):
        picks = ([picked] * seeds for picked in draws) if shared else product(draws, repeat=seeds)
        means += [fmean(values_SP[s, p] for s, row in zip(drawn, pick, strict=True) for p in row) for pick in picks]
    law = sorted(round(mean, 9) for mean in means)
    return law[int(0.025 * len(law))], law[int(0.975 * len(law))]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("values", [
    [[0.0, 1.0], [0.0, 1.0], [0.0, 1.0]],  # problems alone: six fair coins, or two
    [[0.0, 0.0], [0.0, 0.0], [1.0, 1.0]],  # seeds alone
    [[0.0, 0.25], [0.5, 1.0], [0.0, 1.0]],
])  # fmt: skip
def test_small_intervals_against_every_resample(values: list[list[float]], shared: bool) -> None:
    table = np.array(values)
    assert arm_interval(table, shared=shared) == pytest.approx(exact_interval(table, shared=shared))


def test_shared_problems_by_hand() -> None:
    """One easy and one hard problem for all three seeds."""
    table = np.array([[0.0, 1.0]] * 3)
    # Each seed draws its own: six coins, no head has odds 1/64 < 2.5 %, at most one 7/64: from 1/6 to 5/6.
    assert arm_interval(table) == pytest.approx((1 / 6, 5 / 6))
    # One set for all: two coins, no head has odds 1/4.
    assert arm_interval(table, shared=True) == (0.0, 1.0)


def test_arms_of_other_shapes_are_not_paired() -> None:
    with pytest.raises(ValueError, match=r"equal seeds and problems: \(2, 3\) against \(2, 4\)"):
        paired_difference(np.zeros((2, 3)), np.zeros((2, 4)))


def test_the_interval_over_seeds_by_hand() -> None:
    """Means .4 and .6: std sqrt(2 * .1^2 / 1), error sqrt(.02 / 2) = .1, and t(.975, 1) = tan(.475 pi) = 12.7062."""
    assert t_interval(np.array([0.4, 0.6])) == pytest.approx((0.5 - 1.27062, 0.5 + 1.27062), abs=1e-5)
    # .2, .5, .5, .8: std sqrt(.18 / 3), error sqrt(.06 / 4) = .122474, t(.975, 3) = 3.182446
    assert t_interval(np.array([0.2, 0.5, 0.5, 0.8])) == pytest.approx((0.5 - 0.389768, 0.5 + 0.389768), abs=1e-5)
    with pytest.raises(ValueError, match="at least two of them, there are 1: run more seeds"):
        t_interval(np.array([0.4]))


def test_only_two_to_four_seeds_get_an_interval_of_their_own() -> None:
    """It is that of the seeds' means over problems: .25 and .75."""
    table = np.array([[0.0, 0.5], [0.5, 1.0]])
    assert few_seeds_interval(table) == t_interval(np.array([0.25, 0.75]))
    assert few_seeds_interval(table[:1]) is None
    assert [few_seeds_interval(np.tile(table[:1], (seeds, 1))) is None for seeds in (4, 5)] == [False, True]
    found = paired_difference(table, np.zeros((2, 2)))
    assert (found.seeds, found.t_low, found.t_high) == (2, *t_interval(np.array([0.25, 0.75])))
    assert paired_difference(np.ones((5, 2)), np.zeros((5, 2)))[3:] == (5, None, None)


@pytest.mark.parametrize("seeds", [2, 3, 4])
def test_over_few_differing_seeds_the_bootstrap_covers_too_little_and_t_what_it_should(seeds: int) -> None:
    """Seeds differ, problems do not: two seeds resample to their smaller and larger mean, right in one case of two."""
    rng = np.random.default_rng(seeds)
    tables = rng.normal(0.0, 0.05, size=(400, seeds, 1)).repeat(4, axis=2)
    resampled = fmean(low <= 0 <= high for low, high in (arm_interval(table, resamples=200) for table in tables))
    over_seeds = fmean(low <= 0 <= high for low, high in (t_interval(table.mean(axis=1)) for table in tables))
    assert resampled == pytest.approx(
        {2: 0.5, 3: 0.75, 4: 0.80}[seeds], abs=0.08
    )  # 3 and 4: extremes of 3^3, 4^4 draws
    assert over_seeds == pytest.approx(0.95, abs=0.035)  # the error of .95 over 400 samples is .011


def test_without_spread_of_seeds_the_bootstrap_covers_too_much() -> None:
    """Only problems differ, drawn anew for each of two seeds: resampling their means as well adds what is not there."""
    rng = np.random.default_rng(9)
    tables = rng.normal(0.0, 1.0, size=(300, 2, 40))
    resampled = [arm_interval(table, resamples=300) for table in tables]
    assert fmean(low <= 0 <= high for low, high in resampled) > 0.965


@pytest.mark.parametrize(("bounds", "sign"), [
    ((0.1, 0.3, None, None), 1),
    ((-0.3, -0.1, None, None), -1),
    ((-0.1, 0.3, None, None), 0),
    ((0.1, 0.3, 0.05, 0.35), 1),
    ((0.1, 0.3, -0.9, 1.3), 0),  # resampling two seeds is not believed alone
    ((-0.3, -0.1, -1.3, 0.9), 0),
    ((-0.01, 0.3, 0.05, 0.24), 0),
    ((-0.3, -0.1, -0.35, -0.05), -1),
    ((0.0, 0.3, None, None), 0),
])  # fmt: skip
def test_arms_are_told_apart_by_every_interval_that_there_is(bounds: tuple[float | None, ...], sign: int) -> None:
    low, high, t_low, t_high = bounds
    assert low is not None
    assert high is not None
    assert Difference((low + high) / 2, low, high, 3, t_low, t_high).sign == sign
