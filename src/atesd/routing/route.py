"""What a router is: it decides which loss trains each group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import ClassVar, Literal, Protocol

from atesd.types import Group, Method, Policy

Source = Literal["student", "reference"]


class Route(StrEnum):
    """What happens to a group."""

    DISTIL = "distil"
    RL = "rl"
    BOTH = "both"
    NLL = "nll"
    SKIP = "skip"

    @property
    def components(self) -> tuple[str, ...]:
        """Loss components that the group's completions feed."""
        return {Route.BOTH: ("distil", "rl"), Route.SKIP: ()}.get(self, (self.value,))


class Router(Policy, Protocol):
    """Chooses the route of every group of a step."""

    def route(self, groups: Sequence[Group], ratio: float) -> list[Route]:
        """Return one route a group, in order; called once a step. `ratio` is the step's largest exposure."""
        ...

    @property
    def capped(self) -> bool:
        """Whether what the latest `route` distils is held to the capped lambda, whatever the target asks for."""
        ...


class RoutingMethod(Method):
    """Base of routers' sections, and what the rest of the program needs to know of any router."""

    declares: ClassVar[tuple[str, ...]] = ("reinforces", "distils", "describe", "build")
    """`reinforces`, `distils`: whether groups may be. One that distils nothing is described by words that complete
    "The teacher sees ..."."""

    source: ClassVar[Source] = "student"
    """Whose completions are trained on: sampled ones, or the references."""
    shared: ClassVar[bool] = False
    """Whether each group is in one component, and all components share one denominator."""
    reads_exposure: ClassVar[bool] = False
    """Whether routes depend on the exposure: then a hold window goes on through steps without distillation."""
    reads_lambda: ClassVar[bool] = False
    """Whether routes depend on lambda*: then the target must be extrapolated."""
    teaches_reinforced: ClassVar[bool] = False
    """Whether groups may be reinforced and distilled at once: then the teacher reads what is reinforced."""
    distils_failures_only: ClassVar[bool] = False
    """Whether nothing but groups without a success is distilled."""

    @property
    def distils_uniform(self) -> bool:
        """Whether groups of equal rewards are distilled because they have no other use."""
        return self.distils_failures_only

    @property
    def asks_teacher(self) -> bool:
        """Whether the teacher has to answer probe problems itself, with its hint."""
        return False

    @property
    def coefs(self) -> Mapping[str, float]:
        """Factor of each component where it is not 1."""
        return {}
