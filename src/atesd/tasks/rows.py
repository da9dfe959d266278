"""Rows from anywhere become problems: defects by place, repeated ids and texts, filters, sets.

A source yields its rows in order, each with its number, counted from 1, or with what is wrong with it.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

from atesd.tasks.base import content_of
from atesd.tasks.columns import RowsMethod, has_system_message, problem_of, unmet_column
from atesd.types import Problem, UserError

_MOST_DEFECTS = 10

Numbered = tuple[int, Mapping[str, Any] | UserError]


@dataclass(frozen=True, slots=True)
class Source:
    """Where rows come from, and what its places are called."""

    name: str
    open: Callable[[], Iterator[Numbered]]
    unit: Literal["line", "row"] = "row"
    word: Literal["field", "column"] = "column"

    def place(self, number: int) -> str:
        """Return `mine.jsonl:3`, or `openai/gsm8k (main, train), row 3`."""
        return f"{self.name}:{number}" if self.unit == "line" else f"{self.name}, row {number}"


@dataclass(slots=True)
class _Reading:
    """What one pass over a source has found so far."""

    problems: list[tuple[str, Problem]] = field(default_factory=list)
    defects: list[str] = field(default_factory=list)
    bad: int = 0
    unfit: Counter[str] = field(default_factory=Counter)
    rows: int = 0
    system: int = 0
    ids: dict[str, int] = field(default_factory=dict)
    contents: dict[str, int] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)
    """Of all columns that a row had."""


def collect(source: Source, rules: RowsMethod, *, solved: bool = True) -> list[tuple[str, Problem]]:
    """Return a source's problems with their places.

    `solved` says whether solutions are needed and no text may be repeated; a benchmark is as it is.

    UserError naming every defect, at most ten, one a line; with `on_bad_row = "drop"`, and for the filters by length, a
    warning counts what is left out instead. UserError too where nothing is left, or a column that was named
    is in no row.
    """
    reading = _Reading()
    for number, row in islice(source.open(), rules.limit):
        reading.rows += 1
        try:
            _take(reading, source, number, row, rules, solved)
        except UserError as error:
            reading.bad += 1
            if len(reading.defects) < _MOST_DEFECTS:
                reading.defects.append(f"{source.place(number)}: {error}")
            if len(reading.defects) == _MOST_DEFECTS and rules.on_bad_row == "error":
                reading.defects.append(f"{source.name}: reading stopped here, and more may follow")
                break
    if reading.defects and rules.on_bad_row == "error":
        raise UserError("\n".join(reading.defects))
    unmet = unmet_column(reading.names, rules, source.word) if solved and reading.names else None
    if unmet:
        raise UserError(f"{source.name} {unmet}")
    left_out = _left_out(reading)
    if not reading.problems:
        remedy = "loosen the filters, or mend the rows" if left_out else _fill(source)
        raise UserError(f"{source.name} holds no problem{left_out and f' ({left_out})'}: {remedy}")
    if left_out:
        warnings.warn(f"{source.name}: {left_out}", stacklevel=2)
    if reading.system:
        warnings.warn(
            f"{source.name}: {reading.system} rows have a system message, which is left out: prompts are the recipe's",
            stacklevel=2,
        )
    return reading.problems


def _take(
    reading: _Reading, source: Source, number: int, row: Mapping[str, Any] | UserError, rules: RowsMethod, solved: bool
) -> None:
    """Add a row's problem. UserError says what is wrong with it."""
    if isinstance(row, UserError):
        raise row
    reading.names.update(row)
    problem = problem_of(row, number, rules, word=source.word, solved=solved)
    unfit = _unfit(problem, rules)
    if unfit:
        reading.unfit[unfit] += 1
        return
    if problem.id in reading.ids:
        raise UserError(f"id {problem.id!r} stands in {source.unit} {reading.ids[problem.id]} already: make ids unique")
    content = content_of(problem)
    if solved and content in reading.contents:
        name = rules.columns.messages or rules.columns.problem
        raise UserError(f"{source.word} {name!r} repeats {source.unit} {reading.contents[content]}: remove one of them")
    reading.ids[problem.id] = reading.contents[content] = number
    reading.system += has_system_message(row, rules.columns)
    reading.problems.append((source.place(number), problem))


def _unfit(problem: Problem, rules: RowsMethod) -> str | None:
    """Say which filter a problem does not pass."""
    asked, solved = len(problem.problem), len(problem.solution)
    if rules.max_problem_chars is not None and asked > rules.max_problem_chars:
        return f"with a problem longer than {rules.max_problem_chars} characters"
    if rules.max_solution_chars is not None and solved > rules.max_solution_chars:
        return f"with a solution longer than {rules.max_solution_chars} characters"
    if rules.min_solution_chars is not None and solved < rules.min_solution_chars:
        return f"with a solution shorter than {rules.min_solution_chars} characters"
    return None


def _left_out(reading: _Reading) -> str:
    """Say what is left out of the rows; empty where nothing is."""
    reasons = [f"{count} {reason}" for reason, count in sorted(reading.unfit.items())]
    if reading.bad:
        reasons.append(f"{reading.bad} with a defect, first {reading.defects[0]}")
    count = sum(reading.unfit.values()) + reading.bad
    return f"left out {count} of {reading.rows} rows: {'; '.join(reasons)}" if reasons else ""


def _fill(source: Source) -> str:
    if source.word == "field":
        return "write one JSON object with problem and solution a line"
    return "name one with rows"
