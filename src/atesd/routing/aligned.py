"""The aligned router (ours): distil where some exposure ratio would raise the reward, else reinforce or leave alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from atesd.alignment import Credits
from atesd.exposure.held import Ratio
from atesd.facts import RunFacts
from atesd.routing.route import Route, Router, RoutingMethod
from atesd.types import Group, Measurement, Observation


class Aligned(RoutingMethod):
    """Distil the problems of a level while the best ratio's credit (alignment.py) is above `margin` errors (ours)."""

    kind: Literal["aligned"] = "aligned"
    otherwise: Literal["rl", "skip"] = "rl"
    """What happens to groups that distillation would not help: reinforcement, which needs several attempts, or
    nothing."""
    uniform: Literal["distil", "skip"] = "skip"
    """What happens to a group that would be reinforced but has equal rewards."""
    margin: Annotated[float, Field(ge=-10, le=10)] = -2.0
    """Standard errors above which the best credit must be. Below 0: distil unless that is shown to do harm."""
    grid: tuple[Ratio, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Candidate ratios; those of `exposure.kind = "influence"` cost nothing more."""
    by: Literal["none", "level"] = "level"
    """Whether each level of problems has a credit of its own."""
    every: Annotated[int, Field(ge=1)] = 5
    """Steps between measurements."""
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.8
    """Decay of the credits, per measurement."""

    distils: ClassVar[bool] = True
    shared: ClassVar[bool] = True
    reads_exposure: ClassVar[bool] = True

    @model_validator(mode="after")
    def _check(self) -> Aligned:
        if self.otherwise == "skip" and self.uniform != "skip":
            raise ValueError(
                f'routing.uniform = "{self.uniform}" is about groups that would be reinforced, but '
                'routing.otherwise = "skip" reinforces none: remove routing.uniform'
            )
        return self

    @property
    def reinforces(self) -> bool:
        """Unless what is not distilled is left alone."""
        return self.otherwise == "rl"

    @property
    def distils_uniform(self) -> bool:
        """Groups of equal rewards, where they are not skipped."""
        return self.uniform == "distil"

    def describe(self) -> str:
        """Say when groups are distilled."""
        rest = "reinforced" if self.otherwise == "rl" else "left alone"
        return f"Groups are distilled where that would raise the reward of graded rollouts, else {rest}"

    def build(self, run: RunFacts) -> Router:
        """Return the router."""
        return AlignedRouter(self, run)


class AlignedRouter:
    """Settles the route of every level by its best credit; a level of which nothing is known is distilled."""

    capped: ClassVar[bool] = False

    def __init__(self, config: Aligned, run: RunFacts) -> None:
        self._config = config
        self._credits = Credits(config.grid, decay=config.decay, by=config.by, levels=run.levels)
        self._helps = {level: True for level, _ in self._credits}
        self._latest: dict[str, float] = {}

    def route(self, groups: Sequence[Group], ratio: float) -> list[Route]:  # noqa: ARG002
        """Return each group's route by its level."""
        return [self._of(group) for group in groups]

    def _of(self, group: Group) -> Route:
        if self._helps.get(self._credits.of(group.problem.id), True):
            return Route.DISTIL
        if self._config.otherwise == "skip":
            return Route.SKIP
        if len(set(group.rewards)) > 1:
            return Route.RL
        return Route.DISTIL if self._config.distils_uniform or not group.rewards else Route.SKIP

    def wants(self, step: int) -> Sequence[Measurement]:
        """Ask for the credits on their cadence."""
        return self._credits.wanted() if step and step % self._config.every == 0 else []

    def observe(self, observation: Observation) -> None:
        """Add the credits up, and settle the levels."""
        self._latest = {}
        if self.wants(observation.step) and self._credits.add(observation):
            for level, credits in self._credits:
                if credits.known:
                    self._helps[level] = float(credits.z.max()) > self._config.margin
            self._latest = {
                (f"route/{level}/best_credit" if level else "route/best_credit"): float(credits.z.max())
                for level, credits in self._credits
            }

    def metrics(self) -> Mapping[str, float]:
        """Return the best credits over their errors where they were renewed."""
        return self._latest

    def state_dict(self) -> dict[str, Any]:
        """Return credits and routes."""
        return {"credits": self._credits.state_dict(), "helps": self._helps, "latest": self._latest}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._credits.load_state_dict(state["credits"])
        self._helps, self._latest = dict(state["helps"]), dict(state["latest"])
