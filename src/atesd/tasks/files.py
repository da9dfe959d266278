"""Problems from a JSONL file: one object a line with `problem`, `solution`, and optionally `answer`, `id`, `level`.

Every defect is reported with file, line and field, up to ten at a time; nothing is skipped silently.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from atesd.facts import RunFacts
from atesd.rewards.answer import extract_answer
from atesd.rewards.kinds import Grader, MathConfig
from atesd.seeds import derive_seed
from atesd.tasks.base import TaskMethod, check_disjoint, cites_hint, content_of
from atesd.tasks.texts import Field as TextField
from atesd.types import Config, Problem, UserError

_MOST_DEFECTS = 10


class Columns(Config):
    """Names of the fields in a row."""

    problem: str = "problem"
    """What is asked."""
    solution: str = "solution"
    """The worked reference solution."""
    answer: str = "answer"
    """The final answer; without it the answer is found in `\\boxed{}` or after `####` in the solution."""
    id: str = "id"
    """A unique name; without it the line number serves."""
    level: str = "level"
    """A difficulty, for reports."""


class JsonlConfig(TaskMethod):
    """Your own problems with worked solutions, from a JSONL file."""

    kind: Literal["jsonl"] = "jsonl"
    path: str
    """The file with training problems; probe and, without `eval_path`, evaluation problems are split off it."""
    eval_path: str | None = None
    """A second file with evaluation problems."""
    probe_size: Annotated[int, Field(ge=0)] = 32
    """Problems split off to measure progress."""
    eval_size: Annotated[int, Field(ge=0)] = 64
    """Problems split off for evaluation where there is no `eval_path`."""
    split_seed: Annotated[int, Field(ge=0)] = 0
    """Fixes the split; it does not follow the run's seed, so that all runs hold out the same problems."""
    columns: Columns = Columns()
    """Names of the fields."""
    on_missing_answer: Literal["error", "keep"] = "error"
    """A solution without a recognisable answer is an error, or kept as not gradable."""
    max_line_bytes: Annotated[int, Field(ge=1)] = 1_000_000
    """Longest line that is read."""

    def build(self, run: RunFacts) -> JsonlTask:  # noqa: ARG002
        """Return the task; the file is read when problems are first asked for."""
        return JsonlTask(self)


@dataclass(frozen=True)
class JsonlTask:
    """The problems of a file, split by a seed of their own."""

    config: JsonlConfig

    @property
    def name(self) -> str:
        """The file's stem."""
        return Path(self.config.eval_path or self.config.path).stem.replace("/", "-")

    @property
    def default_reward(self) -> Grader:
        """Answers are compared by meaning."""
        return MathConfig()

    def train(self) -> list[Problem]:
        """Return what is neither probe nor evaluation problem."""
        return self._split[0]

    def probe(self) -> list[Problem]:
        """Return the probe problems."""
        return self._split[1]

    def evaluation(self) -> list[Problem]:
        """Return the evaluation problems."""
        return self._split[2]

    def traits(self, problem: Problem, completion: str) -> dict[str, bool]:  # noqa: ARG002
        """Count completions that cite a hint."""
        return {"cites_hint": cites_hint(completion)}

    def place(self, problem: Problem, field: TextField) -> str:
        """Return file, line and field of a problem's text."""
        return f"{self._places[problem]}: field {getattr(self.config.columns, field)!r}"

    @cached_property
    def _rows(self) -> list[list[tuple[int, Problem]]]:
        return [read_rows(Path(path), self.config) for path in self._paths]

    @property
    def _paths(self) -> list[str]:
        return [path for path in (self.config.path, self.config.eval_path) if path]

    @cached_property
    def _places(self) -> dict[Problem, str]:
        files = zip(self._paths, self._rows, strict=True)
        return {problem: f"{path}:{number}" for path, rows in files for number, problem in rows}

    @cached_property
    def _split(self) -> tuple[list[Problem], list[Problem], list[Problem]]:
        config = self.config
        problems, *others = ([problem for _, problem in rows] for rows in self._rows)
        held_out = others[0] if others else []
        needed = config.probe_size + (0 if held_out else config.eval_size)
        if len(problems) <= needed:
            raise UserError(
                f"{config.path} has {len(problems)} problems, of which {needed} would be held out: "
                "lower task.probe_size and task.eval_size, or add problems"
            )
        order = np.random.default_rng(derive_seed(config.split_seed, "split")).permutation(len(problems))
        shuffled = [problems[index] for index in order]
        probe, rest = shuffled[: config.probe_size], shuffled[config.probe_size :]
        if not held_out:
            held_out, rest = rest[: config.eval_size], rest[config.eval_size :]
        check_disjoint({"train": rest, "probe": probe, "evaluation": held_out})
        return rest, probe, held_out


def read_problems(path: Path, config: JsonlConfig) -> list[Problem]:
    """Read and validate a file. UserError naming every defect (at most ten) by line and field."""
    return [problem for _, problem in read_rows(path, config)]


def read_rows(path: Path, config: JsonlConfig) -> list[tuple[int, Problem]]:
    """Return what `read_problems` does with the number of each line."""
    problems: list[tuple[int, Problem]] = []
    defects: list[str] = []
    lines_of: dict[str, int] = {}
    lines_of_content: dict[str, int] = {}
    for number, line in _lines(path, config.max_line_bytes):
        try:
            problem = _problem(line, number, config)
            if problem.id in lines_of:
                raise UserError(f"id {problem.id!r} stands in line {lines_of[problem.id]} already: make ids unique")
            content = content_of(problem)
            if content in lines_of_content:
                raise UserError(
                    f"field {config.columns.problem!r} repeats line {lines_of_content[content]}: remove one of them"
                )
        except UserError as error:
            defects.append(f"{path}:{number}: {error}")
            if len(defects) == _MOST_DEFECTS:
                break
            continue
        lines_of[problem.id] = lines_of_content[content] = number
        problems.append((number, problem))
    if defects:
        raise UserError("\n".join(defects))
    if not problems:
        raise UserError(f"{path} holds no problem: write one JSON object with problem and solution a line")
    return problems


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
        raise UserError(f"{path} cannot be read ({error.strerror}): give the path of a JSONL file") from error


def _problem(line: bytes, number: int, config: JsonlConfig) -> Problem:
    """Turn a line into a problem, or say what is wrong with it."""
    if len(line.rstrip(b"\r\n")) > config.max_line_bytes:
        raise UserError(f"line longer than {config.max_line_bytes} bytes: shorten it, or raise task.max_line_bytes")
    try:
        row = json.loads(line.decode("utf-8-sig"), parse_constant=_refuse)
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 at byte {error.start} of the line: save the file as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"not JSON ({error}): write one complete object a line") from error
    if not isinstance(row, dict):
        raise UserError(f'a {type(row).__name__} where an object was expected: write {{"problem": ..., ...}}')
    columns = config.columns
    found = Problem(
        id=_text(row, columns.id, default=str(number)),
        problem=_text(row, columns.problem),
        solution=_text(row, columns.solution),
        answer=_text(row, columns.answer, default=""),
        level=_text(row, columns.level, default=""),
    )
    answer = (found.answer or "").strip() or extract_answer(found.solution)
    if answer is None and config.on_missing_answer == "error":
        raise UserError(
            f"field {columns.solution!r} states no answer in \\boxed{{}} or after ####: add field "
            f'{columns.answer!r}, or set task.on_missing_answer = "keep"'
        )
    return replace(found, answer=answer)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON number")


def _text(row: dict[str, Any], field: str, *, default: str | None = None) -> str:
    """Return a field as text; numbers become text where the field is optional."""
    value = row.get(field)
    if value is None:
        if default is None:
            names = ", ".join(map(repr, row)) or "none"
            raise UserError(f"field {field!r} is missing (fields here: {names}): add it, or name yours in task.columns")
        return default
    if default is not None and isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise UserError(f"field {field!r} is too large a number: write it as text")
        return str(value)
    if not isinstance(value, str):
        raise UserError(f"field {field!r} is a {type(value).__name__}, expected text: quote it")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise UserError(f"field {field!r} holds half of a surrogate pair: write the whole character")
    if default is None and not value.strip():
        raise UserError(f"field {field!r} is empty: fill it, or remove the line")
    return value
