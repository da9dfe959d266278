"""What a problem's texts may not hold: spellings that a model reads as control, and the fences around a hint.

A solution that spells the end of a turn could close it, and one with the line by which the teacher's prompt closes the
hint could go on as if it were the prompt. Such rows are refused by name before a run begins.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, Protocol, runtime_checkable

from atesd.types import Problem, UserError

Field = Literal["problem", "solution", "answer"]
FIELDS: tuple[Field, ...] = ("problem", "solution", "answer")
Flaw = Callable[[str], str | None]
"""Says what is wrong with a text, None where nothing is."""

LOOKS_LIKE_CONTROL = re.compile(
    r"<[|\uff5c][^|\uff5c<>\n]{1,40}[|\uff5c]>"  # <|im_end|>, and DeepSeek's wide bars
    r"|</?s>|<(?:bos|eos|pad|unk|mask)>|<(?:start|end)_of_\w+>"
    r"|\[/?INST\]|<</?SYS>>|<extra_id_\d+>"
)
"""How well-known models spell their control tokens: for texts whose model is not known yet."""

_MOST_NAMED = 10
_MOST_READ = 100  # problems, spread over all: a tokenizer without a letter shows in any of them
_SHORTEST = 3  # characters of a fence


@runtime_checkable
class Placed(Protocol):
    """A task that knows where its problems come from."""

    def place(self, problem: Problem, field: Field) -> str:
        """Return where a field stands, such as `mine.jsonl:3: field 'solution'`."""
        ...


def fences(teacher: str) -> list[str]:
    """Return the texts that open and close the hint in a teacher's template: the nearest above and below `{hint}`.

    What stands before the hint on its own line introduces it, and is no fence; neither is a line with a placeholder.
    """
    above, hole, below = teacher.partition("{hint}")
    if not hole:
        return []
    before, _, introduction = above.rpartition("\n")
    opening = "" if introduction.strip() else _nearest(before.splitlines()[::-1])
    found = (opening, _nearest(below.splitlines()))
    return [fence for fence in found if len(fence) >= _SHORTEST and not re.search(r"\{\w+\}", fence)]


def fence_flaw(text: str, known: Sequence[str]) -> str | None:
    """Say which fence a text holds: as a line of its own, or anywhere where the fence is more than words."""
    lines = {line.strip() for line in text.splitlines()}
    for fence in known:
        if fence in lines or (fence in text and not re.fullmatch(r"[\w ]+[:.]?", fence)):
            return (
                f"holds {fence!r}, by which the teacher's prompt fences the hint: take it out, or fence hints "
                "otherwise in prompt.teacher"
            )
    return None


def flaws(task: object, sets: Mapping[str, Sequence[Problem]], flaw: Flaw, known: Sequence[str] = ()) -> Iterator[str]:
    """Yield one line for each text with a flaw or a fence, with set, problem, field and, where known, file and line."""
    for name, problems in sets.items():
        for problem in problems:
            for field in FIELDS:
                text = getattr(problem, field) or ""
                found = flaw(text) or fence_flaw(text, known)
                if found:
                    yield f"{place_of(task, name, problem, field)}: {found}"


def refuse_texts(task: object, sets: Mapping[str, Sequence[Problem]], flaw: Flaw, known: Sequence[str] = ()) -> None:
    """UserError naming what `flaws` finds, at most ten."""
    found = list(flaws(task, sets, flaw, known))
    if found:
        more = [f"and {len(found) - _MOST_NAMED} more"] if len(found) > _MOST_NAMED else []
        raise UserError("\n".join(found[:_MOST_NAMED] + more))


def unread(problems: Sequence[Problem], unknown: Callable[[str], Sequence[str]]) -> str | None:
    """Say what of the problems a tokenizer knows no token for, as `unknown` finds it in a text; None where nothing.

    The model reads all of it as one token, and cannot write it. Of many problems some are looked at.
    """
    looked = problems[:: -(-len(problems) // _MOST_READ) or 1]
    found = [dict.fromkeys([*unknown(each.problem), *unknown(each.solution)]) for each in looked]
    pieces = list(dict.fromkeys(piece for pieces in found for piece in pieces))
    if not pieces:
        return None
    named = ", ".join(map(repr, pieces[:_MOST_NAMED])) + (" ..." if len(pieces) > _MOST_NAMED else "")
    return (
        f"the model's tokenizer knows no token for {named}, which {sum(map(bool, found))} of {len(looked)} problems "
        "hold: the model reads and writes one sign for all of them; take a model whose vocabulary holds your texts"
    )


def overlong(
    sets: Mapping[str, Sequence[Problem]], tokens: Callable[[str], Sequence[int]], context: int | None
) -> str | None:
    """Say which problems a model's context cannot hold, whatever stands around them; None where it holds all.

    Of what is trained on and probed the solution counts, too, which the teacher reads.
    """
    if context is None:
        return None
    found: dict[str, int] = {}
    for name, problems in sets.items():
        for each in problems:
            length = len(tokens(each.problem)) + (0 if name == "evaluation" else len(tokens(each.solution)))
            found |= {each.id: length} if length > context else {}
    if not found:
        return None
    named = ", ".join(f"{name}: {length}" for name, length in list(found.items())[:_MOST_NAMED])
    return (
        f"{len(found)} problems have more tokens with their solutions than the model's context of {context} ({named}"
        f"{', ...' if len(found) > _MOST_NAMED else ''}), prompt and completion not counted: training refuses them, or "
        'leaves them out with step.overlong = "drop"'
    )


def place_of(task: object, name: str, problem: Problem, field: Field) -> str:
    """Return where a text stands, in a file or at least in which set and problem."""
    if isinstance(task, Placed):
        return task.place(problem, field)
    return f"{name} problem {problem.id!r}, {field}"


def control_look(text: str) -> str | None:
    """Say which spellings of a text look like control tokens."""
    found = list(dict.fromkeys(LOOKS_LIKE_CONTROL.findall(text)))
    return f"spells {', '.join(map(repr, found))}" if found else None


def _nearest(lines: Sequence[str]) -> str:
    return next((line.strip() for line in lines if line.strip()), "")
