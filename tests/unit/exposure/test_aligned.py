"""Exposure by graded rollouts: the controller of `influence` with `reference = "reward"`, and Beta rewarded alike."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from atesd.exposure.beta_controller import BetaConfig, BetaController
from atesd.exposure.controller import Controller
from atesd.facts import RunFacts
from atesd.kinds import ExposureSection
from atesd.types import Measurement, Observation

from support.exposure_toy import seen

GRID = (0.0, 0.3, 0.8)
FACTS = RunFacts(levels={"a": "easy", "b": "hard", "c": "easy"}, total_steps=20)


def build(facts: RunFacts = FACTS, **fields: Any) -> Controller:
    section = {"kind": "influence", "reference": "reward", "grid": GRID, "hold": 2, "start": 0.5} | fields
    return TypeAdapter(ExposureSection).validate_python(section).build(facts)


def credit(step: int, *, stats: Mapping[str, float] = {}, **best: int) -> Observation:
    """Return an observation in which one candidate of each level is clearly the best: 9 to 1, errors of 1/2."""
    found: dict[Measurement, dict[str, float]] = {}
    for place, ratio in enumerate(GRID):
        means = {level: 9.0 if place == chosen else 1.0 for level, chosen in best.items()}
        table = {
            f"{level}/{fold}": mean + (-0.5, 0.5)[fold] + 0.1 * fold * place
            for level, mean in means.items()
            for fold in (0, 1)
        }
        found[Measurement("reward_influence_by_level", ratio)] = table
    return Observation(step, {"reward/mean": 0.5, "reward/std": 0.5, **stats}, found)


def play(controller: Controller, step: int) -> list[float]:
    return list(controller.propose(step, ["a", "b", "c", "new"]))


def test_candidates_are_played_as_they_are_and_held_for_their_window() -> None:
    controller = build(by="level")
    controller.observe(Observation(0))
    assert controller.wants(0) == []
    assert play(controller, 0) == [0.5] * 4
    assert controller.wants(1) == []
    controller.observe(credit(1, easy=2, hard=2))
    assert controller.metrics() == {}, "credits that were not asked for are ignored"
    assert play(controller, 1) == [0.5] * 4
    assert controller.wants(2) == [Measurement("reward_influence_by_level", ratio) for ratio in GRID]
    controller.observe(credit(2, easy=1, hard=2))
    assert controller.metrics()["exposure/easy/credit/0.3"] > 5
    assert play(controller, 2) == [0.3, 0.8, 0.3, 0.5], "a problem of no known level keeps the start"
    controller.observe(Observation(3))
    assert controller.metrics() == {}
    assert play(controller, 3) == [0.3, 0.8, 0.3, 0.5]


def test_a_level_without_credit_keeps_its_ratio() -> None:
    controller = build(by="level", hold=1)
    controller.observe(Observation(0))
    play(controller, 0)
    controller.observe(credit(1, easy=0))
    assert play(controller, 1) == [0.0, 0.5, 0.0, 0.5]
    controller.observe(credit(2, hard=2))
    assert play(controller, 2) == [0.0, 0.8, 0.0, 0.5]


def test_one_ratio_for_all() -> None:
    controller = build(by="none", hold=1)
    controller.observe(Observation(0))
    play(controller, 0)
    assert controller.wants(1)[:3] == [Measurement("reward_influence", ratio) for ratio in GRID]
    assert controller.wants(1)[3:] == [Measurement("probe_influence", ratio) for ratio in GRID]
    found = {Measurement("reward_influence", ratio): {"/0": 1.0 * ratio, "/1": 1.2 * ratio + 0.01} for ratio in GRID}
    controller.observe(Observation(1, measured=found))
    assert play(controller, 1) == [0.8] * 4


def by_probe(step: int, best: int, level: str = "easy", **stats: float) -> Observation:
    """What is measured where rewards say nothing: the probe's credits alone, 9 to 1, errors of 1/2."""
    found = credit(step, **{level: best}).measured
    found = {Measurement("probe_influence_by_level", each.ratio): value for each, value in found.items()}
    return Observation(step, {"route/distil_groups": 1.0, **stats}, found)


REWARDS = [Measurement("reward_influence_by_level", ratio) for ratio in GRID]
PROBE = [Measurement("probe_influence_by_level", ratio) for ratio in GRID]


def test_while_rewards_say_nothing_the_probe_takes_their_place() -> None:
    """None given, then all equal: the probe's sums are the credit's own, level by level, with their decay."""
    controller = build(by="level", hold=1, decay=0.0)
    controller.observe(Observation(0))
    assert play(controller, 0) == [0.5] * 4
    assert controller.wants(1) == REWARDS + PROBE
    controller.observe(by_probe(1, 1))
    assert controller.metrics()["exposure/easy/credit/0.3"] > 5
    assert play(controller, 1) == [0.3, 0.5, 0.3, 0.5]
    controller.observe(by_probe(2, 2, "hard", **{"reward/mean": 0.0, "reward/std": 0.0}))
    assert play(controller, 2) == [0.3, 0.8, 0.3, 0.5], "all wrong is as good as ungraded"
    controller.observe(by_probe(3, 0))
    assert play(controller, 3) == [0.0, 0.8, 0.0, 0.5], "with a decay of 0 the latest window says all"


def test_the_probes_sums_are_kept_and_restored() -> None:
    """Two windows for .3, then one for 0, as clear as either: with a decay of .9 two outweigh one."""
    controller = build(by="level", hold=1, decay=0.9)
    controller.observe(Observation(0))
    for step in (1, 2):
        play(controller, step - 1)
        controller.observe(by_probe(step, 1))
    again = build(by="level", hold=1, decay=0.9)
    again.load_state_dict(json.loads(json.dumps(controller.state_dict())))
    for held in (controller, again):
        play(held, 2)
        held.observe(by_probe(3, 0))
        assert play(held, 3) == [0.3, 0.5, 0.3, 0.5]


def test_a_missing_credit_of_the_probe_spoils_its_window() -> None:
    controller = build(by="level", hold=1)
    controller.observe(Observation(0))
    play(controller, 0)
    found = dict(list(by_probe(1, 1).measured.items())[:2])
    controller.observe(Observation(1, {"route/distil_groups": 1.0}, found))
    assert controller.metrics() == {"exposure/discarded": 1.0}
    assert play(controller, 1) == [0.5] * 4


def test_the_probe_has_no_say_once_rewards_differed() -> None:
    controller = build(by="level", hold=1)
    controller.observe(Observation(0))
    play(controller, 0)
    controller.observe(by_probe(1, 2))
    assert play(controller, 1) == [0.8, 0.5, 0.8, 0.5]
    controller.observe(by_probe(2, 0, **{"reward/std": 0.1}))
    assert controller.metrics() == {"exposure/discarded": 1.0}
    assert play(controller, 2) == [0.8, 0.5, 0.8, 0.5], "what was chosen before is kept until rewards speak"
    assert controller.wants(3) == REWARDS
    again = build(by="level", hold=1)
    again.load_state_dict(json.loads(json.dumps(controller.state_dict())))
    assert again.wants(3) == REWARDS
    controller.observe(credit(3, easy=0))
    assert play(controller, 3) == [0.0, 0.5, 0.0, 0.5]


def test_rewards_speak_before_the_probe_where_both_do() -> None:
    controller = build(by="level", hold=1)
    controller.observe(Observation(0))
    play(controller, 0)
    both = {**by_probe(1, 2, "easy").measured, **credit(1, easy=0).measured}
    controller.observe(Observation(1, {}, both))
    assert play(controller, 1) == [0.0, 0.5, 0.0, 0.5]


def test_a_task_without_probe_problems_is_asked_for_rewards_alone() -> None:
    controller = build(replace(FACTS, has_probe=False), by="level", hold=1)
    controller.observe(Observation(0))
    play(controller, 0)
    assert controller.wants(1) == REWARDS


def test_the_probe_alone_can_be_asked_by_errors() -> None:
    controller = build(reference="probe", play="best", by="level", hold=1)
    controller.observe(Observation(0))
    play(controller, 0)
    assert controller.wants(1) == PROBE
    controller.observe(by_probe(1, 1, **{"reward/std": 0.5}))
    assert play(controller, 1) == [0.3, 0.5, 0.3, 0.5], "graded or not"


def test_both_references_enter_one_sum_by_their_precision() -> None:
    """Folds 0 and 8 of the one candidate: error 4; 3.9 and 4.1: error .1. In units of error the second counts more."""
    for vague, clear, best in ((0.0, 1.0, 0.8), (1.0, 0.0, 0.0)):
        controller = build(reference="both", hold=1, grid=(0.0, 0.8))
        controller.observe(Observation(0))
        play(controller, 0)
        low, high = 0.0, 0.8
        assert controller.wants(1) == [
            Measurement(f"{source}_influence", ratio) for source in ("reward", "probe") for ratio in (low, high)
        ]
        loud = {low: 5 * clear, high: 5 * vague}  # prefers the one that the clear source does not
        quiet = {low: vague, high: clear}
        found: dict[Measurement, dict[str, float]] = {}
        for ratio in (low, high):
            found[Measurement("reward_influence", ratio)] = {"/0": loud[ratio] - 4, "/1": loud[ratio] + 4 + ratio}
            found[Measurement("probe_influence", ratio)] = {
                "/0": quiet[ratio] - 0.1,
                "/1": quiet[ratio] + 0.1 + ratio / 9,
            }
        controller.observe(Observation(1, {}, found))
        assert play(controller, 1) == [best] * 4
        one = build(reference="both", hold=1, grid=(0.0, 0.8))
        one.observe(Observation(0))
        play(one, 0)
        one.observe(Observation(1, {}, {key: value for key, value in found.items() if key.kind == "reward_influence"}))
        assert play(one, 1) == [0.8 - best] * 4, "a source that is missing leaves the other one"
        assert "exposure/credit/0" in one.metrics()


def test_a_window_that_could_not_be_measured_is_discarded_and_said() -> None:
    controller = build(by="level", hold=1)
    controller.observe(Observation(0))
    assert controller.metrics() == {}
    play(controller, 0)
    controller.observe(Observation(1))
    assert controller.metrics() == {"exposure/discarded": 1.0}
    assert play(controller, 1) == [0.5] * 4
    controller.observe(Observation(2, {"route/distil_groups": 0.0, "route/paused": 0.0}))
    assert controller.metrics() == {}, "nothing was distilled: nothing is missing"
    play(controller, 2)
    controller.observe(credit(3, easy=1, hard=1))
    assert play(controller, 3) == [0.3, 0.3, 0.3, 0.5]


def test_a_step_without_distillation_does_not_end_a_window_unless_the_router_reads_the_exposure() -> None:
    for paused, held in ((1.0, [0.5, 0.5]), (0.0, [0.3, 0.3])):
        controller = build(by="level", hold=1)
        controller.observe(Observation(0))
        play(controller, 0)
        controller.observe(credit(1, stats={"route/idle": 1.0, "route/paused": paused}, easy=1, hard=1))
        assert play(controller, 1)[:2] == held


def test_paused_steps_add_no_windows() -> None:
    controller = build(by="level", hold=1)
    controller.observe(Observation(0))
    play(controller, 0)
    before = controller.state_dict()["credits"]
    for step in (1, 2, 3):
        controller.observe(credit(step, stats={"route/idle": 1.0, "route/paused": 1.0}, easy=1, hard=1))
        assert controller.state_dict()["credits"] == before
    controller.observe(credit(4, easy=1, hard=1))
    assert controller.state_dict()["credits"] != before


def test_credits_decay_by_the_recipes_rate_a_window() -> None:
    """Two windows for .3, then two for .8: with a decay of 0 the latest says all, at .9 they stand in the balance."""
    for decay, expected in ((0.0, 0.8), (0.9, 0.3)):
        controller = build(by="level", hold=1, decay=decay)
        controller.observe(Observation(0))
        play(controller, 0)
        for step in range(1, 9):
            controller.observe(credit(step, easy=1 if step < 8 else 2))
            played = play(controller, step)
        assert played[0] == expected


def test_a_controller_is_restored_in_the_middle_of_a_window() -> None:
    controller = build(by="level", hold=2)
    controller.observe(Observation(0))
    for step in range(1, 4):
        play(controller, step - 1)
        controller.observe(credit(step, easy=step % 3, hard=1))
    again = build(by="level", hold=2)
    again.load_state_dict(json.loads(json.dumps(controller.state_dict())))
    assert again.metrics() == controller.metrics()
    for step in range(4, 9):
        assert play(again, step - 1) == play(controller, step - 1)
        assert again.wants(step) == controller.wants(step)
        for each in (again, controller):
            each.observe(credit(step, easy=(step + 1) % 3, hard=2))
        assert again.state_dict() == controller.state_dict()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"by": "level"}, 'exposure.play = "best" or exposure.reference = "reward"'),
        ({"by": "level", "play": "mixture"}, 'exposure.play = "best"'),
        ({"reference": "reward", "temperature": 0.5}, "remove exposure.temperature"),
        ({"play": "best", "temperature": 0.5}, "remove exposure.temperature"),
        ({"reference": "reward", "play": "mixture"}, "remove exposure.play"),
        ({"reference": "both", "play": "mixture"}, 'not "both": remove exposure.play'),
    ],
)
def test_settings_that_the_reference_does_not_read_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TypeAdapter(ExposureSection).validate_python({"kind": "influence"} | fields)


def test_paired_asks_for_the_reward_where_it_is_the_reference() -> None:
    controller = TypeAdapter(ExposureSection).validate_python(
        {"kind": "paired", "hold": 1, "reference": "reward", "delta": 0.2}
    )
    controller = controller.build(FACTS)
    controller.observe(Observation(0))
    controller.propose(0, ["a"])
    assert [m.kind for m in controller.wants(1)] == ["virtual_reward"] * 2
    low, high = controller.wants(1)
    controller.observe(Observation(1, measured={low: 2.0, high: 1.0}))  # a loss: more exposure lowers it
    assert controller.propose(1, ["a"]) == [pytest.approx(0.6)]


# ---- the Beta policy ------------------------------------------------------------------------------------------------


def policy(seed: int = 0, **fields: Any) -> BetaController:
    settings = {"hold": 1, "decisions_per_update": 2, "reward": "aligned", "learning_rate": 0.1} | fields
    return BetaController(BetaConfig(**settings), 40, seed, True)


def rewarded(controller: BetaController, steps: int, credit_of: Any) -> list[float]:
    """Run with credits as a function of the ratio; return the policy's mean at every decision."""
    means, ratio = [], None
    for step in range(steps):
        found: dict[Measurement, Any] = {Measurement("probe_nll"): 1.0}
        for measurement in controller.wants(step):
            if measurement.kind == "reward_influence":
                assert measurement.ratio == ratio, "the ratio that was drawn"
                middle = credit_of(measurement.ratio)
                found[measurement] = {"/0": middle - 0.25, "/1": middle + 0.25}
        controller.observe(Observation(step, {"route/distil_groups": 1.0} if step else {}, found))
        (ratio,) = controller.propose(step, ["p"])
        means.append(controller.metrics()["exposure/mean"])
    return means


def test_a_beta_policy_rewarded_by_credit_asks_one_step_later_and_scores_it_over_its_error() -> None:
    controller = policy()
    assert [m.kind for m in controller.wants(0)] == ["probe_nll"], "no grounded term"
    rewarded(controller, 2, lambda _: 3.0)
    # 2.75, 3.25: mean 3, error sqrt(.125 / 2) = .25
    assert controller.metrics()["exposure/reward_lp"] == pytest.approx(12.0)
    assert controller.metrics()["exposure/reward"] == pytest.approx(12.0)
    assert controller.metrics()["exposure/matured"] == 1.0
    assert "exposure/reward_gt" not in controller.metrics()


def test_a_decision_whose_credit_is_missing_is_discarded() -> None:
    controller = policy()
    controller.observe(seen(0, {}, {"probe_nll": 1.0}))
    controller.propose(0, ["p"])
    controller.observe(seen(1, {"route/distil_groups": 1.0}, {"probe_nll": 1.0}))
    assert controller.metrics()["exposure/discarded"] == 1.0
    assert controller.metrics()["exposure/matured"] == 0.0


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_beta_policy_moves_towards_the_ratios_that_are_credited(sign: float) -> None:
    ends = [rewarded(policy(seed), 60, lambda ratio: sign * ratio)[-1] - 0.5 for seed in range(4)]
    assert sum(sign * end for end in ends) / 4 > 0.1


def test_an_open_decision_is_restored_with_its_credit() -> None:
    controller = policy()
    rewarded(controller, 4, lambda ratio: ratio)
    again = policy()
    again.load_state_dict(json.loads(json.dumps(controller.state_dict())))
    assert [decision.credit for decision in again._ready] == [decision.credit for decision in controller._ready]
    assert again.state_dict() == controller.state_dict()


def test_a_learning_rate_of_0_is_a_prior_that_never_changes() -> None:
    """The same draws as a policy that has not been updated; another rate moves it on the same rewards."""
    fields = {"reward": "full", "lambda_gt": 0.0, "look_ahead": 1, "rectify": "none"}
    still, moving = policy(learning_rate=0.0, **fields), policy(learning_rate=0.05, **fields)
    for controller in (still, moving):
        for step in range(20):
            controller.observe(seen(step, {"route/distil_groups": 1.0} if step else {}, {"probe_nll": 1.0 + step % 3}))
            controller.propose(step, ["p"])
            if controller is still:
                metrics = controller.metrics()
                assert (metrics["exposure/ka"], metrics["exposure/kb"]) == pytest.approx((3.0, 3.0))
        assert controller.metrics()["exposure/updates"] > 5
    assert abs(moving.metrics()["exposure/ka"] - 3.0) > 0.01
