"""What steers exposure: one question on top of the four verbs of every policy.

A controller sees step numbers, problem ids and named numbers. It knows neither text nor tokens, so that the same
controllers serve any student whose teacher can be shown more or less.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from atesd.types import Policy


class Controller(Policy, Protocol):
    """Chooses how much of the reference the teacher sees."""

    def propose(self, step: int, problem_ids: Sequence[str]) -> Sequence[float]:
        """Return one exposure ratio in [0, 1] per problem of update `step`, after theta_step has been observed."""
        ...
