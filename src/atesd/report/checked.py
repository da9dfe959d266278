"""Read the files of a run directory without trusting them: a copy may be cut short, edited, or from elsewhere.

What does not parse is one UserError with file and line. A value of the wrong kind is left out, with a note for the
reader, wherever a report can do without it; accuracies cannot, so that a damaged evaluation is a UserError too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from atesd.files import numbered_jsonl
from atesd.runlog import FORMAT, RunDir
from atesd.seals import MANIFEST, flaw, is_manifest, read_manifest
from atesd.types import UserError

LARGEST = 1e100  # beyond it, figures would overflow
LONGEST_STEP = 10**12
ONCE = (
    "config.json",
    "about.json",
    "env.json",
)  # sealed as soon as they are written; the others when a run is complete

Test = Callable[[Any], bool]


def is_number(value: Any) -> bool:
    """Tell whether a value is a finite number that a figure can show."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -LARGEST < value < LARGEST


def is_amount(value: Any) -> bool:
    """Tell whether a value is a number of at least 0."""
    return is_number(value) and value >= 0


def is_step(value: Any) -> bool:
    """Tell whether a value can be the number of a step."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < LONGEST_STEP


def is_text(value: Any) -> bool:
    """Tell whether a value is text."""
    return isinstance(value, str)


def is_shade(value: Any) -> bool:
    """Tell whether a value is a part of a text and a share."""
    return isinstance(value, list) and len(value) == 2 and is_text(value[0]) and is_amount(value[1]) and value[1] <= 1


def is_bool(value: Any) -> bool:
    """Tell whether a value is true or false."""
    return isinstance(value, bool)


def list_of(test: Test) -> Test:
    """Return a test for lists whose members pass a test."""
    return lambda value: isinstance(value, list) and all(map(test, value))


def table_of(test: Test) -> Test:
    """Return a test for objects whose values pass a test."""
    return lambda value: isinstance(value, dict) and all(map(test, value.values()))


def optional(test: Test) -> Test:
    """Return a test that null passes, too."""
    return lambda value: value is None or test(value)


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object; {} where there is no such file. UserError where it is damaged."""
    if not path.is_file():
        return {}
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(loaded, indent=2)  # the page shows some: nothing nested too deeply for that
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}): restore it from a copy") from error
    if not isinstance(loaded, dict):
        raise UserError(f"{path} is damaged (no object): restore it from a copy")
    return loaded


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield line number and object of a JSON Lines file; nothing where there is no such file. UserError as above."""
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is no ordinary file: put the run's own in its place")
    try:
        yield from numbered_jsonl(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): restore it from a copy") from error


def refuse_damaged(path: Path, row: Mapping[str, Any], schema: Mapping[str, Test], line: int | None = None) -> None:
    """UserError naming the first field of a row that fails its test, or is missing."""
    place = f"{path}, line {line}," if line else f"{path}"
    for field, test in schema.items():
        if field not in row:
            raise UserError(f"{place} is damaged (field {field!r} is missing): restore it from a copy")
        if not test(row[field]):
            raise UserError(f"{place} is damaged (field {field!r} is {_shown(row[field])}): restore it from a copy")


def kept(name: str, row: Mapping[str, Any], schema: Mapping[str, Test], notes: list[str]) -> dict[str, Any]:
    """Return a row without the fields that fail their tests, which are noted; others stay as they are."""
    wrong = [field for field, test in schema.items() if field in row and not test(row[field])]
    notes += [f"{name}: field {field!r} is {_shown(row[field])}, and was left out" for field in wrong]
    return {field: value for field, value in row.items() if field not in wrong}


def read_metrics(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """Return the logged steps; what is no step or no finite number is left out and noted."""
    rows, stepless, wrong = [], [], dict[str, list[int]]()
    for line, row in read_rows(path):
        if not is_step(row.get("step")):
            stepless.append(line)
            continue
        rows.append({key: value for key, value in row.items() if is_number(value)})
        for key in row.keys() - rows[-1].keys():
            wrong.setdefault(key, []).append(line)
    if stepless:
        notes.append(f"{path.name}, {_lines(stepless)}: no number of a step, left out")
    notes += [
        f"{path.name}, {_lines(lines)}: {key} is no finite number, left out" for key, lines in sorted(wrong.items())
    ]
    return rows


def seal_notes(folder: RunDir, *, is_complete: bool, version: int) -> list[str]:
    """Say which sealed files are not what the run wrote.

    Logs of a run that is not complete must begin as its newest checkpoint, which remembers them, says.
    """
    try:
        manifest = read_manifest(folder.path)
        if manifest is None:
            return [] if version < FORMAT else [f"{MANIFEST} is missing or damaged: files cannot be vouched for"]
        seals = {name: each for name, each in manifest["files"].items() if is_complete or name in ONCE}
        found = {name: flaw(folder.path, {name: each}) for name, each in seals.items()}
        if not is_complete:
            logs = written_seals(folder.checkpoints)
            found |= {name: flaw(folder.path, {name: each}, prefix=True) for name, each in logs.items()}
    except (OSError, ValueError, RecursionError) as error:
        return [f"{MANIFEST} is damaged ({error}): files cannot be vouched for"]
    return [_seal_note(name, why) for name, why in found.items() if why]


def written_seals(checkpoints: Path) -> dict[str, Any]:
    """Return the seals of logs in the newest checkpoint whose state can be read; {} where there is none."""
    steps = {int(name): folder for folder in checkpoints.glob("step_*") if (name := folder.name[5:]).isdecimal()}
    for step in sorted(steps, reverse=True):
        try:
            seals = json.loads((steps[step] / "state.json").read_text(encoding="utf-8"))["written"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue  # it may be removed just now; a resumed run says what is wrong with it
        if is_manifest({"files": seals}):
            return dict(seals)
    return {}


def writable(text: str) -> str:
    """Put a question mark in place of what no file can hold: halves of surrogate pairs, which JSON can spell."""
    return text.encode(errors="replace").decode()


def _seal_note(name: str, why: str) -> str:
    """Word a flaw: `x.jsonl is not what this run wrote`, with sizes where they differ."""
    if why == f"{name} is missing":
        return why
    sizes = why.removeprefix(f"{name} has ")
    return f"{name} is not what this run wrote" + (f" ({sizes})" if sizes != why else "")


def _lines(numbers: list[int]) -> str:
    named = ", ".join(map(str, numbers[:3])) + (f" and {len(numbers) - 3} more" if len(numbers) > 3 else "")
    return f"line{'s' if len(numbers) > 1 else ''} {named}"


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 40 else f"{text[:40]}..."
