"""Routes by truth table, the retirement of the teacher, and the cliff router's modes."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest

from atesd.cliff import CliffConfig, threshold
from atesd.routing import (
    BothConfig,
    CliffRouterConfig,
    DistilConfig,
    Guarded,
    HdpoConfig,
    ReinforceConfig,
    RetireConfig,
    Route,
    Router,
    SupervisedConfig,
    guarded,
)
from atesd.types import Group, Measurement, Observation, Problem, StopReason, Trajectory, Turn

TURN = Turn((1,), (2,), (-1.0,), "", StopReason.EOS, 0)
DISTIL, RL, BOTH, NLL, SKIP = Route.DISTIL, Route.RL, Route.BOTH, Route.NLL, Route.SKIP
CLIFF = CliffConfig(every=10, grid=(0.0, 1.0), min_hits=1, min_stay=2, hysteresis=0.02)


def group(*rewards: float | None) -> Group:
    return Group(Problem("p", "x", "y"), tuple(Trajectory((TURN,), reward) for reward in rewards))


FAILED, MIXED, SOLVED, UNGRADED, PARTLY = group(0, 0), group(0, 1), group(1, 1), group(None, None), group(None, 1)
GROUPS = [FAILED, MIXED, SOLVED, UNGRADED, PARTLY]


@pytest.mark.parametrize(
    ("config", "routes"),
    [
        (DistilConfig(), [DISTIL] * 5),
        (ReinforceConfig(), [RL, RL, RL, SKIP, RL]),
        (BothConfig(), [BOTH, BOTH, BOTH, DISTIL, BOTH]),
        (HdpoConfig(), [DISTIL, RL, RL, DISTIL, RL]),
        (RetireConfig(), [BOTH, BOTH, BOTH, DISTIL, BOTH]),
        (CliffRouterConfig(), [DISTIL] * 5),
        (SupervisedConfig(), [NLL] * 5),
    ],
)
def test_routes_by_rewards(config: DistilConfig, routes: Sequence[Route]) -> None:
    router = config.build(CLIFF, 5.0)
    assert router.strength(1.3, 0.5) == 1.3
    assert router.route(GROUPS) == routes


def mismatch(router: Router, step: int, value: float) -> None:
    router.observe(Observation(step, {"mismatch/top1": value}))


def test_the_teacher_retires_when_the_mismatch_stops_shrinking() -> None:
    router = RetireConfig(patience=2, decay=0.5).build(CLIFF, 5.0)
    values = [0.4, 0.3, 0.2, 0.25, 0.3]  # averages .4, .35, .275, .2625, .28125: one stale step
    for step, value in enumerate(values, start=1):
        mismatch(router, step, value)
    assert router.route([MIXED]) == [BOTH]
    assert router.metrics() == pytest.approx({"route/retired": 0.0, "route/mismatch_ema": 0.28125})
    router.observe(Observation(6, {}))  # a step without distillation says nothing
    state = json.loads(json.dumps(router.state_dict()))
    mismatch(router, 7, 0.3)
    assert router.route(GROUPS) == [RL, RL, RL, SKIP, RL]
    assert router.metrics()["route/retired"] == 1.0
    again = RetireConfig(patience=2, decay=0.5).build(CLIFF, 5.0)
    again.load_state_dict(state)
    assert again.route([MIXED]) == [BOTH]
    mismatch(again, 7, 0.3)
    assert again.state_dict() == router.state_dict()


def contract(step: int, low: float, high: float) -> Observation:
    measured = {}
    for ratio, p in ((0.0, low), (1.0, high)):
        key = Measurement("contract", ratio).key
        measured |= {f"{key}/eos/p": p, f"{key}/eos/b": 0.5, f"{key}/eos/hits": 9.0}
    return Observation(step, measured=measured)


def test_the_cliff_router_distils_below_the_threshold_and_reinforces_above_it() -> None:
    # lambda*(.9) = 1.771 at ratio 0, lambda*(.999) = 1.233 at ratio 1
    router = CliffRouterConfig().build(CLIFF, 5.0)
    router.observe(contract(0, 0.9, 0.999))
    assert router.strength(1.25, 0.0) == 1.25
    assert router.route(GROUPS) == [DISTIL] * 5
    router = CliffRouterConfig().build(CLIFF, 5.0)
    router.observe(contract(0, 0.9, 0.999))
    least = threshold(0.999, 0.5, 5.0)
    assert router.strength(1.25, 1.0) == pytest.approx(1 + 0.9 * (least - 1))
    assert router.route(GROUPS) == [DISTIL, RL, DISTIL, DISTIL, DISTIL]
    assert router.metrics()["cliff/reinforcing"] == 1.0
    skipping = CliffRouterConfig(uniform="skip").build(CLIFF, 5.0)
    skipping.observe(contract(0, 0.9, 0.999))
    skipping.strength(1.25, 1.0)
    assert skipping.route(GROUPS) == [SKIP, RL, SKIP, DISTIL, SKIP]


def test_a_mode_stays_for_its_least_time_and_changes_only_beyond_the_hysteresis() -> None:
    def mode(ratio: float) -> bool:
        router.strength(wanted, ratio)
        return bool(router.metrics()["cliff/reinforcing"])

    router = CliffRouterConfig().build(CLIFF, 5.0)
    router.observe(contract(0, 0.9, 0.999))  # 1.771 at ratio 0, 1.233 at 1
    wanted = 1.4
    assert not mode(0.0)
    assert not mode(1.0), "two steps at least"
    assert mode(1.0)
    assert mode(0.0), "two steps at least"
    assert not mode(0.0)
    wanted = threshold(0.999, 0.5, 5.0) + 0.01  # above lambda* by less than the hysteresis
    assert not mode(1.0)
    assert not mode(1.0)
    wanted += 0.02
    assert mode(1.0)
    wanted -= 0.04  # below by .01
    assert mode(1.0)
    assert mode(1.0)
    wanted -= 0.02
    assert not mode(1.0)


def test_without_a_known_class_it_distils_and_says_so() -> None:
    router = CliffRouterConfig().build(CLIFF, 5.0)
    router.observe(Observation(0))
    assert router.strength(1.9, 1.0) == 1.9
    assert router.route([FAILED]) == [DISTIL]
    assert router.metrics()["cliff/classes"] == 0.0
    assert "cliff/lambda_star" not in router.metrics()


def test_the_guard_caps_the_strength_of_any_router_and_leaves_its_routes() -> None:
    router = Guarded(HdpoConfig().build(CLIFF, 5.0), CLIFF, 5.0)
    assert [measurement.key for measurement in router.wants(10)] == ["contract@0.0", "contract@1.0"]
    router.observe(contract(0, 0.9, 0.999))
    least = threshold(0.999, 0.5, 5.0)
    assert router.strength(1.25, 1.0) == pytest.approx(1 + 0.9 * (least - 1))
    assert router.strength(1.25, 0.0) == 1.25
    assert router.route(GROUPS) == [DISTIL, RL, RL, DISTIL, RL]
    assert router.metrics()["cliff/lambda"] == 1.25
    again = Guarded(HdpoConfig().build(CLIFF, 5.0), CLIFF, 5.0)
    again.load_state_dict(json.loads(json.dumps(router.state_dict())))
    assert again.metrics() == router.metrics()


def test_guarding_by_hand() -> None:
    assert guarded(1.5, 1.2, 0.9) == pytest.approx(1.18)
    assert guarded(1.1, 1.2, 0.9) == 1.1
    assert guarded(1.5, float("inf"), 0.9) == 1.5


def test_a_cliff_router_is_restored_with_mode_and_curve() -> None:
    router = CliffRouterConfig().build(CLIFF, 5.0)
    router.observe(contract(0, 0.9, 0.999))
    router.strength(1.25, 1.0)
    again = CliffRouterConfig().build(CLIFF, 5.0)
    again.load_state_dict(json.loads(json.dumps(router.state_dict())))
    assert again.route(GROUPS) == router.route(GROUPS)
    for ratio in (0.0, 0.0, 1.0, 1.0, 1.0):
        assert again.strength(1.25, ratio) == router.strength(1.25, ratio)
