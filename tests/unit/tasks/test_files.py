"""JSONL files: what is read, and one clear line for everything that is wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from atesd.facts import RunFacts
from atesd.tasks.files import Columns, JsonlConfig, read_problems
from atesd.types import UserError

GOOD = {"problem": "1+1?", "solution": "1+1=2\n#### 2"}


def write(path: Path, *rows: object) -> JsonlConfig:
    """Write rows (objects, or raw bytes for broken ones) and return a config for the file."""
    path.write_bytes(b"".join(row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows))
    return JsonlConfig(path=str(path))


def numbered(count: int) -> list[dict[str, object]]:
    return [{"problem": f"{n}+0?", "solution": f"It is\n\\boxed{{{n}}}", "id": f"p{n}"} for n in range(count)]


def test_rows_with_all_and_with_few_fields(tmp_path: Path) -> None:
    full = {"id": 7, "problem": "p", "solution": "s", "answer": 3, "level": "easy"}
    config = write(tmp_path / "a.jsonl", GOOD, b"\n", full)
    first, second = read_problems(tmp_path / "a.jsonl", config)
    assert (first.id, first.answer, first.level) == ("1", "2", "")
    assert (second.id, second.answer, second.level) == ("7", "3", "easy")


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path: Path) -> None:
    row = json.dumps(GOOD).encode() + b"\r\n"
    config = write(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + row)
    (problem,) = read_problems(tmp_path / "a.jsonl", config)
    assert (problem.problem, problem.answer) == ("1+1?", "2")


def test_a_whole_number_beyond_floats_is_an_answer(tmp_path: Path) -> None:
    config = write(tmp_path / "a.jsonl", {"problem": "10^400?", "solution": "s", "answer": 10**400})
    (problem,) = read_problems(tmp_path / "a.jsonl", config)
    assert problem.answer == "1" + "0" * 400


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet"])
def test_a_table_is_sent_to_the_reader_of_tables(tmp_path: Path, suffix: str) -> None:
    config = write(tmp_path / f"a{suffix}", b"problem,solution\n1+1?,2\n")
    with pytest.raises(UserError, match=rf'task.kind = "dataset", which reads \{suffix} files too'):
        read_problems(tmp_path / f"a{suffix}", config)


def test_a_line_of_exactly_the_limit_is_read_with_its_line_end(tmp_path: Path) -> None:
    config = write(tmp_path / "a.jsonl", GOOD)
    length = len(json.dumps(GOOD))
    path = tmp_path / "a.jsonl"
    assert len(read_problems(path, config.model_copy(update={"max_line_bytes": length}))) == 1
    with pytest.raises(UserError, match="line longer than"):
        read_problems(path, config.model_copy(update={"max_line_bytes": length - 1}))


def test_fields_may_have_other_names(tmp_path: Path) -> None:
    config = write(tmp_path / "a.jsonl", {"question": "q?", "cot": r"so \boxed{5}"})
    renamed = config.model_copy(update={"columns": Columns(problem="question", solution="cot")})
    (problem,) = read_problems(tmp_path / "a.jsonl", renamed)
    assert (problem.problem, problem.answer) == ("q?", "5")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (b'{"problem": "a"\n', "not JSON"),
        (b"[1, 2]\n", "a list where an object was expected"),
        (b'{"problem": "\xff"}\n', "not UTF-8 at byte"),
        (b"[" * 100_000 + b"\n", "not JSON"),
        ({"problem": "a"}, "field 'solution' is missing (fields here: 'problem')"),
        ({"problem": 3, "solution": "#### 1"}, "field 'problem' is a int, expected text"),
        ({"problem": "a", "solution": ["x"]}, "field 'solution' is a list, expected text"),
        ({"problem": "a", "solution": "  "}, "field 'solution' is empty"),
        ({"problem": "a", "solution": "just words"}, "states no answer in \\boxed{} or after ####: add field 'answer'"),
        ({"problem": "a", "solution": "#### 1", "answer": True}, "field 'answer' is a bool"),
        ({"problem": "a", "solution": "#### 1", "id": "1"}, "id '1' stands in line 1 already"),
        ({"problem": "a", "solution": "#### 1", "id": {}}, "field 'id' is a dict"),
        ({"problem": " 1+1? ", "solution": "#### 3"}, "field 'problem' repeats line 1"),
        ({"problem": "a", "solution": "# Heading\nwords", "answer": " "}, "states no answer"),
        (b'{"problem": "a", "solution": "b", "answer": NaN}\n', "not JSON (NaN is no JSON number)"),
        (b'{"problem": "a", "solution": "b", "answer": 1e999}\n', "field 'answer' is too large a number"),
        (b'{"problem": "a", "solution": "b", "answer": ' + b"9" * 5000 + b"}\n", "not JSON"),
        (b'{"problem": "\\ud800", "solution": "#### 1"}\n', "field 'problem' holds half of a surrogate pair"),
        ({"problem": "x" * 11_000_000, "solution": "#### 1"}, "line longer than 1000000 bytes"),
    ],
)
def test_a_broken_row_is_named_with_file_line_and_remedy(row: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    config = write(path, GOOD, row, {"problem": "b", "solution": "#### 2"})
    with pytest.raises(UserError) as caught:
        read_problems(path, config)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"{path}:2: ")
    assert message in line


OTHER_KINDS: dict[str, tuple[bytes, str]] = {
    "an array over several lines": (
        json.dumps([GOOD], indent=1).encode(),
        "holds one JSON array, not one object a line",
    ),
    "an array that opens its first object": (b"[{\n" + json.dumps(GOOD)[1:].encode() + b"]", "holds one JSON array"),
    "an array in one line": (b"\xef\xbb\xbf" + json.dumps([GOOD, GOOD]).encode() + b"\n\n", "holds one JSON array"),
    "Parquet": (b"PAR1\x15\x04\n\xff\n", 'a Parquet file: name it .parquet and set task.kind = "dataset"'),
    "UTF-16": ('{"problem": "1+1?"}\n'.encode("utf-16"), "UTF-16: save it as UTF-8"),
    "UTF-16 of the other order": (b"\xfe\xff" + "{}".encode("utf-16-be"), "UTF-16: save it as UTF-8"),
    "gzip": (b"\x1f\x8b\x08\x00\xff", "compressed with gzip: unpack it"),
    "zip": (b"PK\x03\x04\x14", "a zip archive: unpack it"),
}


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_a_file_of_another_kind_is_refused_whole(kind: str, tmp_path: Path) -> None:
    content, message = OTHER_KINDS[kind]
    path = tmp_path / "own data.jsonl"
    with pytest.raises(UserError) as caught:
        read_problems(path, write(path, content))
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"{path} ")
    assert message in line
    if "array" in kind:
        assert line.endswith(f"rewrite it, as with jq -c '.[]' '{path}' > lines.jsonl")


def test_a_key_that_stands_twice_is_told(tmp_path: Path) -> None:
    config = write(tmp_path / "a.jsonl", b'{"problem": "1+1?", "solution": "#### 2", "problem": "2+2?"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl:1: not JSON \(the key 'problem' stands twice in an object\)"):
        read_problems(tmp_path / "a.jsonl", config)


def test_a_file_that_is_nowhere_is_looked_for_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"^d/no\.jsonl cannot be read .*begins at, which {tmp_path} is not$"):
        read_problems(Path("d/no.jsonl"), JsonlConfig(path="d/no.jsonl"))
    with pytest.raises(UserError, match=r"give the path of a JSONL file$"):
        read_problems(tmp_path / "no.jsonl", JsonlConfig(path="no.jsonl"))


def test_a_chat_in_place_of_a_text_is_told(tmp_path: Path) -> None:
    config = write(tmp_path / "a.jsonl", {"problem": [{"role": "user", "content": "1+1?"}], "solution": "#### 2"})
    with pytest.raises(
        UserError, match=r"'problem' is a chat, expected text: write its .* as task\.columns\.messages$"
    ):
        read_problems(tmp_path / "a.jsonl", config)


def test_a_first_line_that_is_a_list_is_one_broken_row(tmp_path: Path) -> None:
    config = write(tmp_path / "a.jsonl", [GOOD], GOOD)
    with pytest.raises(UserError, match=r"a\.jsonl:1: a list where an object was expected"):
        read_problems(tmp_path / "a.jsonl", config)


def test_defects_are_reported_together_ten_at_most(tmp_path: Path) -> None:
    config = write(tmp_path / "a.jsonl", *[{"problem": "a"}] * 12)
    with pytest.raises(UserError) as caught:
        read_problems(tmp_path / "a.jsonl", config)
    *named, last = str(caught.value).splitlines()
    assert [line.split(":")[1] for line in named] == [str(n) for n in range(1, 11)]
    assert last == f"{tmp_path / 'a.jsonl'}: reading stopped here, and more may follow"
    write(tmp_path / "b.jsonl", *[{"problem": "a"}] * 9)
    with pytest.raises(UserError) as caught:
        read_problems(tmp_path / "b.jsonl", config)
    assert len(str(caught.value).splitlines()) == 9


def test_missing_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.jsonl cannot be read"):
        read_problems(tmp_path / "none.jsonl", JsonlConfig(path="x"))
    with pytest.raises(UserError, match="holds no problem"):
        read_problems(tmp_path / "a.jsonl", write(tmp_path / "a.jsonl"))


def test_unanswered_solutions_can_be_kept(tmp_path: Path) -> None:
    config = write(tmp_path / "a.jsonl", {"problem": "a", "solution": "words"})
    (problem,) = read_problems(tmp_path / "a.jsonl", config.model_copy(update={"on_missing_answer": "keep"}))
    assert problem.answer is None


def test_the_split_is_disjoint_complete_and_the_same_for_every_seed_of_a_run(tmp_path: Path) -> None:
    config = write(tmp_path / "a.jsonl", *numbered(20)).model_copy(update={"probe_size": 3, "eval_size": 5})
    one, two = config.build(RunFacts()), config.build(RunFacts(seed=99))
    sets = [{p.id for p in problems} for problems in (one.train(), one.probe(), one.evaluation())]
    assert [len(ids) for ids in sets] == [12, 3, 5]
    assert set.union(*sets) == {f"p{n}" for n in range(20)}
    assert [p.id for p in one.train()] == [p.id for p in two.train()]


def test_a_second_file_is_the_evaluation_set_and_may_not_repeat_training_problems(tmp_path: Path) -> None:
    config = write(tmp_path / "a.jsonl", *numbered(6))
    write(tmp_path / "b.jsonl", {"problem": "new?", "solution": "#### 1"})
    apart = config.model_copy(update={"probe_size": 1, "eval_path": str(tmp_path / "b.jsonl")}).build(RunFacts())
    assert [p.problem for p in apart.evaluation()] == ["new?"]
    assert apart.name == "b"
    write(tmp_path / "b.jsonl", {"problem": " 3+0? ", "solution": "#### 1"})
    mixed = config.model_copy(update={"probe_size": 1, "eval_path": str(tmp_path / "b.jsonl")}).build(RunFacts())
    with pytest.raises(UserError) as told:
        mixed.train()
    new, old = f"{tmp_path}/b.jsonl:1 (evaluation)", f"{tmp_path}/a.jsonl:4 (train)"
    assert str(told.value) == f"problem {new} has the same text as {old}: remove one of them"


def test_all_rows_may_be_evaluated_and_none_trained_on(tmp_path: Path) -> None:
    config = write(tmp_path / "a.jsonl", *numbered(3)).model_copy(update={"eval_size": "all"})
    task = config.build(RunFacts())
    assert [p.problem for p in task.evaluation()] == [row["problem"] for row in numbered(3)], "in the file's order"
    assert task.train() == task.probe() == []
    assert JsonlConfig.model_validate({"path": "a", "eval_size": "all"}).eval_size == "all"


def test_a_file_with_too_few_problems_says_what_to_lower(tmp_path: Path) -> None:
    config = write(tmp_path / "a.jsonl", *numbered(4))
    with pytest.raises(UserError, match=r"has 4 problems, of which 96 would be held out: lower task\.probe_size"):
        config.build(RunFacts()).train()


def test_a_column_that_was_named_must_be_in_some_row(tmp_path: Path) -> None:
    """In any, as fields may be left out; a name that is in none would be ignored in silence."""
    path = tmp_path / "a.jsonl"
    second = {"problem": "2+2?", "solution": "#### 4", "final": 4, "tests": "t", "name": "b", "hard": "yes"}
    config = write(path, GOOD, second)

    def read(**columns: object) -> list[str]:
        named = Columns.model_validate(columns)
        return [str(each.answer) for each in read_problems(path, config.model_copy(update={"columns": named}))]

    assert read(answer="final", extra=("tests",), id="name", level="hard") == ["2", "4"]
    assert read(extra=()) == read() == ["2", "4"]
    for columns, key, name in (
        ({"answer": "fnal"}, "answer", "fnal"),
        ({"id": "nme"}, "id", "nme"),
        ({"level": "lvl"}, "level", "lvl"),
        ({"extra": ("tests", "testz")}, "extra", "testz"),
    ):
        said = (
            f"{path} has no field '{name}' in any row (fields here: 'final', 'hard', 'name', 'problem', 'solution', "
            f"'tests'): mend task.columns.{key}, or leave it out"
        )
        with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
            read(**columns)
