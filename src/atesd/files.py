"""Files that are written whole or not at all, and JSON in them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from atesd.types import UserError


def write_atomic(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old or the new content, never a part.

    UserError where something lies there that is no ordinary file: a link, a device, a pipe, a folder.
    """
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise UserError(f"{path} is no ordinary file and is left as it is: remove it, or choose another place")
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        error.filename = error.filename or str(path)  # of a disk that is full, or a limit
        raise
    finally:
        partial.unlink(missing_ok=True)


def refuse_unwritable(path: Path, option: str = "--out") -> None:
    """UserError where a file or folder cannot be made or replaced, before the work whose result it is to hold.

    Tried in the folder itself, or the nearest one above it that exists, where nothing is left.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{path} holds bytes that are no UTF-8: choose another place with {option}") from error
    tried = path.parents if path.is_file() else (path, *path.parents)
    place = next((above for above in tried if above.exists()), Path())
    try:
        TemporaryFile(dir=place).close()
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): choose another place with {option}") from error


def settle(path: Path) -> None:
    """Have a file on disk, whatever happens to the machine."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def dump_json(value: object, *, indent: int | None = 2) -> str:
    """Serialise readably, or in one line, refusing NaN and infinities, which JSON lacks."""
    return json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False) + "\n"


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Read the objects of a JSON Lines file of a run; a torn last line (a crash) is left out.

    UserError with file and line where one is no object.
    """
    return (row for _, row in numbered_jsonl(path))


def numbered_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Read as `read_jsonl` does; each object comes with the number of its line."""
    if not path.exists():
        return
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is damaged ({error}): restore it from a copy") from error
    *lines, _ = text.split("\n")  # a text may hold separators that splitlines would cut at
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}, line {number} is damaged ({error}): restore it from a copy") from error
            if not isinstance(row, dict):
                raise UserError(f"{path}, line {number} is damaged (no object): restore it from a copy")
            yield number, row
