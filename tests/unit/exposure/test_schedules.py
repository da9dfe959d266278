from __future__ import annotations

import json

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from atesd.exposure.controller import Controller
from atesd.exposure.schedules import Cosine, Fixed, Linear, Steps, Uniform
from atesd.facts import RunFacts
from atesd.kinds import ExposureSection
from atesd.seeds import derive_seed
from atesd.types import Observation

SECTION: TypeAdapter[ExposureSection] = TypeAdapter(ExposureSection)


def ratios(controller: Controller, steps: int) -> list[float]:
    found = []
    for step in range(steps):
        first, second = controller.propose(step, ["a", "b"])
        assert first == second
        found.append(first)
        controller.observe(Observation(step + 1, {"route/distil_groups": 1.0}))
    return found


def test_fixed_is_full_exposure_unless_told() -> None:
    assert ratios(Fixed().build(RunFacts(seed=0, total_steps=3)), 2) == [1.0, 1.0]
    assert ratios(Fixed(ratio=0.25).build(RunFacts(seed=0, total_steps=3)), 2) == [0.25, 0.25]


def test_linear_reaches_both_ends() -> None:
    assert ratios(Linear(start=1.0, end=0.2).build(RunFacts(seed=0, total_steps=5)), 5) == pytest.approx(
        [1.0, 0.8, 0.6, 0.4, 0.2]
    )
    assert ratios(Linear(start=0.0, end=1.0, steps=3).build(RunFacts(seed=0, total_steps=5)), 5) == [
        0.0,
        0.5,
        1.0,
        1.0,
        1.0,
    ]
    assert ratios(Linear(start=0.5, end=1.0).build(RunFacts(seed=0, total_steps=1)), 1) == [0.5]


def test_cosine_by_hand() -> None:
    # end + (start - end) (1 + cos(pi f)) / 2 at f = 0, 1/4, 1/2, 3/4, 1; cos(pi/4) = .70711
    expected = [1.0, 0.1 + 0.9 * 0.8535534, 0.55, 0.1 + 0.9 * 0.1464466, 0.1, 0.1]
    assert ratios(Cosine(start=1.0, end=0.1, steps=5).build(RunFacts(seed=0, total_steps=9)), 6) == pytest.approx(
        expected, abs=1e-7
    )


def test_steps_change_at_their_boundaries() -> None:
    assert ratios(Steps(values=(1.0, 0.5, 0.25), boundaries=(2, 3)).build(RunFacts(seed=0, total_steps=5)), 5) == [
        1.0,
        1.0,
        0.5,
        0.25,
        0.25,
    ]


@pytest.mark.parametrize(
    ("section", "match"),
    [
        ({"kind": "fixed", "ratio": 1.5}, "less than or equal to 1"),
        ({"kind": "linear", "start": -0.1}, "greater than or equal to 0"),
        ({"kind": "steps", "values": [1.0, 0.5], "boundaries": []}, "one boundary fewer"),
        ({"kind": "steps", "values": [1.0, 0.5, 0.2], "boundaries": [4, 4]}, "do not rise"),
        ({"kind": "random", "low": 0.6, "high": 0.5}, "swap them"),
        ({"kind": "learned"}, "fixed.*linear.*cosine.*steps.*random.*beta"),
    ],
)
def test_nonsense_is_refused(section: dict[str, object], match: str) -> None:
    with pytest.raises(ValidationError, match=match):
        SECTION.validate_python(section)


@pytest.mark.parametrize(
    "section",
    [
        {"kind": "fixed"},
        {"kind": "linear"},
        {"kind": "cosine"},
        {"kind": "steps", "values": [0.5]},
        {"kind": "random"},
        {"kind": "beta"},
    ],
)
def test_every_kind_builds_a_controller_and_survives_json(section: dict[str, object]) -> None:
    config = SECTION.validate_python(section)
    assert SECTION.validate_json(config.model_dump_json()) == config
    controller = config.build(RunFacts(seed=0, total_steps=10))
    controller.observe(Observation(0))
    assert all(0.0 <= ratio <= 1.0 for ratio in controller.propose(0, ["a"]))


def test_uniform_draws_once_per_window_and_by_seed() -> None:
    drawn = ratios(Uniform(low=0.2, high=0.4, hold=3).build(RunFacts(seed=7, total_steps=12)), 12)
    windows = [drawn[start : start + 3] for start in range(0, 12, 3)]
    assert all(len(set(window)) == 1 for window in windows)
    assert len(set(drawn)) == 4
    assert all(0.2 <= ratio <= 0.4 for ratio in drawn)
    assert drawn == ratios(Uniform(low=0.2, high=0.4, hold=3).build(RunFacts(seed=7, total_steps=12)), 12)
    assert drawn != ratios(Uniform(low=0.2, high=0.4, hold=3).build(RunFacts(seed=8, total_steps=12)), 12)


def test_uniform_draws_from_a_stream_of_the_runs_exposure_seed() -> None:
    random = np.random.default_rng([derive_seed(7, "exposure"), 2])
    expected = [random.uniform(0.2, 0.4) for _ in range(6)]
    assert ratios(Uniform(low=0.2, high=0.4, hold=1).build(RunFacts(seed=7, total_steps=6)), 6) == expected


def test_uniform_covers_its_range() -> None:
    drawn = ratios(Uniform(hold=1).build(RunFacts(seed=0, total_steps=2000)), 2000)
    # mean .5, sd of the mean 1/sqrt(12 * 2000) = .0065
    assert sum(drawn) / 2000 == pytest.approx(0.5, abs=0.026)
    assert min(drawn) < 0.01
    assert max(drawn) > 0.99


def test_uniform_pauses_where_nothing_is_distilled() -> None:
    controller = Uniform(hold=2).build(RunFacts(seed=0, total_steps=9))
    drawn = []
    for step, groups in enumerate([1.0, 0.0, 0.0, 1.0, 1.0]):
        drawn += controller.propose(step, ["a"])
        controller.observe(Observation(step + 1, {"route/distil_groups": groups}))
    assert len(set(drawn[:4])) == 1
    assert drawn[4] != drawn[3]


def test_uniform_resumes_inside_a_window() -> None:
    whole = ratios(Uniform(hold=3).build(RunFacts(seed=1, total_steps=20)), 11)
    for stop in range(11):
        first = Uniform(hold=3).build(RunFacts(seed=1, total_steps=20))
        head = ratios(first, stop)
        second = Uniform(hold=3).build(RunFacts(seed=99, total_steps=20))
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert head + ratios(second, 11 - stop) == whole
