"""lambda*: a table worked by hand, monotonicity, the fixed point, and what is made of measurements."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import exp, inf, log
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from atesd.cliff import CliffConfig, CliffMeter, contract_class, largest_p, threshold
from atesd.types import ContractPoint, Measurement, Observation, Reading, UserError

TABLE = [
    (0.9, 0.5, 5, 1.771244), (0.99, 0.5, 5, 1.352001), (0.99, 0.9, 5, 1.674544), (0.99, 0.5, 2, 1.151941),
    (0.999, 0.5, 5, 1.233140), (0.999, 0.5, 1.2, 1.026422), (0.999, 0.9, 5, 1.341911), (0.9999, 0.99, 5, 1.348749),
    (0.8, 0.6, 3, 2.277249), (0.7, 0.3, 1.2, 1.148303),
]  # fmt: skip
INVERSE = [
    (1.22, 0.5, 5, 0.999337), (1.25, 0.5, 5, 0.998411), (1.25, 0.9, 5, 0.999822), (1.5, 0.5, 5, 0.963677),
    (1.1, 0.5, 1.2, 0.884733),
]  # fmt: skip
GRID = (0.0, 0.25, 0.5, 0.75, 1.0)
RISING = (0.99, 0.995, 0.994, 0.999, 0.9995)
probabilities = st.floats(0.01, 0.999)


def fixed_point(p: float, b: float, strength: float) -> float:
    """Return what the student converges to: logit q = lambda logit p - (lambda - 1) logit b."""
    return 1 / (1 + exp((strength - 1) * log(b / (1 - b)) - strength * log(p / (1 - p))))


@pytest.mark.parametrize(("p", "b", "c", "expected"), TABLE)
def test_the_threshold_by_the_table_is_where_the_tails_ratio_equals_the_clip(
    p: float, b: float, c: float, expected: float
) -> None:
    least = threshold(p, b, c)
    assert least == pytest.approx(expected, abs=1e-6)
    assert (1 - p) / (1 - fixed_point(p, b, least)) == pytest.approx(c, abs=1e-9)


@pytest.mark.parametrize(("strength", "b", "c", "expected"), INVERSE)
def test_the_largest_p_by_the_table(strength: float, b: float, c: float, expected: float) -> None:
    assert largest_p(strength, b, c) == pytest.approx(expected, abs=1e-6)


def test_with_an_even_base_the_formula_is_the_short_one() -> None:
    assert threshold(0.97, 0.5, 4) == pytest.approx(log(0.03 / 3.97) / log(0.03 / 0.97))


@given(probabilities, probabilities, st.floats(1.05, 20), st.floats(1.001, 1.2))
def test_the_threshold_falls_with_p_and_rises_with_b_and_c(p: float, b: float, c: float, factor: float) -> None:
    if p <= b + 1e-3:
        return
    least = threshold(p, b, c)
    assert least > 1
    assert threshold(1 - (1 - p) / factor, b, c) < least
    assert threshold(p, b, c * factor) > least
    assert threshold(p, min(b * factor, (b + p) / 2), c) > least
    assert largest_p(least, b, c) == pytest.approx(p, abs=1e-9)


def test_a_teacher_not_above_the_base_has_no_threshold() -> None:
    assert threshold(0.4, 0.5, 5) == threshold(0.5, 0.5, 5) == inf


def test_a_strength_hardly_above_1_is_safe_almost_everywhere() -> None:
    assert 1 - largest_p(1.0 + 1e-9, 0.5, 5) < 1e-12


@pytest.mark.parametrize(
    ("p", "b", "c", "named"),
    [(0.0, 0.5, 5, "p = 0.0"), (1.0, 0.5, 5, "p = 1.0"), (0.9, 0.0, 5, "b = 0.0"), (0.9, 90.0, 5, "b = 90.0"),
     (0.9, 0.5, 1.0, "c = 1.0"), (0.9, 0.5, 0.2, "c = 0.2"), (float("nan"), 0.5, 5, "p = nan"),
     (0.9, 0.5, inf, "c = inf")],
)  # fmt: skip
def test_numbers_outside_the_domain_are_named(p: float, b: float, c: float, named: str) -> None:
    with pytest.raises(UserError, match=named):
        threshold(p, b, c)


@pytest.mark.parametrize("strength", [1.0, 0.5, inf, float("nan")])
def test_a_strength_that_has_no_largest_p_is_named(strength: float) -> None:
    with pytest.raises(UserError, match=f"lambda = {strength}"):
        largest_p(strength, 0.5, 5)


def test_descent_on_the_extrapolated_target_settles_at_the_fixed_point() -> None:
    """Student logit x, target p^1.3 / b^.3 normalised: d KL(student || target) / dx = q (1 - q) (x - target logit)."""
    kept, other = 0.9**1.3 * 0.6**-0.3, 0.1**1.3 * 0.4**-0.3
    x = log(0.6 / 0.4)
    for _ in range(4000):
        q = 1 / (1 + exp(-x))
        x -= 0.1 * q * (1 - q) * (x - log(kept / other))
    assert 1 / (1 + exp(-x)) == pytest.approx(0.939046, abs=1e-6)
    assert fixed_point(0.9, 0.6, 1.3) == pytest.approx(0.939046, abs=1e-6)


def measured(points: Mapping[str, tuple[float, ...]], *, b: float = 0.5, hits: int = 40) -> dict[Measurement, Reading]:
    return {
        Measurement("contract", ratio): {name: ContractPoint(row[place], b, hits) for name, row in points.items()}
        for place, ratio in enumerate(GRID)
    }


def meter(points: Mapping[str, tuple[float, ...]], **options: Any) -> CliffMeter:
    found = CliffMeter(CliffConfig(min_hits=32), 5.0)
    found.observe(Observation(0, measured=measured(points, **options)))
    return found


def test_the_closed_form_ratio_by_hand() -> None:
    """p = (.99, .995, .994, .999, .9995), b .5, c 5, lambda 1.25 gives .681982."""
    assert meter({"eos": RISING}).largest_ratio(1.25, 0.0, 1.0) == pytest.approx(0.681982, abs=1e-6)


def test_a_dip_is_fitted_away_on_logits() -> None:
    fitted = contract_class("eos", {ratio: ContractPoint(p, 0.5, 9) for ratio, p in zip(GRID, RISING, strict=True)})
    middle = 0.5 * (log(0.995 / 0.005) + log(0.994 / 0.006))
    assert fitted.logit_p[1] == fitted.logit_p[2] == pytest.approx(middle)
    assert fitted.p(0.125) == pytest.approx(1 / (1 + 2.718281828459045 ** -(0.5 * (log(99) + middle))))


def test_several_classes_the_most_careful_wins_and_bounds_hold() -> None:
    both = meter({"eos": RISING, "box": (0.9,) * 5})
    assert both.largest_ratio(1.25, 0.0, 1.0) == pytest.approx(0.681982, abs=1e-6)
    assert both.threshold(1.0) == pytest.approx(threshold(0.9995, 0.5, 5))
    assert meter({"eos": (0.9995,) * 5}).largest_ratio(1.25, 0.1, 0.9) == 0.1
    assert meter({"eos": (0.9,) * 5}).largest_ratio(1.25, 0.1, 0.9) == 0.9
    assert meter({"eos": RISING}).largest_ratio(1.25, 0.0, 0.5) == 0.5


def test_classes_with_few_positions_are_counted_but_not_used() -> None:
    few = meter({"eos": RISING}, hits=31)
    assert few.threshold(1.0) == inf
    assert few.metrics(1.0) == {"cliff/classes": 0.0, "cliff/thin_classes": 1.0, "cliff/stale_classes": 0.0}
    assert few.largest_ratio(1.25, 0.0, 1.0) == 1.0


@pytest.mark.parametrize("place", range(5))
def test_one_ratio_with_few_positions_is_enough_to_leave_a_class_out(place: int) -> None:
    grid = measured({"eos": RISING, "box": RISING}, hits=32)
    grid[Measurement("contract", GRID[place])] = {
        "eos": ContractPoint(0.99, 0.5, 31), "box": ContractPoint(RISING[place], 0.5, 32)
    }  # fmt: skip
    found = CliffMeter(CliffConfig(min_hits=32), 5.0)
    found.observe(Observation(0, measured=grid))
    assert found.metrics(0.0)["cliff/classes"] == found.metrics(0.0)["cliff/thin_classes"] == 1.0
    assert "cliff/p/box" in found.metrics(0.0)


def test_the_base_is_the_mean_of_its_logits_over_the_grid() -> None:
    bases = (0.2, 0.5, 0.9, 0.5, 0.5)
    grid = {
        Measurement("contract", ratio): {"eos": ContractPoint(0.99, b, 40)}
        for ratio, b in zip(GRID, bases, strict=True)
    }
    found = CliffMeter(CliffConfig(), 5.0)
    found.observe(Observation(0, measured=grid))
    mean = (log(0.2 / 0.8) + log(0.9 / 0.1)) / 5  # the other three logits are 0
    assert found.metrics(1.0)["cliff/b/eos"] == pytest.approx(1 / (1 + exp(-mean)))
    assert found.metrics(1.0)["cliff/b/eos"] != pytest.approx(sum(bases) / 5, abs=1e-3)


def test_a_class_that_occurs_at_some_ratios_only_is_fitted_on_those() -> None:
    grid = measured({"eos": RISING})
    for ratio in (0.25, 0.75):
        grid[Measurement("contract", ratio)] = {}
    del grid[Measurement("contract", 0.5)]
    found = CliffMeter(CliffConfig(), 5.0)
    found.observe(Observation(0, measured=grid))
    middle = 0.5 * (log(0.99 / 0.01) + log(0.9995 / 0.0005))
    assert found.metrics(0.5)["cliff/p/eos"] == pytest.approx(1 / (1 + exp(-middle)))


def test_losing_the_form_does_not_lift_the_bound() -> None:
    known = meter({"eos": RISING})
    least = known.threshold(1.0)
    known.observe(Observation(25, measured=measured({"eos": (0.6,) * 5}, hits=31)))
    assert known.threshold(1.0) == least
    assert known.metrics(1.0)["cliff/stale_classes"] == 1.0
    known.observe(Observation(50))
    assert known.threshold(1.0) == least
    known.observe(Observation(75, measured=measured({"eos": (0.6,) * 5})))
    assert known.threshold(1.0) > least
    assert known.metrics(1.0)["cliff/stale_classes"] == 0.0


def test_metrics_say_what_the_threshold_is_made_of() -> None:
    numbers = meter({"eos": RISING, "box": (0.3,) * 5}).metrics(0.75)
    assert numbers["cliff/lambda_star"] == pytest.approx(threshold(0.999, 0.5, 5))
    assert numbers["cliff/p/eos"] == pytest.approx(0.999)
    assert numbers["cliff/b/eos"] == pytest.approx(0.5)
    assert numbers["cliff/teacher_not_above_base/box"] == 1.0
    assert numbers["cliff/teacher_not_above_base/eos"] == 0.0


def test_a_meter_asks_on_its_cadence_ignores_other_steps_and_is_restored_from_json() -> None:
    config = CliffConfig(every=10, grid=(0.0, 1.0))
    asked = CliffMeter(config, 5.0)
    assert [m.key for m in asked.wants(20)] == ["contract@0.0", "contract@1.0"]
    assert asked.wants(21) == []
    known = meter({"eos": RISING})
    known.observe(Observation(1, measured=measured({"eos": (0.6,) * 5})))
    assert known.threshold(1.0) == pytest.approx(threshold(0.9995, 0.5, 5))
    other = CliffMeter(CliffConfig(), 5.0)
    other.load_state_dict(json.loads(json.dumps(known.state_dict())))
    assert other.metrics(0.3) == known.metrics(0.3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"contract": {"box": "("}}, "no regular expression"),
        ({"contract": {"eos": "x"}}, "taken by the end token"),
        ({"contract": {}, "eos": False}, "at least one forced form"),
        ({"grid": (1.0, 0.0)}, "ratios that rise"),
        ({"c": 1.0}, "greater than 1"),
    ],
)
def test_sections_that_make_no_sense_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        CliffConfig.model_validate(fields)


@pytest.mark.parametrize("b", [0.5, 0.9, 0.999, 0.9995, 0.99999])
@pytest.mark.parametrize("strength", [1.1, 1.25, 1.5])
def test_a_p_that_saturates_its_clamp_is_as_safe_as_its_threshold_says(b: float, strength: float) -> None:
    """lambda* at 1 - 1e-6: 1.116 at b .5, 1.259 at .9995, so a lambda of 1.25 is safe at the latter only."""
    full = meter({"eos": (1.0,) * 5}, b=b)
    safe = full.threshold(1.0) >= strength
    assert full.largest_ratio(strength, 0.0, 1.0) == float(safe)
    assert full.largest_ratio(strength, 0.2, 0.8) == (0.8 if safe else 0.2)


def test_the_saturated_cases_lie_on_both_sides() -> None:
    assert meter({"eos": (1.0,) * 5}, b=0.9995).largest_ratio(1.25, 0.0, 1.0) == 1.0
    assert meter({"eos": (1.0,) * 5}, b=0.999).largest_ratio(1.25, 0.0, 1.0) == 0.0
    # logit of the largest p at lambda 1.25, b .9995, c 5: 7.6004 + ln 5 / .25 = 14.04 > 13.82 = logit(1 - 1e-6)
    assert log(0.9995 / 0.0005) + log(5) / 0.25 > log((1 - 1e-6) / 1e-6)


@pytest.mark.parametrize(
    ("strength", "b"), [(1.01, 0.5), (1.0 + 1e-9, 0.5), (1.25, 1 - 1e-15), (1e6, 0.999), (1e12, 0.5), (1e12, 1 - 1e-9)]
)
def test_the_largest_p_lies_strictly_between_the_base_and_1(strength: float, b: float) -> None:
    p = largest_p(strength, b, 5)
    assert b < p < 1
