from __future__ import annotations

import json
from math import nan
from typing import Any

import numpy as np
import pytest

from atesd.exposure.beta_controller import BetaConfig, BetaController
from atesd.exposure.controller import Controller
from atesd.facts import RunFacts
from atesd.seeds import derive_seed

from support.exposure_toy import Toy, average, final_mean, seen


def build(steps: int = 100, seed: int = 0, frozen: bool = True, **fields: Any) -> Controller:
    return BetaController(BetaConfig(**({"lambda_gt": 0.0} | fields)), steps, seed, frozen)


def keys(controller: Controller, step: int) -> list[str]:
    return [measurement.key for measurement in controller.wants(step)]


def feed(controller: Controller, levels: list[float], groups: list[float] | None = None, **stats: float) -> list[float]:
    """Observe the given probe values one a step; return the ratios proposed after each."""
    drawn = []
    for step, level in enumerate(levels):
        numbers = {"route/distil_groups": groups[step - 1] if groups else 1.0, **stats} if step else {}
        controller.observe(seen(step, numbers, {"probe_nll": level}))
        drawn += controller.propose(step, ["p"])
    return drawn


# ---- the clock ----------------------------------------------------------------------------------------------------


def test_a_window_lasts_exactly_its_steps_and_all_problems_share_its_ratio() -> None:
    toy = Toy(build(hold=3, look_ahead=6), 0.5).run(30)
    windows = [toy.ratios[start : start + 3] for start in range(0, 30, 3)]
    assert all(len(set(window)) == 1 for window in windows)
    assert len(set(toy.ratios)) == 10
    controller = build()
    controller.observe(seen(0, {}, {"probe_nll": 1.0}))
    assert len(set(controller.propose(0, ["a", "b", "c"]))) == 1
    assert len(controller.propose(0, ["a", "b", "c"])) == 3


def test_counts_of_a_hundred_steps() -> None:
    # pipelined: decisions at 0, 5, ..., 95; those up to 90 mature (0 + 10 ... 90 + 10), 19; 19 // 4 = 4 updates.
    # serial: decisions at 0, 15, ..., 90, all mature, 7; 7 // 4 = 1 update.
    for clock, matured, updates, drawn in (("pipelined", 19, 4, 20), ("serial", 7, 1, 7)):
        toy = Toy(build(clock=clock), 0.5).run(100)
        metrics = toy.controller.metrics()
        assert (metrics["exposure/matured"], metrics["exposure/updates"]) == (matured, updates)
        assert len(set(toy.ratios)) == drawn
        assert metrics["exposure/discarded"] == 0.0


def test_decisions_overlap_while_their_look_ahead_runs() -> None:
    controller = build(hold=2, look_ahead=4)
    opened = []
    for step in range(7):
        controller.observe(seen(step, {}, {"probe_nll": 1.0}))
        controller.propose(step, ["p"])
        opened.append(controller.metrics()["exposure/open"])
    # open from steps {0}, {0}, {0, 2}, {0, 2}, {2, 4}, ...
    assert opened == [1.0, 1.0, 2.0, 2.0, 2.0, 2.0, 2.0]


def test_a_step_without_distilled_groups_pauses_the_window_and_discards_open_decisions() -> None:
    controller = build(hold=2, look_ahead=4)
    # updates 0, 1 distil; update 2 does not; 3, 4, 5, 6 do: windows {0, 1}, {2, 3, 4}, {5, 6}, {7, 8}
    drawn = feed(controller, [1.0] * 9, groups=[1, 1, 0, 1, 1, 1, 1, 1])
    assert len(set(drawn[0:2])) == len(set(drawn[2:5])) == len(set(drawn[5:7])) == 1
    assert len(set(drawn)) == 4
    # the decisions of steps 0 and 2 are open when update 2 fails; that of step 5 would mature at 9
    assert controller.metrics()["exposure/discarded"] == 2.0
    assert controller.metrics()["exposure/matured"] == 0.0


def test_a_decision_that_matured_before_the_pause_is_kept() -> None:
    controller = build(hold=2, look_ahead=4)
    feed(controller, [1.0] * 6, groups=[1, 1, 1, 1, 0])  # step 0 matures at theta_4, update 4 distils nothing
    metrics = controller.metrics()
    assert (metrics["exposure/matured"], metrics["exposure/discarded"]) == (1.0, 2.0)


def test_steps_must_come_in_order() -> None:
    controller = build()
    with pytest.raises(AssertionError):
        controller.propose(0, ["p"])
    controller.observe(seen(0))
    with pytest.raises(AssertionError):
        controller.observe(seen(2))


# ---- the reward ---------------------------------------------------------------------------------------------------

LEVELS = [2.0, 1.5, 1.75, 1.0, 0.9]  # falls .5, -.25, .75, .1


def test_reward_matures_with_theta_t0_plus_l() -> None:
    controller = build(hold=2, look_ahead=4, gamma=0.5, reward_norm=False)
    feed(controller, LEVELS[:4])
    assert "exposure/reward" not in controller.metrics()
    controller.observe(seen(4, {}, {"probe_nll": LEVELS[4]}))
    # .5 + .25 * .75 + .125 * .1
    assert controller.metrics()["exposure/reward"] == pytest.approx(0.5 + 0.1875 + 0.0125)
    controller.propose(4, ["p"])
    controller.observe(seen(5, {}, {"probe_nll": 0.9}))
    assert "exposure/reward" not in controller.metrics()


@pytest.mark.parametrize(
    ("reward", "matures", "expected"),
    [("immediate", 1, 0.5), ("short_delay", 2, 0.5), ("lookahead", 4, 0.5 + 0.1875 + 0.0125)],
)
def test_reward_variants_differ_in_their_span(reward: str, matures: int, expected: float) -> None:
    controller = build(hold=2, look_ahead=4, gamma=0.5, reward=reward, lambda_gt=0.25)
    feed(controller, LEVELS[:matures])
    assert "exposure/reward_lp" not in controller.metrics()
    controller.observe(seen(matures, {}, {"probe_nll": LEVELS[matures]}))
    assert controller.metrics()["exposure/reward_lp"] == pytest.approx(expected)
    assert "exposure/reward_gt" not in controller.metrics()
    assert keys(controller, matures + 1) in (["probe_nll"], [])


def test_sparse_probes_are_asked_for_and_discounted_by_steps() -> None:
    controller = build(hold=4, look_ahead=4, gamma=0.5, probe_every=2, reward_norm=False)
    asked = []
    for step, level in enumerate([2.0, nan, 1.5, nan, 1.0]):
        asked.append(keys(controller, step))
        controller.observe(seen(step, {}, {} if step % 2 else {"probe_nll": level}))
        controller.propose(step, ["p"])
    assert asked == [["probe_nll"], [], ["probe_nll"], [], ["probe_nll"]]
    assert controller.metrics()["exposure/reward_lp"] == pytest.approx(0.5 + 0.25 * 0.5)


def test_frozen_teacher_is_tabulated_once_and_interpolated_at_the_own_ratio() -> None:
    controller = build(hold=2, look_ahead=2, lambda_gt=0.5, gt_grid=(0.0, 0.5, 1.0), reward_norm=False)
    assert keys(controller, 0) == ["probe_nll", "gt_solution@0.0", "gt_solution@0.5", "gt_solution@1.0"]
    table = {"gt_solution@0.0": -3.0, "gt_solution@0.5": -1.0, "gt_solution@1.0": -0.5}
    controller.observe(seen(0, {}, {"probe_nll": 2.0, **table}))
    (ratio,) = controller.propose(0, ["p"])
    assert keys(controller, 1) == ["probe_nll"]
    for step in (1, 2):
        controller.observe(seen(step, {}, {"probe_nll": 2.0 - 0.1 * step}))
        controller.propose(step, ["p"])
    grounded = float(np.interp(ratio, [0.0, 0.5, 1.0], [-3.0, -1.0, -0.5]))
    assert controller.metrics()["exposure/reward_gt"] == pytest.approx(grounded)
    assert controller.metrics()["exposure/reward"] == pytest.approx(0.1 + 0.9 * 0.1 + 0.5 * grounded)


def test_a_ratio_that_cannot_be_tabulated_is_left_out_and_an_empty_table_is_asked_for_again() -> None:
    controller = build(hold=2, look_ahead=2, lambda_gt=1.0, gt_grid=(0.0, 0.5, 1.0), gt_target="hidden_only")
    controller.observe(seen(0, {}, {"probe_nll": 2.0, "gt_hidden_only@0.0": nan}))
    controller.propose(0, ["p"])
    assert "gt_hidden_only@0.5" in keys(controller, 1)
    found = {"gt_hidden_only@0.0": -3.0, "gt_hidden_only@0.5": -1.0, "gt_hidden_only@1.0": nan}
    controller.observe(seen(1, {}, {"probe_nll": 2.0, **found}))
    controller.propose(1, ["p"])
    assert keys(controller, 2) == ["probe_nll"]
    controller.observe(seen(2, {}, {"probe_nll": 1.0}))
    assert -3.0 <= controller.metrics()["exposure/reward_gt"] <= -1.0


def test_without_any_table_decisions_are_discarded() -> None:
    controller = build(hold=2, look_ahead=2, lambda_gt=1.0)
    feed(controller, [1.0] * 5)
    metrics = controller.metrics()
    assert (metrics["exposure/matured"], metrics["exposure/discarded"]) == (0.0, 2.0)


def test_changing_teacher_is_measured_at_each_open_decisions_ratio() -> None:
    controller = build(hold=2, look_ahead=4, gamma=0.5, lambda_gt=0.5, frozen=False, reward_norm=False)
    assert keys(controller, 0) == ["probe_nll"]
    ratios: list[float] = []
    for step in range(5):
        wanted = keys(controller, step)
        # the decision of step 2 is due from step 3 on, that of step 0 until step 4
        expected = {f"gt_solution@{ratio!r}" for ratio in ratios[: (step + 1) // 2]} if step else set()
        assert set(wanted) == {"probe_nll"} | expected
        grounded = {key: -float(step) for key in wanted if key.startswith("gt")}
        controller.observe(seen(step, {}, {"probe_nll": 1.0, **grounded}))
        if step % 2 == 0:
            ratios += controller.propose(step, ["p"])
        else:
            controller.propose(step, ["p"])
    # -(1 + .5 * 2 + .25 * 3 + .125 * 4) / 1.875
    assert controller.metrics()["exposure/reward_gt"] == pytest.approx(-3.25 / 1.875)
    assert controller.metrics()["exposure/reward"] == pytest.approx(-0.5 * 3.25 / 1.875)


def test_a_changing_teacher_that_cannot_be_measured_discards_the_decision() -> None:
    controller = build(hold=2, look_ahead=2, lambda_gt=0.5, frozen=False)
    feed(controller, [1.0] * 3)
    assert controller.metrics()["exposure/discarded"] == 1.0


@pytest.mark.parametrize("bad", [nan, None])
@pytest.mark.parametrize("when", [0, 1, 4])
def test_missing_measurements_discard_the_decision(bad: float | None, when: int) -> None:
    controller = build(hold=5, look_ahead=4)
    for step in range(5):
        measured = {"probe_nll": bad if step == when else 1.0}
        controller.observe(seen(step, {}, {key: value for key, value in measured.items() if value is not None}))
        controller.propose(step, ["p"])
    metrics = controller.metrics()
    assert (metrics["exposure/matured"], metrics["exposure/discarded"], metrics["exposure/open"]) == (0.0, 1.0, 0.0)


def test_training_loss_belongs_to_the_step_before_its_update() -> None:
    controller = build(hold=5, look_ahead=4, gamma=0.5, progress_metric="train_kd", reward_norm=False)
    for step in range(6):
        # the loss of update step - 1 was measured at theta_(step - 1)
        stats = {"loss/distil": LEVELS[step - 1], "route/distil_groups": 1.0} if step else {}
        controller.observe(seen(step, stats))
        if step < 5:
            assert controller.metrics()["exposure/matured"] == 0.0
            controller.propose(step, ["p"])
    # l_0 .. l_4 all under the ratio of window 0; matured once update 4 is done
    assert controller.metrics()["exposure/reward_lp"] == pytest.approx(0.5 + 0.1875 + 0.0125)


def test_rising_accuracy_is_progress() -> None:
    controller = build(hold=2, look_ahead=2, gamma=1.0, progress_metric="probe_accuracy")
    for step, accuracy in enumerate([0.2, 0.3, 0.5]):
        assert keys(controller, step) == ["probe_accuracy"]
        controller.observe(seen(step, {}, {"probe_accuracy": accuracy}))
        controller.propose(step, ["p"])
    assert controller.metrics()["exposure/reward_lp"] == pytest.approx(0.3)


def test_each_term_is_divided_by_its_deviation_so_far() -> None:
    fields: dict[str, Any] = {"hold": 1, "look_ahead": 1, "gamma": 1.0, "decisions_per_update": 9, "lambda_gt": 0.5}
    controller = build(gt_grid=(0.0, 1.0), **fields)
    levels = [2.0, 1.9, 1.6]  # progress .1, then .3: deviation .1 sqrt(2)
    table = {"gt_solution@0.0": 0.0, "gt_solution@1.0": 4.0}
    drawn = []
    for step, level in enumerate(levels):
        controller.observe(seen(step, {}, {"probe_nll": level, **table}))
        drawn += controller.propose(step, ["p"])
    grounded = 4.0 * np.array(drawn[:2])
    expected = 0.3 / (0.1 * 2**0.5) + 0.5 * grounded[1] / grounded.std(ddof=1)
    assert controller.metrics()["exposure/reward"] == pytest.approx(expected)


def test_measurements_taken_for_others_change_nothing() -> None:
    def run(extra: dict[str, float]) -> list[float]:
        controller = build(hold=4, look_ahead=4, probe_every=4, decisions_per_update=2)
        drawn = []
        for step in range(40):
            asked = dict.fromkeys(keys(controller, step), 2.0 - 0.01 * step)
            controller.observe(seen(step, {}, extra | asked))
            drawn += controller.propose(step, ["p"])
        return [*drawn, controller.metrics()["exposure/feature/probe_ema"]]

    assert run({}) == run({"probe_nll": 77.0, "gt_solution@0.5": 1.0})


# ---- the policy ---------------------------------------------------------------------------------------------------


def test_the_unclipped_draw_is_scored() -> None:
    for bounds in ("clip", "affine"):
        controller = build(alpha_min=0.45, alpha_max=0.5, bounds=bounds)
        controller.observe(seen(0, {}, {"probe_nll": 1.0}))
        (ratio,) = controller.propose(0, ["p"])
        (row,) = controller.state_dict()["open"]
        assert row["ratio"] == ratio
        assert 0.45 <= ratio <= 0.5
        assert row["draw"] == np.random.default_rng([0, 1]).beta(3.0, 3.0)
        assert not 0.45 <= row["draw"] <= 0.5


def test_one_decision_per_update_moves_nothing_and_is_no_nan() -> None:
    toy = Toy(build(decisions_per_update=1, entropy_coef=0.0), 0.8).run(100)
    metrics = toy.controller.metrics()
    assert metrics["exposure/updates"] == 19.0
    assert toy.means == pytest.approx([0.5] * 100, abs=1e-12)


def test_entropy_is_penalised_only_after_its_start() -> None:
    def entropies(coefficient: float) -> list[float]:
        controller = build(400, decisions_per_update=1, entropy_coef=coefficient, learning_rate=0.002)
        found = []
        for step in range(400):
            controller.observe(seen(step, {}, {"probe_nll": 1.0}))
            controller.propose(step, ["p"])
            found.append(controller.metrics()["exposure/entropy"])
        return found

    free, penalised = entropies(0.0), entropies(5.0)
    assert free == pytest.approx([-0.2678641] * 400, abs=1e-6)
    assert penalised[:120] == pytest.approx(free[:120], abs=1e-6)
    assert -0.6 < penalised[-1] < -0.45


def test_metrics_describe_the_decision_in_force() -> None:
    controller = build(warm_start={"mean": 0.75, "concentration": 8.0})
    feed(controller, [1.0], groups=None)
    metrics = controller.metrics()
    assert (metrics["exposure/ka"], metrics["exposure/kb"]) == (pytest.approx(6.0), pytest.approx(2.0))
    assert metrics["exposure/mean"] == pytest.approx(0.75)
    assert metrics["exposure/feature/probe_ema"] == 1.0
    assert metrics["exposure/feature/progress"] == 0.0
    assert metrics["exposure/open"] == 1.0


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("metric", ["probe_nll", "train_kd"])
def test_resume_continues_bit_for_bit_from_every_step(frozen: bool, metric: str) -> None:
    fields: dict[str, Any] = {
        "lambda_gt": 0.25,
        "progress_metric": metric,
        "force_train_kd": True,
        "importance_clip": 5.0,
        "features": ("progress", "ratio_ema", "loss_ema", "probe_ema", "improvement", "reward_margin"),
        "hold": 3,
        "look_ahead": 6,
        "decisions_per_update": 2,
    }
    total, paused = 36, {17}

    def advance(toy: Toy) -> dict[str, float]:
        toy.observe()
        metrics = dict(toy.controller.metrics())
        toy.update(distilled=toy.step not in paused)
        return metrics

    whole = Toy(build(total, 3, frozen, **fields), 0.5)
    expected, snapshots = [], []
    for _ in range(total):
        toy_state = (whole.level, whole.step, dict(whole.stats))
        snapshots.append((json.dumps(whole.controller.state_dict(), allow_nan=False), toy_state))
        expected.append(advance(whole))
    assert expected[-1]["exposure/updates"] > 2
    for text, (level, step, stats) in snapshots:
        again = Toy(build(total, 99, frozen, **fields), 0.5, level=level, step=step, stats=stats)
        again.controller.load_state_dict(json.loads(text))
        assert [advance(again) for _ in range(step, total)] == expected[step:]
        assert again.ratios == whole.ratios[step:]


def test_resume_between_observing_and_proposing() -> None:
    toy, other = Toy(build(), 0.5), build(seed=5)
    for _ in range(25):
        toy.observe()
        toy.update()
    toy.observe()  # step 25: a window boundary
    other.load_state_dict(json.loads(json.dumps(toy.controller.state_dict())))
    assert other.propose(25, ["p"]) == toy.controller.propose(25, ["p"])
    assert other.metrics() == toy.controller.metrics()


def test_seeds_decide_the_draws() -> None:
    assert Toy(build(seed=1), 0.5).run(20).ratios == Toy(build(seed=1), 0.5).run(20).ratios
    assert Toy(build(seed=1), 0.5).run(20).ratios != Toy(build(seed=2), 0.5).run(20).ratios


def test_a_run_gives_it_a_seed_of_its_own_and_says_whether_the_teacher_is_frozen() -> None:
    run = RunFacts(seed=3, total_steps=60, teacher_frozen=False)
    built, same = BetaConfig(decisions_per_update=1).build(run), build(60, derive_seed(3, "exposure"), frozen=False)
    assert Toy(built, 0.5).run(20).ratios == Toy(same, 0.5).run(20).ratios
    assert all(measurement.kind != "gt_solution" for measurement in BetaConfig().build(run).wants(0))
    table = [measurement.ratio for measurement in BetaConfig().build(RunFacts()).wants(0)]
    assert table == [None, *BetaConfig().gt_grid]


# ---- the toy: where it ends ---------------------------------------------------------------------------------------


def toy_mean(best: float | None, seeds: int = 6, steps: int = 1500, **fields: Any) -> float:
    return average([final_mean(Toy(build(steps, seed, **fields), best).run(steps)) for seed in range(seeds)])


@pytest.mark.parametrize("best", [0.3, 0.5, 0.8])
def test_toy_progress_on_the_probe_finds_the_best_ratio(best: float) -> None:
    assert toy_mean(best, entropy_coef=0.0) == pytest.approx(best, abs=0.06)


@pytest.mark.parametrize(("best", "shifted"), [(0.3, 0.36), (0.5, 0.55), (0.8, 0.89)])
def test_toy_defaults_shift_towards_exposure(best: float, shifted: float) -> None:
    assert toy_mean(best, seeds=4, lambda_gt=0.25) == pytest.approx(shifted, abs=0.04)


def test_toy_grounded_term_without_normalisation_swamps_progress() -> None:
    assert toy_mean(0.3, seeds=2, lambda_gt=0.25, reward_norm=False, entropy_coef=0.0) > 0.9


@pytest.mark.parametrize("best", [0.3, None])
def test_toy_training_loss_drives_exposure_up_whatever_is_best(best: float | None) -> None:
    fields: dict[str, Any] = {"progress_metric": "train_kd", "force_train_kd": True, "entropy_coef": 0.0}
    assert toy_mean(best, seeds=2, **fields) == pytest.approx(0.945, abs=0.02)


@pytest.mark.parametrize("best", [0.3, 0.8])
def test_toy_training_loss_inside_one_window_is_safe(best: float) -> None:
    assert toy_mean(best, seeds=3, progress_metric="train_kd", look_ahead=4, entropy_coef=0.0) == pytest.approx(
        best, abs=0.06
    )


def test_toy_short_runs_move_only_part_of_the_way() -> None:
    slow = toy_mean(0.8, steps=100, learning_rate=0.01, entropy_coef=0.0)
    fast = toy_mean(0.8, steps=100, entropy_coef=0.0)
    assert 0.5 < slow < 0.62 < fast < 0.8


def test_a_step_whose_loss_was_not_taken_discards_decisions_whatever_its_routes() -> None:
    controller = build(40, hold=2)
    controller.observe(seen(0, measured={"probe_nll": 1.0}))
    controller.propose(0, ["p"])
    controller.observe(seen(1, {"route/distil_groups": 4.0, "route/idle": 1.0, "route/paused": 1.0}))
    assert controller.metrics()["exposure/discarded"] == 1.0
    assert controller.metrics()["exposure/open"] == 0.0
