"""What policies make of what they are told: exposure, lambda, routes and order, replayed from the log of real runs.

The measurements that are read here are themselves recomputed in `test_measurements.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import pstdev
from typing import Any

import pytest
import torch
from torch.distributions import Beta

from atesd.recipe import build_config
from atesd.train.loop import Trainer
from atesd.types import ContractPoint, Measurement, Observation

from support.gauges import Gauges, mean, read_off, sigmoid
from support.oracle import Oracle, distance
from support.wired import RECIPES, recipe

Oracles = Callable[[str], Oracle]


def ratios(truth: Oracle, step: int) -> list[float]:
    """Return the exposure of every distilled group of a step."""
    return [group["ratio"] for group in truth.run.groups[step] if group["ratio"] is not None]


@pytest.mark.parametrize("name", RECIPES)
def test_the_log_describes_groups_routes_and_exposure(name: str, oracle: Oracles) -> None:
    truth = oracle(name)
    for step, groups in truth.run.groups.items():
        found = truth.run.metrics[step]
        shown = [row.ratio for row in truth.rows(step) if "distil" in row.components]
        for key, expected in (("", mean), ("_min", min), ("_max", max)):
            if shown:
                assert found[f"exposure/ratio{key}"] == pytest.approx(expected(shown))
        for route in ("distil", "rl", "nll", "skip"):
            fed = [group for group in groups if group["route"] in (route, "both" if route in ("distil", "rl") else "")]
            assert found[f"route/{route}_groups"] == len(fed)
        lengths = [len(row.completion) for row in truth.rows(step)]
        assert found["rollout/length_mean"] == pytest.approx(mean(lengths))
        assert found["optim/tokens"] == sum(lengths)
        assert found["rollout/truncated"] == sum(row.cut_off for row in truth.rows(step))
        rewards = [reward for group in groups for reward in group["rewards"] if reward is not None]
        assert found["reward/mean"] == pytest.approx(mean(rewards))
        assert found["reward/std"] == pytest.approx(pstdev(rewards))
        uniform = sum(len({*group["rewards"]} - {None}) == 1 for group in groups)
        assert found["reward/uniform_groups"] == uniform


@pytest.mark.parametrize("name", RECIPES)
def test_the_rollout_file_shows_the_hint_that_the_teacher_read(name: str, oracle: Oracles) -> None:
    truth = oracle(name)
    for step, records in truth.run.rollouts.items():
        for row, record in zip(truth.rows(step), records, strict=True):
            assert record["components"] == list(row.components)
            assert record["advantage"] == pytest.approx(row.advantage, abs=2e-6)
            if "distil" in row.components:
                assert record["hint"] == truth.hint(row.problem, record["ratio"])
                assert record["ratio"] == pytest.approx(row.ratio, abs=1e-12)


# ---- routes ---------------------------------------------------------------------------------------------------------


def test_hdpo_reinforces_every_group_with_a_reward_above_0(oracle: Oracles) -> None:
    truth = oracle("hdpo")
    best = []
    for groups in truth.run.groups.values():
        for group in groups:
            graded = [reward for reward in group["rewards"] if reward is not None]
            best.append(max(graded, default=0.0))
            assert group["route"] == ("rl" if best[-1] > 0 else "distil")
    assert any(0 < value < 1 for value in best)
    assert 0.0 in best


def test_both_distils_every_group_and_reinforces_what_is_graded(oracle: Oracles) -> None:
    for name in ("tip_both", "sdar"):
        for groups in oracle(name).run.groups.values():
            for group in groups:
                ungraded = all(reward is None for reward in group["rewards"])
                assert group["route"] == ("distil" if ungraded else "both")


def test_the_teacher_retires_when_the_mismatch_has_not_fallen_far_enough(oracle: Oracles) -> None:
    """No average falls by 10: the first is the least, the next two are stale, and patience is 2."""
    truth = oracle("retire")
    decay, average = 0.9, None
    for step in range(1, truth.run.steps + 1):
        found = truth.run.metrics[step]
        names = {group["route"] for group in truth.run.groups[step]}
        assert names <= ({"both", "distil"} if step <= 3 else {"rl", "skip"})
        assert found["route/retired"] == float(step >= 3)
        if step <= 3:
            mismatch = found["mismatch/top1"]
            average = mismatch if average is None else decay * average + (1 - decay) * mismatch
        assert found["route/mismatch_ema"] == pytest.approx(average)


def test_the_teacher_waits_for_the_student_to_reach_a_share_of_its_own_success(oracle: Oracles) -> None:
    """The first average is the least, so the mismatch has stopped after step 2: both are measured from step 3 on."""
    truth = oracle("retire_share")
    share, students = truth.settings["routing"]["teacher_share"], list(truth.run.of(truth.run.probe))
    hinted = {truth.teacher_prompt(problem, 0.5): problem for problem in truth.run.probe}
    plain = {truth.prompt(problem): problem for problem in truth.run.probe}
    teachers = [call for call in truth.run.calls if set(call.prompts) == set(hinted)]
    retired, compared = False, 0
    for step in range(1, truth.run.steps + 1):
        found = truth.run.metrics[step]
        names = {group["route"] for group in truth.run.groups[step]}
        assert names <= ({"rl", "skip"} if retired else {"both", "distil"})
        measured = "measure/teacher_accuracy@0.5" in found
        assert measured is ("measure/probe_accuracy" in found) is (step >= 3 and not retired)
        if measured:
            success = {}
            for role, calls, problems in (("probe", students, plain), ("teacher", teachers, hinted)):
                call = calls.pop(0)
                asked = zip(call.prompts, call.turns, strict=True)
                rewards = [
                    truth.reward(problems[prompt], turn.text, str(turn.stop) == "length") for prompt, turn in asked
                ]
                assert len(rewards) == 9
                success[role] = sum(each for each in rewards if each is not None) / sum(r is not None for r in rewards)
                weights = truth.teacher(call.updates) if role == "teacher" else truth.weights(call.updates)
                assert distance(call.weights, weights) < 1e-5
                assert call.updates == step
            assert found["measure/teacher_accuracy@0.5"] == pytest.approx(success["teacher"])
            assert found["measure/probe_accuracy"] == pytest.approx(success["probe"])
            retired = success["probe"] >= share * success["teacher"]
            compared += 1
        assert found["route/retired"] == float(retired)
    assert not students
    assert not teachers
    assert compared > 1, "the first comparison keeps the teacher"
    assert retired, "a later one does not"


def test_the_guard_caps_lambda_by_the_largest_exposure_of_the_step(oracle: Oracles) -> None:
    truth = oracle("guard")
    gauges = Gauges(truth)
    wanted, kappa = truth.settings["target"]["lambda_x"], truth.settings["cliff"]["kappa"]
    differs = False
    for step, groups in truth.run.groups.items():
        shown = ratios(truth, step)
        capped = [
            min(wanted, 1 + kappa * (gauges.lambda_star(step - 1, ratio) - 1)) for ratio in (max(shown), min(shown))
        ]
        assert [group["lambda"] for group in groups] == pytest.approx([capped[0]] * len(groups), rel=1e-4)
        assert truth.run.metrics[step]["cliff/lambda"] == pytest.approx(capped[0], rel=1e-4)
        assert capped[0] < wanted
        differs |= capped[1] > capped[0] * 1.001
    assert differs, "the least exposure would have allowed more"


def test_the_cliff_router_changes_its_mode_behind_the_hysteresis_and_stays(oracle: Oracles) -> None:
    """Replay: past lambda* by the hysteresis (none at the start), after min_stay steps; guarded while reinforcing."""
    truth = oracle("cliff")
    gauges = Gauges(truth)
    settings, wanted = truth.settings["cliff"], truth.settings["target"]["lambda_x"]
    reinforcing, stayed, modes, blocked = False, 0, [], 0
    for step, groups in truth.run.groups.items():
        least = gauges.lambda_star(step - 1, max(ratios(truth, step)))
        margin = settings["hysteresis"] if step > 1 else 0.0
        changes = wanted <= least - margin if reinforcing else wanted > least + margin
        blocked += changes and 0 < stayed < settings["min_stay"] and step > 1
        if changes and (stayed >= settings["min_stay"] or step == 1):
            reinforcing, stayed = not reinforcing, 0
        stayed += 1
        modes.append(reinforcing)
        strength = min(wanted, 1 + settings["kappa"] * (least - 1)) if reinforcing else wanted
        assert truth.run.metrics[step]["cliff/reinforcing"] == float(reinforcing)
        assert truth.run.metrics[step]["cliff/lambda"] == pytest.approx(strength, rel=1e-4)
        for group in groups:
            forced = reinforcing and len(set(group["rewards"])) > 1
            assert group["route"] == ("rl" if forced else "distil")
            if not forced:
                assert group["lambda"] == pytest.approx(strength, rel=1e-4)
    assert modes != sorted(modes)
    assert any(modes)
    assert blocked, "min_stay held a change back"


def test_a_contract_class_needs_its_positions_at_every_ratio_of_the_grid(tmp_path: Path) -> None:
    """A run has as many at every ratio. So the numbers are handed to the guard as the loop hands them."""
    tree = recipe("guard", cliff={"grid": [0.0, 1.0], "min_hits": 10, "every": 1, "c": 2.0})
    strength = Trainer.start(build_config(tree), tmp_path / "run").parts.strength
    measured = {
        Measurement("contract", ratio): {"thin": ContractPoint(p, b, hits), "thick": ContractPoint(p, b, 12)}
        for ratio, p, b, hits in ((0.0, 0.9, 0.5, 12), (1.0, 0.8, 0.7, 9))
    }
    strength.observe(Observation(0, {}, measured))
    found = strength.metrics()
    assert (found["cliff/classes"], found["cliff/thin_classes"]) == (1.0, 1.0)
    assert "cliff/b/thin" not in found
    logits = [math.log(b / (1 - b)) for b in (0.5, 0.7)]
    assert found["cliff/b/thick"] == pytest.approx(sigmoid(mean(logits)), rel=1e-9)
    pooled = mean([math.log(p / (1 - p)) for p in (0.9, 0.8)])  # p must not fall with the ratio
    assert found["cliff/p/thick"] == pytest.approx(sigmoid(pooled), rel=1e-9)


# ---- exposure -------------------------------------------------------------------------------------------------------


def test_a_line_of_exposure_from_the_first_update_to_the_last(oracle: Oracles) -> None:
    truth = oracle("schedules")
    assert [set(ratios(truth, step)) for step in (1, 2, 3)] == [{0.25}, {0.5}, {0.75}]


def test_random_exposure_is_drawn_anew_in_every_window(oracle: Oracles) -> None:
    truth = oracle("cliff")
    drawn = [set(ratios(truth, step)) for step in truth.run.groups]
    assert all(len(values) == 1 for values in drawn)
    assert len(set.union(*drawn)) == truth.run.steps


def test_the_closed_form_shows_the_most_that_keeps_lambda_safe(oracle: Oracles) -> None:
    """By halving: lambda* does not rise with the ratio."""
    truth = oracle("closed_form")
    gauges = Gauges(truth)
    wanted = truth.settings["target"]["lambda_x"]
    for step in (1, 2):
        low, high = 0.0, 1.0
        assert gauges.lambda_star(step - 1, low) > wanted > gauges.lambda_star(step - 1, high)
        while high - low > 1e-7:
            middle = (low + high) / 2
            low, high = (middle, high) if gauges.lambda_star(step - 1, middle) >= wanted else (low, middle)
        assert ratios(truth, step) == pytest.approx([low] * len(truth.run.groups[step]), abs=1e-3)


def bin_ratios(truth: Oracle, number: int, decay: float, boundaries: list[int]) -> list[float]:
    """Return a bin's exposure in each step before the last decision, undone from its moving average.

    The average starts at the first ratio: e_1 = r_1, e_s = decay e_(s-1) + (1 - decay) r_s, and is logged as a
    feature at the decisions before the steps in `boundaries`.
    """
    average = [truth.run.metrics[step][f"exposure/bin{number}/feature/ratio_ema"] for step in boundaries]
    return [average[0], *((new - decay * old) / (1 - decay) for old, new in pairwise(average))]


def test_difficulty_bins_are_thirds_of_the_pass_rate_and_the_first_is_the_easiest(oracle: Oracles) -> None:
    truth = oracle("guard")
    shown = [bin_ratios(truth, number, 0.9, [2, 3]) for number in range(3)]
    assert len({round(ratio, 6) for values in shown for ratio in values}) == 6, "every bin has a policy of its own"
    met = set()
    for step in (1, 2, 3):
        # Two attempts: rates 1, 1/2, 0 are the bins 0, 1, 2.
        groups = truth.run.groups[step]
        numbers = [{1.0: 0, 0.5: 1, 0.0: 2}[mean(group["rewards"])] for group in groups]
        for number in range(3):
            share = numbers.count(number) / len(numbers)
            assert truth.run.metrics[step][f"exposure/bin{number}/share"] == pytest.approx(share)
        if step < 3:
            met |= set(numbers)
            for group, number in zip(groups, numbers, strict=True):
                assert group["ratio"] == pytest.approx(shown[number][step - 1], rel=1e-9)
    assert met == {0, 1, 2}


def test_perplexity_orders_problems_and_makes_their_bins(oracle: Oracles) -> None:
    truth = oracle("still")
    gauges = Gauges(truth)
    nll = {problem.id: gauges.nll(truth.run.initial, [problem]) for problem in truth.run.trainer.parts.problems}
    assert truth.run.metrics[0]["measure/reference_nll"] == pytest.approx(mean(list(nll.values())), rel=1e-4)
    order = sorted(nll, key=lambda identity: nll[identity])
    shown = [truth.run.metrics[3][f"exposure/bin{number}/feature/ratio_ema"] for number in range(2)]
    assert shown[0] != pytest.approx(shown[1], rel=1e-2)
    for step in (1, 2, 3):
        groups = truth.run.groups[step]
        assert [group["problem_id"] for group in groups] == order
        if step < 3:
            expected = [shown[0], shown[0], shown[1], shown[1]]
            assert [group["ratio"] for group in groups] == pytest.approx(expected, rel=1e-9)


def test_influence_averages_credits_and_mixes_ratios_by_them(oracle: Oracles) -> None:
    truth = oracle("influence")
    exposure = truth.settings["exposure"]
    grid, decay = exposure["grid"], exposure["decay"]
    assert decay == 0.8
    assert set(ratios(truth, 1)) == {exposure["start"]}
    credit: list[float] = []
    for step in range(1, truth.run.steps + 1):
        found = truth.run.metrics[step]
        new = [found[f"measure/influence@{ratio}"] for ratio in grid]
        credit = [decay * old + (1 - decay) * fresh for old, fresh in zip(credit or new, new, strict=True)]
        assert [found[f"exposure/credit/{ratio:g}"] for ratio in grid] == pytest.approx(credit)
        spread = math.sqrt(mean([(value - mean(credit)) ** 2 for value in credit]))
        weights = [math.exp((value - mean(credit)) / spread / exposure["temperature"]) for value in credit]
        mixed = sum(weight * ratio for weight, ratio in zip(weights, grid, strict=True)) / sum(weights)
        if step < truth.run.steps:
            assert ratios(truth, step + 1) == pytest.approx([mixed] * len(truth.run.groups[step + 1]))


def test_paired_climbs_its_credit_by_at_most_the_rate(oracle: Oracles) -> None:
    truth = oracle("paired")
    exposure = truth.settings["exposure"]
    ratio, squares = exposure["start"], []
    for step in range(1, truth.run.steps + 1):
        assert ratios(truth, step) == pytest.approx([ratio] * len(truth.run.groups[step]))
        low, high = max(0.0, ratio - exposure["delta"]), min(1.0, ratio + exposure["delta"])
        sides = sorted(
            (float(key.partition("@")[2]), value)
            for key, value in truth.run.metrics[step].items()
            if key.startswith("measure/virtual_nll@")
        )
        assert [side for side, _ in sides] == pytest.approx([low, high])
        credit = (sides[0][1] - sides[1][1]) / (high - low)
        assert truth.run.metrics[step]["exposure/paired_credit"] == pytest.approx(credit)
        squares.append(credit**2)
        change = exposure["rate"] * max(-1.0, min(1.0, credit / math.sqrt(mean(squares))))
        ratio = min(exposure["high"], max(exposure["low"], ratio + change))


def averaged(values: list[float], decay: float) -> float:
    """Return the moving average that starts at its first value."""
    average = values[0]
    for value in values[1:]:
        average = decay * average + (1 - decay) * value
    return average


def test_the_learned_policy_reads_the_training_state(oracle: Oracles) -> None:
    """The decision before step t is logged with it; it knows what was logged up to then."""
    truth = oracle("beta")
    decay, metrics = truth.settings["exposure"]["ema_decay"], truth.run.metrics
    level = [metrics[step]["measure/probe_nll"] for step in range(truth.run.steps)]
    for step in range(1, truth.run.steps + 1):
        past = range(1, step)
        expected = {
            "progress": (step - 1) / truth.run.steps,
            "probe_ema": averaged(level[:step], decay) / level[0],
            **dict.fromkeys(
                ("ratio_ema", "loss_ema", "mismatch_ema", "confidence", "improvement", "reward_margin"), 0.0
            ),
        }
        if past:
            losses = [metrics[t]["loss/distil"] for t in past]
            rewards = [metrics[t]["reward/mean"] for t in past]
            expected |= {
                "ratio_ema": averaged([ratios(truth, t)[0] for t in past], decay),
                "loss_ema": averaged(losses, decay) / losses[0],
                "mismatch_ema": averaged([metrics[t]["mismatch/top1"] for t in past], decay),
                "confidence": metrics[step - 1]["student/confidence"],
                "improvement": (level[step - 2] - level[step - 1]) / level[0],
                "reward_margin": rewards[-1] - averaged(rewards[:-1], decay) if len(rewards) > 1 else 0.0,
            }
        found = {name: metrics[step][f"exposure/feature/{name}"] for name in expected}
        assert found == pytest.approx(expected, abs=1e-9)
    assert any(metrics[step]["exposure/feature/reward_margin"] for step in range(1, truth.run.steps + 1))


def rewarded(truth: Oracle, start: int) -> tuple[float, float]:
    """Return both terms of the reward of the decision before step `start` + 1."""
    exposure, metrics = truth.settings["exposure"], truth.run.metrics
    span, gamma = exposure["look_ahead"], exposure["gamma"]
    key = "measure/" + exposure["progress_metric"]
    level = [metrics[start + i][key] for i in range(span + 1)]
    progress = sum(gamma**i * max(0.0, level[i] - level[i + 1]) for i in range(span))
    ratio, grounded = ratios(truth, start + 1)[0], f"measure/gt_{exposure['gt_target']}@"
    if truth.settings["teacher"]["weights"] == "frozen":
        table = sorted((float(k.removeprefix(grounded)), v) for k, v in metrics[0].items() if k.startswith(grounded))
        return progress, read_off(ratio, [x for x, _ in table], [y for _, y in table])
    values = [metrics[start + i][f"{grounded}{ratio!r}"] for i in range(1, span + 1)]
    weights = [gamma**i for i in range(span)]
    return progress, sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)


@pytest.mark.parametrize(("name", "hold"), [("beta", 1), ("beta_ema", 2)])
def test_a_decision_is_rewarded_for_progress_and_for_a_teacher_that_still_knows(
    name: str, hold: int, oracle: Oracles
) -> None:
    truth = oracle(name)
    span = truth.settings["exposure"]["look_ahead"]
    starts = [start for start in range(0, truth.run.steps, hold) if start + span <= truth.run.steps]
    assert len(starts) >= 2
    seen: list[tuple[float, float]] = []
    for start in starts:
        found = truth.run.metrics[start + span]
        progress, grounded = rewarded(truth, start)
        seen.append((progress, grounded))
        assert found["exposure/reward_lp"] == pytest.approx(progress, rel=1e-6, abs=1e-12)
        assert found["exposure/reward_gt"] == pytest.approx(grounded, rel=1e-6)
        scales = [deviation([pair[term] for pair in seen]) for term in (0, 1)]
        whole = progress / scales[0] + truth.settings["exposure"]["lambda_gt"] * grounded / scales[1]
        assert found["exposure/reward"] == pytest.approx(whole, rel=1e-6)


def deviation(values: list[float]) -> float:
    """Return the standard deviation (ddof 1), 1 where there is none."""
    if len(values) < 2:
        return 1.0
    found = math.sqrt(sum((value - mean(values)) ** 2 for value in values) / (len(values) - 1))
    return found if found > 1e-12 else 1.0


def test_the_learned_policy_is_scored_at_what_it_drew(oracle: Oracles) -> None:
    """The first update scores three draws of Beta(2, 3); the ratio shown is .2 + .4 draw."""
    truth = oracle("beta")
    exposure, metrics = truth.settings["exposure"], truth.run.metrics
    for step in (1, 2, 3, 4):
        assert (metrics[step]["exposure/ka"], metrics[step]["exposure/kb"]) == pytest.approx((2.0, 3.0))
    terms = [rewarded(truth, start) for start in (0, 1, 2)]
    scales = [deviation([pair[term] for pair in terms]) for term in (0, 1)]
    rewards = [lp / scales[0] + exposure["lambda_gt"] * gt / scales[1] for lp, gt in terms]
    spread = deviation(rewards)
    advantages = [(reward - mean(rewards)) / (spread + exposure["eps"]) for reward in rewards]
    draws = [(ratios(truth, step)[0] - 0.2) / 0.4 for step in (1, 2, 3)]
    policy = Beta(torch.tensor(2.0).double(), torch.tensor(3.0).double())
    scores = [a * float(policy.log_prob(torch.tensor(d).double())) for a, d in zip(advantages, draws, strict=True)]
    excess = max(0.0, float(policy.entropy()) - exposure["entropy_target"])
    assert excess > 0
    coefficient = exposure["entropy_coef"] * 4 / truth.run.steps  # from the start on, linearly; learnt after 4 steps
    assert metrics[4]["exposure/loss"] == pytest.approx(-mean(scores) + coefficient * excess**2, rel=1e-6)
    assert metrics[4]["exposure/updates"] == 1.0
    assert metrics[5]["exposure/ka"] != pytest.approx(2.0)


def test_clipped_draws_are_scored_as_drawn(tmp_path: Path) -> None:
    """With alpha_max = .3 all draws above are shown as .3, a point that says nothing of the draws."""
    exposure: dict[str, Any] = {
        "kind": "beta",
        "hold": 1,
        "look_ahead": 1,
        "alpha_max": 0.3,
        "lambda_gt": 0.0,
        "entropy_coef": 0.0,
        "decisions_per_update": 4,
        "reward_norm": False,
        "warm_start": {"mean": 0.7, "concentration": 20.0},
    }
    losses = []
    for run, alpha_max in enumerate((0.3, 1.0)):
        tree = recipe("beta", exposure=exposure | {"alpha_max": alpha_max})
        controller = Trainer.start(build_config(tree), tmp_path / str(run)).parts.controller
        shown = []
        for step, level in enumerate((1.0, 0.9, 0.7, 0.65, 0.3)):
            stats = {"route/distil_groups": 1.0} if step else {}
            controller.observe(Observation(step, stats, {Measurement("probe_nll"): level}))
            shown.append(controller.propose(step, ["a"])[0])
        losses.append(controller.metrics()["exposure/loss"])
        assert (set(shown) == {0.3}) is (alpha_max == 0.3)
    assert losses[0] == pytest.approx(losses[1], rel=1e-9), "the bounds belong to the teacher, not to the policy"
