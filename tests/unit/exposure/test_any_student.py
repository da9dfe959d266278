"""Every exposure controller steers a student that has neither tokens nor text: one number, whose loss falls faster at
some ratios than at others. A new controller is driven here as soon as it is in the union.

    loss of an update at ratios a_i:  l -= mean_i speed(a_i),   speed(a) = .02 (1 - |a - best|)
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import pytest
from pydantic import TypeAdapter

from atesd.cliff import CliffConfig
from atesd.exposure.controller import Controller, ExposureMethod
from atesd.facts import RunFacts
from atesd.kinds import ExposureSection
from atesd.types import ContractPoint, Measurement, Observation, Reading

METHODS: dict[str, type[ExposureMethod]] = {
    method.model_fields["kind"].default: method for method in get_args(get_args(ExposureSection)[0])
}
QUICK: dict[str, Any] = {"hold": 1, "look_ahead": 1, "lambda_gt": 0.0, "learning_rate": 0.1, "entropy_coef": 0.0}
# Settings with which a run of 40 steps shows something; a kind without any is driven with its defaults.
SETTINGS: dict[str, dict[str, Any]] = {
    "steps": {"values": [1.0, 0.25], "boundaries": [20]},
    "random": {"hold": 2},
    "beta": QUICK,
    "difficulty": {"policy": QUICK},
    "closed_form": {"hold": 1},
    "paired": {"hold": 1},
    "influence": {"hold": 1},
    "dlr": {"hold": 1},
}
PROBLEMS = ["a", "b", "c", "d"]
RATES = [1.0, 0.5, 0.0, None]
STEPS = 40
FACTS = RunFacts(total_steps=STEPS, problem_ids=PROBLEMS, strength=1.25, cliff=CliffConfig(every=5))


@dataclass(frozen=True)
class Student:
    """A student, and what can be measured of it."""

    best: float
    loss: float = 2.0

    def speed(self, ratio: float) -> float:
        return 0.02 * (1.0 - abs(ratio - self.best))

    def reading(self, measurement: Measurement) -> Reading:
        ratio = measurement.ratio or 0.0
        match measurement.kind:
            case "virtual_nll":
                return self.loss - self.speed(ratio)
            case "influence":
                return self.speed(ratio)
            case (
                "reward_influence_by_level" | "probe_influence_by_level"
            ):  # two folds, whose errors are no one's friend
                return {f"/{fold}": self.speed(ratio) + (0.001, -0.001)[fold] * (1 + ratio) for fold in (0, 1)}
            case "contract":  # lambda* falls with the ratio: 2.7 at 0, 1.2 at 1
                return {"form": ContractPoint(0.7 + 0.2995 * ratio, 0.5, 99)}
            case "reference_nll":
                return {problem: float(place) for place, problem in enumerate(PROBLEMS)}
            case _:
                return self.loss

    def update(self, ratios: Sequence[float]) -> Student:
        return replace(self, loss=self.loss - sum(map(self.speed, ratios)) / len(ratios))


def build(kind: str, **facts: Any) -> Controller:
    section = TypeAdapter(ExposureSection).validate_python({"kind": kind, **SETTINGS.get(kind, {})})
    return section.build(replace(FACTS, **facts))


def advance(
    controller: Controller, student: Student, step: int, stats: dict[str, float]
) -> tuple[list[float], Student]:
    """Measure, propose, update once."""
    measured = {measurement: student.reading(measurement) for measurement in controller.wants(step)}
    controller.observe(Observation(step, stats, measured))
    ratios = list(controller.propose(step, PROBLEMS, RATES))
    return ratios, student.update(ratios)


def stats_of(student: Student) -> dict[str, float]:
    return {"loss/distil": student.loss, "route/distil_groups": 4.0, "reward/mean": 0.5}


def run(controller: Controller, student: Student, first: int = 0) -> list[list[float]]:
    """Return the ratios of all steps from `first` on."""
    rows = []
    for step in range(first, STEPS):
        ratios, student = advance(controller, student, step, stats_of(student) if step else {})
        rows.append(ratios)
    return rows


@pytest.mark.parametrize("kind", METHODS)
def test_every_controller_steers_it_and_resumes_exactly(kind: str) -> None:
    controller, student = build(kind), Student(best=0.3)
    for step in range(STEPS // 2):
        ratios, student = advance(controller, student, step, stats_of(student) if step else {})
        assert len(ratios) == len(PROBLEMS)
        assert all(0.0 <= ratio <= 1.0 for ratio in ratios)
    again = build(kind, seed=99)
    again.load_state_dict(json.loads(json.dumps(controller.state_dict(), allow_nan=False)))
    assert again.metrics() == controller.metrics()
    rest = run(controller, student, STEPS // 2)
    assert run(again, student, STEPS // 2) == rest
    assert again.metrics() == controller.metrics()
    assert again.state_dict() == controller.state_dict()
    assert all(0.0 <= ratio <= 1.0 for ratios in rest for ratio in ratios)


def settled(kind: str, **student: float) -> float:
    """Return the mean ratio of the last ten steps over three seeds."""
    rows = [row for seed in range(3) for row in run(build(kind, seed=seed), Student(**student))[-10:]]
    return sum(map(sum, rows)) / (len(rows) * len(PROBLEMS))


@pytest.mark.parametrize(
    "kind", [kind for kind, method in METHODS.items() if method.measured and not method.reads_lambda]
)
def test_a_learned_one_moves_to_where_the_loss_falls_faster(kind: str) -> None:
    assert settled(kind, best=0.0) < 0.45
    assert settled(kind, best=1.0) > 0.55


@pytest.mark.parametrize("kind", [kind for kind, method in METHODS.items() if not method.measured])
def test_one_that_is_not_learned_asks_for_nothing_and_does_not_care(kind: str) -> None:
    assert run(build(kind), Student(best=0.0)) == run(build(kind), Student(best=1.0))
    assert all(not build(kind).wants(step) for step in range(STEPS))


@pytest.mark.parametrize("kind", [kind for kind, method in METHODS.items() if method.reads_lambda])
def test_one_that_reads_lambda_shows_less_where_more_is_asked_of_the_target(kind: str) -> None:
    found = [run(build(kind, strength=strength), Student(best=0.0))[-1] for strength in (1.2, 1.5, 2.0)]
    assert found == sorted(found, reverse=True)
    assert found[0] > found[1] > found[2]
