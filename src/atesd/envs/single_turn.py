"""One prompt, one completion."""

from __future__ import annotations

from collections.abc import Sequence

from atesd.envs.base import SampleTurns
from atesd.types import Group, Problem, Trajectory


class SingleTurn:
    """Ask every problem `group_size` times, all in one engine call."""

    def play(self, problems: Sequence[Problem], group_size: int, sample: SampleTurns) -> list[Group]:
        """Return one group a problem."""
        turns = iter(sample([problem for problem in problems for _ in range(group_size)]))
        return [Group(problem, tuple(Trajectory((next(turns),)) for _ in range(group_size))) for problem in problems]
