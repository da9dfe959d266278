"""Routers without state: section and router at once.

    distil    every group is distilled                                        OPSD, ATESD
    rl        every group is reinforced                                       GRPO
    both      both losses on every group: L_rl + coef L_distil                SDAR
    hdpo      groups without any success are distilled, the others reinforced after HDPO 2603.23871
    sft       cross-entropy on the references

Where a group cannot be graded at all it cannot be reinforced: `rl` skips it, the others distil it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from atesd.facts import RunFacts
from atesd.routing.route import Route, Router, RoutingMethod, Source
from atesd.types import Group, Stateless


class _Fixed(Stateless, RoutingMethod):
    """A router that looks at each group alone; `of` returns its route."""

    capped: ClassVar[bool] = False

    def build(self, run: RunFacts) -> Router:  # noqa: ARG002
        """Return the router."""
        return self

    def route(self, groups: Sequence[Group], ratio: float) -> list[Route]:  # noqa: ARG002
        """Return one route a group."""
        return [self.of(group) for group in groups]

    @abstractmethod
    def of(self, group: Group) -> Route:
        """Return a group's route."""


class Distil(_Fixed):
    """Distil every group."""

    kind: Literal["distil"] = "distil"

    reinforces: ClassVar[bool] = False
    distils: ClassVar[bool] = True

    def describe(self) -> str:
        """Nothing to say."""
        return ""

    def of(self, group: Group) -> Route:  # noqa: ARG002
        """Distil."""
        return Route.DISTIL


class Reinforce(_Fixed):
    """Reinforce every group by the section `rl`, without a teacher: GRPO and its kin."""

    kind: Literal["rl"] = "rl"

    reinforces: ClassVar[bool] = True
    distils: ClassVar[bool] = False

    def describe(self) -> str:
        """Say what there is instead of a teacher."""
        return "nothing: no teacher, the student is reinforced by the rewards of its own completions"

    def of(self, group: Group) -> Route:
        """Reinforce; skip what cannot be graded."""
        return Route.RL if group.rewards else Route.SKIP


class Both(_Fixed):
    """L_rl + coef L_distil on every group, each with its own denominator; SDAR with `gate.kind = "sdar"`."""

    kind: Literal["both"] = "both"
    coef: Annotated[float, Field(ge=0, le=1e6)] = 0.01
    """Factor of the distillation loss (lambda_sdar), at most a million; 0 is reinforcement alone. SDAR: .01."""

    reinforces: ClassVar[bool] = True
    distils: ClassVar[bool] = True
    teaches_reinforced: ClassVar[bool] = True

    @property
    def coefs(self) -> dict[str, float]:
        """The distillation loss is scaled."""
        return {"distil": self.coef}

    def describe(self) -> str:
        """Name the coefficient."""
        return f"Every group is reinforced and distilled, the distillation loss times {self.coef:g}"

    def of(self, group: Group) -> Route:
        """Return both where there are rewards."""
        return Route.BOTH if group.rewards else Route.DISTIL


class Hdpo(_Fixed):
    """Distil groups without any success, reinforce the others.

    After HDPO (2603.23871). Deviations: 1. the student's own failed completions are distilled, not filtered rollouts of
    the teacher; 2. at weight 1, over the tokens of all groups.
    """

    kind: Literal["hdpo"] = "hdpo"

    reinforces: ClassVar[bool] = True
    distils: ClassVar[bool] = True
    shared: ClassVar[bool] = True
    distils_failures_only: ClassVar[bool] = True

    def describe(self) -> str:
        """Say which groups are distilled."""
        return "Groups without any success are distilled, the others reinforced"

    def of(self, group: Group) -> Route:
        """Reinforce where an attempt has a reward above 0."""
        return Route.RL if any(reward > 0 for reward in group.rewards) else Route.DISTIL


class Supervised(_Fixed):
    """Supervised fine-tuning on the same solutions with the same number of updates and problems.

    The sceptic's baseline, without sampling. Loss: mean over tokens of -log p_S(y*_t | x, y*_<t) at temperature 1, the
    closing EOS included.
    """

    kind: Literal["sft"] = "sft"

    source: ClassVar[Source] = "reference"
    reinforces: ClassVar[bool] = False
    distils: ClassVar[bool] = False

    def describe(self) -> str:
        """Say what there is instead of a teacher."""
        return "nothing: no teacher, the student trains on the reference solutions themselves"

    def of(self, group: Group) -> Route:  # noqa: ARG002
        """Train on the reference."""
        return Route.NLL
