"""Exposure by what graded rollouts say: the candidate ratio whose step would raise the reward most (alignment.py).

Candidates are played as they are, never mixed: a hint shows whole segments, so that a ratio a little below a candidate
can hide what the candidate shows.

While rewards say nothing, as none was given or all were equal so far, the probe's NLL takes their place where there is
a probe. What was chosen by it is kept until a level's rewards speak.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from atesd.alignment import Credits
from atesd.exposure.window import HoldClock, is_idle, step_counts
from atesd.types import Measurement, Observation


class AlignedController:
    """One ratio for all problems, or one a level, renewed at every window boundary."""

    def __init__(
        self, grid: Sequence[float], credits: Credits, *, start: float, hold: int, instead: Credits | None = None
    ) -> None:
        self._grid = tuple(grid)
        self._credits = credits
        self._instead = instead  # asked until rewards differ
        self._ratios = {level: start for level, _ in credits}
        self._start = start
        self._clock = HoldClock(hold)
        self._latest: dict[str, float] = {}

    def propose(
        self,
        step: int,  # noqa: ARG002
        problem_ids: Sequence[str],
        pass_rates: Sequence[float | None] = (),  # noqa: ARG002
    ) -> Sequence[float]:
        """Return the held ratio of each problem's level, renewed first if the window has ended."""
        if self._clock.ended:
            for credits in (self._instead, self._credits):
                self._ratios |= {level: self._grid[each.best()] for level, each in credits or () if each.known}
            self._clock.start()
        return [self._ratios.get(self._credits.of(problem), self._start) for problem in problem_ids]

    def wants(self, step: int) -> Sequence[Measurement]:
        """Ask for the credits of all candidates where the window may end, by the probe too while rewards are equal."""
        return self._asked(step)

    def _asked(self, step: int) -> list[Measurement]:
        if not (step and self._clock.may_end):
            return []
        return [*self._credits.wanted(), *(self._instead.wanted() if self._instead else [])]

    def observe(self, observation: Observation) -> None:
        """Add the window's credits up."""
        self._latest = {}
        wanted = self._asked(observation.step)
        if observation.stats.get("reward/std", 0.0) > 0:
            self._instead = None
        if wanted and step_counts(observation.stats):
            spoke = [credits for credits in (self._credits, self._instead) if credits and credits.add(observation)]
            if spoke:
                self._latest = spoke[0].metrics()
                self._renewed()
            elif not is_idle(observation.stats):
                self._latest = {"exposure/discarded": 1.0}
        if step_counts(observation.stats):
            self._clock.tick()

    def _renewed(self) -> None:
        """Take in that credits have just been renewed."""

    def metrics(self) -> Mapping[str, float]:
        """Return the credits over their errors where they were renewed."""
        return self._latest

    def state_dict(self) -> dict[str, Any]:
        """Return credits, ratios and the open window."""
        return {
            "credits": self._credits.state_dict(),
            "ratios": self._ratios,
            "instead": self._instead.state_dict() if self._instead else None,
            "held": self._clock.held,
            "latest": self._latest,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._credits.load_state_dict(state["credits"])
        self._ratios, self._latest = dict(state["ratios"]), dict(state["latest"])
        if self._instead and state["instead"] is not None:
            self._instead.load_state_dict(state["instead"])
        else:
            self._instead = None
        self._clock.held = state["held"]
