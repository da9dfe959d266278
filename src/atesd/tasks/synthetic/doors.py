"""The pico tier's task in several turns: doors in a row, each behind a lock that only a look shows.

A problem names its doors and the goal behind them, `adg#`. The student reads the door before it and replies:

    a       the door            *    look at its lock
    a4      the lock, seen      7    try a key; the right one is KEYS[door, lock]
    a-      the wrong key, the door stays shut; the number of turns is limited
    d       the next door, and so on; behind the last one is the goal

So what is observed matters: no text tells the locks, and without a look a key is a guess among ten. The warm start
knows the keys of 30 of the 100 pairs of door and lock; the others are what an expert's trajectory reveals, `a*`, `a47`,
`d*`, `d21`: in every turn what the expert read and did.

The teacher of the warm start has a planted weakness, the shortcut: where its hint shows a door's key it does not look
with probability c * (revealed turns / turns)^2, because who was told the key needs no look. A student that imitates
this tries keys blindly.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from atesd.types import ExpertTurn, Problem

Split = Literal["train", "probe", "eval"]

STUDENT_TEMPLATE = "{problem}"
TEACHER_TEMPLATE = "{problem}\n>{hint}"
ANSWER_TEMPLATE = "\n{answer}"

DOORS = "abcdefghij"
GOAL = "#"
LOOK, SHUT = "*", "-"
NUM_DOORS = {"three": 3, "four": 4}
"""Levels: how many doors."""

SHORTCUT = 0.9
"""c of the shortcut's probability."""
LOOKS = 0.8
"""How often the warm start looks at a lock, without a hint."""
GUESSES = 0.3
"""Share of the guessed keys of warm-start conversations that are learned."""


def _keys(seed: int) -> dict[tuple[str, int], int]:
    rng = random.Random(seed)
    return {(door, lock): rng.randrange(10) for door in DOORS for lock in range(10)}


def _known(seed: int) -> frozenset[tuple[str, int]]:
    rng = random.Random(seed)
    return frozenset((door, lock) for lock in range(10) for door in rng.sample(DOORS, 3))


KEYS = _keys(30260)
"""(door, lock) -> the key that opens it: arbitrary, fixed."""

KNOWN = _known(30261)
"""The 30 pairs, three for every lock, whose key the warm start knows."""


def locks_of(text: str) -> list[int]:
    """Return the locks of a problem's doors: they follow from its text, by a hash that nobody can guess."""
    rng = random.Random(zlib.crc32(f"locks of {text}".encode()))
    return [rng.randrange(10) for _ in text.removesuffix(GOAL)]


def split_of(text: str) -> Split:
    """Return the split to which a problem's text belongs: crc32 mod 10 gives 0..7 train, 8 probe, 9 eval."""
    bucket = zlib.crc32(text.encode()) % 10
    return "train" if bucket < 8 else "probe" if bucket == 8 else "eval"


def problem_of(text: str, level: str = "") -> Problem:
    """Return the problem of a row of doors, with the expert's trajectory, which looks before it tries a key."""
    rows = [(door, lock, KEYS[door, lock]) for door, lock in zip(text, locks_of(text), strict=False)]
    expert: list[ExpertTurn] = []
    for place, (door, lock, key) in enumerate(rows):
        end = "\n" if place + 1 < len(rows) else ""
        expert += [ExpertTurn(LOOK, f"{door}{LOOK}\n"), ExpertTurn(str(key), f"{door}{lock}{key}{end}")]
    return Problem(
        id=f"doors-{text.removesuffix(GOAL)}",
        problem=text,
        solution="".join(turn.text for turn in expert),
        answer=GOAL,
        level=level,
        extra={"doors": [list(row) for row in rows]},
        expert=tuple(expert),
    )


def draw(level: str, rng: random.Random) -> Problem:
    """Draw one problem of a level; no door occurs twice."""
    return problem_of("".join(rng.sample(DOORS, NUM_DOORS[level])) + GOAL, level)


def problems(split: Split, num: int, seed: int) -> list[Problem]:
    """Return up to `num` different problems of a split, the levels in turn while they last.

    Splits are disjoint by content for any seeds; the same arguments give the same problems.
    """
    rng = random.Random(f"doors {split} {seed}")
    seen: set[str] = set()
    found: list[Problem] = []
    levels = list(NUM_DOORS)
    while len(found) < num:
        problem = draw(levels[len(found) % len(levels)], rng)
        if problem.problem not in seen and split_of(problem.problem) == split:
            seen.add(problem.problem)
            found.append(problem)
    return found


def hint(problem: Problem, num_turns: int) -> str:
    """Return the hint that shows the first `num_turns` turns of the expert, the goal always kept."""
    if num_turns >= len(problem.expert):
        return problem.solution
    visible = "".join(turn.text for turn in problem.expert[:num_turns]).rstrip()
    goal = ANSWER_TEMPLATE.format(answer=problem.answer)
    return visible + goal if visible else goal.lstrip()


@dataclass(frozen=True, slots=True)
class WarmTurn:
    """One turn of a warm-start conversation: what the student reads, what it replies, and whether that is learned."""

    read: str
    reply: str
    learned: bool


def warm_conversation(
    problem: Problem, num_turns: int | None, rng: random.Random, limit: int, *, shortcut: float = SHORTCUT, slips: bool
) -> list[WarmTurn]:
    """Play one warm-start conversation; `num_turns` of the expert's turns are hinted, None is without a hint.

    Every key is honest: that of the hint where it shows this door's, else the known one where the lock was seen, else
    uniform; after a wrong key another one. Guesses teach little but noise: `GUESSES` of them are learned. With `slips`
    some replies are a student's that are not learned: a key without a look, or a wrong one.
    """
    shown = 0 if num_turns is None else num_turns
    skip = shortcut * min(1.0, shown / len(problem.expert)) ** 2
    user = (
        problem.problem
        if num_turns is None
        else TEACHER_TEMPLATE.format(problem=problem.problem, hint=hint(problem, shown))
    )
    rows: Sequence[tuple[str, int, int]] = [
        (str(door), int(lock), int(key)) for door, lock, key in problem.extra["doors"]
    ]
    turns: list[WarmTurn] = []

    def say(read: str, reply: str, learned: bool) -> None:
        turns.append(WarmTurn(f"{user}\n{read}" if not turns else read, reply, learned))

    for place, (door, lock, key) in enumerate(rows):
        told = shown >= 2 * place + 2
        seen, tried, read = False, set[int](), door
        while len(turns) < limit:
            slipped = slips and rng.random() < 0.25
            if not seen and not tried:
                look = rng.random() < (1 - skip if told else LOOKS)
                if slipped:
                    look = rng.random() < 0.5
                if look:
                    say(read, LOOK, not slipped)
                    seen, read = True, f"{door}{lock}"
                    continue
            options = [each for each in range(10) if each not in tried]
            best = key if told or (seen and (door, lock) in KNOWN) else None
            choice = best if best is not None and not slipped else rng.choice(options)
            say(read, str(choice), not slipped and (best is not None or rng.random() < GUESSES))
            if choice == key:
                break
            tried.add(choice)
            read = f"{door}{SHUT}"
    return turns
