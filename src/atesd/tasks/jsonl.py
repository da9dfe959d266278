"""JSON Lines, read line by line by ourselves.

The reader of `datasets` stops at the first broken line and names no line, takes an answer written 007 or a column of
mixed types for one type, and fills what a row lacks. Here every defect keeps its line, and the rows their own types.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

from atesd.tasks.rows import Numbered, Source
from atesd.types import UserError

_TABLES = (".csv", ".tsv", ".parquet")
# What files of other kinds begin with, and how to mend it.
_OTHERS = {
    b"PAR1": 'a Parquet file: name it .parquet and set task.kind = "dataset"',
    b"\x1f\x8b": "compressed with gzip: unpack it",
    b"PK\x03\x04": "a zip archive: unpack it",
    b"\xff\xfe": "UTF-16: save it as UTF-8",
    b"\xfe\xff": "UTF-16: save it as UTF-8",
}


def jsonl_source(path: str, longest: int) -> Source:
    """Return the source of a file with one JSON object a line, at most `longest` bytes each."""
    return Source(path, lambda: _rows(Path(path), longest), unit="line", word="field")


def _rows(path: Path, longest: int) -> Iterator[Numbered]:
    if path.suffix in _TABLES:
        raise UserError(f'{path} is no JSON Lines file: set task.kind = "dataset", which reads {path.suffix} files too')
    lines = _lines(path, longest)
    ahead = list(islice(lines, 2))
    _refuse_others(path, [line for _, line in ahead])
    for number, line in chain(ahead, lines):
        try:
            yield number, _object(line, longest)
        except UserError as error:
            yield number, error


def _refuse_others(path: Path, ahead: Sequence[bytes]) -> None:
    """UserError for a file that is whole, but of another kind, where each of its lines would be a defect.

    `ahead` are its first two lines, as far as it has them.
    """
    first, second = (*ahead, b"", b"")[:2]
    for begins, what in _OTHERS.items():
        if first.startswith(begins):
            raise UserError(f"{path} is no JSON Lines file, but {what}")
    begin = first.decode("utf-8-sig", "replace").strip()
    if begin in ("[", "[{") or (begin.startswith("[{") and not second):
        shown = shlex.quote(str(path))
        raise UserError(
            f"{path} holds one JSON array, not one object a line: rewrite it, as with jq -c '.[]' {shown} > lines.jsonl"
        )


def _lines(path: Path, longest: int) -> Iterator[tuple[int, bytes]]:
    """Yield the non-empty lines; a line longer than `longest` comes cut, which its reader notices."""
    try:
        with path.open("rb") as file:
            number = 0
            while line := file.readline(longest + 1):
                number += 1
                rest = line
                while len(rest) > longest and not rest.endswith(b"\n"):
                    rest = file.readline(longest + 1)
                if line.strip():
                    yield number, line
    except OSError as error:
        where = "" if path.is_absolute() else f", or go to the folder that it begins at, which {Path.cwd()} is not"
        raise UserError(f"{path} cannot be read ({error.strerror}): give the path of a JSONL file{where}") from error


def _object(line: bytes, longest: int) -> dict[str, Any]:
    """Return the object of a line, or say what is wrong with it."""
    if len(line.rstrip(b"\r\n")) > longest:
        raise UserError(f"line longer than {longest} bytes: shorten it, or raise task.max_line_bytes")
    try:
        row = json.loads(line.decode("utf-8-sig"), parse_constant=_refuse, object_pairs_hook=_once)
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 at byte {error.start} of the line: save the file as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"not JSON ({error}): write one complete object a line") from error
    if not isinstance(row, dict):
        raise UserError(f'a {type(row).__name__} where an object was expected: write {{"problem": ..., ...}}')
    return row


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object, none of whose keys may stand twice: one of its values would be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for number, (key, _) in enumerate(pairs) if key in dict(pairs[:number]))
        raise ValueError(f"the key {twice!r} stands twice in an object")
    return found


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON number")
