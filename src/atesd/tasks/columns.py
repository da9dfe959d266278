"""From a row of a table or file to a problem: which column holds what, chat-style rows, GSM8K's annotations."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field

from atesd.rewards.answer import extract_answer
from atesd.tasks.base import TaskMethod
from atesd.types import Config, Problem, UserError

# What GSM8K puts behind a sum: `48/2 = <<48/2=24>>24`. Only arithmetic, so that no shift or template is taken for it.
_ANNOTATION = re.compile(r"<<[\d\s.,+\-*/()%$=]*=[\d\s.,+\-*/()%$=]*>>")
_ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}
_RESERVED = ("prompts", "completions", "answer", "solution", "id")


class Columns(Config):
    """Names of the columns (fields) in a row."""

    problem: str = "problem"
    """What is asked."""
    solution: str = "solution"
    """The worked reference solution."""
    answer: str = "answer"
    """The final answer; without it, or where it names the solution's own column (GSM8K), the answer is found in
    `\\boxed{}` or after `####` in the solution."""
    id: str = "id"
    """A unique name; without it the number of the line or row serves."""
    level: str = "level"
    """A difficulty, for reports."""
    messages: str | None = None
    """A chat in place of problem and solution: one message of the user, then one of the assistant."""
    extra: tuple[str, ...] | None = None
    """Further columns that reach reward functions; unset, all that the row has."""


class RowsMethod(TaskMethod):
    """What all tasks made of rows have in common: columns, sets, filters."""

    probe_size: Annotated[int, Field(ge=0)] = 32
    """Problems split off to measure progress."""
    eval_size: Annotated[int, Field(ge=0)] | Literal["all"] = 64
    """Problems split off for evaluation where no other source is named for it. `all`: none is left to train on, as
    `atesd eval --task FILE` has it."""
    split_seed: Annotated[int, Field(ge=0)] = 0
    """Fixes the split; it does not follow the run's seed, so that all runs hold out the same problems."""
    columns: Columns = Columns()
    """Names of the fields."""
    on_missing_answer: Literal["error", "keep"] = "error"
    """A solution without a recognisable answer is an error, or kept as not gradable."""
    on_bad_row: Literal["error", "drop"] = "error"
    """A row with a defect (a text missing, empty or repeated) is an error, or left out; a warning counts them."""
    calculator: Literal["strip", "keep"] = "strip"
    """GSM8K's calculator annotations `<<48/2=24>>` are taken out of solutions, or kept."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Read only so many rows from the beginning of each source."""
    max_problem_chars: Annotated[int, Field(ge=1)] | None = None
    """Leave out problems with a longer text; a warning counts them."""
    min_solution_chars: Annotated[int, Field(ge=1)] | None = None
    """Leave out problems with a shorter solution."""
    max_solution_chars: Annotated[int, Field(ge=1)] | None = None
    """Leave out problems with a longer solution."""
    max_line_bytes: Annotated[int, Field(ge=1)] = 1_000_000
    """Longest line of a JSON Lines file that is read."""


def problem_of(
    row: Mapping[str, Any], number: int, rules: RowsMethod, *, word: str = "field", solved: bool = True
) -> Problem:
    """Turn a row into a problem. UserError says what is wrong with it, by column (`word` is what rows call it).

    `solved` says whether a solution is needed; benchmarks do without.
    """
    columns = rules.columns
    if columns.messages is not None:
        problem, solution = _chat(row, columns.messages, word)
    else:
        problem = _text(row, columns.problem, word=word)
        solution = _text(row, columns.solution, word=word, default=None if solved else "")
    given = "" if columns.answer == columns.solution else _text(row, columns.answer, word=word, default="")
    answer = given.strip() or extract_answer(solution)
    if answer is None and rules.on_missing_answer == "error":
        raise UserError(_no_answer(columns, word) if solved else f"{word} {columns.answer!r} is empty: fill it")
    found = Problem(
        id=_text(row, columns.id, word=word, default=str(number)),
        problem=problem,
        solution=_ANNOTATION.sub("", solution) if rules.calculator == "strip" else solution,
        answer=answer,
        level=_text(row, columns.level, word=word, default=""),
    )
    return replace(found, extra=_extra(row, columns, word))


def missing_columns(names: Sequence[str], rules: RowsMethod, *, solved: bool = True) -> str | None:
    """Say which needed columns a table with these names lacks, and what to do; None where it has them."""
    columns = rules.columns
    needed = (
        [columns.messages] if columns.messages else [columns.problem, columns.solution if solved else columns.answer]
    )
    needed += columns.extra or ()
    lacking = [name for name in needed if name not in names]
    if not lacking:
        return None
    what = f"column{'s' if len(lacking) > 1 else ''} {' and '.join(map(repr, lacking))}"
    return f"has no {what} (columns here: {', '.join(map(repr, names)) or 'none'}): {_remedy(names, columns)}"


def unmet_column(names: Collection[str], rules: RowsMethod, word: str) -> str | None:
    """Say which column that need not be there was named, but is in no row; None where each is in one at least."""
    columns, usual = rules.columns, Columns()
    named = [(key, getattr(columns, key)) for key in ("answer", "id", "level") if getattr(columns, key)]
    named = [(key, name) for key, name in named if name != getattr(usual, key)]
    named += [("extra", name) for name in columns.extra or ()]
    for key, name in named:
        if name not in names:
            here = ", ".join(map(repr, sorted(names)))
            return f"has no {word} {name!r} in any row ({word}s here: {here}): mend task.columns.{key}, or leave it out"
    return None


def has_system_message(row: Mapping[str, Any], columns: Columns) -> bool:
    """Tell whether a chat-style row holds a system message, which is no part of the problem."""
    messages = row.get(columns.messages) if columns.messages else None
    return isinstance(messages, list) and any(_role(message) == "system" for message in messages)


def _remedy(names: Sequence[str], columns: Columns) -> str:
    """Say how to name other columns, with the names of well-known layouts where the row has them."""
    if columns.messages is None and "problem" not in names:
        for name in ("messages", "conversations"):
            if name in names:
                return f"for chats set task.columns.messages={name}, or name yours in task.columns"
        if {"question", "answer"} <= set(names):
            return "name yours in task.columns, such as task.columns.problem=question task.columns.solution=answer"
    separator = next((sign for sign in ";\t|" if len(names) == 1 and sign in names[0]), None)
    if separator:
        return f"the header is one column with {separator!r} in it: save the table with commas, or as .tsv with tabs"
    return "add it, or name yours in task.columns"


def _no_answer(columns: Columns, word: str) -> str:
    return (
        f"{word} {columns.messages or columns.solution!r} states no answer in \\boxed{{}} or after ####: add {word} "
        f'{columns.answer!r}, or set task.on_missing_answer = "keep"'
    )


def _extra(row: Mapping[str, Any], columns: Columns, word: str) -> dict[str, Any]:
    """Return the further columns of a row, for reward functions."""
    used = {columns.problem, columns.solution, columns.answer, columns.id, columns.level, columns.messages}
    names = [name for name in row if name not in used] if columns.extra is None else columns.extra
    found = {name: row.get(name) for name in names}
    taken = [name for name in found if name in _RESERVED]
    if taken:
        raise UserError(
            f"{word} {taken[0]!r} has the name of an argument that reward functions get anyway: rename it, or list "
            "the further ones in task.columns.extra"
        )
    return found


def _chat(row: Mapping[str, Any], name: str, word: str) -> tuple[str, str]:
    """Return what the user asks and the assistant answers. Roles may stand in `role` or, as ShareGPT has it, `from`."""
    messages = row.get(name)
    if messages is None:
        names = ", ".join(map(repr, row)) or "none"
        raise UserError(f"{word} {name!r} is missing ({word}s here: {names}): add it, or name yours in task.columns")
    if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
        raise UserError(f"{word} {name!r} is no list of messages: write [{{role, content}}, ...]")
    roles = [_role(message) for message in messages]
    spoken = [role for role in roles if role != "system"]
    if spoken != ["user", "assistant"]:
        shown = ", ".join(map(str, roles)) or "none"
        raise UserError(
            f"{word} {name!r} holds messages by {shown}: one by the user, then one by the assistant is read"
        )
    texts = [message for message, role in zip(messages, roles, strict=True) if role != "system"]
    return _content(texts[0], name, word), _content(texts[1], name, word)


def _role(message: Any) -> str:
    role = message.get("role", message.get("from")) if isinstance(message, Mapping) else None
    return _ROLES.get(str(role), str(role))


def _content(message: Mapping[str, Any], name: str, word: str) -> str:
    key = "content" if "content" in message else "value"
    try:
        return _text(message, key, word="key")
    except UserError as error:
        raise UserError(f"{word} {name!r}, message by {_role(message)}: {error}") from error


def _text(row: Mapping[str, Any], name: str, *, word: str, default: str | None = None) -> str:
    """Return a field as text; numbers become text where the field is optional."""
    value = row.get(name)
    if value is None:
        if default is None:
            names = ", ".join(map(repr, row)) or "none"
            what = "is empty" if name in row else f"is missing ({word}s here: {names})"
            remedy = "fill it, or remove the row" if name in row else _remedy(list(row), Columns())
            raise UserError(f"{word} {name!r} {what}: {remedy}")
        return default
    if default is not None and isinstance(value, int | float) and not isinstance(value, bool):
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{word} {name!r} is too large a number, or none: write it as text")
        # A column with gaps makes floats of whole numbers in Parquet and pandas; larger ones are not exact as floats.
        return f"{value:.0f}" if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else str(value)
    if not isinstance(value, str):
        is_chat = isinstance(value, list) and any(isinstance(each, Mapping) and "role" in each for each in value)
        remedy = "write its texts as columns, or a whole chat as task.columns.messages" if is_chat else "quote it"
        raise UserError(f"{word} {name!r} is a {'chat' if is_chat else type(value).__name__}, expected text: {remedy}")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise UserError(f"{word} {name!r} holds half of a surrogate pair: write the whole character")
    if default is None and not value.strip():
        raise UserError(f"{word} {name!r} is empty: fill it, or remove the line")
    return value
