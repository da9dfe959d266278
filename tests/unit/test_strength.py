"""lambda in force: as wanted, or held to the cap that lambda* sets."""

from __future__ import annotations

import json
from dataclasses import replace
from math import inf

import pytest

from atesd.cliff import CliffConfig, threshold
from atesd.facts import RunFacts
from atesd.strength import Constant, Guard, guarded
from atesd.types import ContractPoint, Measurement, Observation

FACTS = RunFacts(strength=1.25, cliff=CliffConfig(every=10, grid=(0.0, 1.0), min_hits=1, kappa=0.8))
LEAST = threshold(0.999, 0.5, 5.0)  # 1.233 at ratio 1; at ratio 0 it is 1.771
KNOWN = Observation(
    0,
    measured={
        Measurement("contract", 0.0): {"eos": ContractPoint(0.9, 0.5, 9)},
        Measurement("contract", 1.0): {"eos": ContractPoint(0.999, 0.5, 9)},
    },
)


def guard(*, always: bool, run: RunFacts = FACTS) -> Guard:
    found = Guard(run, always=always)
    found.observe(KNOWN)
    return found


def test_a_constant_is_what_the_target_wants() -> None:
    constant = Constant(FACTS)
    assert [constant.at(ratio, capped=capped) for ratio in (0.0, 1.0) for capped in (False, True)] == [1.25] * 4
    assert list(constant.wants(0)) == []
    assert (constant.metrics(), constant.state_dict()) == ({}, {})


def test_the_cap_goes_a_share_of_the_way_to_lambda_star() -> None:
    cap = pytest.approx(1 + 0.8 * (LEAST - 1))
    assert guard(always=True).at(1.0, capped=False) == cap
    assert guard(always=True).at(1.0, capped=True) == cap
    assert guard(always=False).at(1.0, capped=True) == cap
    assert guard(always=False).at(1.0, capped=False) == 1.25, "nobody asked for the cap"
    assert guard(always=True).at(0.0, capped=True) == 1.25, "it is below the cap"


def test_the_clip_of_the_run_is_the_c_of_lambda() -> None:
    found = guard(always=True, run=replace(FACTS, c=2.0))
    assert found.at(1.0, capped=False) == pytest.approx(1 + 0.8 * (threshold(0.999, 0.5, 2.0) - 1))


def test_without_a_known_class_nothing_is_capped() -> None:
    unknown = Guard(FACTS, always=True)
    unknown.observe(Observation(0))
    assert unknown.at(1.0, capped=True) == 1.25
    assert "cliff/lambda_star" not in unknown.metrics()
    assert unknown.metrics()["cliff/classes"] == 0.0


def test_it_logs_lambda_star_at_the_latest_exposure_and_lambda_once_there_is_one() -> None:
    found = guard(always=True)
    assert found.metrics()["cliff/lambda_star"] == pytest.approx(LEAST), "before the first step, at full exposure"
    assert "cliff/lambda" not in found.metrics()
    found.at(0.0, capped=False)
    assert found.metrics()["cliff/lambda_star"] == pytest.approx(threshold(0.9, 0.5, 5.0))
    assert found.metrics()["cliff/lambda"] == 1.25
    assert found.metrics()["cliff/p/eos"] == pytest.approx(0.9)


def test_it_asks_on_the_meters_cadence() -> None:
    found = guard(always=False)
    assert [measurement.key for measurement in found.wants(20)] == ["contract@0.0", "contract@1.0"]
    assert list(found.wants(21)) == []


def test_a_guard_is_restored_with_its_curve() -> None:
    found = guard(always=True)
    for ratio in (0.3, 0.9):
        again = Guard(FACTS, always=True)
        again.load_state_dict(json.loads(json.dumps(found.state_dict())))
        assert again.metrics() == found.metrics()
        assert again.at(ratio, capped=False) == found.at(ratio, capped=False)
    assert again.state_dict() == found.state_dict()


def test_guarding_by_hand() -> None:
    assert guarded(1.5, 1.2, 0.9) == pytest.approx(1.18)
    assert guarded(1.1, 1.2, 0.9) == 1.1
    assert guarded(1.5, inf, 0.9) == 1.5
