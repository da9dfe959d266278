"""What a student acts in: one readable routine from problems to groups of trajectories."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from atesd.types import Group, Problem, Turn

SampleTurns = Callable[[Sequence[Problem]], list[Turn]]
"""Samples one completion a problem, in one engine call."""


class Environment(Protocol):
    """Turns problems into groups, in one readable routine: what is asked, how often, and what is kept."""

    def play(self, problems: Sequence[Problem], group_size: int, sample: SampleTurns) -> list[Group]:
        """Return one group of `group_size` trajectories a problem, in order, without rewards."""
        ...
