"""What policies are told: every logged measurement and every credit, recomputed from weights and completions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from support.gauges import Gauges, mean, sigmoid
from support.oracle import Oracle

Oracles = Callable[[str], Oracle]
MEASURING = (
    "schedules",
    "guard",
    "closed_form",
    "cliff",
    "influence",
    "influence_last",
    "paired",
    "beta",
    "beta_ema",
    "still",
    "aligned",
    "aligned_lambda",
    "paired_reward",
    "beta_aligned",
)


def measured(truth: Oracle) -> list[tuple[int, str, float]]:
    """Return every measurement of a run: step, key, number."""
    return [
        (step, key.removeprefix("measure/"), value)
        for step, row in truth.run.metrics.items()
        for key, value in row.items()
        if key.startswith("measure/")
    ]


def of_kind(truth: Oracle, kind: str) -> list[tuple[int, float, str, float]]:
    """Return the measurements of a kind: step, ratio, what stands below the key, number."""
    found = []
    for step, key, value in measured(truth):
        name, _, rest = key.partition("@")
        if name == kind:
            ratio, _, below = rest.partition("/")
            found.append((step, float(ratio or "nan"), below, value))
    return found


@pytest.mark.parametrize("name", MEASURING)
def test_probe_nll_is_the_student_without_a_hint(name: str, oracle: Oracles) -> None:
    truth = oracle(name)
    gauges = Gauges(truth)
    for step, _, _, value in of_kind(truth, "probe_nll"):
        assert value == pytest.approx(gauges.nll(truth.weights(gauges.done(step)), truth.run.probe), rel=1e-4)


def test_the_probe_is_logged_on_its_cadence(oracle: Oracles) -> None:
    assert [step for step, *_ in of_kind(oracle("schedules"), "probe_nll")] == [0, 2]


def test_references_of_a_batch_are_scored_before_its_update(oracle: Oracles) -> None:
    truth = oracle("schedules")
    gauges = Gauges(truth)
    for step in range(1, truth.run.steps + 1):
        weights = truth.weights(gauges.done(step - 1))
        problems = [truth.run.problem(group["problem_id"]) for group in truth.run.groups[step]]
        expected = mean([gauges.nll(weights, [problem]) for problem in problems])
        assert truth.run.metrics[step]["curriculum/reference_nll"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("name", "kind"), [("beta", "hidden_only"), ("beta_ema", "solution"), ("guard", "answer")])
def test_a_grounded_term_is_what_the_teacher_finds_likely(name: str, kind: str, oracle: Oracles) -> None:
    truth = oracle(name)
    gauges = Gauges(truth)
    found = of_kind(truth, f"gt_{kind}")
    assert found
    for step, ratio, _, value in found:
        expected = gauges.grounded(kind, ratio, truth.teacher(gauges.done(step)))
        assert value == pytest.approx(expected, rel=1e-4)


def test_a_frozen_teacher_is_tabulated_once_where_something_is_hidden(oracle: Oracles) -> None:
    assert [(step, ratio) for step, ratio, *_ in of_kind(oracle("beta"), "gt_hidden_only")] == [(0, 0.0), (0, 0.4)]


def test_a_moving_teacher_is_measured_at_the_ratio_of_every_open_decision(oracle: Oracles) -> None:
    """Windows of 2, look-ahead 2: the decision of steps 0 and 2 is scored at 1, 2 and at 3, 4; that of 4 at 5."""
    truth = oracle("beta_ema")
    ratios = {step: truth.run.groups[step][0]["ratio"] for step in truth.run.groups}
    found = [(step, ratio) for step, ratio, *_ in of_kind(truth, "gt_solution")]
    assert found == [(1, ratios[1]), (2, ratios[2]), (3, ratios[3]), (4, ratios[4]), (5, ratios[5])]


def test_probe_kl_is_on_completions_of_the_start_under_full_exposure(oracle: Oracles) -> None:
    """And against the teacher of the start, though an average teaches here."""
    truth = oracle("beta_ema")
    gauges = Gauges(truth)
    found = of_kind(truth, "probe_kl")
    assert [step for step, *_ in found] == [0, 1, 2, 3, 4, 5]
    assert len(truth.run.of(truth.run.probe)) == 1
    for step, _, _, value in found:
        done = gauges.done(step)
        expected = gauges.divergence(truth.weights(done), truth.weights(0))
        assert value == pytest.approx(expected, rel=1e-4)


def test_probe_accuracy_is_the_mean_reward_of_probe_completions(oracle: Oracles) -> None:
    truth = oracle("guard")
    problems = {truth.prompt(problem): problem for problem in truth.run.probe}
    found = of_kind(truth, "probe_accuracy")
    calls = truth.run.of(truth.run.probe)
    assert [step for step, *_ in found] == [0, 1, 2, 3]
    for (_, _, _, value), call in zip(found, calls, strict=True):
        rewards = [
            truth.reward(problems[prompt], turn.text, str(turn.stop) == "length")
            for prompt, turn in zip(call.prompts, call.turns, strict=True)
        ]
        assert value == pytest.approx(mean([reward for reward in rewards if reward is not None]))


@pytest.mark.parametrize("name", ["guard", "cliff", "influence", "closed_form"])
def test_contract_positions_give_p_b_and_hits(name: str, oracle: Oracles) -> None:
    """p and b are those of mean logits, at the sampling temperature."""
    truth = oracle(name)
    gauges = Gauges(truth)
    found: dict[tuple[int, float], dict[str, float]] = {}
    for step, ratio, below, value in of_kind(truth, "contract"):
        found.setdefault((step, ratio), {})[below] = value
    every = truth.settings["cliff"]["every"]
    assert sorted(found) == [
        (step, ratio) for step in range(0, truth.run.steps + 1, every) for ratio in truth.settings["cliff"]["grid"]
    ]
    for (step, ratio), numbers in found.items():
        expected: dict[str, float] = {}
        for key, (p, b, hits) in gauges.contract(step, ratio).items():
            expected |= {f"{key}/p": sigmoid(p), f"{key}/b": sigmoid(b), f"{key}/hits": float(hits)}
        assert numbers == pytest.approx(expected, rel=1e-3)  # in float32 logits near 1 carry an error of several %


@pytest.mark.parametrize("name", ["guard", "cliff", "influence", "closed_form"])
def test_lambda_star_is_the_least_over_classes_at_the_exposure_in_force(name: str, oracle: Oracles) -> None:
    truth = oracle(name)
    gauges = Gauges(truth)
    different = set()
    for step in range(1, truth.run.steps + 1):
        found = truth.run.metrics[step]
        ratio = max(group["ratio"] or 0.0 for group in truth.run.groups[step])
        assert ratio, "a step without a distilled group shows no exposure"
        expected = gauges.lambda_star(step, ratio)
        assert found.get("cliff/lambda_star", math.inf) == pytest.approx(expected, rel=1e-4)
        every = truth.settings["cliff"]["every"]
        curves = gauges.curves(step - step % every)
        assert found["cliff/classes"] == len(curves)
        grid = truth.settings["cliff"]["grid"]
        different |= {
            round(gauges.contract(step - step % every, point)[name][1], 3) for name in curves for point in grid
        }
        for key, (_, b) in curves.items():
            assert found[f"cliff/b/{key}"] == pytest.approx(sigmoid(b), rel=1e-3)
    assert len(different) > len(curves), "b differs over the grid"


@pytest.mark.parametrize("name", ["influence", "influence_last"])
def test_influence_is_the_probes_change_under_adams_preconditioner(name: str, oracle: Oracles) -> None:
    truth = oracle(name)
    gauges = Gauges(truth)
    found = of_kind(truth, "influence")
    assert {step for step, *_ in found} == set(range(1, truth.run.steps + 1))
    for step, ratio, _, value in found:
        assert value == pytest.approx(gauges.influence(step, ratio), rel=2e-3, abs=1e-5)


def test_influence_is_looked_at_with_a_gradient_that_is_clipped_and_with_one_that_is_not(oracle: Oracles) -> None:
    kept = set()
    for name in ("influence", "influence_last"):
        gauges = Gauges(oracle(name))
        names = gauges.names(gauges.settings["probe"]["credit_parameters"])
        kept |= {
            gauges.kept(gauges.gradient(step, ratio), names) for step, ratio, *_ in of_kind(oracle(name), "influence")
        }
    assert max(kept) == 1.0
    assert min(kept) < 0.7


@pytest.mark.parametrize("name", ["influence", "influence_last"])
def test_influence_is_what_finite_differences_of_both_losses_say(name: str, oracle: Oracles) -> None:
    truth = oracle(name)
    gauges = Gauges(truth)
    for step, ratio, _, value in of_kind(truth, "influence")[:3]:
        of_probe, of_distillation = gauges.influence_by_differences(step, ratio)
        assert value == pytest.approx(of_probe, rel=5e-3, abs=3e-5)
        assert value == pytest.approx(of_distillation, rel=5e-3, abs=3e-5)


def test_a_virtual_step_is_the_optimizers_next_one(oracle: Oracles) -> None:
    """Both moments, the decay, the clip and the present rate, which is 0 behind the last update of this schedule."""
    truth = oracle("paired")
    gauges = Gauges(truth)
    found, moved = of_kind(truth, "virtual_nll"), []
    assert {step for step, *_ in found} == set(range(1, truth.run.steps + 1))
    for step, ratio, _, value in found:
        now = gauges.nll(truth.weights(gauges.done(step)), truth.run.probe)
        expected = gauges.virtual(step, ratio)
        assert value - now == pytest.approx(expected - now, rel=1e-2, abs=2e-6)
        moved.append(abs(expected - now))
        assert (moved[-1] > 1e-9) is (step < truth.run.steps)
    assert max(moved) > 1e-3


def test_virtual_steps_are_compared_by_the_reward_of_earlier_completions(oracle: Oracles) -> None:
    truth = oracle("paired_reward")
    gauges = Gauges(truth)
    found = of_kind(truth, "virtual_reward")
    known = {step for step in truth.run.groups if any(row.outcome for row in gauges.graded(step))}
    assert {step for step, *_ in found} == known
    assert len(known) > 1
    moved = []
    for step, ratio, _, value in found:
        now = gauges.reward_loss(truth.weights(gauges.done(step)), step)
        expected = gauges.reward_loss(gauges.stepped(step, ratio), step)
        assert value - now == pytest.approx(expected - now, rel=2e-2, abs=2e-6)
        moved.append(abs(expected - now))
    assert max(moved) > 1e-4


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aligned", "reward_influence_by_level"),
        ("aligned_lambda", "reward_influence"),
        ("aligned_lambda", "reward_influence_lambda"),
        ("beta_aligned", "reward_influence"),
    ],
)
def test_reward_influence_is_the_product_with_the_policy_gradient_of_the_steps_before(
    name: str, kind: str, oracle: Oracles
) -> None:
    """The log has the mean over levels and folds; `test_aligned.py` looks at what policies make of each."""
    truth = oracle(name)
    gauges = Gauges(truth)
    found = of_kind(truth, kind)
    assert found
    for step, asked, _, value in found:
        chosen = {"strength" if kind.endswith("lambda") else "ratio": asked}
        levels = gauges.reward_credit(step, **chosen).values()
        if kind.endswith("level"):
            expected = mean([fold for level in levels for fold in level])
        else:
            expected = mean([sum(folds) for folds in zip(*levels, strict=True)])
        size = max(abs(fold) for level in levels for fold in level)
        assert value == pytest.approx(expected, rel=2e-3, abs=2e-4 * size)


def test_no_measurement_is_left_unchecked(oracle: Oracles) -> None:
    checked = {
        "probe_nll",
        "probe_kl",
        "probe_accuracy",
        "gt_hidden_only",
        "gt_solution",
        "gt_answer",
        "contract",
        "influence",
        "virtual_nll",
        "virtual_reward",
        "reward_influence",
        "reward_influence_by_level",
        "reward_influence_lambda",
    }
    found: set[Any] = set()
    for name in MEASURING:
        found |= {key.partition("@")[0] for _, key, _ in measured(oracle(name))}
    # reference_nll: its order of problems is checked; the probe's credits: tests/invariants/test_reward_credit.py
    # retention: tests/invariants/test_retention.py
    assert found == checked | {"reference_nll", "probe_influence_by_level"}
