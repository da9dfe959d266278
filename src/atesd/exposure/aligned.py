"""Exposure by what graded rollouts say: the candidate ratio whose step would raise the reward most (alignment.py).

Candidates are played as they are, never mixed: a hint shows whole segments, so that a ratio a little below a candidate
can hide what the candidate shows.

While not one completion of the run could be graded the probe's NLL takes the place of rewards: the candidate of highest
influence credit (influence.py), averaged over windows, is played for all problems.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from atesd.alignment import Credits
from atesd.exposure.window import HoldClock, is_idle, step_counts
from atesd.types import Measurement, Observation


class AlignedController:
    """One ratio for all problems, or one a level, renewed at every window boundary."""

    def __init__(self, grid: Sequence[float], credits: Credits, *, start: float, hold: int, decay: float) -> None:
        self._grid = tuple(grid)
        self._credits = credits
        self._decay = decay
        self._graded = False
        self._probe: list[float] | None = None  # averaged credits of the fall-back
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
            for level, credits in self._credits:
                if credits.known:
                    self._ratios[level] = self._grid[credits.best()]
                elif self._probe is not None and not self._graded:
                    self._ratios[level] = self._grid[self._probe.index(max(self._probe))]
            self._clock.start()
        return [self._ratios.get(self._credits.of(problem), self._start) for problem in problem_ids]

    def wants(self, step: int) -> Sequence[Measurement]:
        """Ask for the credits of all candidates where the window may end, by the probe too while nothing is graded."""
        if not (step and self._clock.may_end):
            return []
        return [*self._credits.wanted(), *([] if self._graded else self._by_probe)]

    def observe(self, observation: Observation) -> None:
        """Add the window's credits up."""
        self._latest = {}
        wanted = self.wants(observation.step)
        self._graded = self._graded or "reward/mean" in observation.stats
        if wanted:
            if self._credits.add(observation):
                self._latest = self._credits.metrics()
            elif not self._graded and self._add_probe(observation):
                self._latest = {
                    f"exposure/credit/{ratio:g}": credit
                    for ratio, credit in zip(self._grid, self._probe or (), strict=True)
                }
            elif not is_idle(observation.stats):
                self._latest = {"exposure/discarded": 1.0}
        if step_counts(observation.stats):
            self._clock.tick()

    @property
    def _by_probe(self) -> list[Measurement]:
        return [Measurement("influence", ratio) for ratio in self._grid]

    def _add_probe(self, observation: Observation) -> bool:
        """Average the probe's credits in; False where one is missing."""
        found = [observation.number(measurement) for measurement in self._by_probe]
        known = [credit for credit in found if credit is not None]
        if len(known) < len(found):
            return False
        before = self._probe or known
        self._probe = [self._decay * old + (1 - self._decay) * new for old, new in zip(before, known, strict=True)]
        return True

    def metrics(self) -> Mapping[str, float]:
        """Return the credits over their errors where they were renewed."""
        return self._latest

    def state_dict(self) -> dict[str, Any]:
        """Return credits, ratios and the open window."""
        return {
            "credits": self._credits.state_dict(),
            "ratios": self._ratios,
            "graded": self._graded,
            "probe": self._probe,
            "held": self._clock.held,
            "latest": self._latest,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._credits.load_state_dict(state["credits"])
        self._ratios, self._latest = dict(state["ratios"]), dict(state["latest"])
        self._graded, self._probe = state["graded"], state["probe"]
        self._clock.held = state["held"]
