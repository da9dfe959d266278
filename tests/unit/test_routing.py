"""Routes by truth table, the retirement of the teacher, and the cliff router's modes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

import pytest
from pydantic import ValidationError

from atesd.cliff import CliffConfig, CliffMeter, threshold
from atesd.facts import RunFacts
from atesd.kinds import RoutingSection
from atesd.routing.cliff import Cliff, CliffRouter
from atesd.routing.fixed import Both, Distil, Hdpo, Reinforce, Supervised
from atesd.routing.retire import Retire
from atesd.routing.route import Route, Router, RoutingMethod
from atesd.types import ContractPoint, Group, Measurement, Observation, Problem, StopReason, Trajectory, Turn

TURN = Turn((1,), (2,), (-1.0,), "", StopReason.EOS, 0)
DISTIL, RL, BOTH, NLL, SKIP = Route.DISTIL, Route.RL, Route.BOTH, Route.NLL, Route.SKIP
CLIFF = CliffConfig(every=10, grid=(0.0, 1.0), min_hits=1, min_stay=2, hysteresis=0.02)
FACTS = RunFacts(strength=1.25, cliff=CLIFF)


def group(*rewards: float | None) -> Group:
    return Group(Problem("p", "x", "y"), tuple(Trajectory((TURN,), reward) for reward in rewards))


FAILED, MIXED, SOLVED, UNGRADED, PARTLY = group(0, 0), group(0, 1), group(1, 1), group(None, None), group(None, 1)
FRACTION, PENALTY, EMPTY = group(0.0, 0.1), group(-1.0, 0.0), group()
GROUPS = [FAILED, MIXED, SOLVED, UNGRADED, PARTLY, FRACTION, PENALTY, EMPTY]


@pytest.mark.parametrize(
    ("config", "routes"),
    [
        (Distil(), [DISTIL] * 8),
        (Reinforce(), [RL, RL, RL, SKIP, RL, RL, RL, SKIP]),
        (Both(), [BOTH, BOTH, BOTH, DISTIL, BOTH, BOTH, BOTH, DISTIL]),
        (Hdpo(), [DISTIL, RL, RL, DISTIL, RL, RL, DISTIL, DISTIL]),
        (Retire(), [BOTH, BOTH, BOTH, DISTIL, BOTH, BOTH, BOTH, DISTIL]),
        (Cliff(), [DISTIL] * 8),
        (Supervised(), [NLL] * 8),
    ],
)
def test_routes_by_rewards(config: RoutingMethod, routes: Sequence[Route]) -> None:
    router = config.build(FACTS)  # type: ignore[attr-defined]
    assert router.route(GROUPS, 0.5) == routes
    assert not router.capped


def test_what_each_router_says_of_itself() -> None:
    """reinforces, distils, shared, reads_exposure, reads_lambda, distils_failures_only, distils_uniform, source.

    And teaches_reinforced, asks_teacher.
    """
    said = {
        method.model_fields["kind"].default: (
            method().reinforces, method.distils, method.shared, method.reads_exposure, method.reads_lambda,
            method.distils_failures_only, method().distils_uniform, method.source, method.teaches_reinforced,
            method().asks_teacher,
        )
        for method in get_args(get_args(RoutingSection)[0])
    }  # fmt: skip
    assert said == {
        "distil": (False, True, False, False, False, False, False, "student", False, False),
        "rl": (True, False, False, False, False, False, False, "student", False, False),
        "both": (True, True, False, False, False, False, False, "student", True, False),
        "hdpo": (True, True, True, False, False, True, True, "student", False, False),
        "retire": (True, True, False, False, False, False, False, "student", True, False),
        "cliff": (True, True, True, True, True, False, True, "student", False, False),
        "aligned": (True, True, True, True, False, False, False, "student", False, False),
        "sft": (False, False, False, False, False, False, False, "reference", False, False),
    }
    assert not Cliff(uniform="skip").distils_uniform
    assert Retire(teacher_share=0.9).asks_teacher


def test_coefficients_scale_the_distillation_loss() -> None:
    assert (Both().coefs, Both(coef=0.3).coefs, Retire().coefs) == ({"distil": 0.01}, {"distil": 0.3}, {"distil": 1.0})
    assert Hdpo().coefs == Distil().coefs == Cliff().coefs == {}


# ---- the retirement -----------------------------------------------------------------------------------------------


def mismatch(router: Router, step: int, value: float) -> None:
    router.observe(Observation(step, {"mismatch/top1": value}))


def test_the_teacher_retires_when_the_mismatch_stops_shrinking() -> None:
    section = Retire(patience=2, decay=0.5)
    router = section.build(FACTS)
    assert router.metrics() == {"route/retired": 0.0}
    values = [0.4, 0.3, 0.2, 0.25, 0.3]  # averages .4, .35, .275, .2625, .28125: one stale step
    for step, value in enumerate(values, start=1):
        mismatch(router, step, value)
    assert router.route([MIXED], 0.5) == [BOTH]
    assert router.metrics() == pytest.approx({"route/retired": 0.0, "route/mismatch_ema": 0.28125})
    router.observe(Observation(6, {}))  # a step without distillation says nothing
    state = json.loads(json.dumps(router.state_dict()))
    mismatch(router, 7, 0.3)
    assert router.route(GROUPS, 0.5) == [RL, RL, RL, SKIP, RL, RL, RL, SKIP]
    assert router.metrics()["route/retired"] == 1.0
    mismatch(router, 8, 0.0)
    assert router.route([MIXED], 0.5) == [RL], "retirement is final"
    resumed = section.build(FACTS)
    resumed.load_state_dict(json.loads(json.dumps(router.state_dict())))
    mismatch(resumed, 9, 0.0)
    assert resumed.route([MIXED, UNGRADED], 0.5) == [RL, SKIP], "in a resumed run, too"
    again = section.build(FACTS)
    again.load_state_dict(state)
    assert again.route([MIXED], 0.5) == [BOTH]
    mismatch(again, 7, 0.3)
    assert again.state_dict() == router.state_dict()


@pytest.mark.parametrize(("values", "retired"), [
    ([0.5, 0.39, 0.28], False),  # falls of .11 are new least values
    ([0.5, 0.41, 0.41], True),  # .09 is less than the fall that counts
    ([0.5, 0.41, 0.32], False),  # two small falls add up: the least stays at .5 until it is beaten by .1
    ([0.5, 0.55, 0.45], True),
    ([0.5, 0.5, 0.5], True),
])  # fmt: skip
def test_a_new_least_mismatch_must_be_lower_by_the_least_fall(values: list[float], retired: bool) -> None:
    router = Retire(patience=2, decay=0.0, min_fall=0.1).build(FACTS)
    for step, value in enumerate(values, start=1):
        mismatch(router, step, value)
    assert router.metrics()["route/retired"] == float(retired)


def test_an_equal_mismatch_is_no_new_least() -> None:
    router = Retire(patience=1, decay=0.0).build(FACTS)
    mismatch(router, 1, 0.5)
    mismatch(router, 2, 0.4)
    assert router.metrics()["route/retired"] == 0.0
    mismatch(router, 3, 0.4)
    assert router.metrics()["route/retired"] == 1.0


STUDENT = Measurement("probe_accuracy")


def successes(router: Router, step: int, mismatch: float, student: float | None, teacher: float | None) -> None:
    """Tell a router what it asked for; the teacher's success at ratio .5, another one at 1."""
    taken = {STUDENT: student, Measurement("teacher_accuracy", 0.5): teacher, Measurement("teacher_accuracy", 1.0): 0.0}
    measured = {asked: number for asked, number in taken.items() if number is not None}
    router.observe(Observation(step, {"mismatch/top1": mismatch}, measured))


@pytest.mark.parametrize(("student", "teacher", "retired"), [
    (0.45, 0.5, True), (0.44, 0.5, False), (0.9, 0.5, True), (0.0, 0.0, True), (None, 0.5, False), (0.5, None, False),
])  # fmt: skip
def test_the_teacher_also_waits_for_the_students_success(
    student: float | None, teacher: float | None, retired: bool
) -> None:
    """At 90 % of the teacher's; unknown successes keep it."""
    router = Retire(patience=1, decay=0.0, teacher_share=0.9, every=1).build(FACTS)
    router.route([MIXED], 0.5)
    successes(router, 1, 0.4, 1.0, 0.1)  # a new least mismatch
    successes(router, 2, 0.4, 1.0, 0.1)  # stopped now; nothing was asked for before
    assert router.metrics()["route/retired"] == 0.0
    successes(router, 3, 0.4, student, teacher)
    assert router.metrics()["route/retired"] == float(retired)
    assert router.route([MIXED, UNGRADED], 0.5) == ([RL, SKIP] if retired else [BOTH, DISTIL])


def test_successes_are_asked_for_while_the_mismatch_does_not_shrink_at_the_exposure_in_force() -> None:
    router = Retire(patience=2, decay=0.0, teacher_share=0.9, every=3).build(FACTS)
    router.route([MIXED], 0.25)
    asked = []
    for step, value in enumerate([0.4, 0.3, 0.3, 0.3, 0.3, 0.3, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2]):
        asked.append([measurement.key for measurement in router.wants(step)])
        router.observe(Observation(step, {"mismatch/top1": value}))
        router.route([MIXED], 0.5)
    # stale: 0 0 1 2 3 4, then a new least at step 6: 0 1 2 3 4 5; asked at steps 6 and 9 of those divisible by 3
    both = ["probe_accuracy", "teacher_accuracy@0.5"]
    assert asked == [[], [], [], [], [], [], both, [], [], both, [], []]
    assert list(Retire(patience=1, decay=0.0).build(FACTS).wants(3)) == []


def test_a_new_least_mismatch_keeps_the_teacher_whatever_the_students_success() -> None:
    router = Retire(patience=1, decay=0.0, teacher_share=0.5, every=1).build(FACTS)
    router.route([MIXED], 0.5)
    for step, value in enumerate([0.4, 0.4], start=1):
        mismatch(router, step, value)
    successes(router, 3, 0.3, 1.0, 0.5)
    assert router.metrics()["route/retired"] == 0.0
    assert list(router.wants(4)) == []
    state = json.loads(json.dumps(router.state_dict()))
    again = Retire(patience=1, decay=0.0, teacher_share=0.5, every=1).build(FACTS)
    again.load_state_dict(state)
    for each in (router, again):
        mismatch(each, 4, 0.3)
        assert [asked.key for asked in each.wants(5)] == ["probe_accuracy", "teacher_accuracy@0.5"]
        successes(each, 5, 0.3, 0.3, 0.6)
        assert each.metrics()["route/retired"] == 1.0
        assert list(each.wants(6)) == []
        assert each.route([MIXED], 0.5) == [RL]


def test_a_cadence_of_successes_that_nothing_asks_for_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"set routing\.teacher_share, such as 0\.9, or remove routing\.every"):
        Retire(every=3)


# ---- the cliff ----------------------------------------------------------------------------------------------------


def contract(step: int, low: float, high: float) -> Observation:
    points = {0.0: low, 1.0: high}
    measured = {Measurement("contract", ratio): {"eos": ContractPoint(p, 0.5, 9)} for ratio, p in points.items()}
    return Observation(step, measured=measured)


# lambda*(.9) = 1.771 at ratio 0, lambda*(.999) = 1.233 at ratio 1
KNOWN = contract(0, 0.9, 0.999)


def built(section: Cliff | None = None, **facts: float) -> CliffRouter:
    router = (section or Cliff()).build(replace(FACTS, **facts))  # type: ignore[arg-type]
    assert isinstance(router, CliffRouter)
    router.observe(KNOWN)
    return router


def ratio_at(least: float) -> float:
    """Return the ratio whose lambda* is `least`, by bisection."""
    meter = CliffMeter(CLIFF, 5.0)
    meter.observe(KNOWN)
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if meter.threshold(middle) > least else (low, middle)
    return low


def test_the_cliff_router_distils_below_the_threshold_and_reinforces_above_it() -> None:
    router = built()
    assert router.route(GROUPS, 0.0) == [DISTIL] * 8
    assert not router.capped
    assert router.metrics() == {"cliff/reinforcing": 0.0}
    router = built()
    assert router.route(GROUPS, 1.0) == [DISTIL, RL, DISTIL, DISTIL, DISTIL, RL, RL, DISTIL]
    assert router.capped, "what is left to distil is held to the cap"
    assert router.metrics() == {"cliff/reinforcing": 1.0}
    skipping = built(Cliff(uniform="skip"))
    assert skipping.route(GROUPS, 1.0) == [SKIP, RL, SKIP, DISTIL, SKIP, RL, RL, DISTIL]


def modes(router: CliffRouter, ratios: Sequence[float]) -> list[bool]:
    found = []
    for ratio in ratios:
        router.route([], ratio)
        found.append(router.capped)
    return found


def test_a_mode_stays_for_its_least_time() -> None:
    # at lambda 1.4 ratio 0 is safe, ratio 1 is not; two steps at least
    assert modes(built(strength=1.4), [0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0]) == [
        False, False, True, True, False, False, True,
    ]  # fmt: skip


def test_the_first_step_chooses_freely_and_counts_in_its_mode() -> None:
    assert modes(built(strength=1.4), [1.0, 0.0, 0.0]) == [True, True, False]
    # within the hysteresis the first step still obeys lambda* itself
    assert modes(built(strength=1.4), [ratio_at(1.39)]) == [True]
    assert modes(built(strength=1.4), [ratio_at(1.41)]) == [False]


def test_a_mode_changes_only_beyond_the_hysteresis() -> None:
    below = [ratio_at(1.4 - margin) for margin in (0.01, 0.01, 0.01, 0.019, 0.021)]
    assert modes(built(strength=1.4), [0.0, *below]) == [False] * 5 + [True]
    above = [ratio_at(1.4 + margin) for margin in (0.01, 0.01, 0.01, 0.019, 0.021)]
    assert modes(built(strength=1.4), [1.0, *above]) == [True] * 5 + [False]


def test_without_a_known_class_it_distils() -> None:
    router = Cliff().build(replace(FACTS, strength=1.9))
    router.observe(Observation(0))
    assert router.route([FAILED, MIXED], 1.0) == [DISTIL, DISTIL]


def test_the_cliff_router_asks_on_the_meters_cadence_and_follows_new_measurements() -> None:
    router = built()
    assert [measurement.key for measurement in router.wants(10)] == ["contract@0.0", "contract@1.0"]
    assert list(router.wants(11)) == []
    assert threshold(0.999, 0.5, 5.0) < 1.25 < threshold(0.9, 0.5, 5.0)
    assert modes(router, [1.0, 1.0]) == [True, True]
    router.observe(contract(10, 0.9, 0.9))
    assert modes(router, [1.0]) == [False]


def test_the_clip_of_the_run_is_the_c_of_lambda() -> None:
    # c = 1.2 instead of 5: lambda*(.9) falls from 1.771 below 1.25
    assert modes(built(c=1.2), [0.0]) == [True]


def test_a_cliff_router_is_restored_with_mode_and_curve() -> None:
    for taken in range(4):
        router = built(strength=1.4)
        modes(router, [1.0, 0.0, 1.0][:taken])
        again = Cliff().build(replace(FACTS, strength=1.4))
        again.load_state_dict(json.loads(json.dumps(router.state_dict())))
        assert again.capped == router.capped
        for ratio in (0.0, 0.0, 1.0, 1.0, 1.0):
            assert again.route(GROUPS, ratio) == router.route(GROUPS, ratio)
