"""An evaluation whose samples are kept while it goes on, so that one that was stopped goes on where it was.

    FOLDER/settings.json              what every number depends on
    FOLDER/samples/part_0000.jsonl    the samples of the first problems, one a line, written at once when all are there
    FOLDER/result.json                the metrics, when all parts are there

Each part samples with a seed of its own, derived from the seed and the part's first problem, so that the numbers are
the same however often it was stopped. How many problems make a part follows from the settings alone: as many as one
call of the engine holds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atesd.evaluate.runner import Evaluation, Row, Traits, Write, sample, summarise
from atesd.files import dump_json, read_jsonl, refuse_unwritable, write_atomic
from atesd.rollout.driver import Driver
from atesd.rollout.sampler import SamplingConfig
from atesd.runlog import RunDir
from atesd.seeds import derive_seed
from atesd.types import Problem, UserError, shown

_LARGEST_PART = 16  # more would be lost to a stop


@dataclass(frozen=True, slots=True)
class Progress:
    """How far an evaluation is."""

    problems: int
    total: int
    sampled: int
    """Problems sampled by this process; the others were kept."""
    correct: float | None
    """Share of correct samples so far; None where none could be graded."""


def evaluate_kept(
    folder: Path,
    settings: Mapping[str, Any],
    task: str,
    problems: Sequence[Problem],
    driver: Driver,
    sampling: SamplingConfig,
    *,
    seed: int,
    traits: Traits,
    show: Callable[[Progress], None],
    write: Write | None = None,
) -> Evaluation:
    """Evaluate part by part, reading the parts that are there already; `write` gets all rows before the metrics.

    UserError without problems, where the folder holds the results of other settings, where it is damaged, or while
    another process writes it.
    """
    if not problems:
        raise UserError(f"task {task!r} has no evaluation problem: name a file or data set with some")
    run = _opened(folder, settings)
    try:
        size = part_size(sampling)
        tables: list[list[Row]] = []
        sampled = 0
        for start in range(0, len(problems), size):
            part = problems[start : start + size]
            path = folder / "samples" / f"part_{start // size:04d}.jsonl"
            found = _read(path, part, sampling.group_size)
            if found is None:
                found = sample(part, driver, sampling, seed=derive_seed(seed, "part", start), traits=traits)
                _write(path, found)
                sampled += len(part)
            tables += found
            show(Progress(len(tables), len(problems), sampled, _correct(tables)))
        if write is not None:
            write([row for table in tables for row in table])
        result = summarise(task, tables)
        write_atomic(folder / "result.json", dump_json(result.metrics))
        return result
    finally:
        run.unlock()


def part_size(sampling: SamplingConfig) -> int:
    """Return how many problems make a part: those whose longest completions one call of the engine holds, 1 to 16."""
    fitting = sampling.batch_tokens // (sampling.group_size * sampling.max_new_tokens)
    return max(1, min(fitting, _LARGEST_PART))


def _opened(folder: Path, settings: Mapping[str, Any]) -> RunDir:
    """Take the folder for this evaluation alone. UserError where it is another's."""
    path = folder / "settings.json"
    if folder.exists() and not path.is_file() and any(entry.name != ".lock" for entry in folder.iterdir()):
        raise UserError(f"{folder} holds other files and is left as it is: choose another folder with --results")
    refuse_unwritable(folder, "--results")
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    run = RunDir(folder)
    run.lock()
    wanted = json.loads(json.dumps(settings))
    if not path.is_file():
        write_atomic(path, dump_json(wanted))
        return run
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(known, dict)
    except (ValueError, AssertionError) as error:
        run.unlock()
        raise UserError(f"{path} is damaged: delete {folder}, or choose another with --results") from error
    other = [name for name in {**known, **wanted} if known.get(name) != wanted.get(name)]
    if other:
        run.unlock()
        name = other[0]
        raise UserError(
            f"{folder} holds results of another evaluation ({name} = {shown(known.get(name), 60)} there, "
            f"{shown(wanted.get(name), 60)} here): choose another folder with --results, or delete it"
        )
    return run


def _read(path: Path, part: Sequence[Problem], k: int) -> list[list[Row]] | None:
    """Return a part that is there; None where it is not. UserError where it is not what was written."""
    if not path.is_file():
        return None
    rows = list(read_jsonl(path))
    expected = [(problem.id, place) for problem in part for place in range(k)]
    if [(row.get("problem_id"), row.get("sample")) for row in rows] != expected:
        raise UserError(
            f"{path} is damaged ({len(rows)} samples where {len(expected)} belong): delete it, and it is sampled again"
        )
    return [rows[start : start + k] for start in range(0, len(rows), k)]


def _write(path: Path, tables: Sequence[Sequence[Row]]) -> None:
    lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for table in tables for row in table)
    write_atomic(path, "".join(lines))


def _correct(tables: Sequence[Sequence[Row]]) -> float | None:
    graded = [row["reward"] == 1.0 for table in tables for row in table if row["reward"] is not None]
    return sum(graded) / len(graded) if graded else None
