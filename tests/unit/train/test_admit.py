"""Which problems a run takes."""

from __future__ import annotations

import warnings
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from atesd.recipe import build_config
from atesd.rewards.kinds import ExactConfig
from atesd.rollout.render import Renderer
from atesd.train.admit import answerable, sets_of, warn_of_problems
from atesd.types import Problem, UserError

from support.rollouts import byte_tokenizer

ONE, LONGER = Problem("one", "first", "l1", "2"), Problem("longer", "first!", "l1", "2")


def asked(problems: list[Problem], context: int | None, *, overlong: str = "error", **prompt: str) -> list[str]:
    """Return the ids of those whose prompts fit a context with a completion of 10 tokens."""
    tree: dict[str, Any] = {
        "prompt": {"student": "{problem}", **prompt},
        "rollout": {"max_new_tokens": 5},
        "eval": {"max_new_tokens": 10},
        "step": {"overlong": overlong},
    }
    return [each.id for each in answerable(build_config(tree), Renderer(byte_tokenizer()), problems, context)]


def tokens(problem: Problem) -> int:
    return len(Renderer(byte_tokenizer()).student_ids([{"role": "user", "content": problem.problem}]))


def test_what_an_evaluation_asks_must_fit_with_a_full_completion_of_evaluation() -> None:
    room = tokens(ONE) + 10
    assert tokens(LONGER) == tokens(ONE) + 1
    assert asked([LONGER, ONE], room + 1) == ["longer", "one"]
    assert asked([LONGER], None) == ["longer"], "a model without a limit holds anything"
    with pytest.raises(UserError) as told:
        asked([LONGER, ONE], room)
    assert str(told.value) == (
        f"1 evaluation problems (longer) do not fit the model's context of {room} tokens with a completion of 10: "
        'shorten eval.max_new_tokens where that is too long, or leave them out with step.overlong = "drop"'
    )
    with pytest.warns(UserWarning, match=r"dropped 1 evaluation problems \(longer\) which do not fit"):
        assert asked([LONGER, ONE], room, overlong="drop") == ["one"]
    with pytest.raises(UserError, match="and no others are left: take shorter ones"):
        asked([LONGER], room, overlong="drop")


def test_the_prompt_of_evaluation_counts() -> None:
    room = tokens(ONE) + 10
    assert asked([ONE], room) == ["one"]
    assert asked([ONE], room + len("Say: "), evaluation="Say: {problem}") == ["one"]
    with pytest.raises(UserError, match="1 evaluation problems"):
        asked([ONE], room + len("Say: ") - 1, evaluation="Say: {problem}")


def test_only_five_are_named() -> None:
    many = [Problem(f"p{place}", "first", "l1", "2") for place in range(7)]
    with pytest.raises(UserError, match=r"7 evaluation problems \(p0, p1, p2, p3, p4, \.\.\.\) do not fit"):
        asked(many, 11)


def test_sets_that_are_not_what_a_task_promises_are_refused() -> None:
    other = Problem("other", "third", "l1", "2")
    rows = SimpleNamespace(name="own", train=lambda: [ONE], probe=list, evaluation=lambda: [LONGER, other])
    assert sets_of(build_config({"eval": {"problems": 1}}), rows)["evaluation"] == [LONGER]
    for evaluation, says in (
        (
            [replace(ONE, id="again")],
            r"problem 'again' \(evaluation\) has the same text as 'one' \(train\): remove one",
        ),
        ([LONGER, replace(other, id="longer")], r"the evaluation problems of task 'own' hold two with the id 'longer'"),
        ([replace(other, answer=0)], "evaluation problems of task 'own' hold one whose answer is 0: make it a text"),
        ([replace(other, id=7)], "hold one whose id is 7: make it a text"),
        ([{"problem": "x"}], r"are \[\{'problem': 'x'\}\]: return a list of atesd\.types\.Problem, \[\] for none"),
        (None, "the evaluation problems of task 'own' are None: return a list of"),
    ):
        rows.evaluation = lambda given=evaluation: given
        with pytest.raises(UserError, match=says):
            sets_of(build_config({}), rows)


def test_a_run_without_anything_to_evaluate_on_is_refused_before_it_begins() -> None:
    rows = SimpleNamespace(name="own", train=lambda: [ONE], probe=list, evaluation=lambda: [LONGER])
    assert sets_of(build_config({}), rows) == {"train": [ONE], "probe": [], "evaluation": [LONGER]}
    rows.evaluation = list
    with pytest.raises(UserError, match=r"task 'own' has no evaluation problem: raise task\.eval_size"):
        sets_of(build_config({}), rows)


def warned(problems: list[Problem], **tree: Any) -> list[str]:
    """Return what a run of these problems is warned of."""
    config = build_config({"step": {"problems": 2}, **tree})
    task: Any = SimpleNamespace(default_reward=ExactConfig())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_problems(config, problems, Renderer(byte_tokenizer()), task)
    return [str(each.message) for each in caught]


def test_a_step_of_more_problems_than_there_are_is_told() -> None:
    first, second = Problem("1", "first", "so\nit\nis 2", "2"), Problem("2", "second", "so\nit\nis 2", "2")
    assert warned([first, second]) == []
    (said,) = warned([first])
    assert said.startswith("step.problems = 2, and there are 1 training problems: every step samples some of them")


def test_an_answer_that_exact_grading_refuses_in_its_own_solution_is_told() -> None:
    right, wrong = Problem("r", "first", "2\n= 2\n#2", "2."), Problem("w", "third", "3 * 7\n= 21\n#21", "21.0")
    assert warned([right, wrong], reward={"kind": "math"}) == []
    for reward in ({}, {"reward": {"kind": "exact"}}, {"reward": [{"kind": "math"}, {"kind": "exact"}]}):
        (said,) = warned([right, wrong], **reward)
        assert said.startswith("1 of 2 training problems (w) have an answer that is not written as their own solutions")
        assert said.endswith('set reward = {kind = "math"}')
