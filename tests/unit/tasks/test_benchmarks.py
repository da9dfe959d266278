"""Benchmarks: which columns are read, from the hub's layout or a file of one's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from atesd.facts import RunFacts
from atesd.tasks import tables
from atesd.tasks.base import check_gold
from atesd.tasks.benchmarks import BENCHMARKS, NAMES, BenchmarkConfig
from atesd.types import UserError

# Rows as the hub's data sets have them: names of columns from their cards, invented content.
HUB: dict[str, dict[str, Any]] = {
    "aime24": {"id": 60, "problem": "p", "solution": r"\boxed{25}", "answer": "025", "url": "u", "year": "2024"},
    "aime25": {"id": "0", "problem": "p", "answer": "25", "solution": "s", "year": "2025"},
    "hmmt25": {"problem_idx": 1, "problem": "p", "answer": "103", "problem_type": ["Algebra"]},
    "math500": {"problem": "p", "solution": "s", "answer": r"\frac{1}{2}", "subject": "Algebra", "level": 2},
    "amc23": {"id": 0, "question": "p", "answer": "27.0", "url": "u"},
    "minerva": {"question": "p", "answer": "1e33"},
    "gsm8k": {"question": "p", "answer": "2*9=<<2*9=18>>18\n#### 18"},
}
ANSWERS = {**{name: row["answer"] for name, row in HUB.items()}, "gsm8k": "18"}


def test_every_benchmark_is_named_once() -> None:
    assert set(NAMES) == set(BENCHMARKS) == set(HUB)


@pytest.mark.parametrize("name", NAMES)
def test_rows_as_on_the_hub_become_problems(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load(path: str, config: str | None, **settings: Any) -> Any:
        asked.append((path, config, settings["split"], settings["revision"]))
        return datasets.Dataset.from_list([HUB[name], HUB[name]])

    monkeypatch.setattr(tables, "_silence", lambda ask: "")
    monkeypatch.setattr(datasets, "load_dataset", load)
    task = BenchmarkConfig(name=name, revision="abc").build(RunFacts())  # type: ignore[arg-type]
    first, second = task.evaluation()
    table = BENCHMARKS[name].table
    assert asked == [(table.path, table.config, table.split, "abc")]
    assert (first.id, second.id) == ("1", "2"), "a repeated text is kept"
    assert (first.problem, first.answer) == ("p", ANSWERS[name])
    assert first.extra == {}
    assert (task.train(), task.probe(), task.name) == ([], [], name)
    if name == "math500":
        assert first.level == "2"
    assert task.place(second, "answer") == f"{table.name}, row 2: answer"


@pytest.mark.parametrize("name", ["aime24", "gsm8k", "minerva"])
@pytest.mark.parametrize("plain", [True, False])
def test_a_file_may_have_the_hubs_columns_or_plain_ones(name: str, plain: bool, tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    row = {"problem": "p", "answer": ANSWERS[name]} if plain else HUB[name]
    path.write_text(json.dumps(row) + "\n")
    (problem,) = BenchmarkConfig(name=name, data=str(path)).build(RunFacts()).evaluation()  # type: ignore[arg-type]
    assert (problem.problem, problem.answer) == ("p", ANSWERS[name])


def test_columns_of_a_file_may_be_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"q": "p", "a": "7", "problem": "other", "answer": "8"}\n')
    config = BenchmarkConfig(name="aime24", data=str(path), columns={"problem": "q", "answer": "a"})
    (problem,) = config.build(RunFacts()).evaluation()
    assert (problem.problem, problem.answer) == ("p", "7")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"q": "p", "answer": "7"}\n', ":1: field 'problem' is missing (fields here: 'q', 'answer')"),
        ('{"problem": "p"}\n', ":1: field 'answer' is empty: fill it"),
        ("", " holds no problem"),
        ("{", ":1: not JSON"),
    ],
)
def test_a_file_that_is_no_benchmark_says_why(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        BenchmarkConfig(name="aime24", data=str(path)).build(RunFacts()).evaluation()
    assert str(caught.value).startswith(f"{path}{message}")


def test_the_grader_takes_answers_as_benchmarks_write_them() -> None:
    task = BenchmarkConfig(name="aime24").build(RunFacts())
    reward = task.default_reward.build(RunFacts())
    assert reward(
        prompts=["p"] * 4,
        completions=[r"\boxed{25}", r"\boxed{27}", r"\boxed{0.5}", r"\boxed{26}"],
        answer=["025", "27.0", r"\frac{1}{2}", "025"],
    ) == [1.0, 1.0, 1.0, 0.0]
    assert check_gold([], reward).passed


def test_a_revision_is_that_of_the_source_that_is_named() -> None:
    table = BenchmarkConfig(name="aime24", data="me/copy", revision="abc").table
    assert (table.path, table.revision) == ("me/copy", "abc")
