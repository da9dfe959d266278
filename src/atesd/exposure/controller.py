"""What steers exposure: one question on top of the four verbs of every policy.

A controller sees step numbers, problem ids and named numbers. It knows neither text nor tokens, so that the same
controllers serve any student whose teacher can be shown more or less.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from atesd.cliff import CliffConfig
from atesd.types import Policy


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What a controller may depend on besides its own section."""

    total_steps: int
    seed: int
    """Seed of the controller's own random choices."""
    teacher_frozen: bool = True
    """Whether the teacher's answers depend on the hint alone for the whole run."""
    strength: float = 1.0
    """The target's lambda."""
    cliff: CliffConfig = field(default_factory=CliffConfig)
    c: float = 5.0
    """The importance clip behind lambda*."""


class Controller(Policy, Protocol):
    """Chooses how much of the reference the teacher sees."""

    def propose(
        self, step: int, problem_ids: Sequence[str], pass_rates: Sequence[float | None] = ()
    ) -> Sequence[float]:
        """Return one exposure ratio in [0, 1] per problem of update `step`, after theta_step has been observed.

        `pass_rates` are the mean rewards of the problems' attempts in this step, None where none is gradable.
        """
        ...
