"""Hugging Face data sets, Parquet and CSV: what is read, and one line for everything that is wrong."""

from __future__ import annotations

import re
import time
import warnings
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from atesd.facts import RunFacts
from atesd.tasks import tables
from atesd.tasks.files import DatasetConfig
from atesd.types import Problem, UserError

ROWS = [{"problem": f"{n}+0?", "solution": f"It is\n#### {n}", "answer": f"00{n}", "source": "mine"} for n in range(6)]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def problems(path: Path | str, **settings: Any) -> list[Problem]:
    sizes = {"probe_size": 0, "eval_size": 0} | settings
    found = DatasetConfig(path=str(path), **sizes).build(RunFacts()).train()
    return sorted(found, key=lambda problem: int(problem.id))


def csv(folder: Path, text: str | bytes, name: str = "a.csv") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def written(folder: Path, kind: str) -> Path:
    """Write the rows as one kind of source."""
    table = datasets.Dataset.from_list(ROWS)
    path = folder / kind
    match kind:
        case "a.parquet":
            table.to_parquet(str(path))
        case "a.csv":
            table.to_csv(str(path))
        case "a.tsv":
            table.to_csv(str(path), sep="\t")
        case "a.jsonl":
            table.to_json(str(path))
        case "saved":
            table.save_to_disk(str(path))
        case "splits":
            datasets.DatasetDict({"train": table}).save_to_disk(str(path))
        case "files":
            path.mkdir()
            table.to_parquet(str(path / "train.parquet"))
    return path


@pytest.mark.parametrize("kind", ["a.parquet", "a.csv", "a.tsv", "a.jsonl", "saved", "splits", "files"])
def test_the_same_rows_from_every_kind_of_source(kind: str, tmp_path: Path) -> None:
    read = problems(written(tmp_path, kind))
    assert [(p.problem, p.solution, p.answer, p.extra) for p in read] == [
        (row["problem"], row["solution"], row["answer"], {"source": "mine"}) for row in ROWS
    ], "text stays text: 000 is no 0"
    assert DatasetConfig(path=str(tmp_path / kind)).build(RunFacts()).name == ("a" if kind.startswith("a.") else kind)


@pytest.mark.parametrize("kind", ["a.parquet", "a.csv", "saved", "files"])
def test_a_limit_reads_the_first_rows(kind: str, tmp_path: Path) -> None:
    assert [p.problem for p in problems(written(tmp_path, kind), limit=2)] == ["0+0?", "1+0?"]


def test_a_stream_is_read_row_by_row_up_to_its_limit(tmp_path: Path) -> None:
    folder = written(tmp_path, "files")
    assert [p.problem for p in problems(folder, streaming=True, limit=3)] == ["0+0?", "1+0?", "2+0?"]
    with pytest.raises(ValueError, match="set limit, the number of rows to read"):
        DatasetConfig(path=str(folder), streaming=True)


def test_evaluation_problems_may_come_from_another_split(tmp_path: Path) -> None:
    table = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"a": table.select(range(4)), "b": table.select(range(4, 6))}).save_to_disk(tmp_path / "s")
    task = DatasetConfig(path=str(tmp_path / "s"), split="a", eval_split="b", probe_size=1).build(RunFacts())
    assert sorted(p.problem for p in task.evaluation()) == ["4+0?", "5+0?"]
    assert (len(task.train()), len(task.probe())) == (3, 1)
    assert task.place(task.evaluation()[0], "solution").endswith("s (b), row 1: column 'solution'")


def test_cells_of_a_csv_file_keep_their_lines(tmp_path: Path) -> None:
    path = csv(tmp_path, '\ufeffproblem,solution,answer\r\n"a\r\n, b","x\n#### 1",NA\r\n\r\nc,#### 2,\r\n')
    config = DatasetConfig(path=str(path), probe_size=0, eval_size=0).build(RunFacts())
    first, second = sorted(config.train(), key=lambda problem: int(problem.id))
    assert (first.id, first.problem.split(), first.answer) == ("2", ["a", ",", "b"], "NA")
    assert (second.id, second.problem, second.answer) == ("6", "c", "2")
    assert config.place(second, "problem") == f"{path}:6: column 'problem'"


def test_a_csv_file_with_the_index_of_pandas_is_read(tmp_path: Path) -> None:
    path = csv(tmp_path, ",problem,solution,\n0,a,#### 1,x\n1,b,#### 2,y\n")
    config = DatasetConfig(path=str(path), probe_size=0, eval_size=0).build(RunFacts())
    assert sorted((each.id, each.problem, each.answer) for each in config.train()) == [("2", "a", "1"), ("3", "b", "2")]


@pytest.mark.parametrize("separator", [";", "\t"])
def test_a_table_with_another_separator_is_told_how_to_be_saved(separator: str, tmp_path: Path) -> None:
    path = csv(tmp_path, f"problem{separator}solution\na{separator}#### 1\n")
    told = f"the header is one column with {separator!r} in it: save the table with commas, or as .tsv with tabs"
    with pytest.raises(UserError, match=re.escape(told)):
        DatasetConfig(path=str(path), probe_size=0, eval_size=0).build(RunFacts()).train()


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("problem,solution\nc,d,e\nf\na,#### 1\n", [":2: 3 cells where the header has 2", ":3: 1 cells where"]),
        (b"problem,solution\na,#### 1\n\xe9,b\n", [":3: not UTF-8 at byte 0 of the line"]),
        ('problem,solution\na,"b\n', [":2: no CSV (unexpected end of data): mend the quotes"]),
        ("", [" is empty: write a header"]),
        ("problem,solution\n", [" holds no row: name one with rows"]),
        ("problem,problem\na,b\n", [":1: column 'problem' stands twice in the header"]),
        ("problem,cot\na,b\n", [" has no column 'solution' (columns here: 'problem', 'cot'): add it"]),
        ("problem,solution\na,\nb,#### 1\n", [":2: column 'solution' is empty"]),
        ("problem,solution,id\na,#### 1,x\nb,#### 1,x\n", [":3: id 'x' stands in line 2 already"]),
        ("problem,solution\na,#### 1\na,#### 2\n", [":3: column 'problem' repeats line 2"]),
    ],
)
def test_what_is_wrong_with_a_csv_file_is_named_by_line(text: str | bytes, lines: list[str], tmp_path: Path) -> None:
    path = csv(tmp_path, text)
    with pytest.raises(UserError) as caught:
        problems(path)
    said = str(caught.value).splitlines()
    assert len(said) == len(lines)
    assert all(line.startswith(f"{path}{begin}") for line, begin in zip(said, lines, strict=True)), said


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"problem": ["a"], "cot": ["b"]}, r" has no column 'solution' \(columns here: 'problem', 'cot'\): add it"),
        ({"problem": ["a", "b"], "solution": ["#### 1", None]}, r", row 2: column 'solution' is empty: fill it"),
        ({"problem": ["a", "b"], "solution": ["#### 1", "words"]}, r", row 2: column 'solution' states no answer"),
        ({"problem": ["a", "b"], "solution": ["#### 1"] * 2, "id": [3, 3]}, r", row 2: id '3' stands in row 1 already"),
        ({"problem": ["a"], "solution": [7]}, r", row 1: column 'solution' is a int, expected text"),
        ({"problem": ["a"], "solution": ["b"], "answer": [float("nan")]}, r", row 1: column 'answer' is too large a n"),
    ],
)
def test_what_is_wrong_with_a_parquet_file_is_named_by_row(
    columns: dict[str, list[Any]], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_dict(columns).to_parquet(str(path))
    with pytest.raises(UserError, match=f"^{re.escape(str(path))}{message}") as caught:
        problems(path)
    assert "\n" not in str(caught.value)


def test_rows_are_numbered_through_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six rows in batches of four."""
    monkeypatch.setattr(tables, "_BATCH", 4)
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_list([*ROWS, {"problem": "x", "solution": ""}]).to_parquet(str(path))
    assert [int(p.id) for p in problems(path, limit=6)] == [1, 2, 3, 4, 5, 6]
    with pytest.raises(UserError, match=r"a\.parquet, row 7: column 'solution' is empty"):
        problems(path)


def test_a_truncated_an_empty_and_a_badly_encoded_parquet_file(tmp_path: Path) -> None:
    path = written(tmp_path, "a.parquet")
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(
        UserError, match=r"a\.parquet cannot be read \(Parquet magic bytes not found.*give a whole one$"
    ):
        problems(path)
    datasets.Dataset.from_dict({"problem": [], "solution": []}).to_parquet(str(tmp_path / "b.parquet"))
    with pytest.raises(UserError, match=r"b\.parquet holds no row"):
        problems(tmp_path / "b.parquet")
    nothing = pyarrow.array([], pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"problem": nothing, "solution": nothing}), tmp_path / "d.parquet")
    with pytest.raises(UserError, match=r"d\.parquet holds no row"):
        problems(tmp_path / "d.parquet")
    # Two texts of one byte each: offsets 0, 1, 2.
    offsets = pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0")
    text = pyarrow.StringArray.from_buffers(2, offsets, pyarrow.py_buffer(b"a\xff"))
    pyarrow.parquet.write_table(pyarrow.table({"problem": ["x", "y"], "solution": text}), tmp_path / "c.parquet")
    with pytest.raises(UserError, match=r"c\.parquet, row 2: column 'solution' is not UTF-8"):
        problems(tmp_path / "c.parquet", on_missing_answer="keep")


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("splits", {"split": "tst"}, r"has no split 'tst' \(splits here: train\): name one in task.split"),
        ("files", {"split": "tst"}, r"cannot be read \(Unknown split \"tst\".*'train'.*\): name one in task.split"),
        ("files", {"config": "x"}, r"cannot be read \(BuilderConfig 'x' not found.*\): name one in task.config"),
        ("files", {"revision": "x"}, r"is a folder, which has no revision: remove task.revision"),
        ("saved", {"split": "x"}, r"is a data set of one part, which has no split: remove task.split"),
        ("saved", {"streaming": True, "limit": 2}, r"wrote, which has no streaming: remove task.streaming"),
        ("a.csv", {"config": "x"}, r"is a file, which has no config: remove task.config"),
        ("a.parquet", {"split": "x"}, r"is a file, which has no split: remove task.split"),
        ("a.jsonl", {"split": "x"}, r"is a JSON Lines file, which has no split: remove task.split"),
    ],
)
def test_options_that_a_source_does_not_have(kind: str, settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        problems(written(tmp_path, kind), **settings)


def test_damaged_folders_and_paths_that_lead_nowhere(tmp_path: Path) -> None:
    folder = written(tmp_path, "saved")
    (arrow,) = folder.glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:300])
    with pytest.raises(UserError, match=r"saved cannot be read \(Expected to read .* bytes.*\): give a whole one"):
        problems(folder)
    for path, message in (
        ("none.parquet", "none.parquet cannot be read (No such file"),
        ("a/b/c", "a/b/c does not exist: give a file, a folder, or a name on the hub"),
    ):
        with pytest.raises(UserError) as caught:
            problems(path)
        assert message in str(caught.value)


def test_the_folder_that_one_stands_in_is_a_folder_and_one_without_data_says_what_to_give(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "data" / "mine.jsonl").write_text('{"problem": "1+1", "solution": "#### 2"}\n')
    monkeypatch.chdir(tmp_path / "data")
    assert len(problems(".")) == 1
    with pytest.raises(UserError, match=r"empty cannot be read \(.*\): give a folder with files of one kind: \.jsonl"):
        problems(tmp_path / "empty")


def test_files_that_a_folder_holds_beside_those_of_the_kind_that_is_read_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    for place in ("a.jsonl", "b.jsonl", "more/c.csv", "more/d.csv", ".hidden/e.csv"):
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
    for name in "ab":
        (folder / f"{name}.jsonl").write_text(f'{{"problem": "{name}", "solution": "#### 2"}}\n')
    assert len(problems(folder)) == 2
    for place in ("more/c.csv", ".hidden/e.csv"):
        (folder / place).write_text("problem,solution\nq,#### 2\n")
    with pytest.warns(UserWarning, match=r"more/c\.csv left unread, as files of one kind are read, json here: give"):
        assert len(problems(folder)) == 2
    (folder / "more/d.csv").write_text("problem,solution\nr,#### 2\n")
    (folder / "c.jsonl").write_text('{"problem": "c", "solution": "#### 2"}\n')
    with pytest.warns(UserWarning, match=r"more/c\.csv and 1 more left unread"):
        assert len(problems(folder, split="train")) == 3


def test_a_packed_file_is_to_be_unpacked(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(b"\x1f\x8b")
    with pytest.raises(UserError, match=r"a\.jsonl\.gz is no file that is read: unpack it, or give one of \.jsonl"):
        problems(tmp_path / "a.jsonl.gz")


def test_a_hub_that_cannot_be_reached_fails_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import HfApi, constants

    asked = []

    def silent(self: object, *args: Any, **kwargs: Any) -> None:
        asked.append(kwargs["timeout"])
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(HfApi, "dataset_info", silent)
    began = time.monotonic()
    with pytest.raises(UserError) as caught:
        problems("owner/none", config="main")
    assert time.monotonic() - began < 5
    assert asked == [10.0], "once"
    assert str(caught.value).startswith(
        "owner/none (main) cannot be read: the hub does not answer (Name or service not known), and the cache does not"
    )
    assert (datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE) == (False, False), "others may ask again"


def test_what_the_hub_refuses_is_not_taken_for_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import HfApi

    def load(*_: Any, **__: Any) -> None:
        assert not datasets.config.HF_HUB_OFFLINE
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'owner/none' doesn't exist on the Hub")

    monkeypatch.setattr(HfApi, "dataset_info", lambda *_, **__: None)
    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(UserError, match=r"^owner/none cannot be read \(Dataset .*\): mend the name, or log in"):
        problems("owner/none")


def test_filters_by_length_leave_out_and_say_so(tmp_path: Path) -> None:
    path = csv(tmp_path, "problem,solution\naaa,#### 1\nb,#### 22222\nc,#### 3\n,#### 4\n")
    with pytest.warns(
        UserWarning, match=r"left out 2 of 4 rows: 1 with a solution longer than 9 characters; 1 with a "
    ):
        kept = problems(path, max_solution_chars=9, on_bad_row="drop")
    assert [p.problem for p in kept] == ["aaa", "c"]
    with pytest.warns(UserWarning, match=r"1 with a defect, first .*:5: column 'problem' is empty"):
        assert [p.problem for p in problems(path, max_problem_chars=1, on_bad_row="drop")] == ["b", "c"]
    with pytest.warns(UserWarning, match=r"left out 3 of 4 rows: 2 with a solution shorter than 7 characters"):
        assert [p.problem for p in problems(path, min_solution_chars=7, on_bad_row="drop")] == ["b"]
    with pytest.raises(UserError, match=r"holds no problem \(left out 4 of 4 rows"):
        problems(path, min_solution_chars=100, on_bad_row="drop")


def test_system_messages_are_counted(tmp_path: Path) -> None:
    chat = [{"role": role, "content": f"{role} #### 1"} for role in ("system", "user", "assistant")]
    datasets.Dataset.from_dict({"chat": [chat]}).save_to_disk(tmp_path / "chats")
    with pytest.warns(UserWarning, match="1 rows have a system message, which is left out"):
        (problem,) = problems(tmp_path / "chats", columns={"messages": "chat"})
    assert problem.problem == "user #### 1"


def test_nothing_is_read_before_problems_are_asked_for() -> None:
    with warnings.catch_warnings():
        DatasetConfig(path="owner/none").build(RunFacts())
    assert tables.Table("a/b", "main", None, "test").name == "a/b (main, test)"
