"""The target: the distribution that the student is pulled to, made of the log-probabilities of the teacher views.

A target is a pure, element-wise function of the views' normalised log-probabilities on the same vocabulary entries. So
it works on vocabulary tiles; one that mixes views costs one more pass, for its normaliser.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, Protocol

from torch import Tensor

from atesd.types import Config


class Target(Protocol):
    """What the tiled divergence needs of a target."""

    @property
    def num_views(self) -> int:
        """Number of teacher views that it reads."""
        ...

    @property
    def is_first_view(self) -> bool:
        """Whether the target is the first view as it is, and so needs no normaliser of its own."""
        ...

    def log_target(self, log_views: Sequence[Tensor]) -> Tensor:
        """Return the log target up to a constant per token from the views' log-probabilities, each [n, v].

        Element-wise, without looking at other entries; must not change its arguments.
        """
        ...


class Plain(Config):
    """One view, as it is: OPSD and ATESD."""

    kind: Literal["plain"] = "plain"

    num_views: ClassVar[int] = 1
    is_first_view: ClassVar[bool] = True

    def log_target(self, log_views: Sequence[Tensor]) -> Tensor:
        """Return the log-probabilities of the only view."""
        return log_views[0]

    def build(self) -> Target:
        """Return the target itself: it keeps no state."""
        return self


TargetConfig = Plain
