"""What steers exposure: one question on top of the four verbs of every policy.

A controller sees step numbers, problem ids and named numbers. It knows neither text nor tokens, so that the same
controllers serve any student whose teacher can be shown more or less.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Protocol

from atesd.types import Method, Policy


class Controller(Policy, Protocol):
    """Chooses how much of the reference the teacher sees."""

    def propose(
        self, step: int, problem_ids: Sequence[str], pass_rates: Sequence[float | None] = ()
    ) -> Sequence[float]:
        """Return one exposure ratio in [0, 1] per problem of update `step`, after theta_step has been observed.

        `pass_rates` are the mean rewards of the problems' attempts in this step, None where none is gradable.
        """
        ...


class ExposureMethod(Method):
    """Base of controllers' sections, and what the rest of the program needs to know of any controller."""

    declares: ClassVar[tuple[str, ...]] = ("measured", "reads_length", "describe", "build")
    """`measured`: whether the exposure is measured or learned, so that it is refused where nothing is distilled.
    `reads_length`: whether it depends on the length of the run, so that a longer run would have begun otherwise."""

    reads_lambda: ClassVar[bool] = False
    """Whether the exposure depends on lambda*: then the target must be extrapolated."""

    @property
    def reads_hidden(self) -> bool:
        """Whether the teacher is asked for the segments that a ratio hides, so that there must be some."""
        return False

    @property
    def reads_base(self) -> bool:
        """Whether progress is the way to the teacher of step 0, whose weights are then kept."""
        return False

    @property
    def reads_rewards(self) -> bool:
        """Whether problems are told apart by the rewards of their attempts: then groups need several."""
        return False

    @property
    def without_rewards(self) -> str:
        """The setting that does without them."""
        return ""
