"""What decides which part of the privileged context a teacher sees.

A revealer answers one question on top of the four verbs of every policy, so it may keep state, learn and be
checkpointed. It may cut a solution into segments, an expert's trajectory into turns, or choose words; and it may look
at the rollout that the teacher is about to score.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Protocol

from atesd.exposure.reveal import Reveal
from atesd.types import Method, Policy, Problem, Trajectory


class Revealer(Policy, Protocol):
    """Turns an exposure ratio into what is visible of a problem's solution."""

    def reveal(self, problem: Problem, ratio: float, rollout: Trajectory | None = None) -> Reveal:
        """Return what the teacher sees at a ratio in [0, 1]; 1 bounds it from above.

        `rollout` is the attempt to be scored; None where there is none: prompts that are shown or measured. The
        result's `ratio` is the share in force, at most the one asked for.
        """
        ...


class RevealMethod(Method):
    """Base of revealers' sections."""

    declares: ClassVar[tuple[str, ...]] = ("reads_rollout", "describe", "build")
    """`reads_rollout`: whether the share in force is known only after the rollout."""

    def warning(self, solutions: Sequence[str]) -> str | None:  # noqa: ARG002
        """Return what to warn of before step 0, seeing the training problems' solutions; None for nothing."""
        return None
