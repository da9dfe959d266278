"""From routed groups to rows: components, advantages, weights, views, and what does not fit."""

from __future__ import annotations

from typing import Any

import pytest

from atesd.exposure.prompt import donors
from atesd.facts import RunFacts
from atesd.losses.target import View
from atesd.recipe import build_config
from atesd.rollout.render import Renderer
from atesd.routing.route import Route
from atesd.train.batch import Passage, Row
from atesd.train.hints import Hints, places, refuse_overlong
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


def test_all_prompts_of_a_step_are_rendered_in_one_batch_and_each_row_has_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two attempts at a problem read the same; what is not distilled asks for nothing."""
    tokenizer = byte_tokenizer()
    config = build_config(SECTIONS)
    made = Rows(
        Hints(config.prompt, config.reveal.build(RunFacts()), Renderer(tokenizer), {}),
        outcomes=Outcomes(1),
        policy=config.rl,
    )
    calls = []
    apply = tokenizer.apply_chat_template
    monkeypatch.setattr(
        tokenizer, "apply_chat_template", lambda asked, **options: calls.append(len(asked)) or apply(asked, **options)
    )
    groups, routes = [group(each, 1.0, 0.0) for each in (ONE, TWO, ONE)], [Route.BOTH, Route.DISTIL, Route.RL]
    found = made.build(groups, routes, [0.5, 0.0, 1.0], ("teacher", "full"))
    assert calls == [4], "two problems, at their ratio and whole"
    read = hints().teacher_ids
    for row, problem, ratio in zip(found, [ONE, ONE, TWO, TWO], [0.5, 0.5, 0.0, 0.0], strict=False):
        assert row.view_prompts == {"teacher": read(problem, ratio), "full": read(problem, 1.0)}
        assert (row.hint, row.ratio) == (hints().hint(problem, ratio).text, ratio)
    assert [dict(row.view_prompts) for row in found[4:]] == [{}, {}]
    assert [row.ratio for row in found[4:]] == [1.0, 1.0]
    made.build(groups, routes, [0.5, 0.5, 1.0], ("teacher", "full"))
    assert calls == [4, 1], "only the second problem's at another ratio is new"


def test_every_view_reads_what_the_environment_said_first_in_its_own_attempt() -> None:
    turn = Turn((1, 2), (3, 4), (), "", StopReason.EOS, 0)
    attempts = tuple(Trajectory((turn,), 1.0, opening=each) for each in (" left", "", " right"))
    found = rows(maker(), [Group(ONE, attempts)], [Route.DISTIL], ("teacher", "full"))
    renderer = Renderer(byte_tokenizer())
    for row, opening in zip(found, (" left", "", " right"), strict=True):
        texts: dict[View, str] = {"teacher": "l1 =2", "full": "l1\nl2"}
        for view, hint in texts.items():
            text = renderer.prompt_text(row.view_prompts[view])
            assert text == f"<|im_start|>user\nfirst|{hint}{opening}<|im_end|>\n<|im_start|>assistant\n"


def test_further_views_have_prompts_of_their_own_and_the_base_reads_the_students() -> None:
    (row, _) = rows(maker(), [group(ONE, 1.0, 0.0)], [Route.DISTIL], ("teacher", "full", "answer", "base"))
    read = hints().teacher_ids
    assert row.view("teacher") == Passage(read(ONE, 0.5), (3, 4))
    assert row.view("full") == Passage(read(ONE, 1.0), (3, 4))
    assert row.view("answer") == Passage(read(ONE, 0.0), (3, 4))
    assert row.view("base") == row.student == Passage((1, 2), (3, 4))
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


RANDOM = {"unit": "token", "order": "random_segments", "hidden_marker": "[...]"}


@pytest.mark.parametrize("reveal", [{"unit": "line"}, {"unit": "line", "hidden_marker": "[...]"}, RANDOM])
@pytest.mark.parametrize("hint", ["solution", "wrong_problem"])
@pytest.mark.parametrize("words", [1, 2, 9, 26])
def test_no_hint_at_any_ratio_is_longer_than_what_is_said_beforehand(
    reveal: dict[str, str], hint: str, words: int
) -> None:
    problem = Problem("wordy", "first", " ".join("abcdefghijklmnopqrstuvwxyz"[:words]), "2")
    other = Problem("other", "second", "m1\nm2", "4" * 50)
    prompt = SECTIONS["prompt"] | {"hint": hint}
    made = hints((problem, other) if hint == "wrong_problem" else (), reveal=reveal, prompt=prompt)
    for each in (problem, other):
        lengths = [len(made.teacher_ids(each, place / 60)) for place in range(61)]
        assert max(lengths) <= made.longest(each)
        room = max(lengths) + 9
        assert made.fitting([each], room, 10)[1] == [each.id], "a token less than it needs"
        assert not made.fitting([each], made.longest(each) + 10, 10)[1]


def test_what_fits_by_its_letters_is_not_tokenized_and_what_fits_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    made = hints()
    wide = Problem("wide", "f\u00fcnf", "l1\n" + "\u4e8c" * 9, None)
    problems = [ONE, wide, Problem("answered", "first", "l1\nl2", "2" * 90)]
    needed = {each.id: made.longest(each) for each in problems}
    asked: list[str] = []
    longest = made.longest
    monkeypatch.setattr(made, "longest", lambda each: (asked.append(each.id), longest(each))[1])
    for context in range(10, 600):
        fitting, overlong = made.fitting(problems, context, 10)
        assert {each.id for each in fitting} == {name for name, length in needed.items() if length + 10 <= context}
        assert len(overlong) == len(problems) - len(fitting)
    assert {*asked} == set(needed), "or this shows nothing"
    asked.clear()
    monkeypatch.setattr(made, "student_ids", lambda _: pytest.fail("tokenized"))
    monkeypatch.setattr(made, "teacher_ids", lambda *_: pytest.fail("tokenized"))
    assert made.fitting(problems, 600, 10) == (problems, [])


def test_what_spells_control_tokens_is_tokenized_whatever_its_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some tokenizers cannot, which a run must know when it begins."""
    made = hints()
    spelling = [Problem("p", "a <|im_end|>", "l1", "2"), Problem("s", "a", "<|im_start|>\nl2", "2")]
    asked: list[str] = []
    longest = made.longest
    monkeypatch.setattr(made, "longest", lambda each: (asked.append(each.id), longest(each))[1])
    assert made.fitting([ONE, *spelling], 5000, 10)[1] == []
    assert asked == ["p", "s"]


def test_a_student_longer_than_its_teacher_is_measured_too(monkeypatch: pytest.MonkeyPatch) -> None:
    made = hints(prompt={"student": "{problem}" + "." * 90, "teacher": "{problem}{hint}", "answer": ""})
    student, teacher = len(made.student_ids(ONE)), len(made.teacher_ids(ONE, 1.0))
    assert student > teacher + 50
    for context in (student + 9, student + 10, student + 40):
        assert (made.fitting([ONE], context, 10)[1] == []) == (context >= student + 10)


MASKED: dict[str, Any] = {"kind": "retention", "choose": "prefix"}


def test_a_masked_hint_is_whole_and_its_first_tokens_are_kept() -> None:
    """A token a byte: of the hint's 5 tokens `l1 l2`, with a line end between, ceil(.5 * 5) = 3."""
    hint = hints(reveal=MASKED).hint(ONE, 0.5)
    assert hint.text == "l1\nl2 =2", "the answer stands behind a solution that does not end by stating it"
    assert hint.veil is not None
    read = Renderer(byte_tokenizer()).token_texts(hint.prompt_ids)
    assert "".join(read[hint.veil.start : hint.veil.stop]) == "l1\nl2"
    assert hint.veil[2:] == (3, (0, 1, 2))
    (row, _) = rows(maker(reveal=MASKED), [group(ONE, 1.0, 0.0)], [Route.DISTIL], ("teacher", "full", "answer", "base"))
    assert row.view("teacher") == Passage(hint.prompt_ids, (3, 4), hint.veil)
    assert [row.view(name).veil for name in ("full", "answer", "base")] == [None] * 3


def test_what_a_solution_ends_with_stating_stays_and_its_prompt_is_opsds() -> None:
    """Of `l1 l2`, without the statement, ceil(.25 * 5) = 2 tokens."""
    stating = Problem("stating", "first", "l1\nl2\n=2 .\n", "2")
    made = hints(reveal=MASKED)
    hint = made.hint(stating, 0.25)
    assert hint.text == stating.solution
    assert hint.prompt_ids == made.teacher_ids(stating, 1.0)
    assert hint.veil is not None
    assert hint.veil.stop - hint.veil.start == len("l1\nl2")
    assert hint.veil.keep == 2
    inside = Problem("inside", "first", "l1\n=2 so\nl2", "2")
    assert made.hint(inside, 0.25).text == "l1\n=2 so\nl2 =2"
    assert made.hint(Problem("bare", "first", "=2", "2"), 0.5).veil is None, "nothing is left that could be hidden"


def test_at_both_ends_and_where_the_budget_holds_all_nothing_is_hidden() -> None:
    made, plain = hints(reveal=MASKED), hints()
    for ratio in (0.0, 1.0):
        assert made.hint(ONE, ratio) == plain.hint(ONE, ratio)
    assert made.hint(ONE, 0.81).veil is None  # ceil(.81 * 5) = 5
    assert made.hint(ONE, 0.8).veil is not None


def test_turns_keep_the_veil_of_their_first_prompt() -> None:
    turns = (
        Turn((1, 2), (3,), (-1.0,), "a", StopReason.EOS, 0),
        Turn((1, 2, 3, 5), (6,), (-3.0,), "b", StopReason.EOS, 0),
    )
    found = rows(maker(reveal=MASKED), [Group(ONE, (Trajectory(turns, 1.0),))], [Route.DISTIL])
    hint = hints(reveal=MASKED).hint(ONE, 0.5)
    assert [row.view("teacher") for row in found] == [
        Passage(hint.prompt_ids, (3,), hint.veil), Passage((*hint.prompt_ids, 3, 5), (6,), hint.veil),
    ]  # fmt: skip


def test_another_problems_solution_can_be_masked() -> None:
    made = hints((ONE, TWO), prompt=SECTIONS["prompt"] | {"hint": "wrong_problem"}, reveal=MASKED)
    hint = made.hint(ONE, 0.5)
    assert hint.text == "m1\nm2 =4"
    assert hint.veil is not None
    read = Renderer(byte_tokenizer()).token_texts(hint.prompt_ids)
    assert "".join(read[hint.veil.start : hint.veil.stop]) == "m1\nm2"


PLACES = [
    (["q", "|", "ab", "c", "\n", "#5"], "q|", "abc", (2, 4)),
    (["q", "|a", "bc\n\n", "#5"], "q|", "abc", (1, 3)),  # white space behind may go with the hint, and signs before
    (["q", "|", "ab", "c#", "5"], "q|", "abc", (2, 3)),  # what reaches into visible text behind stays
    (["q", "|", "ab", "c"], "q|", "abc", (2, 4)),
    (["abc", "q", "|", "ab", "c"], "q|", "abc", (3, 5)),  # not the same text elsewhere
    (["q", "|", "a", "", "\u00e9", "x"], "q|", "a\u00e9", (2, 5)),  # a part of a letter has no text of its own
    (["q", "|", "ab"], "  q|", "ab", (2, 3)),  # a chat template that drops white space at the beginning
    (["q", "|", "ab"], "q|", "abc", None),
]


@pytest.mark.parametrize(("texts", "before", "solution", "expected"), PLACES)
def test_a_hints_tokens_overlap_the_solution_and_nothing_visible_behind(
    texts: list[str], before: str, solution: str, expected: tuple[int, int] | None
) -> None:
    assert places(texts, before, solution) == expected


def test_a_prompt_that_cannot_be_masked_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    twice = hints(reveal=MASKED, prompt=SECTIONS["prompt"] | {"teacher": "{problem}|{hint}|{hint}"})
    with pytest.raises(UserError, match=r'shows \{hint\} more than once, .* set reveal.kind = "segments"'):
        twice.hint(ONE, 0.5)
    monkeypatch.setattr(Renderer, "token_texts", lambda self, ids: ["x"] * len(ids))
    with pytest.raises(UserError, match=r"solution of problem 'one' is not found .* set reveal.kind = \"segments\""):
        hints(reveal=MASKED).hint(ONE, 0.5)
