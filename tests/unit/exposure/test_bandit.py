"""The bandit: its regression against a conditioned joint normal, its windows, and runs whose best ratio is known."""

from __future__ import annotations

import json
from itertools import product
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError
from scipy.stats import multivariate_normal

from atesd.exposure.bandit import LENGTHS, NOISES, PLACES, BanditController, posterior, spread_place
from atesd.facts import RunFacts
from atesd.kinds import ExposureSection
from atesd.types import Measurement, Observation

from support.exposure_toy import Toy

NLL = Measurement("probe_nll")
DECISIONS = [(0, 0.5, 0.4), (5, 0.8, 0.1), (10, 0.2, 0.3), (15, 0.8, -0.1), (20, 0.35, 0.2)]


def build(seed: int = 3, **fields: Any) -> BanditController:
    made = TypeAdapter(ExposureSection).validate_python({"kind": "bandit", **fields}).build(RunFacts(seed=seed))
    assert isinstance(made, BanditController)
    return made


def joint(length: float, noise: float) -> tuple[np.ndarray, np.ndarray]:
    """Covariance of (y of the decisions, f at the places), entry by entry, and the standardised y."""
    points = [(ratio, step / 10 - 1) for step, ratio, _ in DECISIONS]  # steps 0 to 20 as -1 to 1
    whole = np.zeros((len(points) + len(PLACES),) * 2)
    everything = points + [(float(place), None) for place in PLACES]
    for i, (a, t) in enumerate(everything):
        for j, (b, u) in enumerate(everything):
            whole[i, j] = (1 - noise) * np.exp(-0.5 * ((a - b) / length) ** 2)
            if t is not None and u is not None:
                whole[i, j] += 1 + t * u + noise * (i == j)
    gains = np.array([gain for _, _, gain in DECISIONS])
    return whole, (gains - gains.mean()) / np.sqrt(((gains - gains.mean()) ** 2).mean())


def test_the_posterior_is_the_joint_normal_conditioned_on_the_decisions() -> None:
    """By the precision matrix: f | y ~ N(-L_ff^-1 L_fy y, L_ff^-1); the likelihood is scipy's."""

    def log_likelihood(choice: tuple[float, float]) -> float:
        whole, y = joint(*choice)
        return float(multivariate_normal.logpdf(y, np.zeros(5), whole[:5, :5]))

    length, noise = max(product(LENGTHS, NOISES), key=log_likelihood)
    whole, y = joint(length, noise)
    precision = np.linalg.inv(whole + 1e-9 * np.eye(len(whole)))
    covariance = np.linalg.inv(precision[5:, 5:])
    found_mean, found_covariance = posterior(DECISIONS)
    np.testing.assert_allclose(found_mean, -covariance @ precision[5:, :5] @ y, atol=1e-4)
    np.testing.assert_allclose(found_covariance, covariance, atol=1e-4)
    assert np.abs(found_mean).max() > 0.1


def test_equal_progress_says_nothing() -> None:
    mean, _ = posterior([(0, 0.1, 0.2), (5, 0.6, 0.2), (10, 0.9, 0.2)])
    np.testing.assert_allclose(mean, 0.0, atol=1e-12)


def test_the_first_decisions_stand_at_equal_distances_from_the_middle_outwards() -> None:
    assert [spread_place(index, 5) for index in range(5)] == [0.5, 0.75, 0.25, 1.0, 0.0]
    assert [spread_place(index, 3) for index in range(3)] == [0.5, 1.0, 0.0]
    assert [spread_place(index, 2) for index in range(2)] == [0.0, 1.0]
    assert sorted(spread_place(index, 4) for index in range(4)) == pytest.approx([0, 1 / 3, 2 / 3, 1])
    toy = Toy(build(low=0.2, high=0.6, hold=2), best=0.4).run(10)
    assert toy.ratios == pytest.approx([0.4, 0.4, 0.5, 0.5, 0.3, 0.3, 0.6, 0.6, 0.2, 0.2])


def test_a_decision_is_scored_by_the_signed_progress_of_its_own_window() -> None:
    controller = build(hold=2)
    levels = {0: 2.0, 2: 1.5, 4: 1.75}
    asked = []
    for step in range(5):
        wanted = controller.wants(step)
        asked += [step] * bool(wanted)
        assert wanted in ([], [NLL])
        controller.observe(Observation(step, {"route/distil_groups": 1.0}, {NLL: levels.get(step, 99.0)}))
        if step in (2, 4):
            assert controller.metrics()["exposure/progress"] == {2: 0.5, 4: -0.25}[step]
        else:
            assert controller.metrics() == {}
        controller.propose(step, ["p"])
    assert asked == [0, 2, 4]
    assert controller.state_dict()["decisions"] == [[0, 0.5, 0.5], [2, 0.75, -0.25]]


def test_accuracy_counts_upwards() -> None:
    controller = build(hold=1, progress_metric="probe_accuracy")
    accuracy = Measurement("probe_accuracy")
    assert controller.wants(0) == [accuracy]
    for step, value in enumerate((0.25, 0.75)):
        controller.observe(Observation(step, {"route/distil_groups": 1.0}, {accuracy: value}))
        controller.propose(step, ["p"])
    assert controller.state_dict()["decisions"] == [[0, 0.5, 0.5]]


def test_a_window_that_counts_without_distillation_is_left_out_and_said() -> None:
    """Under a router that reads the exposure; what a step with distillation brings is scored again behind it."""
    controller = build(hold=2)
    for step, idle in enumerate((0.0, 1.0, 0.0, 0.0, 0.0)):
        controller.observe(Observation(step, {"route/idle": idle, "route/paused": 0.0}, {NLL: 1.0 / (step + 1)}))
        if step == 2:
            assert controller.metrics() == {"exposure/discarded": 1.0}
        controller.propose(step, ["p"])
    ((begun, _, gain),) = controller.state_dict()["decisions"]
    assert (begun, gain) == (2, pytest.approx(1 / 3 - 1 / 5))


def test_a_window_without_both_ends_is_left_out_and_said() -> None:
    controller = build(hold=1)
    for step, value in enumerate((1.0, float("nan"), 0.5, 0.25)):
        controller.observe(Observation(step, {"route/distil_groups": 1.0}, {NLL: value}))
        if step in (1, 2):
            assert controller.metrics() == {"exposure/discarded": 1.0}
        controller.propose(step, ["p"])
    assert controller.state_dict()["decisions"] == [[2, 0.25, 0.25]]


def test_steps_without_distillation_do_not_use_a_window_up() -> None:
    controller = build(hold=2)
    ratios = []
    for step, groups in enumerate((0.0, 1.0, 0.0, 0.0, 1.0, 1.0)):
        controller.observe(Observation(step, {"route/distil_groups": groups} if step else {}, {NLL: 2.0 - 0.1 * step}))
        ratios += controller.propose(step, ["p"])
    assert ratios == [0.5, 0.5, 0.5, 0.5, 0.75, 0.75]
    ((start, ratio, gain),) = controller.state_dict()["decisions"]
    assert (start, ratio, gain) == (0, 0.5, pytest.approx(0.4))


@pytest.mark.parametrize("wanted", [0.2, 0.5, 0.8])
def test_it_settles_where_progress_is_best_in_a_run_of_a_hundred_steps(wanted: float) -> None:
    """Twenty windows, five of them spread: the estimate alone, and draws on average, end near the best ratio."""
    estimate = Toy(build(width=0.0), best=wanted).run(100)
    assert estimate.ratios[-1] == pytest.approx(wanted, abs=0.06)
    drawn = [Toy(build(seed=seed), best=wanted).run(100).ratios[-25:] for seed in range(6)]
    assert np.mean(drawn) == pytest.approx(wanted, abs=0.06)
    assert np.std(drawn) > 0.0, "draws explore"


def test_a_trend_is_not_taken_for_an_effect_of_the_ratio() -> None:
    """Progress falls with time alone, and small ratios came early: only the trend tells them apart."""
    decisions = [(5 * j, ratio, 1.0 - 0.05 * j) for j, ratio in enumerate((0.1, 0.3, 0.2, 0.5, 0.4, 0.6, 0.7, 0.9))]
    trendless = [(0, ratio, gain) for _, ratio, gain in decisions]
    assert np.ptp(posterior(decisions)[0]) < 0.4 * np.ptp(posterior(trendless)[0])


def test_the_width_scales_the_draws_and_seeds_differ() -> None:
    def last(**fields: Any) -> float:
        controller = build(**fields)
        state = controller.state_dict() | {
            "decisions": [list(d) for d in DECISIONS],
            "drawn": 9,
            "held": 5,
            "ratio": 0.1,
        }
        controller.load_state_dict(state)
        return controller.propose(50, ["p"])[0]

    estimate = {last(seed=seed, width=0.0) for seed in range(4)}
    assert estimate == {float(PLACES[posterior(DECISIONS)[0].argmax()])}
    spread = {width: np.std([last(seed=seed, width=width) for seed in range(40)]) for width in (0.0, 0.1, 1.0)}
    assert 0.0 == spread[0.0] < spread[0.1] < spread[1.0]


def test_draws_are_as_wide_as_the_posterior() -> None:
    """The share of draws that prefer the upper half is what 4,000 draws of another generator say."""
    controller = build()
    state = controller.state_dict() | {"decisions": [list(d) for d in DECISIONS], "held": 5, "ratio": 0.1}
    chosen = []
    for drawn in range(9, 309):
        controller.load_state_dict(state | {"drawn": drawn})
        chosen.append(controller.propose(50, ["p"])[0])
    mean, covariance = posterior(DECISIONS)
    others = np.random.default_rng(0).multivariate_normal(mean, covariance + 1e-9 * np.eye(101), size=4000)
    assert np.mean(np.array(chosen) > 0.5) == pytest.approx(np.mean(PLACES[others.argmax(axis=1)] > 0.5), abs=0.08)


def test_the_log_says_what_the_regression_finds_best() -> None:
    toy = Toy(build(hold=1, low=0.1, high=0.9), best=0.7)
    for _ in range(8):
        toy.observe()
        toy.update()
    toy.observe()
    decisions = [(step, (ratio - 0.1) / 0.8, gain) for step, ratio, gain in toy.controller.state_dict()["decisions"]]
    expected = 0.1 + 0.8 * PLACES[posterior(decisions)[0].argmax()]
    assert toy.controller.metrics()["exposure/bandit_best"] == pytest.approx(expected)


@pytest.mark.parametrize("done", [43, 45])
def test_restored_in_an_open_window_or_between_two_it_goes_on_as_before(done: int) -> None:
    toy = Toy(build(), best=0.3).run(done)
    again = Toy(build(), best=0.3)
    again.controller.load_state_dict(json.loads(json.dumps(toy.controller.state_dict())))
    again.level, again.step, again.stats = toy.level, toy.step, dict(toy.stats)
    toy.ratios, again.ratios = [], []
    # `run` has observed its last step already
    for run in (toy, again):
        run.update()
        run.run(30)
    assert toy.ratios == again.ratios
    assert len(set(toy.ratios)) > 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"low": 0.5, "high": 0.5}, "leaves no choice"),
        ({"low": 0.8, "high": 0.5}, "swap them"),
        ({"spread": 1}, "greater than or equal to 2"),
        ({"width": -1.0}, "greater than or equal to 0"),
        ({"progress_metric": "train_kd"}, "probe_nll"),
    ],
)
def test_nonsense_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        build(**fields)
