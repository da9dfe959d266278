"""Reveals by segments of the solution: what revealers share that cut it, and the plain one (ATESD 2605.11458)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal

from atesd.exposure.reveal import Order, Reveal, Unit, reveal, segmentation_warning
from atesd.exposure.revealer import Revealer, RevealMethod
from atesd.facts import RunFacts
from atesd.types import Problem, Stateless, Trajectory


class Cut(Stateless, RevealMethod):
    """Base of revealers without state that show some of a solution's segments: section and revealer at once."""

    unit: Unit = "auto"
    """What a segment is. `auto` is `line` for a solution with several non-empty lines, else `sentence`; `token` means
    words with the white space after them, not a tokenizer's tokens."""
    hidden_marker: str = ""
    """Text in place of each run of hidden segments, for instance `[...]`; empty leaves no trace (the paper)."""

    def build(self, run: RunFacts) -> Revealer:  # noqa: ARG002
        """Return the revealer."""
        return self

    def warning(self, solutions: Sequence[str]) -> str | None:
        """Warn of solutions that mostly make one segment."""
        return segmentation_warning(solutions, self.unit)

    def marked(self, problem: Problem) -> int:  # noqa: ARG002
        """Return how many runs of segments are hidden at most, whatever the ratio: as many markers has a hint."""
        return 1

    @abstractmethod
    def reveal(self, problem: Problem, ratio: float, rollout: Trajectory | None = None) -> Reveal:
        """Return what is visible."""

    def _shown(self, problem: Problem, ratio: float, order: Order = "prefix") -> Reveal:
        marker = self.hidden_marker
        return reveal(problem.solution, ratio, unit=self.unit, order=order, hidden_marker=marker, seed_key=problem.id)


class Segments(Cut):
    """The share of segments that the ratio says. Defaults: lines or sentences, from the start, no marker."""

    kind: Literal["segments"] = "segments"
    order: Order = "prefix"
    """Which segments are shown first: from the start (the paper), from the end, or in a fixed random order."""

    reads_rollout: ClassVar[bool] = False

    def describe(self) -> str:
        """Nothing to say."""
        return ""

    def marked(self, problem: Problem) -> int:
        """Return 1, or in a random order as many runs as can have visible segments between them."""
        return (self._shown(problem, 0.0).total + 1) // 2 if self.order == "random_segments" else 1

    def reveal(self, problem: Problem, ratio: float, rollout: Trajectory | None = None) -> Reveal:  # noqa: ARG002
        """Show that share of the segments, in the configured order."""
        return self._shown(problem, ratio, self.order)
