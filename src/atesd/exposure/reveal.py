"""The reveal operator: which part of a reference solution the teacher sees at an exposure ratio.

    segments r_1..r_m of y*,   k = floor(ratio * m + 1e-9),   reveal = concat(r_1..r_k)

ATESD, arXiv 2605.11458. Ours, where the paper is silent: 1. the segment units; 2. the 1e-9, because floats
give floor(.29 * 100) = 28; 3. the orders other than `prefix`; 4. the optional marker in place of what is hidden.
Everything works on text: units never depend on a tokenizer.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from math import floor
from statistics import median
from typing import Literal, get_args

from atesd.types import UserError

Unit = Literal["auto", "line", "sentence", "paragraph", "token"]
Order = Literal["prefix", "suffix", "random_segments"]

# Text in which no sentence may end. Dollars follow pandoc's rule, so that the prices in "pays $5. Then $6" are not a
# formula: no space after the opening sign, none before the closing one, and no digit behind it. Spans are bounded to
# keep hostile text (thousands of unclosed openings) cheap.
_BREAK = r"(?:\r\n?+|\n)"  # one line end, of Unix, Windows or an old Mac; never the halves of \r\n
_FORMULA = (
    r"\$\$.{1,4000}?\$\$"
    r"|\\\[.{1,4000}?\\\]|\\\(.{1,4000}?\\\)"
    r"|\\begin\{(?P<environment>[a-zA-Z]{1,20}\*?)\}.{0,4000}?\\end\{(?P=environment)\}"
    rf"|(?<!\\)\$(?=\S)(?:[^$\\\r\n]|\\(?:\r\n|.)|{_BREAK}(?!\s*[\r\n])){{1,2000}}?(?<=\S)\$(?!\d)"
)
_ABBREVIATION = r"\b(?:e\.g|i\.e|etc|cf|vs|resp|approx|Eqs?|Figs?|Thm|Lem|Prop|Cor|Dr|Mrs?|Ms|St|Prof)\."
_LIST_NUMBER = r"(?:^|[\r\n])[ \t]*(?:\d{1,3}|[a-zA-Z])\."
_EMPTY_LINE = rf"{_BREAK}[ \t]*{_BREAK}"
_STOP = rf"(?:(?<![.!?])[.!?]++[\"'\u201d\u2019)\]}}*_]*+(?=\s)|[\u3002\uff01\uff1f]++)|(?={_EMPTY_LINE}){_BREAK}"
_SCAN = re.compile(rf"(?P<formula>{_FORMULA})|(?P<skip>{_ABBREVIATION}|{_LIST_NUMBER})|(?P<stop>{_STOP})", re.DOTALL)
_FORMULA_STOP = re.compile(r"[.!?]\s*(?:\$\$?|\\\]|\\\)|\\end\{[a-zA-Z*]+\})$")
_SPACE = re.compile(r"\s*")


@dataclass(frozen=True, slots=True)
class Reveal:
    """The visible part of a solution at an exposure ratio: `shown` of `total` segments.

    `hidden_spans` are half-open character ranges of the solution that are not visible, in order and not adjacent.
    """

    text: str
    ratio: float
    """The share in force."""
    shown: int
    total: int
    hidden_spans: tuple[tuple[int, int], ...] = ()
    foreign: bool = False
    """Whether the text is no part of the solution, as a retrieved skill is: then it is never replaced by it."""
    masked: bool = False
    """Whether the text is the whole solution, of which attention reaches some tokens (`Masker`): one segment, counted
    as not shown."""

    @property
    def complete(self) -> bool:
        """Tell whether nothing is hidden."""
        return self.shown == self.total


def split_segments(solution: str, unit: Unit = "auto") -> list[str]:
    """Cut a solution into segments whose concatenation is the solution, character by character.

    Every segment has visible text and carries the white space that follows it. Sentences end at `.`, `!` or `?`
    before white space, or at an empty line; not inside formulas, at decimals, list numbers or common abbreviations.
    Lines end at a line feed, a carriage return, or both together (one end). UserError if the solution is empty.
    """
    if unit not in get_args(Unit):
        raise UserError(f"reveal unit {unit!r} is unknown; choose one of {', '.join(get_args(Unit))}")
    if not solution.strip():
        raise UserError("the reference solution is empty, so there is nothing to reveal; drop the row or fill it in")
    if unit == "auto":
        unit = "line" if sum(1 for line in re.split(r"[\r\n]", solution) if line.strip()) > 1 else "sentence"
    ends = {"line": _line_ends, "sentence": _sentence_ends, "paragraph": _paragraph_ends, "token": _word_ends}[unit]
    return _cut(solution, ends(solution))


@lru_cache(4096)
def _kept_segments(solution: str, unit: Unit) -> tuple[str, ...]:
    return tuple(split_segments(solution, unit))


def reveal(
    solution: str,
    ratio: float,
    *,
    unit: Unit = "auto",
    order: Order = "prefix",
    hidden_marker: str = "",
    seed_key: str = "",
) -> Reveal:
    """Show the first floor(ratio * m + 1e-9) of m segments, in the given order but at their own places.

    What is visible at a ratio stays visible at every larger one, in all orders; 0 shows nothing, 1 everything.
    With `random_segments` the order is fixed by `seed_key` (a problem's id) and the solution. A marker is followed by
    the white space that ended what it replaces. UserError if the ratio leaves [0, 1] or the solution is empty.
    """
    check_ratio(ratio)
    segments = _kept_segments(solution, unit)
    total = len(segments)
    shown = floor(ratio * total + 1e-9)
    visible = set(_order(total, order, f"{seed_key}\0{solution}")[:shown])
    text, hidden, position = "", [], 0
    for index, segment in enumerate(segments):
        if index in visible:
            text += segment
        elif index + 1 == total or index + 1 in visible:
            text += hidden_marker + segment[len(segment.rstrip()) :] if hidden_marker else ""
        if index not in visible:
            hidden.append((position, position + len(segment)))
        position += len(segment)
    return Reveal(text, ratio, shown, total, _merge(hidden))


def check_ratio(ratio: float) -> None:
    """Refuse a number that is no exposure ratio, NaN included."""
    if not 0.0 <= ratio <= 1.0:
        raise UserError(f"exposure ratio {ratio!r} is outside [0, 1]: 0 shows the answer only, 1 the whole solution")


def segmentation_warning(solutions: Sequence[str], unit: Unit = "auto") -> str | None:
    """Warn if more than half of the solutions make a single segment: every ratio below 1 then shows nothing of them.

    Names the coarsest unit with at least 4 segments in the median, else the finest one. Empty solutions are left out.
    """
    filled = [solution for solution in solutions if solution.strip()]
    single = sum(1 for solution in filled if len(split_segments(solution, unit)) == 1)
    if 2 * single <= len(filled):
        return None
    counts = {
        other: median(len(split_segments(solution, other)) for solution in filled)
        for other in ("paragraph", "line", "sentence", "token")
    }
    better: str = next((name for name, count in counts.items() if count >= 4), "token")
    remedy = f"choose unit {better!r} (median {counts[better]:g} segments)" if better != unit else "give longer ones"
    return (
        f"{single} of {len(filled)} solutions make one segment with unit {unit!r}, so any ratio below 1 hides them "
        f"wholly; {remedy}"
    )


def _cut(text: str, ends: Iterable[int]) -> list[str]:
    """Cut at the given places, leaving no segment without visible text."""
    places, last = [0], len(text.rstrip())
    for end in ends:
        if end < last and text[places[-1] : end].strip():
            places.append(end)
    return [text[start:end] for start, end in pairwise([*places, len(text)])]


def _line_ends(text: str) -> list[int]:
    return [match.end() for match in re.finditer(rf"{_BREAK}(?:[ \t]*{_BREAK})*", text)]


def _paragraph_ends(text: str) -> list[int]:
    return [match.end() for match in re.finditer(rf"{_EMPTY_LINE}\s*", text)]


def _word_ends(text: str) -> list[int]:
    return [match.end() for match in re.finditer(r"\S+\s*", text)]


def _sentence_ends(text: str) -> list[int]:
    ends = [0]
    for match in _SCAN.finditer(text):
        if match.start() < ends[-1]:
            continue  # inside the white space after the last end
        if match["stop"] or (match["formula"] and _FORMULA_STOP.search(match[0])):
            space = _SPACE.match(text, match.end())
            assert space is not None
            if space[0] or match["stop"]:
                ends.append(space.end())
    return ends


def _order(total: int, order: Order, seed_text: str) -> list[int]:
    """Return segment indices in the order in which they become visible."""
    indices = list(range(total))
    if order == "suffix":
        indices.reverse()
    elif order == "random_segments":
        random.Random(hashlib.sha256(seed_text.encode()).digest()).shuffle(indices)
    return indices


def _merge(spans: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Join ranges that touch."""
    merged: list[tuple[int, int]] = []
    for start, end in spans:
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((start, end))
    return tuple(merged)
