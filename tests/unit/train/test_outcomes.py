"""What became of attempts: advantages by hand, which steps are kept, and state."""

from __future__ import annotations

import json

import pytest

from atesd.train.outcomes import Graded, Outcomes, advantages
from atesd.types import Group, Problem, StopReason, Trajectory, Turn


def turn(name: int) -> Turn:
    return Turn((name,), (name, name + 100), (-1.0, -1.0), "", StopReason.EOS, 0)


def group(*rewards: float | None, level: str = "", name: int = 0) -> Group:
    problem = Problem(f"p{name}", "x", "y", level=level)
    attempts = [Trajectory((turn(10 * name + number),), reward) for number, reward in enumerate(rewards)]
    return Group(problem, tuple(attempts))


def kept(outcomes: Outcomes) -> list[tuple[int, float, int]]:
    """Return prompt, advantage and group of what is kept."""
    return [(each.passage.prompt[0], each.advantage, each.group) for each in outcomes.earlier()]


def test_several_attempts_are_compared_with_the_mean_of_the_others() -> None:
    # 1 against (0 + .5) / 2, 0 against (1 + .5) / 2, .5 against 1 / 2
    assert advantages(group(1.0, 0.0, 0.5), expected=9.0) == pytest.approx([0.75, -0.75, 0.0])
    assert advantages(group(1.0, None, 0.5), expected=9.0) == [0.5, None, -0.5], "ungradable attempts are no others"
    assert advantages(group(1.0, 1.0), expected=0.0) == [0.0, 0.0]


def test_a_lone_attempt_is_compared_with_what_is_expected() -> None:
    assert advantages(group(1.0), expected=0.25) == [0.75]
    assert advantages(group(None, 0.0), expected=0.25) == [None, -0.25]
    assert advantages(group(1.0), expected=None) == [None]
    assert advantages(group(None, None), expected=0.5) == [None, None]


def test_the_newest_step_is_not_among_what_is_known() -> None:
    outcomes = Outcomes(2)
    assert outcomes.earlier() == []
    outcomes.add([group(1.0, 0.0, name=1)])
    assert outcomes.earlier() == [], "what is asked about says nothing of itself"
    outcomes.add([group(0.0, 1.0, name=2), group(1.0, None, 0.0, name=3)])
    assert kept(outcomes) == [(10, 1.0, 0), (11, -1.0, 0)]
    outcomes.add([group(1.0, 1.0, name=4)])
    assert kept(outcomes) == [
        (10, 1.0, 0), (11, -1.0, 0), (20, -1.0, 1), (21, 1.0, 1), (30, 1.0, 2), (32, -1.0, 2),
    ]  # fmt: skip
    outcomes.add([group(name=5)])
    assert [name for name, *_ in kept(outcomes)] == [20, 21, 30, 32, 40, 41], "two steps are kept"
    assert outcomes.earlier()[-1] == Graded(outcomes.earlier()[-1].passage, 0.0, 2), "numbered through"


def test_every_turn_of_an_attempt_is_kept() -> None:
    outcomes = Outcomes(1)
    attempts = (Trajectory((turn(1), turn(2)), 1.0), Trajectory((turn(3),), 0.0), Trajectory((turn(4),), None))
    outcomes.add([Group(Problem("p", "x", "y"), attempts)])
    outcomes.add([])
    assert kept(outcomes) == [(1, 1.0, 0), (2, 1.0, 0), (3, -1.0, 0)]
    assert outcomes.earlier()[1].passage == ((2,), (2, 102), None)


def test_running_means_by_level() -> None:
    """Level a: .5 at first, then .9 * .5 + .1 * 1 = .55; level b: 0, seen once."""
    outcomes = Outcomes(5)
    assert outcomes.of(group(1.0, level="a")) == [None]
    first = [group(1.0, level="a", name=1), group(0.0, level="a", name=2), group(0.0, level="b", name=3)]
    outcomes.add(first)
    assert [outcomes.of(each) for each in first] == [[0.5], [-0.5], [0.0]], "the first step has its own mean"
    second = [group(1.0, level="a", name=4)]
    outcomes.add(second)
    assert outcomes.of(second[0]) == [0.5], "the mean before the step"
    assert outcomes.of(group(1.0, level="b")) == [1.0], "a level that the step lacks keeps its mean"
    assert outcomes.of(group(1.0, level="c")) == [None]
    outcomes.add([group(0.0, level="a", name=5), group(None, level="a", name=6), group(None, level="b", name=7)])
    assert outcomes.of(group(0.0, level="a")) == [pytest.approx(-0.55)]
    outcomes.add([group(0.0, level="a"), group(1.0, level="b")])
    # .9 * .55 + .1 * 0 = .495; b: nothing was graded in between
    assert outcomes.of(group(0.0, level="a")) == [pytest.approx(-0.495)]
    assert outcomes.of(group(1.0, level="b")) == [1.0]
    assert kept(outcomes) == [
        (10, 0.5, 0), (20, -0.5, 1), (30, 0.0, 2), (40, 0.5, 3), (50, pytest.approx(-0.55), 4),
    ]  # fmt: skip


def test_a_steps_mean_is_over_all_graded_attempts_of_a_level() -> None:
    """1, 0, 0 and 1: .5, not the mean of the groups' means, which is 2/3."""
    outcomes = Outcomes(1)
    outcomes.add([group(1.0, 0.0, 0.0), group(1.0, None)])
    assert outcomes.of(group(1.0)) == [0.5]


def test_state_goes_through_json() -> None:
    outcomes, again = Outcomes(2), Outcomes(2)
    assert json.loads(json.dumps(outcomes.state_dict())) == {"kept": [], "newest": None, "means": {}}
    outcomes.add([group(1.0, level="a", name=1), group(0.0, level="a", name=2)])
    outcomes.add([group(1.0, 0.0, level="b", name=3)])
    again.add([group(1.0, name=9)])
    again.load_state_dict(json.loads(json.dumps(outcomes.state_dict())))
    for number in range(4, 7):
        step = [group(float(number % 2), level="a", name=number), group(1.0, 0.0, level="b", name=number + 10)]
        for each in (outcomes, again):
            each.add(step)
        assert again.earlier() == outcomes.earlier()
        assert again.of(step[0]) == outcomes.of(step[0])
    assert isinstance(again.earlier()[0].passage.prompt, tuple)
    assert again.state_dict() == outcomes.state_dict()


def test_state_of_a_run_that_has_not_begun_empties_what_was_kept() -> None:
    outcomes = Outcomes(2)
    outcomes.add([group(1.0, 0.0)])
    outcomes.add([group(1.0, 0.0)])
    outcomes.load_state_dict({"kept": [], "newest": None, "means": {}})
    assert outcomes.earlier() == []
    outcomes.add([group(1.0, 0.0)])
    assert outcomes.earlier() == []
