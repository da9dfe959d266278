"""Rows of well-known layouts: which column holds what, GSM8K's annotations, chats, further columns."""

from __future__ import annotations

from typing import Any

import pytest

from atesd.tasks.columns import Columns, has_system_message, missing_columns, problem_of
from atesd.tasks.files import JsonlConfig
from atesd.types import UserError

GSM8K = Columns(problem="question", solution="answer")
USER, ASSISTANT = {"role": "user", "content": "1+1?"}, {"role": "assistant", "content": r"It is \boxed{2}"}


def rules(columns: Columns, **settings: Any) -> JsonlConfig:
    return JsonlConfig(path="x", columns=columns, **settings)


def test_gsm8k_solutions_lose_their_annotations_and_state_the_answer() -> None:
    row = {"question": "How many?", "answer": "48/2 = <<48/2=24>>24 and $<<2.5*4=10>>10, x << 2 = y >> 1\n#### 1,234"}
    problem = problem_of(row, 1, rules(GSM8K))
    assert problem.solution == "48/2 = 24 and $10, x << 2 = y >> 1\n#### 1,234"
    assert problem.answer == "1,234", "not the whole text of the column"
    assert problem.extra == {}
    assert problem_of(row, 1, rules(GSM8K, calculator="keep")).solution == row["answer"]


def test_openthoughts_rows_keep_their_further_columns_for_rewards() -> None:
    row = {"problem": "p", "solution": r"\boxed{3}", "domain": "math", "tests": [1, 2]}
    assert problem_of(row, 1, rules(Columns())).extra == {"domain": "math", "tests": [1, 2]}
    assert problem_of(row, 1, rules(Columns(extra=("tests",)))).extra == {"tests": [1, 2]}
    assert problem_of(row, 1, rules(Columns(extra=()))).extra == {}


@pytest.mark.parametrize("name", ["prompts", "completions"])
def test_a_further_column_may_not_take_the_name_of_an_argument(name: str) -> None:
    with pytest.raises(UserError, match=f"field '{name}' has the name of an argument"):
        problem_of({"problem": "p", "solution": "#### 1", name: 1}, 1, rules(Columns()))


@pytest.mark.parametrize(
    "messages",
    [
        [USER, ASSISTANT],
        [{"role": "system", "content": "be brief"}, USER, ASSISTANT],
        [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": r"It is \boxed{2}"}],
    ],
)
def test_a_chat_is_a_problem_and_its_solution(messages: list[dict[str, str]]) -> None:
    columns = Columns(messages="chat")
    problem = problem_of({"chat": messages}, 7, rules(columns))
    assert (problem.id, problem.problem, problem.solution, problem.answer) == ("7", "1+1?", r"It is \boxed{2}", "2")
    assert has_system_message({"chat": messages}, columns) == (len(messages) == 3)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"x": 1}, "field 'chat' is missing (fields here: 'x')"),
        ({"chat": "hello"}, "field 'chat' is no list of messages"),
        ({"chat": ["hello"]}, "field 'chat' is no list of messages"),
        ({"chat": []}, "field 'chat' holds messages by none: one by the user"),
        ({"chat": [USER, ASSISTANT, USER, ASSISTANT]}, "by user, assistant, user, assistant: one by the user"),
        ({"chat": [ASSISTANT, USER]}, "by assistant, user: one by the user"),
        (
            {"chat": [USER, {"role": "assistant", "content": None}]},
            "'chat', message by assistant: key 'content' is empty",
        ),
        ({"chat": [USER, {"role": "assistant", "content": "words"}]}, "field 'chat' states no answer"),
    ],
)
def test_a_chat_that_is_no_problem_and_solution_says_why(row: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        problem_of(row, 1, rules(Columns(messages="chat")))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("names", "columns", "lacking", "remedy"),
    [
        (["question", "answer"], Columns(), "columns 'problem' and 'solution'", "task.columns.problem=question"),
        (["messages"], Columns(), "columns 'problem' and 'solution'", "task.columns.messages=messages"),
        (["problem", "cot"], Columns(), "column 'solution'", "add it, or name yours"),
        (["problem"], Columns(messages="chat"), "column 'chat'", "add it, or name yours"),
        (["problem", "solution"], Columns(extra=("tests",)), "column 'tests'", "add it, or name yours"),
    ],
)
def test_a_table_says_once_which_columns_it_lacks_and_which_it_has(
    names: list[str], columns: Columns, lacking: str, remedy: str
) -> None:
    said = missing_columns(names, rules(columns))
    assert said is not None
    assert said.startswith(f"has no {lacking} (columns here: {', '.join(map(repr, names))}): ")
    assert remedy in said


def test_a_table_with_all_columns_lacks_none() -> None:
    assert missing_columns(["problem", "solution", "x"], rules(Columns())) is None
    assert missing_columns(["problem", "answer"], rules(Columns()), solved=False) is None


def test_without_solutions_the_answer_must_stand_in_its_column() -> None:
    assert problem_of({"problem": "p", "answer": 7}, 1, rules(Columns()), solved=False).answer == "7"
    with pytest.raises(UserError, match="column 'answer' is empty"):
        problem_of({"problem": "p", "answer": ""}, 1, rules(Columns()), word="column", solved=False)


def test_whole_numbers_that_gaps_made_floats_are_written_whole() -> None:
    def answer(value: object) -> str | None:
        row = {"problem": "p", "solution": "s", "answer": value, "level": value}
        problem = problem_of(row, 1, rules(Columns()))
        assert problem.level == problem.answer
        return problem.answer

    assert [answer(value) for value in (21.0, -3.0, 21, 2.5, 1e300)] == ["21", "-3", "21", "2.5", "1e+300"]
    assert answer(9007199254740992.0) == "9007199254740992.0", "larger ones are not exact"
