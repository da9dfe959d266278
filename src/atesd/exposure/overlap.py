"""PAINT's rule: show each sample the reference up to where its own rollout still follows it.

arXiv 2604.26573 masks a suffix of the solution by the overlap of rollout and reference. Only this half of it is here:
its interpolation of targets at tokens of mismatched entropy is left out, and its thresholds are not known to us. Ours:
reveal up to the last segment that shares an n-gram of words and signs with the rollout, plus `extra` segments; one that
is shorter than n counts as a whole. Nothing is learned; the strong baseline.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from atesd.exposure.controller import Controller, RunFacts
from atesd.exposure.reveal import RevealConfig, split_segments
from atesd.exposure.schedules import Schedule
from atesd.types import Config

_WORD = re.compile(r"\w+|[^\w\s]")


class Overlap(Config):
    """Exposure per sample by the overlap of rollout and reference (PAINT 2604.26573)."""

    kind: Literal["overlap"] = "overlap"
    n: Annotated[int, Field(ge=1)] = 8
    """Length of the shared n-gram, in words and signs."""
    extra: Annotated[int, Field(ge=0)] = 1
    """Segments revealed beyond the last shared one."""

    def build(self, run: RunFacts) -> Controller:  # noqa: ARG002
        """Return a controller that proposes 1: the rule looks at each rollout itself."""
        return Schedule(lambda step: 1.0)  # noqa: ARG005

    def ratio(self, solution: str, rollout: str, reveal: RevealConfig) -> float:
        """Return the exposure ratio of one sample."""
        parts, said = split_segments(solution, reveal.unit), words(rollout)
        last = -1
        for index, part in enumerate(parts):
            own = words(part)
            n = min(self.n, len(own))
            if n and grams(own, n) & grams(said, n):
                last = index
        return min(1.0, (last + 1 + self.extra) / len(parts))


def words(text: str) -> list[str]:
    """Cut a text into words, numbers and single signs."""
    return _WORD.findall(text)


def grams(tokens: Sequence[str], n: int) -> set[tuple[str, ...]]:
    """Return the n-grams."""
    return {tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)}
