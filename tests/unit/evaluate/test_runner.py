from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from atesd.evaluate.runner import EvalConfig, Evaluation, evaluate
from atesd.metrics import METRICS
from atesd.rewards.exact import exact_reward
from atesd.rewards.weighted import WeightedReward
from atesd.rollout.sampler import SamplingConfig
from atesd.types import Problem, UserError

from support.rollouts import fake_driver

EASY = Problem("easy", "one", "#1", answer="1", level="1")
HARD = Problem("hard", "two", "#2", answer="2", level="2")
OPEN_ENDED = Problem("open", "why", "because", answer=None, level="3")

# Four samples a problem, as `FakeSampler` hands out places: the easy one right three times, the hard one once.
REPLIES = ["#1", "#1", "#5", "#1", "#9", "#2", "#9", "see hint #9", "x", "x", "x", "x"]


def run(problems: Sequence[Problem], replies: Sequence[str] = REPLIES, limit: int = 99) -> Evaluation:
    driver, sampler = fake_driver(lambda prompt, place: replies[place], exact_reward)
    result = evaluate(
        "toy",
        problems,
        driver,
        SamplingConfig(group_size=4, max_new_tokens=limit),
        seed=11,
        traits=lambda problem, text: {"cites_hint": "hint" in text},
    )
    assert (sampler.requests, sampler.seeds) == ([4 * len(problems)], [11])
    return result


def test_metrics_of_two_problems_by_hand() -> None:
    metrics = run([EASY, HARD]).metrics
    # Correct 3 of 4 and 1 of 4. pass@2: 1 - C(1,2)/C(4,2) = 1 and 1 - C(3,2)/C(4,2) = 1/2.
    # Majority: easy says 1, right; hard says 9 twice and 2 once ("see hint #9" is no line that starts with #), wrong.
    # The mean of two problems drawn with replacement is 1/4, 1/2 or 3/4 with odds 1:2:1, so the interval is its range.
    # Lengths in bytes and an end token: seven times 3, once 12: 33 / 8.
    assert metrics == pytest.approx(
        {
            "eval/toy/avg@4": 0.5,
            "eval/toy/avg@4_low": 0.25,
            "eval/toy/avg@4_high": 0.75,
            "eval/toy/pass@1": 0.5,
            "eval/toy/pass@1_low": 0.25,
            "eval/toy/pass@1_high": 0.75,
            "eval/toy/pass@2": 0.75,
            "eval/toy/pass@2_low": 0.5,
            "eval/toy/pass@2_high": 1.0,
            "eval/toy/pass@4": 1.0,
            "eval/toy/pass@4_low": 1.0,
            "eval/toy/pass@4_high": 1.0,
            "eval/toy/maj@4": 0.5,
            "eval/toy/maj@4_low": 0.0,
            "eval/toy/maj@4_high": 1.0,
            "eval/toy/level/1": 0.75,
            "eval/toy/level/2": 0.25,
            "eval/toy/length_mean": 33 / 8,
            "eval/toy/truncated_frac": 0.0,
            "eval/toy/ungradable": 0.0,
            "eval/toy/trait/cites_hint": 1 / 8,
        }
    )


def test_pass_at_k_includes_a_k_that_is_no_power_of_two() -> None:
    driver, _ = fake_driver(lambda prompt, place: REPLIES[place], exact_reward)
    sampling = SamplingConfig(group_size=3, max_new_tokens=99)
    metrics = evaluate("toy", [EASY], driver, sampling, seed=0, traits=lambda problem, text: {}).metrics
    assert sorted(key for key in metrics if "pass" in key and not key.endswith(("_low", "_high"))) == [
        f"eval/toy/pass@{k}" for k in (1, 2, 3)
    ]


def test_one_row_a_sample() -> None:
    rows = run([EASY, HARD]).rows
    assert len(rows) == 8
    assert rows[5] == {
        "problem_id": "hard",
        "level": "2",
        "sample": 1,
        "completion": "#2",
        "answer": "2",
        "reward": 1.0,
        "stop": "eos",
        "turns": 1,
        "ended": "over",
        "invalid": 0,
        "length": 3,
        "traits": {"cites_hint": False},
    }


def test_of_several_rewards_the_first_says_what_is_correct() -> None:
    """Totals are 3 * 1 + 0.5 and 3 * 0 + 0.5: none is 1, and one of two is right."""
    half = WeightedReward(
        {"exact": exact_reward, "half": lambda completions, **_: [0.5] * len(completions)}, {"exact": 3.0, "half": 1.0}
    )
    driver, _ = fake_driver(lambda prompt, place: REPLIES[place + 1], half)
    sampling = SamplingConfig(group_size=2, max_new_tokens=99)
    result = evaluate("toy", [EASY], driver, sampling, seed=0, traits=lambda problem, text: {})
    assert result.metrics["eval/toy/avg@2"] == 0.5
    assert [row["reward"] for row in result.rows] == [1.0, 0.0]
    assert result.rows[0]["rewards"] == {"exact": 1.0, "half": 0.5}


def test_ungradable_completions_are_counted_and_enter_no_accuracy() -> None:
    with_open, without = run([EASY, HARD, OPEN_ENDED]).metrics, run([EASY, HARD]).metrics
    assert with_open["eval/toy/ungradable"] == 4.0
    for key in ("avg@4", "avg@4_low", "pass@2", "maj@4", "level/1"):
        assert with_open[f"eval/toy/{key}"] == without[f"eval/toy/{key}"]
    assert "eval/toy/level/3" not in with_open


def test_a_task_without_any_grade_has_no_accuracy() -> None:
    with pytest.warns(UserWarning, match="no completion could be graded"):
        metrics = run([OPEN_ENDED]).metrics
    assert metrics["eval/toy/ungradable"] == 4.0
    assert not [key for key in metrics if "@" in key]


def test_there_is_no_majority_where_nothing_could_be_voted_for() -> None:
    """Actions and free text have no answer: a majority of 0 would say that all are wrong."""
    prose = [reply.replace("#", "it is ") for reply in REPLIES]
    driver, _ = fake_driver(lambda prompt, place: prose[place], lambda completions, **_: [1.0] * len(completions))
    sampling = SamplingConfig(group_size=4, max_new_tokens=99)
    metrics = evaluate("toy", [EASY, HARD], driver, sampling, seed=0, traits=lambda problem, text: {}).metrics
    assert metrics["eval/toy/avg@4"] == 1.0
    assert not [key for key in metrics if "maj@" in key]
    assert "eval/toy/maj@4" in run([EASY]).metrics


def test_rows_are_written_before_the_metrics_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Any] = []
    driver, _ = fake_driver(lambda prompt, place: REPLIES[place], exact_reward)
    monkeypatch.setattr("atesd.evaluate.runner.summarise", lambda task, tables: 1 / 0)
    sampling = SamplingConfig(group_size=4, max_new_tokens=99)
    with pytest.raises(ZeroDivisionError):
        evaluate("toy", [EASY], driver, sampling, seed=0, traits=lambda problem, text: {}, write=written.extend)
    assert [row["completion"] for row in written] == REPLIES[:4]


def test_completions_cut_off_are_wrong_and_counted() -> None:
    """A limit of two tokens cuts "#1" before its end token."""
    metrics = run([EASY], limit=2).metrics
    assert metrics["eval/toy/truncated_frac"] == 1.0
    assert metrics["eval/toy/avg@4"] == 0.0


def test_every_metric_is_in_the_table() -> None:
    def known(key: str) -> bool:
        name = key.removesuffix("_low").removesuffix("_high").split("/")
        name[1] = "{}"
        pattern = "/".join(name[:2] + [part.split("@")[0] + "@{}" if "@" in part else part for part in name[2:]])
        return pattern in METRICS or "/".join([*name[:3], "{}"]) in METRICS

    assert all(known(key) for key in run([EASY, HARD]).metrics)
    assert not known("eval/toy/other")


def test_no_problem_to_evaluate_is_the_users_mistake() -> None:
    driver, _ = fake_driver(lambda prompt, place: "x", exact_reward)
    with pytest.raises(UserError, match="'toy' has no evaluation problem"):
        evaluate("toy", [], driver, SamplingConfig(), seed=0, traits=lambda problem, text: {})


@pytest.mark.parametrize(("limit", "expected"), [(None, 1024), (38_912, 38_912)])
def test_evaluation_samples_by_its_own_settings(limit: int | None, expected: int) -> None:
    """12 completions at T 1.0, top_p .95, top_k off; length and memory are the rollouts' if unset."""
    rollout = SamplingConfig(temperature=1.1, top_k=20, batch_tokens=77)
    found: dict[str, Any] = EvalConfig(max_new_tokens=limit).sampling(rollout).model_dump()
    assert found == {
        "temperature": 1.0,
        "top_p": 0.95,
        "top_k": 0,
        "max_new_tokens": expected,
        "group_size": 12,
        "batch_tokens": 77,
    }
