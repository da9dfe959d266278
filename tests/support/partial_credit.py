"""A reward with fractions and refusals, in TRL's signature.

It is the share of a solution's lines that a completion begins with. Problems that start with 5 cannot be graded, nor
completions with a 9 in their first line.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def score(
    prompts: Sequence[str], completions: Sequence[str], *, solution: Sequence[str], **_: Any
) -> list[float | None]:
    """Return one reward a completion."""
    return [credit(*row) for row in zip(prompts, completions, solution, strict=True)]


def credit(problem: str, completion: str, solution: str) -> float | None:
    """Return the share of leading lines that are right, or None."""
    wanted, given = solution.split("\n"), completion.split("\n")
    if problem[0] == "5" or "9" in given[0]:
        return None
    right = 0
    while right < len(wanted) and given[right : right + 1] == wanted[right : right + 1]:
        right += 1
    return right / len(wanted)
