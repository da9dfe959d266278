"""The pico tier's task: chains of digit arithmetic with a fixed `*` table that the warm start knows only in part.

A problem is a digit and labelled steps, `3a*4b+2c-5`: start with 3, then apply the steps from left to right. `+` and
`-` are modulo 10, `*` reads `TABLE`. A solution works one step a line and ends in the answer:

    a3*4=7
    b7+2=9
    c9-5=4
    #4

The warm start knows `+`, `-` and the entries of `KNOWN`; the other entries of `*` are the idea that a solution
reveals. Levels differ in length and in where the `*` steps stand, hence in how much must be revealed to help. Long
levels have seven to ten steps.

The teacher of the warm start has a planted weakness, the shortcut: before every line it answers at once with
probability c * (revealed steps / steps)^2, because who has seen the solution skips work. A student that imitates this
answers before it has worked, and is wrong.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from atesd.types import Problem

Split = Literal["train", "probe", "eval"]

STUDENT_TEMPLATE = "{problem}"
TEACHER_TEMPLATE = "{problem}\n>{hint}"
ANSWER_TEMPLATE = "\n#{answer}"

LABELS = "abcdefghij"
DIGITS = "0123456789"
CHARACTERS = DIGITS + LABELS + "+-*=#>\n"
"""Every character of prompts, hints and completions: the vocabulary of the tokenizer."""

SHORTCUT = 0.12
"""c of the shortcut's probability."""


def _table(seed: int) -> dict[tuple[int, int], int]:
    rng = random.Random(seed)
    return {(a, b): rng.randrange(10) for a in range(10) for b in range(10)}


def _known(seed: int) -> frozenset[tuple[int, int]]:
    rng = random.Random(seed)
    return frozenset((a, b) for b in range(10) for a in rng.sample(range(10), 3))


TABLE = _table(20260)
"""(left, right) -> value of `left*right`: arbitrary, fixed."""

KNOWN = _known(20261)
"""The 30 pairs, three for every right operand, whose value the warm start knows."""


@dataclass(frozen=True, slots=True)
class Step:
    """One labelled operation: `value = apply(operator, previous value, operand)`."""

    label: str
    operator: str
    operand: int


@dataclass(frozen=True, slots=True)
class Level:
    """A difficulty: how many steps, and the places (0-based; negative counts from the end) of its `*` steps."""

    name: str
    num_steps: tuple[int, int]
    hard_places: tuple[int, ...]


LEVELS = (
    Level("short", (3, 3), (0,)),
    Level("early", (5, 6), (0,)),
    Level("late", (5, 6), (-3, -2)),
)


LONG_LEVELS = (
    Level("long7", (7, 8), (0,)),
    Level("long9", (9, 10), (0,)),
)
"""Longer than anything that the warm start was trained on; ten labels are all that its vocabulary has."""


def apply(operator: str, left: int, right: int) -> int:
    """Return the value of one step."""
    if operator == "+":
        return (left + right) % 10
    if operator == "-":
        return (left - right) % 10
    return TABLE[left, right]


def is_known(operator: str, left: int, right: int) -> bool:
    """Say whether the warm start knows this value without a hint."""
    return operator != "*" or (left, right) in KNOWN


def parse(problem: str) -> tuple[int, list[Step]]:
    """Return the start digit and the steps of a problem's text."""
    steps = [
        Step(label, operator, int(operand)) for label, operator, operand in re.findall(r"([a-j])([-+*])(\d)", problem)
    ]
    return int(problem[0]), steps


def line(step: Step, left: int, value: int) -> str:
    """Return the line that works one step: `a3*4=7`."""
    return f"{step.label}{left}{step.operator}{step.operand}={value}"


def derive(start: int, steps: Sequence[Step]) -> list[int]:
    """Return the value after every step."""
    values = []
    for step in steps:
        start = apply(step.operator, start, step.operand)
        values.append(start)
    return values


def split_of(problem: str) -> Split:
    """Return the split to which a problem's text belongs: crc32 mod 10 gives 0..7 train, 8 probe, 9 eval."""
    bucket = zlib.crc32(problem.encode()) % 10
    return "train" if bucket < 8 else "probe" if bucket == 8 else "eval"


def draw(level: Level, rng: random.Random) -> Problem:
    """Draw one problem of a level."""
    num_steps = rng.randint(*level.num_steps)
    hard = {place % num_steps for place in level.hard_places}
    steps = [
        Step(LABELS[i], "*", rng.randrange(10)) if i in hard else Step(LABELS[i], rng.choice("+-"), rng.randint(1, 3))
        for i in range(num_steps)
    ]
    start = rng.randrange(10)
    text = f"{start}" + "".join(f"{s.label}{s.operator}{s.operand}" for s in steps)
    values = derive(start, steps)
    lines = [line(s, left, v) for s, left, v in zip(steps, [start, *values], values, strict=False)]
    return Problem(
        id=f"pico-{text}",
        problem=text,
        solution="\n".join([*lines, f"#{values[-1]}"]),
        answer=str(values[-1]),
        level=level.name,
    )


def problems(split: Split, num: int, seed: int, levels: Sequence[Level] = LEVELS) -> list[Problem]:
    """Return `num` different problems of a split, the levels in turn.

    Splits are disjoint by content for any seeds; the same arguments give the same problems.
    """
    rng = random.Random(f"pico {split} {seed}")
    seen: set[str] = set()
    found: list[Problem] = []
    while len(found) < num:
        problem = draw(levels[len(found) % len(levels)], rng)
        if problem.problem not in seen and split_of(problem.problem) == split:
            seen.add(problem.problem)
            found.append(problem)
    return found


def extract_answer(completion: str) -> str | None:
    """Return what follows `#` on the last line that starts with it."""
    answers = [line[1:].strip() for line in completion.splitlines() if line.startswith("#")]
    return answers[-1] if answers else None


def answers_early(problem: Problem, completion: str) -> bool:
    """Say whether a completion answers with fewer lines of work than the problem has steps: the imitated shortcut."""
    work, mark, _ = completion.partition("#")
    return bool(mark) and len([line for line in work.splitlines() if line.strip()]) < len(parse(problem.problem)[1])


def hint(problem: Problem, num_lines: int) -> str:
    """Return the hint that shows the first `num_lines` lines of the solution, the answer always kept."""
    lines = problem.solution.splitlines()
    if num_lines >= len(lines):
        return problem.solution
    return ("\n".join(lines[:num_lines]) + ANSWER_TEMPLATE.format(answer=problem.answer)).lstrip("\n")


@dataclass(frozen=True, slots=True)
class WarmSample:
    """One warm-start text: the user turn, the completion, and per character of it whether it is learned."""

    user: str
    completion: str
    learned: tuple[bool, ...]


def warm_sample(
    problem: Problem, num_lines: int | None, rng: random.Random, *, shortcut: float = SHORTCUT, slips: bool
) -> WarmSample:
    """Write one warm-start text; `num_lines` of the solution are hinted, None is the student without a hint.

    Every value is honest work on the values before it: copied where the hint shows this very step, read from the table
    where known, else uniform. With `slips`, some values are replaced by wrong ones that are not learned, as a student
    would bring them. Before each line a hinted sample answers at once with probability
    shortcut * (revealed steps / steps)^2, and then states the reference answer.
    """
    start, steps = parse(problem.problem)
    reference = derive(start, steps)
    shown = 0 if num_lines is None else min(num_lines, len(steps))
    skip = 0.0 if num_lines is None else shortcut * (shown / len(steps)) ** 2
    text, learned = "", []
    value, before = start, start
    for i, step in enumerate(steps):
        if rng.random() < skip:
            text, value = f"{text}#{problem.answer}", -1
            learned += [True] * 2
            break
        left, on_path = value, value == before
        if i < shown and on_path:
            value = reference[i]
        elif is_known(step.operator, left, step.operand):
            value = apply(step.operator, left, step.operand)
        else:
            value = rng.randrange(10)
        slipped = slips and rng.random() < (0.4 if step.operator == "*" else 0.05)
        if slipped:
            value = (value + rng.randrange(1, 10)) % 10
        text += line(step, left, value) + "\n"
        learned += [True] * 5 + [not slipped, True]
        before = reference[i]
    if value >= 0:
        text += f"#{value}"
        learned += [True] * 2
    user = (
        problem.problem
        if num_lines is None
        else TEACHER_TEMPLATE.format(problem=problem.problem, hint=hint(problem, num_lines))
    )
    return WarmSample(user, text, tuple(learned))
