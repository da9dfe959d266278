"""Controllers beyond the Beta policy: closed form, influence, paired, difficulty."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from atesd.cliff import CliffConfig
from atesd.exposure.beta_controller import BetaConfig, BetaController
from atesd.exposure.controller import Controller
from atesd.exposure.influence import mixed_ratio
from atesd.facts import RunFacts
from atesd.kinds import ExposureSection
from atesd.seeds import derive_seed
from atesd.types import ContractPoint, Measurement, Observation

from support.exposure_toy import seen

GRID = (0.0, 0.25, 0.5, 0.75, 1.0)
FACTS = RunFacts(seed=6, total_steps=40, strength=1.25, cliff=CliffConfig(every=4))


def build(**fields: Any) -> Controller:
    return TypeAdapter(ExposureSection).validate_python(fields).build(FACTS)


def restored(controller: Controller, **fields: Any) -> Controller:
    again = build(**fields)
    again.load_state_dict(json.loads(json.dumps(controller.state_dict())))
    return again


def ratio(controller: Controller, step: int) -> float:
    first, second = controller.propose(step, ["a", "b"])
    assert first == second
    return first


def measured(kind: str, values: Mapping[float, float]) -> dict[Measurement, float]:
    return {Measurement(kind, ratio): value for ratio, value in values.items()}


def contract(step: int, *points: float) -> Observation:
    found = {
        Measurement("contract", at): {"eos": ContractPoint(p, 0.5, 40)} for at, p in zip(GRID, points, strict=True)
    }
    return Observation(step, measured=found)


def test_closed_form_reads_the_largest_safe_ratio_at_each_window() -> None:
    fields = {"kind": "closed_form", "hold": 2}
    controller = build(**fields)
    assert [m.key for m in controller.wants(4)] == [f"contract@{at!r}" for at in GRID]
    assert controller.wants(5) == []
    controller.observe(contract(0, 0.99, 0.995, 0.994, 0.999, 0.9995))
    assert ratio(controller, 0) == pytest.approx(0.681982, abs=1e-6)
    controller.observe(Observation(1))
    assert ratio(controller, 1) == pytest.approx(0.681982, abs=1e-6)
    again = restored(controller, **fields)
    for held in (controller, again):
        held.observe(Observation(2))
        held.observe(Observation(3))
        held.observe(contract(4, *(0.9995,) * 5))
        assert ratio(held, 4) == 0.0, "no ratio is safe: the least"
    assert controller.metrics()["cliff/lambda_star"] < 1.25


def test_closed_form_without_a_measurement_shows_the_most_and_says_so() -> None:
    controller = build(kind="closed_form", high=0.8)
    controller.observe(Observation(0))
    assert ratio(controller, 0) == 0.8
    assert controller.metrics()["cliff/classes"] == 0.0


def test_closed_form_says_what_holds_at_its_largest_ratio_before_the_first_window() -> None:
    controller = build(kind="closed_form", high=0.75)
    controller.observe(contract(0, 0.99, 0.995, 0.994, 0.999, 0.9995))
    assert controller.metrics()["cliff/p/eos"] == pytest.approx(0.999)


def test_closed_form_keeps_its_ratio_to_the_end_of_its_window_whatever_is_measured() -> None:
    controller = build(kind="closed_form", hold=3)
    controller.observe(contract(0, *(0.9,) * 5))
    drawn = [ratio(controller, 0)]
    for step in range(1, 7):
        controller.observe(contract(step, *(0.9995,) * 5) if step == 4 else Observation(step))
        drawn.append(ratio(controller, step))
    assert drawn == [1.0] * 6 + [0.0], "windows begin at 0, 3, 6; it was measured at 4"


def test_influence_mixes_the_grid_by_standardised_credit() -> None:
    # credits (0, 1): z = (-1, 1), weights e^-2, e^2 at temperature .5
    assert mixed_ratio([0.0, 1.0], (0.0, 1.0), 0.5) == pytest.approx(1 / (1 + 2.718281828459045**-4))
    assert mixed_ratio([0.3, 0.3], (0.2, 0.6), 0.5) == pytest.approx(0.4)
    assert mixed_ratio([1e-9, 2e-9, 1e-9], (0.0, 0.5, 1.0), 0.1) == pytest.approx(0.5, abs=1e-6)


def test_influence_asks_at_window_ends_and_averages_credits() -> None:
    fields: dict[str, Any] = {"kind": "influence", "hold": 2, "grid": [0.0, 1.0], "start": 0.3, "decay": 0.5}
    fields["temperature"] = 0.5
    controller = build(**fields)
    controller.observe(Observation(0))
    assert controller.wants(0) == []
    assert ratio(controller, 0) == 0.3
    assert controller.wants(1) == []
    controller.observe(Observation(1, measured=measured("influence", {0.0: 9.0, 1.0: -9.0})))
    assert ratio(controller, 1) == 0.3, "credits that were not asked for are ignored"
    assert [m.key for m in controller.wants(2)] == ["influence@0.0", "influence@1.0"]
    controller.observe(Observation(2, measured=measured("influence", {0.0: 0.1, 1.0: 0.5})))
    assert ratio(controller, 2) == pytest.approx(mixed_ratio([0.1, 0.5], (0.0, 1.0), 0.5))
    again = restored(controller, **fields)
    for held in (controller, again):
        held.observe(Observation(3))
        held.observe(Observation(4, measured=measured("influence", {0.0: 0.9, 1.0: 0.1})))
        assert held.metrics() == pytest.approx({"exposure/credit/0": 0.5, "exposure/credit/1": 0.3})
        assert ratio(held, 4) < 0.1


def test_influence_keeps_its_ratio_where_a_credit_is_missing_and_says_so() -> None:
    controller = build(kind="influence", hold=1, grid=[0.0, 1.0])
    controller.observe(Observation(0))
    ratio(controller, 0)
    controller.observe(Observation(1, measured=measured("influence", {0.0: 0.1})))
    assert controller.metrics() == {"exposure/discarded": 1.0}
    assert ratio(controller, 1) == 0.5


def test_influence_does_not_count_a_credit_as_missing_where_nothing_was_distilled() -> None:
    controller = build(kind="influence", hold=1, grid=[0.0, 1.0])
    controller.observe(Observation(0))
    ratio(controller, 0)
    controller.observe(Observation(1, {"route/distil_groups": 0.0}))
    assert controller.metrics() == {}


def test_a_step_without_a_distilled_group_does_not_count() -> None:
    for kind in ("closed_form", "influence", "paired"):
        controller = build(kind=kind, hold=2)
        controller.observe(Observation(0))
        controller.propose(0, ["a"])
        for step in (1, 2, 3):
            controller.observe(Observation(step, {"route/distil_groups": 0.0, "route/paused": 1.0}))
        assert controller.state_dict()["held"] == 0, kind
        controller.observe(Observation(4, {"route/distil_groups": 0.0, "route/paused": 0.0}))
        assert controller.state_dict()["held"] == 1, "a router that reads the exposure must see it move"


@pytest.mark.parametrize("kind", ["influence", "paired"])
def test_a_paused_step_where_a_window_could_end_moves_nothing(kind: str) -> None:
    """It is asked about again and again until a step counts, and only then acts."""
    controller = build(kind=kind, hold=1)
    controller.observe(Observation(0))
    controller.propose(0, ["a"])
    before = controller.state_dict()
    for step in (1, 2, 3):
        values = {measurement: 1.0 + place for place, measurement in enumerate(controller.wants(step))}
        assert values
        controller.observe(Observation(step, {"route/idle": 1.0, "route/paused": 1.0}, values))
        assert controller.state_dict() == before
    values = {measurement: 1.0 + place for place, measurement in enumerate(controller.wants(4))}
    controller.observe(Observation(4, {"route/idle": 0.0, "route/paused": 0.0}, values))
    assert controller.state_dict() != before
    assert "exposure/discarded" not in controller.metrics()


def test_paired_climbs_the_difference_of_both_sides() -> None:
    fields: dict[str, Any] = {"kind": "paired", "hold": 1, "start": 0.5, "delta": 0.2, "rate": 0.1}
    controller = build(**fields)
    controller.observe(Observation(0))
    assert ratio(controller, 0) == 0.5
    assert [m.key for m in controller.wants(1)] == ["virtual_nll@0.3", "virtual_nll@0.7"]
    # more exposure lowers the NLL: credit (2 - 1.9) / .4 = .25, and the first credit is its own scale
    controller.observe(Observation(1, measured=measured("virtual_nll", {0.3: 2.0, 0.7: 1.9})))
    assert controller.metrics() == pytest.approx({"exposure/paired_credit": 0.25})
    assert ratio(controller, 1) == pytest.approx(0.6)
    again = restored(controller, **fields)
    for held in (controller, again):
        low, high = (m.ratio for m in held.wants(2))
        assert (low, high) == pytest.approx((0.4, 0.8))
        held.observe(Observation(2, measured=measured("virtual_nll", {low: 1.9, high: 1.95})))  # type: ignore[dict-item]
        # credit -.125 over the root mean square sqrt((.25^2 + .125^2) / 2) = .19764
        assert ratio(held, 2) == pytest.approx(0.6 - 0.1 * 0.125 / 0.197642, abs=1e-5)


def test_paired_stays_within_its_bounds_and_keeps_its_ratio_without_a_measurement() -> None:
    controller = build(kind="paired", hold=1, start=0.95, high=1.0, rate=0.2)
    controller.observe(Observation(0))
    ratio(controller, 0)
    low, high = (m.ratio for m in controller.wants(1))
    assert high == 1.0
    controller.observe(Observation(1, measured=measured("virtual_nll", {low: 2.0, high: 1.0})))  # type: ignore[dict-item]
    assert ratio(controller, 1) == 1.0
    controller.observe(Observation(2))
    assert controller.metrics() == {"exposure/discarded": 1.0}
    assert ratio(controller, 2) == 1.0


def test_difficulty_gives_each_bin_its_own_policy() -> None:
    controller = build(kind="difficulty", bins=3)
    controller.observe(seen(0, measured={"probe_nll": 1.0}))
    easy, medium, hard, unknown = controller.propose(0, ["a", "b", "c", "d"], [1.0, 0.5, 0.0, None])
    assert len({easy, medium, hard}) == 3
    assert unknown == medium
    metrics = controller.metrics()
    assert [metrics[f"exposure/bin{number}/share"] for number in range(3)] == [0.25, 0.5, 0.25]
    assert {f"exposure/bin{number}/ka" for number in range(3)} <= set(metrics)
    again = build(kind="difficulty", bins=3)
    again.load_state_dict(json.loads(json.dumps(controller.state_dict())))
    assert again.propose(0, ["a", "b"], [1.0, 0.0]) == [easy, hard]


def test_each_bin_draws_from_a_stream_of_its_own() -> None:
    controller = build(kind="difficulty", bins=3)
    controller.observe(seen(0, measured={"probe_nll": 1.0}))
    drawn = controller.propose(0, ["a", "b", "c"], [1.0, 0.5, 0.0])
    for number, ratio in enumerate(drawn):
        part = BetaController(BetaConfig(), 40, derive_seed(6, "exposure") + 1000 * (number + 1), True)
        part.observe(seen(0, measured={"probe_nll": 1.0}))
        assert part.propose(0, ["a"]) == [ratio]


@pytest.mark.parametrize("bins", [2, 3, 4])
def test_bins_by_pass_rate_are_equal_parts_and_the_first_is_easiest(bins: int) -> None:
    controller = build(kind="difficulty", bins=bins)
    controller.observe(seen(0, measured={"probe_nll": 1.0}))
    rates: list[float | None] = [1.0 - (number + 0.5) / bins for number in range(bins)]
    ratios = list(controller.propose(0, [""] * bins, rates))
    assert len(set(ratios)) == bins
    # rewards outside [0, 1] belong to the ends; unknown difficulty is the middle one
    ends = controller.propose(0, [""] * 5, [1.0, 7.0, 0.0, -3.0, None])
    assert list(ends) == [ratios[0], ratios[0], ratios[-1], ratios[-1], ratios[bins // 2]]
    assert controller.metrics()["exposure/bin0/share"] == 2 / 5


def test_every_bin_has_its_pass_rates_whatever_floats_make_of_them() -> None:
    """Of five attempts each number of right ones is a bin of its own, but for all and none but one."""
    controller = build(kind="difficulty", bins=5)
    controller.observe(seen(0, measured={"probe_nll": 1.0}))
    ratios = list(controller.propose(0, [""] * 6, [right / 5 for right in range(5, -1, -1)]))
    assert len(set(ratios[:5])) == 5
    assert ratios[4] == ratios[5]


def test_a_teacher_who_changes_is_measured_for_every_bin() -> None:
    for frozen, grounded in ((True, True), (False, False)):
        run = RunFacts(teacher_frozen=frozen)
        wanted = TypeAdapter(ExposureSection).validate_python({"kind": "difficulty"}).build(run).wants(0)
        assert any(measurement.kind == "gt_solution" for measurement in wanted) is grounded


def test_difficulty_by_perplexity_cuts_at_quantiles_of_the_references() -> None:
    controller = build(kind="difficulty", by="reference_ppl")
    assert Measurement("reference_nll") in controller.wants(0)
    assert Measurement("reference_nll") not in controller.wants(1)
    nll = {name: float(place) for place, name in enumerate("abcdef")}
    controller.observe(Observation(0, measured={Measurement("probe_nll"): 1.0, Measurement("reference_nll"): nll}))
    ratios = controller.propose(0, [*"abcdef", "new"])
    assert ratios[0] == ratios[1] != ratios[2] == ratios[3] != ratios[4] == ratios[5]
    easiest = BetaController(BetaConfig(), 40, derive_seed(6, "exposure") + 1000, True)
    easiest.observe(seen(0, measured={"probe_nll": 1.0}))
    assert [ratios[0]] == easiest.propose(0, ["a"]), "low perplexity is easy: the first bin"
    assert ratios[6] == ratios[2]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "closed_form", "low": 0.8, "high": 0.2}, "swap them"),
        ({"kind": "influence", "grid": [0.5]}, "at least two ratios"),
        ({"kind": "influence", "grid": [1.0, 0.0]}, "rising"),
        ({"kind": "paired", "start": 0.9, "high": 0.5}, "outside"),
        ({"kind": "difficulty", "bins": 1}, "greater than or equal to 2"),
        ({"kind": "paired", "low": 0.8, "high": 0.2}, "swap them"),
    ],
)
def test_sections_that_make_no_sense_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TypeAdapter(ExposureSection).validate_python(fields)


def test_influence_takes_no_credit_before_the_first_update() -> None:
    """At step 0 nothing was distilled: numbers that another policy had measured are none of its business."""
    made = TypeAdapter(ExposureSection).validate_python({"kind": "influence", "grid": [0.0, 1.0]}).build(RunFacts())
    measured = {Measurement("influence", 0.0): -0.5, Measurement("influence", 1.0): 0.5}
    assert made.wants(0) == []
    made.observe(Observation(0, {}, measured))
    assert made.metrics() == {}
    assert made.state_dict()["credits"] is None
