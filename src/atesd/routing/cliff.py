"""The cliff router (ours): distil while the wanted lambda is at most lambda*, else reinforce."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from atesd.cliff import CliffMeter
from atesd.facts import RunFacts
from atesd.routing.route import Route, Router, RoutingMethod
from atesd.types import Group, Measurement, Observation


class Cliff(RoutingMethod):
    """Distil while the target's lambda is at most lambda*, reinforce where it is not; measured by `cliff`."""

    kind: Literal["cliff"] = "cliff"
    uniform: Literal["distil", "skip"] = "distil"
    """What a reinforcing step does with groups of equal rewards: distil at the guarded lambda, or skip."""

    reinforces: ClassVar[bool] = True
    distils: ClassVar[bool] = True
    shared: ClassVar[bool] = True
    reads_exposure: ClassVar[bool] = True
    reads_lambda: ClassVar[bool] = True

    @property
    def distils_uniform(self) -> bool:
        """Groups of equal rewards, where they are not skipped."""
        return self.uniform == "distil"

    def describe(self) -> str:
        """Say when groups are distilled."""
        return "Groups are distilled while the target's λ is at most the measured λ*, else reinforced"

    def build(self, run: RunFacts) -> Router:
        """Return the router."""
        return CliffRouter(self, run)


class CliffRouter:
    """Settles a step's mode, distilling or reinforcing, by lambda* at the step's largest exposure.

    In a reinforcing step a group without reward variance has no gradient: it is distilled at the capped lambda, or
    skipped; one that cannot be graded is distilled. The mode changes when lambda* has passed the wanted lambda by the
    hysteresis, which the first step does without, and stays at least `min_stay` steps. Without a known contract class
    lambda* is infinite.
    """

    def __init__(self, config: Cliff, run: RunFacts) -> None:
        self._config = config
        self._wanted = run.strength
        self._cliff = run.cliff
        self._meter = CliffMeter(run.cliff, run.c)
        self._reinforcing = False
        self._stayed: int | None = None

    @property
    def capped(self) -> bool:
        """Where it reinforces, as the wanted lambda is not safe there."""
        return self._reinforcing

    def route(self, groups: Sequence[Group], ratio: float) -> list[Route]:
        """Settle the step's mode; return its route, or what is left for a group without reward variance."""
        self._settle(self._meter.threshold(ratio))
        return [self._of(group) for group in groups]

    def _settle(self, least: float) -> None:
        """Change the mode if lambda* asks for it, and count the steps in it."""
        margin = 0.0 if self._stayed is None else self._cliff.hysteresis
        asked = self._wanted <= least - margin if self._reinforcing else self._wanted > least + margin
        stayed = self._stayed or 0
        if asked and (self._stayed is None or stayed >= self._cliff.min_stay):
            self._reinforcing, stayed = not self._reinforcing, 0
        self._stayed = stayed + 1

    def _of(self, group: Group) -> Route:
        if not self._reinforcing:
            return Route.DISTIL
        if len(set(group.rewards)) > 1:
            return Route.RL
        return Route.DISTIL if self._config.distils_uniform or not group.rewards else Route.SKIP

    def wants(self, step: int) -> Sequence[Measurement]:
        """Ask for the contract on its cadence."""
        return self._meter.wants(step)

    def observe(self, observation: Observation) -> None:
        """Take in the contract."""
        self._meter.observe(observation)

    def metrics(self) -> Mapping[str, float]:
        """Return the mode."""
        return {"cliff/reinforcing": float(self._reinforcing)}

    def state_dict(self) -> dict[str, Any]:
        """Return everything."""
        return {"meter": self._meter.state_dict(), "reinforcing": self._reinforcing, "stayed": self._stayed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._meter.load_state_dict(state["meter"])
        self._reinforcing, self._stayed = state["reinforcing"], state["stayed"]
