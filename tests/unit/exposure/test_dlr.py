"""Exposure by search, selection and update: router, draws, winners, and the controller around them (DLR 2605.14323)."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from atesd.exposure.dlr import DlrController, Router, divergence, drawn, logit_gradient, winner, zipf
from atesd.facts import RunFacts
from atesd.kinds import ExposureSection
from atesd.recipe import build_config
from atesd.types import Measurement, Observation, UserError

GRID = (0.5, 0.0, 1.0)
FACTS = RunFacts(seed=3, levels={"a": "easy", "b": "hard", "c": "easy"}, total_steps=20)
PROBLEMS = ["a", "b", "c", "new"]
REFERENCES = {"a": 1.0, "b": 3.0, "c": 2.0}


def build(facts: RunFacts = FACTS, **fields: Any) -> DlrController:
    section = {"kind": "dlr", "grid": GRID, "hold": 2} | fields
    found = TypeAdapter(ExposureSection).validate_python(section).build(facts)
    assert isinstance(found, DlrController)
    return found


def credit(step: int, *, source: str = "reward", stats: Mapping[str, float] = {}, **best: int) -> Observation:
    """Return an observation in which one arm of each level has the clearly best credit, 9 to 1."""
    found: dict[Measurement, dict[str, float]] = {}
    for place, ratio in enumerate(GRID):
        means = {level: 9.0 if place == chosen else 1.0 for level, chosen in best.items()}
        table = {
            f"{level}/{fold}": mean + (-0.5, 0.5)[fold] + 0.1 * fold * place
            for level, mean in means.items()
            for fold in (0, 1)
        }
        found[Measurement(f"{source}_influence_by_level", ratio)] = table
    return Observation(step, {"reward/mean": 0.5, "reward/std": 0.5, **stats}, found)


def start(controller: DlrController) -> None:
    controller.observe(Observation(0, {}, {Measurement("reference_nll"): REFERENCES}))


# ---- the router -----------------------------------------------------------------------------------------------------


def test_the_prior_is_zipfs() -> None:
    """1 + 1/2 + 1/3 + 1/4 = 25/12."""
    assert zipf(4).tolist() == pytest.approx([12 / 25, 6 / 25, 4 / 25, 3 / 25])


def test_kl_of_a_hand_histogram_against_the_prior() -> None:
    """Winners 0, 0, 0, 1 of three arms: (3/4) log((3/4) / (6/11)) + (1/4) log((1/4) / (3/11)); an empty bin adds 0."""
    histogram = np.bincount([0, 0, 0, 1], minlength=3) / 4
    by_hand = 0.75 * math.log(0.75 * 11 / 6) + 0.25 * math.log(0.25 * 11 / 3)
    assert divergence(histogram, zipf(3)) == pytest.approx(by_hand)
    assert divergence(zipf(3), zipf(3)) == pytest.approx(0.0, abs=1e-15)


@pytest.mark.parametrize("kl_coef", [0.0, 0.1, 3.0])
def test_the_routers_step_is_autograds(kl_coef: float) -> None:
    """-(1/B) sum log p(a*) + c KL(p_mean || prior), differentiated by torch; a rate of 1 moves by the gradient."""
    random = np.random.default_rng(0)
    features, winners, prior = random.normal(size=(5, 2)), np.array([0, 3, 3, 1, 0]), zipf(4)
    router = Router(2, 4)
    router.weight_KF, router.bias_K = random.normal(size=(4, 2)), random.normal(size=4)
    weight = torch.tensor(router.weight_KF, requires_grad=True)
    bias = torch.tensor(router.bias_K, requires_grad=True)
    log_p = (torch.tensor(features) @ weight.T + bias).log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1).mean()
    mean = log_p.exp().mean(0)
    cross = -log_p[torch.arange(5), torch.tensor(winners)].mean()
    kl = (mean * (mean / torch.tensor(prior)).log()).sum()
    (cross + kl_coef * kl).backward()  # type: ignore[no-untyped-call]
    found = router.step(features, winners, prior, kl_coef=kl_coef, rate=1.0)
    assert found == pytest.approx({"cross_entropy": cross.item(), "kl": kl.item(), "entropy": entropy.item()})
    assert weight.grad is not None
    assert bias.grad is not None
    np.testing.assert_allclose(router.weight_KF, (weight - weight.grad).detach().numpy(), rtol=1e-12)
    np.testing.assert_allclose(router.bias_K, (bias - bias.grad).detach().numpy(), rtol=1e-12)


def test_the_gradient_of_cross_entropy_by_hand() -> None:
    """(p - onehot) / B: uniform over two arms, both winners arm 1."""
    found = logit_gradient(np.full((2, 2), 0.5), np.array([1, 1]), zipf(2), kl_coef=0.0)
    assert found.tolist() == [[0.25, -0.25], [0.25, -0.25]]


def test_an_arm_that_hardly_any_problem_takes_is_pulled_to_the_prior_by_its_own_share() -> None:
    """c p_a (log(p_a / prior_a) - KL(p || prior)) where nothing else pulls: winners as likely as p says."""
    p, prior = np.array([1e-9, 1 - 1e-9]), zipf(2)
    found = logit_gradient(p[None], np.array([1]), prior, kl_coef=1e6)
    pull = 1e6 * p[0] * (math.log(p[0] / prior[0]) - divergence(p, prior))
    assert found[0, 0] == pytest.approx(p[0] + pull, rel=1e-9)


def test_a_router_that_is_certain_stays_finite() -> None:
    router = Router(0, 3)
    router.bias_K = np.array([2000.0, 0.0, -2000.0])
    found = router.step(np.zeros((2, 0)), np.array([2, 2]), zipf(3), kl_coef=0.1, rate=1.0)
    assert all(map(math.isfinite, found.values()))
    assert found["cross_entropy"] == pytest.approx(4000.0)
    assert np.isfinite(router.bias_K).all()


def test_draws_invert_the_distribution_function() -> None:
    """Edges of (.2, .5, .3) are .2, .7, 1; the last is reached by nothing below 1."""
    p = np.array([[0.2, 0.5, 0.3], [0.0, 0.0, 1.0]])
    u = np.array([[0.0, 0.19, 0.2, 0.69, 0.7, 1 - 2**-53]] * 2)
    assert drawn(p, u).tolist() == [[0, 0, 1, 1, 2, 2], [2] * 6]


def test_draws_are_as_frequent_as_their_probabilities() -> None:
    found = drawn(np.array([[0.2, 0.5, 0.3]]), np.random.default_rng(1).random((1, 20000)))
    shares = np.bincount(found[0]) / 20000
    assert shares.tolist() == pytest.approx([0.2, 0.5, 0.3], abs=4 * math.sqrt(0.25 / 20000))


def test_the_winner_is_the_best_of_the_drawn_alone() -> None:
    z = np.array([9.0, 1.0, 3.0, 3.0])
    assert winner([1, 3, 2], z) == 3, "0 was not drawn, and the first of equals wins"
    assert winner([1], z) == 1


# ---- the controller -------------------------------------------------------------------------------------------------


def replayed(controller: DlrController, step: int, draws: int) -> list[list[int]]:
    """Return what a router that has learned nothing draws at a step, from seed and step alone."""
    random = np.random.default_rng([FACTS.seed_for("exposure"), step]).random((len(PROBLEMS), draws))
    return [[int(u * len(GRID)) for u in row] for row in random]


def test_before_any_credit_the_first_draw_is_shown() -> None:
    controller = build()
    start(controller)
    expected = [GRID[arms[0]] for arms in replayed(controller, 0, 4)]
    assert controller.propose(0, PROBLEMS) == expected
    assert controller.propose(0, PROBLEMS) == expected, "asking again changes nothing"


def test_a_window_with_credit_moves_the_router_to_the_winners_and_shows_them() -> None:
    controller = build(kl_coef=0.0, features=["level"], draws=64, learning_rate=40.0)
    start(controller)
    controller.propose(0, PROBLEMS)
    assert controller.wants(1) == []
    controller.observe(Observation(1))
    controller.propose(1, PROBLEMS)
    assert [m.kind for m in controller.wants(2)] == ["reward_influence_by_level"] * 3 + ["probe_influence_by_level"] * 3
    controller.observe(credit(2, easy=2, hard=1))
    found = controller.metrics()
    assert found["exposure/router/cross_entropy"] == pytest.approx(math.log(3)), "the router was uniform"
    assert found["exposure/won/1"] == pytest.approx(2 / 3), "of 64 draws one is the best; the unknown level is left out"
    assert found["exposure/won/0"] == pytest.approx(1 / 3)
    assert found["exposure/arm/1"] > 0.6
    ratios = controller.propose(2, PROBLEMS)
    assert ratios[:3] == [1.0, 0.0, 1.0]
    controller.observe(Observation(3))
    assert controller.metrics() == {}


def test_the_prior_pulls_as_strongly_as_its_weight_says() -> None:
    """The router begins uniform, so that with a heavy prior its mean moves towards the prior's first arm."""
    shares = []
    for kl_coef in (0.0, 5.0):
        controller = build(kl_coef=kl_coef, features=["level"], draws=64, hold=1, learning_rate=0.5)
        start(controller)
        controller.propose(0, PROBLEMS)
        controller.observe(credit(1, easy=2, hard=2))
        shares.append(controller.metrics()[f"exposure/arm/{GRID[0]:g}"])
    assert shares[0] < 1 / 3 < shares[1]


def test_one_draw_is_plain_sampling() -> None:
    """Whatever the credits say, the draw itself is shown, and is what the router learns."""
    controller = build(draws=1, hold=1, learning_rate=0.0)
    start(controller)
    for step in range(4):
        shown = [GRID[arms[0]] for arms in replayed(controller, step, 1)]
        assert controller.propose(step, PROBLEMS) == shown
        controller.observe(credit(step + 1, easy=2, hard=1))
        won = Counter(shown[:3])
        for ratio in GRID:
            assert controller.metrics()[f"exposure/won/{ratio:g}"] == pytest.approx(won[ratio] / 3)


def test_the_probe_is_asked_while_rewards_are_equal_and_only_where_there_is_one() -> None:
    controller = build(hold=1, draws=64, kl_coef=0.0)
    start(controller)
    controller.propose(0, PROBLEMS)
    controller.observe(credit(1, source="probe", stats={"reward/std": 0.0}, easy=1, hard=1))
    assert controller.propose(1, PROBLEMS)[:3] == [0.0] * 3
    alone = build(replace(FACTS, has_probe=False), hold=1)
    start(alone)
    assert {m.kind for m in alone.wants(1)} <= {"reward_influence_by_level"}


def test_what_it_wants_is_all_that_it_reads() -> None:
    """Measurements that others asked for change nothing; without the perplexity no reference is scored."""
    assert build().wants(0) == [Measurement("reference_nll")]
    assert build(features=["level", "confidence"]).wants(0) == []
    runs = []
    for extra in (False, True):
        controller = build()
        start(controller)
        for step in range(5):
            controller.propose(step, PROBLEMS)
            seen = credit(step + 1, easy=step % 3, hard=1)
            asked = set(controller.wants(step + 1))
            wanted = {m: value for m, value in seen.measured.items() if m in asked}
            controller.observe(seen if extra else replace(seen, measured=wanted))
        runs.append(controller.state_dict())
    assert runs[0] == runs[1]


def test_every_measurement_is_one_that_can_be_taken() -> None:
    from atesd.train.measure import Measurer

    class Anything:
        def __getattr__(self, name: str) -> Any:
            return lambda *_: None

    known = Measurer(Anything(), Anything(), Anything(), [])._table  # type: ignore[arg-type]
    for by in ("none", "level"):
        controller = build(by=by, hold=1)
        assert {m.kind for step in range(4) for m in controller.wants(step)} <= set(known)


def test_features_of_a_problem() -> None:
    """Levels one by one, perplexity standardised: (1 - 2) / sqrt(2/3) for a; a rate of .75 becomes .5; 1 step of 20."""
    controller = build(features=["level", "reference_ppl", "pass_rate", "progress"])
    start(controller)
    controller.propose(0, PROBLEMS)
    controller.observe(Observation(1))
    found = controller._features.of(PROBLEMS, [0.75, None, 0.0, 1.0])
    side = math.sqrt(1.5)
    np.testing.assert_allclose(
        found, [[1, 0, -side, 0.5, 0.05], [0, 1, side, 0, 0.05], [1, 0, 0, -1, 0.05], [0, 0, 0, 1, 0.05]], atol=1e-12
    )


def test_perplexities_are_cut_at_three_deviations() -> None:
    """Of 17 references, one far off stands 4 deviations above the mean: sqrt(16), whatever its distance."""
    ids = [f"p{place}" for place in range(17)]
    controller = build(replace(FACTS, levels={}), features=["reference_ppl"])
    far = {name: 5.0 if name == "p16" else 1.0 for name in ids}
    controller.observe(Observation(0, {}, {Measurement("reference_nll"): far}))
    found = controller._features.of(["p0", "p16"], [None, None])
    np.testing.assert_allclose(found, [[-0.25], [3.0]], atol=1e-12)
    controller.propose(0, ids)
    controller.observe(Observation(1, {}, {Measurement("reference_nll"): dict(far, p0=9.0)}))
    np.testing.assert_allclose(controller._features.of(["p0"], [None]), [[-0.25]], err_msg="those of step 0 stay")


@pytest.mark.parametrize("cut", range(7))
def test_a_restored_controller_goes_on_exactly(cut: int) -> None:
    """Cut before a proposal and between a proposal and its observation."""
    controller = build(features=["level", "reference_ppl", "loss_ema", "reward_margin"])
    again = controller
    start(controller)
    for step in range(7):
        if step == cut:
            again = build(features=["level", "reference_ppl", "loss_ema", "reward_margin"])
            again.load_state_dict(json.loads(json.dumps(controller.state_dict())))
        assert again.propose(step, PROBLEMS) == controller.propose(step, PROBLEMS)
        if step == cut:
            again = build(features=["level", "reference_ppl", "loss_ema", "reward_margin"])
            again.load_state_dict(json.loads(json.dumps(controller.state_dict())))
        stats = {"loss/distil": 1.0 / (step + 1), "reward/mean": 0.1 * step}
        seen = credit(step + 1, stats=stats, easy=step % 3, hard=2)
        assert again.wants(step + 1) == controller.wants(step + 1)
        controller.observe(seen)
        if again is not controller:
            again.observe(seen)
        assert again.metrics() == controller.metrics()
    assert again.state_dict() == controller.state_dict()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"grid": [0.5]}, "at least two ratios"),
        ({"grid": [0.5, 0.5]}, "each once"),
        ({"features": ["level", "level"]}, "name one twice"),
        ({"draws": 0}, "greater than or equal to 1"),
        ({"grid": [0.5, 1.5]}, "less than or equal to 1"),
    ],
)
def test_nonsense_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        build(**fields)


def test_pass_rates_need_groups_and_the_error_says_what_does_without() -> None:
    with pytest.raises(UserError, match=r'take "pass_rate" out of exposure\.features'):
        build_config({"exposure": {"kind": "dlr", "features": ["pass_rate"]}})
