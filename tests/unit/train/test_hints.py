"""From routed groups to rows: components, advantages, weights, views, and what does not fit."""

from __future__ import annotations

from typing import Any

import pytest

from atesd.exposure.prompt import donors
from atesd.facts import RunFacts
from atesd.recipe import build_config
from atesd.rollout.render import Renderer
from atesd.routing.route import Route
from atesd.train.batch import Row
from atesd.train.hints import Hints, refuse_overlong
from atesd.train.outcomes import Outcomes
from atesd.train.rows import Rows
from atesd.types import Group, Problem, StopReason, Trajectory, Turn, UserError

from support.rollouts import byte_tokenizer

SECTIONS: dict[str, Any] = {
    "prompt": {"student": "{problem}", "teacher": "{problem}|{hint}", "answer": " ={answer}"},
    "reveal": {"unit": "line"},
    "rollout": {"max_new_tokens": 10, "group_size": 2},
}
ONE = Problem("one", "first", "l1\nl2", "2")
TWO = Problem("two", "second", "m1\nm2", "4")


def hints(problems: tuple[Problem, ...] = (), **sections: Any) -> Hints:
    config = build_config(SECTIONS | sections)
    shown = donors(problems, 0) if problems else {}
    return Hints(config.prompt, config.reveal.build(RunFacts()), Renderer(byte_tokenizer()), shown)


def maker(**sections: Any) -> Rows:
    config = build_config(SECTIONS | sections)
    return Rows(
        hints(**sections),
        outcomes=Outcomes(1),
        policy=config.rl,
        prompt_weight=config.loss.prompt_weight,
        mask_truncated=config.step.truncated == "mask",
    )


def group(problem: Problem, *rewards: float | None, stop: StopReason = StopReason.EOS, text: str = "") -> Group:
    turn = Turn((1, 2), (3, 4), (-1.0, -2.0), text, stop, 0)
    return Group(problem, tuple(Trajectory((turn,), reward) for reward in rewards))


def rows(
    made: Rows, groups: list[Group], routes: list[Route], views: tuple[Any, ...] = ("teacher",), ratio: float = 0.5
) -> list[Row]:
    return made.build(groups, routes, [ratio] * len(groups), views)


def test_rows_carry_the_components_of_their_route_and_group_relative_advantages() -> None:
    groups = [group(ONE, 1.0, 0.0), group(TWO, 1.0, 0.0), group(ONE, 1.0, 0.0), group(TWO, None, 1.0)]
    found = rows(maker(), groups, [Route.DISTIL, Route.RL, Route.BOTH, Route.SKIP])
    assert [row.components for row in found] == [
        *[("distil",)] * 2,
        *[("rl",)] * 2,
        *[("distil", "rl")] * 2,
        *[()] * 2,
    ]
    assert [row.advantage for row in found] == pytest.approx([0, 0, 1, -1, 1, -1, 0, 0], abs=1e-5)
    assert [row.group for row in found] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert ["teacher" in row.view_prompts for row in found] == [True, True, False, False, True, True, False, False]
    assert found[0].sampler_logprobs == (-1.0, -2.0)


def test_an_ungradable_completion_is_not_reinforced_and_counts_in_no_mean() -> None:
    found = rows(maker(), [group(ONE, None, 1.0, 0.0), group(TWO, None, None)], [Route.BOTH, Route.BOTH])
    assert [row.components for row in found] == [
        ("distil",),
        ("distil", "rl"),
        ("distil", "rl"),
        ("distil",),
        ("distil",),
    ]
    assert [row.advantage for row in found] == pytest.approx([0, 1, -1, 0, 0], abs=1e-5)


def test_groups_of_equal_rewards_can_be_dropped() -> None:
    kept = rows(maker(), [group(ONE, 1.0, 1.0)], [Route.RL])
    assert [row.components for row in kept] == [("rl",)] * 2
    dropped = rows(maker(rl={"zero_variance": "drop"}), [group(ONE, 1.0, 1.0)], [Route.RL])
    assert [row.components for row in dropped] == [()] * 2
    middle = rows(maker(rl={"zero_variance": "drop"}), [group(ONE, 0.0, 0.5, 1.0)], [Route.RL])
    assert [row.components for row in middle] == [("rl",)] * 3, "groups are dropped, not completions of advantage 0"


def test_truncated_completions_are_masked_where_asked_for() -> None:
    cut = [group(ONE, 0.0, 0.0, stop=StopReason.LENGTH)]
    assert rows(maker(), cut, [Route.DISTIL])[0].components == ("distil",)
    assert rows(maker(step={"truncated": "mask"}), cut, [Route.DISTIL])[0].components == ()


def test_paced_weighs_by_p_times_1_minus_p() -> None:
    made = maker(loss={"prompt_weight": "paced"})
    groups = [group(ONE, 1.0, 0.0), group(ONE, 1.0, 1.0, 1.0, 0.0), group(ONE, 0.0, 0.0), group(ONE, None, None)]
    found = rows(made, groups, [Route.DISTIL] * 4)
    assert [row.weight for row in found] == [0.25, 0.25, *[0.1875] * 4, 0.0, 0.0, 0.25, 0.25]
    assert {row.weight for row in rows(maker(), groups, [Route.DISTIL] * 4)} == {1.0}


def test_further_views_have_prompts_of_their_own_and_the_base_reads_the_students() -> None:
    (row, _) = rows(maker(), [group(ONE, 1.0, 0.0)], [Route.DISTIL], ("teacher", "full", "answer", "base"))
    read = hints().teacher_ids
    assert row.view("teacher") == (read(ONE, 0.5), (3, 4))
    assert row.view("full") == (read(ONE, 1.0), (3, 4))
    assert row.view("answer") == (read(ONE, 0.0), (3, 4))
    assert row.view("base") == row.student == ((1, 2), (3, 4))
    assert (row.hint, row.ratio) == ("l1 =2", 0.5)


def test_the_overlap_rule_gives_every_completion_a_ratio_of_its_own() -> None:
    made = maker(reveal={"kind": "overlap", "unit": "line", "n": 1, "extra": 0})
    turns = [Turn((1,), (2,), (-1.0,), text, StopReason.EOS, 0) for text in ("l1", "l1 l2", "other")]
    found = rows(made, [Group(ONE, tuple(Trajectory((turn,), 1.0) for turn in turns))], [Route.DISTIL], ratio=1.0)
    assert [row.ratio for row in found] == [0.5, 1.0, 0.0]
    assert [row.view_prompts["teacher"] for row in found] == [hints().teacher_ids(ONE, r) for r in (0.5, 1.0, 0.0)]


def test_every_turn_is_a_row_and_the_teacher_reads_the_same_conversation_behind_its_hint() -> None:
    """The second turn's prompt is the first one's (1, 2), its completion (3, 4), and the environment's words (5,)."""
    turns = (
        Turn((1, 2), (3, 4), (-1.0, -2.0), "a", StopReason.EOS, 0),
        Turn((1, 2, 3, 4, 5), (6,), (-3.0,), "b", StopReason.EOS, 0),
    )
    played = Group(ONE, (Trajectory(turns, 1.0), Trajectory(turns[:1], 0.0)))
    found = rows(maker(), [played], [Route.BOTH])
    assert [(row.prompt, row.completion, row.group) for row in found] == [
        ((1, 2), (3, 4), 0),
        ((1, 2, 3, 4, 5), (6,), 0),
        ((1, 2), (3, 4), 0),
    ]
    teacher = hints().teacher_ids(ONE, 0.5)
    assert [row.view_prompts["teacher"] for row in found] == [teacher, (*teacher, 3, 4, 5), teacher]
    assert [row.advantage for row in found] == pytest.approx([1, 1, -1], abs=1e-5), "one reward an attempt"
    assert [row.sampler_logprobs for row in found] == [(-1.0, -2.0), (-3.0,), (-1.0, -2.0)]


def test_wrong_problem_shows_the_other_problems_solution() -> None:
    made = hints((ONE, TWO), prompt=SECTIONS["prompt"] | {"hint": "wrong_problem"})
    assert made.hint(ONE, 1.0).text == TWO.solution
    assert made.hint(TWO, 1.0).text == ONE.solution
    assert made.shown(ONE, 1.0).text == ONE.solution, "what is measured of a problem is its own"


def test_problems_that_do_not_fit_with_a_full_completion_are_told_apart_and_named() -> None:
    made = hints()
    room = len(made.teacher_ids(ONE, 1.0)) + len(" ={answer}") + len("2") + 10
    long = Problem("long", "first", "l1\nl2 longer", "2")
    fitting, overlong = made.fitting([ONE, long], room, 10)
    assert [problem.id for problem in fitting] == ["one"]
    assert overlong == ["long"]
    assert made.fitting([ONE, long], None, 10) == ([ONE, long], [])
    with pytest.raises(UserError, match=r"1 problems \(long\) do not fit .* step.overlong = \"drop\""):
        refuse_overlong(overlong, room)
    refuse_overlong([], room)
