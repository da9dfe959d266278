"""Credits added up: by hand, against a loop in plain numbers, and under known covariances."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist

import numpy as np
import pytest

from atesd.alignment import Credits, CreditSum, credit_at, over_error
from atesd.types import Measurement, Observation


def test_the_credit_of_one_ratio_has_a_name() -> None:
    assert credit_at(0.25) == Measurement("reward_influence", 0.25)


def test_a_mean_over_its_error_by_hand() -> None:
    """1, 2, 6: mean 3, variance (4 + 1 + 9) / 2 = 7, error sqrt(7 / 3)."""
    assert over_error([1.0, 2.0, 6.0]) == pytest.approx(3 / math.sqrt(7 / 3))
    assert over_error([-1.0, -2.0, -6.0]) == pytest.approx(-3 / math.sqrt(7 / 3))
    assert over_error([2.0, 2.0]) == 0.0, "folds that do not differ say nothing of their error"


def test_two_windows_by_hand() -> None:
    """Two candidates, two folds; decay .5.

    First (1, 3), (2, 2): means 2, 2; C = [[1, 0], [0, 0]] (variance 2 over 2 folds); e^2 = 1/2.
        S = (2, 2) sqrt 2                   Q = [[2, 0], [0, 0]]
    Then (0, 0), (4, 8): means 0, 6; C = [[0, 0], [0, 4]]; e^2 = 2.
        S = (sqrt 2, sqrt 2 + 6 / sqrt 2) = (sqrt 2, 4 sqrt 2)      Q = [[2 / 4, 0], [0, 4 / 2]]
    """
    credits = CreditSum(2, 0.5)
    assert not credits.known
    assert credits.z.tolist() == [0.0, 0.0]
    assert credits.add([[1.0, 3.0], [2.0, 2.0]])
    assert credits.known
    assert credits.z == pytest.approx([2.0, 0.0]), "a candidate without an error has no z"
    assert credits.add([[0.0, 0.0], [4.0, 8.0]])
    state = credits.state_dict()
    assert state["mean"] == pytest.approx([math.sqrt(2), 4 * math.sqrt(2)])
    assert np.array(state["covariance"]) == pytest.approx(np.array([[0.5, 0.0], [0.0, 2.0]]))
    assert credits.z == pytest.approx([2.0, 4.0])
    # (4 - 1) sqrt 2 over sqrt(.5 + 2)
    assert credits.gain(1, 0) == pytest.approx(3 * math.sqrt(2) / math.sqrt(2.5))
    assert credits.gain(0, 1) == pytest.approx(-3 * math.sqrt(2) / math.sqrt(2.5))


def reference(windows: Sequence[Sequence[Sequence[float]]], decay: float) -> tuple[list[float], list[list[float]]]:
    """Return S and Q of the formula, entry by entry."""
    size = len(windows[0])
    S, Q = [0.0] * size, [[0.0] * size for _ in range(size)]
    for window in windows:
        folds = len(window[0])
        m = [sum(row) / folds for row in window]
        C = [
            [
                sum((window[k][j] - m[k]) * (window[i][j] - m[i]) for j in range(folds)) / (folds - 1) / folds
                for i in range(size)
            ]
            for k in range(size)
        ]
        e = math.sqrt(sum(C[k][k] for k in range(size)) / size)
        S = [decay * S[k] + m[k] / e for k in range(size)]
        Q = [[decay**2 * Q[k][i] + C[k][i] / e**2 for i in range(size)] for k in range(size)]
    return S, Q


@pytest.mark.parametrize("decay", [0.0, 0.8])
def test_sums_are_those_of_the_formula_in_plain_numbers(decay: float) -> None:
    random = np.random.default_rng(3)
    windows = [
        (10.0**scale * (random.normal(size=(4, 8)) + random.normal(size=(1, 8)))).tolist() for scale in (-6, 0, 3)
    ]
    credits = CreditSum(4, decay)
    for window in windows:
        assert credits.add(window)
    S, Q = reference(windows, decay)
    assert credits.state_dict()["mean"] == pytest.approx(S)
    assert np.array(credits.state_dict()["covariance"]) == pytest.approx(np.array(Q))
    for a in range(4):
        assert credits.z[a] == pytest.approx(S[a] / math.sqrt(Q[a][a]))
        for b in range(4):
            error = math.sqrt(max(0.0, Q[a][a] + Q[b][b] - 2 * Q[a][b]))
            assert credits.gain(a, b) == (0.0 if a == b else pytest.approx((S[a] - S[b]) / error))


def test_no_scale_of_the_credits_matters() -> None:
    windows = np.random.default_rng(4).normal(size=(3, 2, 8))
    small, large = CreditSum(2, 0.7), CreditSum(2, 0.7)
    for window, factor in zip(windows, (1e-9, 1.0, 1e9), strict=True):
        small.add(window.tolist())
        large.add((factor * window).tolist())
    assert small.z == pytest.approx(large.z)
    assert small.gain(0, 1) == pytest.approx(large.gain(0, 1))


@pytest.mark.parametrize(
    "window",
    [
        [[1.0, 1.0], [2.0, 2.0]],
        [[0.0, 0.0], [0.0, 0.0]],
        [[math.nan, 1.0], [2.0, 3.0]],
    ],
)
def test_a_window_that_says_nothing_changes_nothing(window: list[list[float]]) -> None:
    credits = CreditSum(2, 0.5)
    assert not credits.add(window)
    assert not credits.known
    credits.add([[1.0, 3.0], [2.0, 5.0]])
    before = credits.state_dict()
    assert not credits.add(window)
    assert credits.state_dict() == before


def known(mean: Sequence[float], covariance: Sequence[Sequence[float]]) -> CreditSum:
    credits = CreditSum(len(mean), 0.5)
    credits.load_state_dict({"mean": mean, "covariance": covariance})
    return credits


def test_the_best_is_the_one_that_is_most_probably_so() -> None:
    """Candidate 1 has the highest mean, but its error is shared with 2, which follows it closely below and above.

    N(S, Q): 0 and 1 are independent with errors 1 and 1; the chance that 1 beats 0 is Phi((S1 - S0) / sqrt 2).
    """
    assert known([0.0, 0.3], [[1.0, 0.0], [0.0, 1.0]]).best() == 1
    assert known([0.3, 0.0], [[1.0, 0.0], [0.0, 1.0]]).best() == 0
    # Three candidates of mean 0: 1 and 2 are one and the same but for little, 0 stands alone: it is the best in half of
    # the draws, each of the others in a quarter.
    twins = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.999], [0.0, 0.999, 1.0]]
    assert known([0.0, 0.0, 0.0], twins).best() == 0
    assert known([0.0, 0.1, 0.1], twins).best() == 0, "the highest mean is not the most probable"
    # Of equal means the one with the largest error is the best half of the time.
    assert known([0.0, 0.0, 0.0], [[0.01, 0, 0], [0, 0.01, 0], [0, 0, 9.0]]).best() == 2
    # Beaten for sure.
    assert known([0.0, 5.0, -5.0], [[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]]).best() == 1


def test_errors_that_candidates_share_cancel() -> None:
    """A common error of 10 hides nothing: the difference .3 has an error of sqrt(2 * .01)."""
    shared = (100.0 * np.ones((3, 3)) + 0.01 * np.eye(3)).tolist()
    credits = known([0.0, 0.3, 0.0], shared)
    assert credits.best() == 1
    assert credits.gain(1, 0) == pytest.approx(0.3 / math.sqrt(0.02), rel=1e-6)
    assert abs(credits.z[1]) < 0.04
    # Noise of windows that all candidates share, added up from folds.
    random = np.random.default_rng(5)
    credits = CreditSum(3, 0.8)
    for _ in range(10):
        common = random.normal(size=(1, 8))
        credits.add((common + 0.02 * random.normal(size=(3, 8)) + [[0.0], [0.0], [0.02]]).tolist())
    assert credits.best() == 2
    assert credits.gain(2, 0) > 3


@pytest.mark.parametrize("gap", [0.2, 0.5])
def test_how_often_draws_choose_follows_the_normal_distribution(gap: float) -> None:
    """The share of draws in which 1 beats 0 is Phi(gap / sqrt(Q00 + Q11 - 2 Q01)): best() flips where it passes 1/2."""
    covariance = np.array([[1.0, 0.4], [0.4, 2.0]])
    credits = known([0.0, gap], covariance.tolist())
    values, vectors = np.linalg.eigh(covariance)
    normals = credits._normals
    assert normals.shape == (4096, 2)
    draws = np.array([0.0, gap]) + normals @ (vectors * np.sqrt(values)).T
    share = float((draws[:, 1] > draws[:, 0]).mean())
    assert share == pytest.approx(NormalDist().cdf(gap / math.sqrt(1.0 + 2.0 - 0.8)), abs=0.025)
    assert np.cov(draws.T) == pytest.approx(covariance, abs=0.15)


def test_state_goes_through_json_and_draws_stay_the_same() -> None:
    random = np.random.default_rng(6)
    credits, again = CreditSum(5, 0.8), CreditSum(5, 0.8)
    credits.add(random.normal(size=(5, 8)).tolist())
    again.load_state_dict(json.loads(json.dumps(credits.state_dict())))
    assert again.state_dict() == credits.state_dict()
    for _ in range(20):
        window = random.normal(size=(5, 8)).tolist()
        credits.add(window)
        again.add(window)
        assert again.best() == credits.best()
        assert again.z.tolist() == credits.z.tolist()


# ---- by level -------------------------------------------------------------------------------------------------------

LEVELS = {"p": "easy", "q": "hard", "r": "easy", "s": "a/b"}
GRID = (0.0, 0.5)


def tables(kind: str, *, step: int = 5, **rows: Mapping[str, Sequence[float]]) -> Observation:
    """Return an observation of credits by ratio: `low` and `high`, each by level and fold."""
    measured = {
        Measurement(kind, ratio): {
            f"{level}/{fold}": c for level, folds in rows[name].items() for fold, c in enumerate(folds)
        }
        for ratio, name in zip(GRID, ("low", "high"), strict=True)
        if name in rows
    }
    return Observation(step, measured=measured)


def test_levels_have_sums_of_their_own() -> None:
    credits = Credits(GRID, decay=0.5, by="level", levels=LEVELS)
    assert [level for level, _ in credits] == ["a/b", "easy", "hard"]
    assert [credits.of(problem) for problem in "pqrsx"] == ["easy", "hard", "easy", "a/b", ""]
    assert credits.wanted() == [Measurement("reward_influence_by_level", ratio) for ratio in GRID]
    low = {"easy": [1.0, 3.0], "a/b": [0.0, 8.0]}
    high = {"easy": [2.0, 2.0], "a/b": [5.0, 5.0]}
    assert credits.add(tables("reward_influence_by_level", low=low, high=high))
    found = dict(credits)
    assert not found["hard"].known, "no problem of it was in the batch"
    assert found["easy"].z == pytest.approx([2.0, 0.0])
    # 0, 8: mean 4, variance of the mean 16; 5, 5: none.
    assert found["a/b"].z == pytest.approx([1.0, 0.0])
    assert credits.metrics() == pytest.approx(
        {
            "exposure/easy/credit/0": 2.0,
            "exposure/easy/credit/0.5": 0.0,
            "exposure/a/b/credit/0": 1.0,
            "exposure/a/b/credit/0.5": 0.0,
            "exposure/hard/credit/0": 0.0,
            "exposure/hard/credit/0.5": 0.0,
        }
    )
    again = Credits(GRID, decay=0.5, by="level", levels=LEVELS)
    again.load_state_dict(json.loads(json.dumps(credits.state_dict())))
    assert again.metrics() == credits.metrics()
    assert again.state_dict() == credits.state_dict()


def test_all_problems_together_have_one_sum() -> None:
    credits = Credits(GRID, decay=0.5, by="none", levels=LEVELS)
    assert [level for level, _ in credits] == [""]
    assert {credits.of(problem) for problem in "pqrsx"} == {""}
    assert credits.wanted() == [Measurement("reward_influence", ratio) for ratio in GRID]
    assert credits.add(tables("reward_influence", low={"": [1.0, 3.0]}, high={"": [2.0, 4.0]}))
    assert credits.metrics() == pytest.approx({"exposure/credit/0": 2.0, "exposure/credit/0.5": 3.0})


def test_problems_without_levels_are_one_level() -> None:
    credits = Credits(GRID, decay=0.5, by="level", levels={})
    assert [level for level, _ in credits] == [""]
    assert credits.add(tables("reward_influence_by_level", low={"": [1.0, 3.0]}, high={"": [2.0, 4.0]}))
    assert dict(credits)[""].known


def test_a_candidate_without_a_table_spoils_the_window() -> None:
    credits = Credits(GRID, decay=0.5, by="none", levels={})
    assert not credits.add(Observation(3))
    assert not credits.add(tables("reward_influence", low={"": [1.0, 3.0]}))
    assert not credits.add(tables("reward_influence", high={"": [1.0, 3.0]}))
    assert not credits.add(tables("reward_influence_by_level", low={"": [1.0, 3.0]}, high={"": [2.0, 4.0]}))
    assert not dict(credits)[""].known


def test_the_decay_is_the_recipes() -> None:
    for decay in (0.0, 0.5):
        credits = Credits(GRID, decay=decay, by="none", levels={})
        for _ in range(2):
            credits.add(tables("reward_influence", low={"": [1.0, 3.0]}, high={"": [2.0, 4.0]}))
        # m / e = (2, 3), C / e^2 = 1: z = m (1 + d) / sqrt(1 + d^2)
        assert dict(credits)[""].z == pytest.approx([x * (1 + decay) / math.sqrt(1 + decay**2) for x in (2.0, 3.0)])
