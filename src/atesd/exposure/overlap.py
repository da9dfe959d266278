"""PAINT's rule: show each sample the reference up to where its own rollout still follows it.

arXiv 2604.26573 masks a suffix of the solution by the overlap of rollout and reference. Only this half of it is here:
its interpolation of targets at tokens of mismatched entropy is left out, and its thresholds are not known to us. Ours:
1. reveal up to the last segment that shares an n-gram of words and signs with the rollout, plus `extra` segments; one
that is shorter than n counts as a whole, and one without any letter or digit, such as `\\]` on a line alone, never:
every rollout with a formula shares it; 2. the exposure bounds the share from above. Nothing is learned; the strong
baseline, with `exposure = {kind = "fixed"}` at ratio 1.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from atesd.exposure.reveal import Reveal, split_segments
from atesd.exposure.segments import Cut
from atesd.types import Problem, Trajectory

_WORD = re.compile(r"\w+|[^\w\s]")


class Overlap(Cut):
    """Segments from the start, for each sample by the overlap of rollout and reference (PAINT 2604.26573)."""

    kind: Literal["overlap"] = "overlap"
    n: Annotated[int, Field(ge=1)] = 8
    """Length of the shared n-gram, in words and signs."""
    extra: Annotated[int, Field(ge=0)] = 1
    """Segments revealed beyond the last shared one."""

    reads_rollout: ClassVar[bool] = True

    def describe(self) -> str:
        """Name the rule."""
        return "each completion its own share: the solution up to where the completion still follows it (PAINT)"

    def reveal(self, problem: Problem, ratio: float, rollout: Trajectory | None = None) -> Reveal:
        """Show the overlap's share, at most the ratio; without a rollout, the ratio."""
        if rollout is not None:
            said = "\n".join(turn.text for turn in rollout.turns)
            ratio = min(ratio, self.share(problem.solution, said))
        return self._shown(problem, ratio)

    def share(self, solution: str, said: str) -> float:
        """Return the share of the solution that a text follows, plus the extra segments; more than 1 is possible.

        A segment of signs alone is never where a text was last seen to follow; it counts among the extra ones.
        """
        parts, spoken = split_segments(solution, self.unit), words(said)
        last = -1
        for index, part in enumerate(parts):
            own = words(part)
            n = min(self.n, len(own))
            if _says_something(part) and grams(own, n) & grams(spoken, n):
                last = index
        return (last + 1 + self.extra) / len(parts)


def words(text: str) -> list[str]:
    """Cut a text into words, numbers and single signs."""
    return _WORD.findall(text)


def _says_something(part: str) -> bool:
    return any(letter.isalnum() for letter in part)


def grams(tokens: Sequence[str], n: int) -> set[tuple[str, ...]]:
    """Return the n-grams."""
    return {tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)}
