"""Which loss trains a group: routes of groups and the loss component behind each route.

A router answers `route(groups)` after the rewards are known and shares the four verbs of `types.Policy`. Its `source`
says where completions come from: sampled from the student, or the reference solutions themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated, Literal, Protocol

from pydantic import Field

from atesd.types import Config, Group, Policy, Stateless


class Route(StrEnum):
    """What happens to a group: the value names its loss component."""

    DISTIL = "distil"
    NLL = "nll"
    SKIP = "skip"


class Router(Policy, Protocol):
    """Chooses the route of every group of a step."""

    source: Literal["student", "reference"]

    def route(self, groups: Sequence[Group]) -> list[Route]:
        """Return one route a group, in order."""
        ...


class DistilAll(Stateless):
    """Distil every group: OPSD and ATESD."""

    source: Literal["student", "reference"] = "student"

    def route(self, groups: Sequence[Group]) -> list[Route]:
        return [Route.DISTIL] * len(groups)


class Supervised(Stateless):
    """Train on the reference solutions by cross-entropy, without sampling: the sceptic's baseline.

    Loss: mean over tokens of -log p_S(y*_t | x, y*_<t) at temperature 1, the closing EOS included.
    """

    source: Literal["student", "reference"] = "reference"

    def route(self, groups: Sequence[Group]) -> list[Route]:
        return [Route.NLL] * len(groups)


class DistilConfig(Config):
    """Distil every group."""

    kind: Literal["distil"] = "distil"

    def build(self) -> Router:
        """Return the router."""
        return DistilAll()


class SupervisedConfig(Config):
    """Supervised fine-tuning on the same solutions with the same number of updates and problems."""

    kind: Literal["sft"] = "sft"

    def build(self) -> Router:
        """Return the router."""
        return Supervised()


RoutingConfig = Annotated[DistilConfig | SupervisedConfig, Field(discriminator="kind")]
