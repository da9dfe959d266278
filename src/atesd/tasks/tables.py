"""Tables through `datasets`: the hub, folders, Parquet, CSV. Errors name the source, the row or line, and the column.

`datasets` reads; what it does not say is found out here. Of a CSV file its reader types columns (an answer 007 becomes
7) and fills short rows, so the file's lines are looked through first, and every column is then read as text. When the
hub does not answer at once, only what lies in the cache is read: `datasets` would ask on for minutes.
"""

from __future__ import annotations

import csv
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from atesd.tasks.columns import RowsMethod, missing_columns
from atesd.tasks.rows import Numbered, Source
from atesd.types import UserError, one_line

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".tsv")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_HUB_WAIT_S = 10.0
_MOST_DEFECTS = 10
_LONGEST_CELL = 1 << 30
_BATCH = 1000  # rows decoded at a time


@dataclass(frozen=True, slots=True)
class Table:
    """Which rows to read."""

    path: str
    config: str | None = None
    revision: str | None = None
    split: str | None = None
    streaming: bool = False

    @property
    def name(self) -> str:
        """How errors call the table: `openai/gsm8k (main, train)`."""
        parts = ", ".join(part for part in (self.config, self.split) if part)
        return f"{self.path} ({parts})" if parts else self.path

    def refuse_options(self, what: str, *names: str) -> None:
        """UserError where an option is set that `what` does not have: the named ones, else all."""
        for name in names or ("config", "revision", "split", "streaming"):
            if getattr(self, name):
                raise UserError(f"{self.path} is {what}, which has no {name}: remove task.{name}")


def table_source(table: Table, rules: RowsMethod, *, solved: bool = True) -> Source:
    """Return the source of a table. Nothing is read before its rows are asked for."""
    if table.path.endswith((".csv", ".tsv")):
        return Source(table.path, lambda: _csv_rows(table, rules, solved), unit="line", word="column")
    return Source(table.name, lambda: _rows(table, rules, solved))


def _rows(table: Table, rules: RowsMethod, solved: bool) -> Iterator[Numbered]:
    data = _opened(table)
    names = data.column_names
    if names is not None:  # of a stream they may be known with its first row alone
        _check_columns(table.name, names, rules, solved)
    if table.streaming:
        yield from _streamed(data, table.name, rules, solved)
        return
    for start in range(0, min(len(data), rules.limit or len(data)), _BATCH):
        try:
            batch = data[start : start + _BATCH]
        except UnicodeDecodeError:
            yield from _decoded(data, range(start, min(start + _BATCH, len(data))))
            continue
        rows = zip(*batch.values(), strict=True)
        yield from ((start + place, dict(zip(batch, row, strict=True))) for place, row in enumerate(rows, start=1))


def _streamed(data: Any, name: str, rules: RowsMethod, solved: bool) -> Iterator[Numbered]:
    rows, number = iter(data), 0
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:
            raise _unreadable(f"{name}, row {number + 1}", error) from error
        number += 1
        if number == 1:
            _check_columns(name, list(row), rules, solved)
        yield number, row


def _check_columns(name: str, names: list[str], rules: RowsMethod, solved: bool) -> None:
    missing = missing_columns(names, rules, solved=solved)
    if missing:
        raise UserError(f"{name} {missing}")


def _decoded(data: Any, numbers: range) -> Iterator[Numbered]:
    """Yield rows one by one, since a text of one of them is not UTF-8."""
    for number in numbers:
        try:
            yield number + 1, data[number]
        except UnicodeDecodeError:
            yield number + 1, UserError(f"column {_undecodable(data, number)!r} is not UTF-8: mend the text")


def _undecodable(data: Any, number: int) -> str:
    """Return the column of a row that cannot be decoded."""
    for name in data.column_names:
        try:
            data.select_columns([name])[number]
        except UnicodeDecodeError:
            return str(name)
    return "?"


def _opened(table: Table) -> Any:
    """Return the data set, or the stream, of a table. UserError in one line says why there is none."""
    path = Path(table.path)
    if path.suffix == ".parquet":
        table.refuse_options("a file", "config", "revision", "split", "streaming")
        return _loaded(table, partial(_datasets().load_dataset, "parquet", data_files=[_existing(path)], split="train"))
    if path.is_dir():
        table.refuse_options("a folder", "revision")
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            table.refuse_options("a folder that save_to_disk wrote", "config", "streaming")
            return _split_of(_loaded(table, partial(_datasets().load_from_disk, table.path)), table)
        return _dataset(table)
    if path.suffix in SUFFIXES or path.exists():
        _existing(path)
        packed = "unpack it, or " if path.suffix in (".gz", ".bz2", ".xz", ".zst", ".zip") else ""
        raise UserError(f"{path} is no file that is read: {packed}give one of {', '.join(SUFFIXES)}")
    if not _HUB_NAME.fullmatch(table.path):
        raise UserError(f"{table.path} does not exist: give a file, a folder, or a name on the hub (owner/name)")
    with _hub(table):
        return _dataset(table)


def _dataset(table: Table) -> Any:
    """Load a data set of the hub, or of a folder with its files."""
    path = Path(table.path)
    place = str(path.resolve()) if path.is_dir() else table.path  # `.` has no name for the library
    load = partial(_datasets().load_dataset, place, table.config, revision=table.revision)
    load = partial(load, streaming=table.streaming)
    if table.split is None:
        data = _split_of(_loaded(table, load), table)
    else:
        data = _loaded(table, partial(load, split=table.split))
    if path.is_dir():
        _warn_of_unread(path, data.info.builder_name)
    return data


_READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".tsv": "csv"}
"""How `datasets` calls what reads each of `SUFFIXES`."""


def _warn_of_unread(folder: Path, reader: str) -> None:
    """Name the files of other kinds: of a folder without a card, `datasets` reads the commonest kind alone."""
    if reader not in _READERS.values() or (folder / "README.md").is_file():
        return
    found = (
        file.relative_to(folder) for file in sorted(folder.rglob("*")) if file.suffix in SUFFIXES and file.is_file()
    )
    seen = (name for name in found if not any(part.startswith((".", "_")) for part in name.parts))
    unread = [str(name) for name in seen if _READERS[name.suffix] != reader]
    if unread:
        more = f" and {len(unread) - 1} more" if len(unread) > 1 else ""
        warnings.warn(
            f"{folder}: {unread[0]}{more} left unread, as files of one kind are read, {reader} here: give a folder of "
            "one kind, or a file",
            stacklevel=2,
        )


def _split_of(found: Any, table: Table) -> Any:
    """Return the wanted split: the named one, else `train`, else the only one."""
    if not isinstance(found, dict):
        table.refuse_options("a data set of one part", "split")
        return found
    splits = list(found)
    wanted = table.split or ("train" if "train" in splits or len(splits) != 1 else splits[0])
    if wanted not in splits:
        raise UserError(
            f"{table.path} has no split {wanted!r} (splits here: {', '.join(splits) or 'none'}): name one in task.split"
        )
    return found[wanted]


def _loaded(table: Table, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except UserError:
        raise
    except Exception as error:
        raise _unreadable(table.name, error) from error


_NO_ROWS = ("corresponds to no data", "BatchSize must be greater than 0")
"""How `datasets` speaks of a CSV and of a Parquet file without rows."""


def _unreadable(name: str, error: BaseException) -> UserError:
    """Say in one line what a library found, with the remedy for what is common."""
    innermost = error
    while type(innermost).__name__ == "DatasetGenerationError" and innermost.__cause__ is not None:
        innermost = innermost.__cause__
    if any(sign in str(innermost) for sign in _NO_ROWS):
        return UserError(f"{name} holds no row: name one with rows")
    said = one_line(str(innermost).strip().split("\n")[0]).rstrip(". ") or type(innermost).__name__
    remedies = {
        "Unknown split": "name one in task.split",
        "Bad split": "name one in task.split",
        "BuilderConfig": "name one in task.config",
        "Config name is missing": "name one in task.config",
        "Revision": "mend task.revision",
        "Couldn't reach": "check the network, or give files",
        "doesn't exist on the Hub": "mend the name, or log in with `hf auth login`",
        "any data files": f"give a folder with files of one kind: {', '.join(SUFFIXES)}",
        "gated": "ask for access on its page, then log in with `hf auth login`",
    }
    remedy = next((text for sign, text in remedies.items() if sign in said), "give a whole one")
    return UserError(f"{name} cannot be read ({said}): {remedy}")


@contextmanager
def _hub(table: Table) -> Iterator[None]:
    """Ask the hub once whether it answers; where it does not, read the cache alone, and say so where it has nothing.

    Never of a named revision: the cache does not tell them apart.
    """
    datasets = _datasets()
    from huggingface_hub import HfApi, constants

    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    reason = (
        "offline mode is on"
        if any(before)
        else _silence(lambda: HfApi().dataset_info(table.path, revision=table.revision, timeout=_HUB_WAIT_S))
    )
    if reason and table.revision is not None:  # `datasets` would take the one that was cached last
        raise UserError(
            f"{table.name} cannot be read of revision {table.revision!r}: the hub does not answer ({reason}), and what "
            "the cache holds does not say of which revision it is: check the network, remove task.revision to take "
            "what is there, or give a file or folder instead"
        )
    datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = bool(reason)
    try:
        yield
    except UserError as error:
        if not reason:
            raise
        raise UserError(
            f"{table.name} cannot be read: the hub does not answer ({reason}), and the cache does not have it: check "
            "the network, or give a file or folder instead"
        ) from error
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before


def _silence(ask: Callable[[], Any]) -> str:
    """Return why the hub does not answer; empty where it does, even where its answer is no."""
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    try:
        ask()
    except RepositoryNotFoundError:  # 401, too, where nobody is logged in
        return ""
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status == 401:
            return "it refuses the token: log in again with `hf auth login`"
        return str(status) if status >= 500 else ""
    except Exception as error:  # whichever library carries the request has its own
        return one_line(str(error).strip().split("\n")[0]) or type(error).__name__
    return ""


def _csv_rows(table: Table, rules: RowsMethod, solved: bool) -> Iterator[Numbered]:
    """Yield the records of a CSV file with their lines; all cells are text."""
    table.refuse_options("a file")
    path = Path(_existing(Path(table.path)))
    separator = "\t" if path.suffix == ".tsv" else ","
    names, lines = _csv_lines(path, separator)
    _check_columns(table.path, names, rules, solved)
    datasets = _datasets()
    text = datasets.Features({name: datasets.Value("string") for name in names})
    load = partial(datasets.load_dataset, "csv", data_files=[str(path)], split="train", sep=separator, features=text)
    data = _loaded(table, partial(load, keep_default_na=False, skip_blank_lines=True, encoding="utf-8-sig"))
    if len(data) != len(lines):  # the two readers see other records: never give a row a wrong line
        raise UserError(f"{path} holds {len(lines)} records, of which {len(data)} can be read: mend its quotes")
    yield from zip(lines, data, strict=True)


def _csv_lines(path: Path, separator: str) -> tuple[list[str], list[int]]:
    """Return the names of a CSV file's columns and the line on which each record begins.

    UserError naming each line that is not UTF-8 or has another number of cells than the header, at most ten.
    """
    csv.field_size_limit(_LONGEST_CELL)
    defects: list[str] = []
    lines: list[int] = []
    records = csv.reader(_csv_text(path), delimiter=separator, strict=True)
    begins = 1
    try:
        names = next(records, [])
        if not any(name.strip() for name in names):
            raise UserError(f"{path} is empty: write a header with the names of the columns, then a row a problem")
        names = [name or f"Unnamed: {place}" for place, name in enumerate(names)]  # as pandas calls its index
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise UserError(f"{path}:1: column {twice[0]!r} stands twice in the header: rename one of them")
        begins = records.line_num + 1
        for record in records:
            if record and len(record) != len(names):
                cells = f"{len(record)} cells where the header has {len(names)}"
                defects.append(
                    f"{path}:{begins}: {cells} ({', '.join(map(repr, names))}): quote what holds a separator"
                )
            if record:
                lines.append(begins)
            begins = records.line_num + 1
            if len(defects) == _MOST_DEFECTS:
                break
    except csv.Error as error:
        defects.append(f"{path}:{begins}: no CSV ({error}): mend the quotes")
    if defects:
        raise UserError("\n".join(defects))
    return names, lines


def _csv_text(path: Path) -> Iterator[str]:
    """Yield the lines of a file as text. UserError names the first that is not UTF-8."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path}:{number}: not UTF-8 at byte {error.start} of the line: save the file as UTF-8"
                ) from error


def _existing(path: Path) -> str:
    """Return the path of a file that can be opened. UserError where it cannot."""
    try:
        with path.open("rb"):
            return str(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give the path of a file") from error


def _datasets() -> Any:
    """Return the library, without its progress bars and its own log: what it finds ends in our errors."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    return datasets
