"""Reveal an expert's trajectory in turns: METHOD's agentic exposure, the reveal of ATESD (2605.11458) with turns.

k = floor(ratio * m + 1e-9) of m turns, from the first on; the goal stays, as a final answer does (prompt.py)
"""

from __future__ import annotations

from itertools import accumulate
from math import floor
from typing import ClassVar, Literal

from atesd.exposure.reveal import Reveal, check_ratio
from atesd.exposure.revealer import Revealer, RevealMethod
from atesd.facts import RunFacts
from atesd.types import Problem, Stateless, Trajectory, UserError


class Turns(Stateless, RevealMethod):
    """The share of an expert's turns that the ratio says, from the first on; for tasks in an environment."""

    kind: Literal["turns"] = "turns"

    reads_rollout: ClassVar[bool] = False

    def describe(self) -> str:
        """Nothing to say: the exposure says how much."""
        return ""

    def build(self, run: RunFacts) -> Revealer:  # noqa: ARG002
        """Return the revealer."""
        return self

    def reveal(self, problem: Problem, ratio: float, rollout: Trajectory | None = None) -> Reveal:  # noqa: ARG002
        """Show the first turns. UserError where the problem has no expert."""
        return first_turns(problem, ratio)


def first_turns(problem: Problem, ratio: float) -> Reveal:
    """Show the first floor(ratio m + 1e-9) of m turns of the expert."""
    check_ratio(ratio)
    if not problem.expert:
        raise UserError(
            f'reveal.kind = "turns" shows an expert\'s turns, but problem {problem.id!r} has no expert: take a task in '
            'an environment that has (docs/agents.md), or reveal.kind = "segments"'
        )
    total = len(problem.expert)
    shown = floor(ratio * total + 1e-9)
    ends = [0, *accumulate(len(turn.text) for turn in problem.expert)]
    hidden = ((ends[shown], ends[-1]),) if shown < total else ()
    return Reveal(problem.solution[: ends[shown]], ratio, shown, total, hidden)
