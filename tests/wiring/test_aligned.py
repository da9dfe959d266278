"""What is made of the credit from graded rollouts: exposure, routes, lambda, rewards, by level and fold.

All from the credits that `Gauges` recomputes from recorded samples and weights. K candidates, J folds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from support.gauges import Gauges
from support.oracle import Oracle

Oracles = Callable[[str], Oracle]
Sums = tuple[NDArray[np.float64], NDArray[np.float64]]


def added(sums: Sums | None, credits_KJ: Sequence[Sequence[float]], decay: float) -> Sums:
    """Add a window: S <- d S + m / e, Q <- d^2 Q + C / e^2, e^2 the mean variance of the candidates' means."""
    table = np.array(credits_KJ)
    K, J = table.shape
    m = table.mean(axis=1)
    deviations = table - m[:, None]
    C = deviations @ deviations.T / (J - 1) / J
    e = np.sqrt(sum(C[k, k] for k in range(K)) / K)
    S, Q = sums if sums else (np.zeros(K), np.zeros((K, K)))
    return decay * S + m / e, decay**2 * Q + C / e**2


def z(sums: Sums) -> NDArray[np.float64]:
    return sums[0] / np.sqrt(np.diag(sums[1]))


def chances(sums: Sums) -> NDArray[np.float64]:
    """Return how probable it is of each candidate that it is the best, from draws of its own."""
    draws = np.random.default_rng(7).multivariate_normal(*sums, size=200_000, method="svd")
    return np.bincount(draws.argmax(axis=1), minlength=len(sums[0])) / len(draws)


def levels_of(gauges: Gauges, step: int, grid: Sequence[float]) -> dict[str, list[list[float]]]:
    """Return every level's credits by candidate and fold; nothing where no window could be measured."""
    tables = [gauges.reward_credit(step, ratio=ratio) for ratio in grid]
    assert len({tuple(table) for table in tables}) == 1
    return {level: [table[level] for table in tables] for level in tables[0]}


def together(levels: Mapping[str, Sequence[float]]) -> list[float]:
    """Return the credits of all levels at once, by fold."""
    return [sum(parts) for parts in zip(*levels.values(), strict=True)]


def ratio_of(truth: Oracle, step: int, level: str) -> set[float]:
    groups = truth.run.groups[step]
    return {g["ratio"] for g in groups if g["ratio"] is not None and truth.run.problem(g["problem_id"]).level == level}


def test_every_level_is_shown_the_ratio_that_is_most_probably_the_best(oracle: Oracles) -> None:
    truth = oracle("aligned")
    gauges, exposure = Gauges(truth), truth.settings["exposure"]
    every = {problem.level for problem in truth.run.trainer.parts.problems}
    assert every == {"short", "early", "late"}
    sums: dict[str, Sums] = {}
    chosen = dict.fromkeys(every, exposure["start"])
    shown, windows = set(), 0
    for step in range(1, truth.run.steps + 1):
        for level in every:
            found = ratio_of(truth, step, level)
            assert found <= {chosen[level]}
            shown |= found
        fresh = levels_of(gauges, step, exposure["grid"])
        for level, credits_KJ in fresh.items():
            sums[level] = added(sums.get(level), credits_KJ, exposure["decay"])
        metrics = truth.run.metrics[step]
        assert ("exposure/discarded" in metrics) is (not fresh)
        windows += bool(fresh)
        for level, known in sums.items():
            keys = [f"exposure/{level}/credit/{ratio:g}" for ratio in exposure["grid"]]
            if fresh:
                assert [metrics[key] for key in keys] == pytest.approx(z(known).tolist(), rel=1e-2, abs=5e-3)
            likely = chances(known)
            taken = ratio_of(truth, step + 1, level) if step < truth.run.steps else set()
            for ratio in taken:
                place = exposure["grid"].index(ratio)
                assert likely[place] > likely.max() - 0.02
                chosen[level] = ratio
            if not taken:
                chosen[level] = exposure["grid"][int(likely.argmax())]
    assert len(shown) > 2
    assert windows > 3


def test_a_level_is_distilled_while_its_best_credit_is_above_the_margin(oracle: Oracles) -> None:
    truth = oracle("aligned")
    gauges, routing = Gauges(truth), truth.settings["routing"]
    sums: dict[str, Sums] = {}
    helps: dict[str, bool] = {}
    routes = set()
    for step in range(1, truth.run.steps + 1):
        for group in truth.run.groups[step]:
            graded = [reward for reward in group["rewards"] if reward is not None]
            expected = "rl" if len(set(graded)) > 1 else "skip" if graded else "distil"
            if helps.get(truth.run.problem(group["problem_id"]).level, True):
                expected = "distil"
            assert group["route"] == expected
            routes.add(expected)
        if step % routing["every"]:
            continue
        fresh = levels_of(gauges, step, routing["grid"])
        for level, credits_KJ in fresh.items():
            sums[level] = added(sums.get(level), credits_KJ, routing["decay"])
        for level, known in sums.items() if fresh else ():
            best = float(z(known).max())
            assert abs(best - routing["margin"]) > 0.01, "too close to tell"
            helps[level] = best > routing["margin"]
            assert truth.run.metrics[step][f"route/{level}/best_credit"] == pytest.approx(best, rel=1e-2, abs=5e-3)
    assert routes == {"distil", "rl", "skip"}


def test_lambda_begins_at_1_and_is_what_the_comparison_of_both_says(oracle: Oracles) -> None:
    truth = oracle("aligned_lambda")
    gauges, wanted = Gauges(truth), truth.settings["target"]["lambda_x"]
    strength, sums = 1.0, None
    for step in range(1, truth.run.steps + 1):
        assert {group["lambda"] for group in truth.run.groups[step]} == {strength}
        metrics = truth.run.metrics[step]
        assert ("target/lambda_credit" in metrics) is (step == 5)
        if step % 5:
            continue
        sums = added(sums, [together(gauges.reward_credit(step, strength=each)) for each in (1.0, wanted)], 0.8)
        (S, Q) = sums
        error = np.sqrt(Q[0, 0] + Q[1, 1] - 2 * Q[0, 1])
        assert metrics["target/lambda_credit"] == pytest.approx(float(S[1] - S[0]) / error, rel=2e-2)
        strength = wanted if S[1] > S[0] else 1.0
        assert metrics["target/lambda"] == strength
    assert sums is not None


def test_one_ratio_for_all_is_renewed_at_the_ends_of_windows(oracle: Oracles) -> None:
    truth = oracle("aligned_lambda")
    gauges, exposure = Gauges(truth), truth.settings["exposure"]
    sums, ratio, windows = None, exposure["start"], 0
    for step in range(1, truth.run.steps + 1):
        assert {group["ratio"] for group in truth.run.groups[step]} == {ratio}
        metrics = truth.run.metrics[step]
        known = any(row.outcome for row in gauges.graded(step))
        assert ("exposure/credit/0" in metrics) is (step % 2 == 0 and known)
        assert ("exposure/discarded" in metrics) is (step % 2 == 0 and not known)
        if step % 2 or not known:
            continue
        windows += 1
        table = [together(gauges.reward_credit(step, ratio=each)) for each in exposure["grid"]]
        sums = added(sums, table, exposure["decay"])
        found = [metrics[f"exposure/credit/{each:g}"] for each in exposure["grid"]]
        assert found == pytest.approx(z(sums).tolist(), rel=1e-2, abs=5e-3)
        likely = chances(sums)
        assert abs(likely[0] - 0.5) > 0.02, "too close to tell"
        ratio = exposure["grid"][int(likely.argmax())]
    assert windows > 1


def test_a_beta_policy_is_rewarded_by_the_credit_of_its_draw_over_its_error(oracle: Oracles) -> None:
    """A decision of one step is scored one step later, and discarded where no earlier completion says anything."""
    truth = oracle("beta_aligned")
    gauges = Gauges(truth)
    discarded = 0
    for step in range(1, truth.run.steps + 1):
        metrics = truth.run.metrics[step]
        known = any(row.outcome for row in gauges.graded(step))
        discarded += not known
        assert metrics["exposure/discarded"] == discarded
        assert ("exposure/reward_lp" in metrics) is known
        if not known:
            continue
        (ratio,) = {group["ratio"] for group in truth.run.groups[step]}
        folds = together(gauges.reward_credit(step, ratio=ratio))
        middle = sum(folds) / len(folds)
        error = np.sqrt(sum((fold - middle) ** 2 for fold in folds) / (len(folds) - 1) / len(folds))
        assert metrics["exposure/reward_lp"] == pytest.approx(middle / error, rel=1e-2)
        assert not any(key.startswith("measure/gt_") for key in metrics)
    assert 0 < discarded < 3


def test_an_attempt_without_others_is_compared_with_the_running_mean_of_its_level(oracle: Oracles) -> None:
    """What the recipes must hold for the tests above to say anything."""
    lone = [row for step in range(1, 7) for row in oracle("aligned_lambda").rows(step)]
    assert len({row.outcome for row in lone}) > 4
    several = [row for step in range(1, 7) for row in oracle("aligned").rows(step)]
    assert any(row.outcome is None for row in several)
    assert any(row.place == 8 and row.outcome for row in several), "a fold holds two problems of a step"
    assert any(row.outcome and row.outcome < 0 for row in several)
