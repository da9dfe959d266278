"""What a gradient rule is: it changes gradients between the backward pass and clipping, and may mend the step after.

Before the first step `prepare` sees the model. The update calls, in this order: `attached` around the student's forward
and backward passes, `apply` once all gradients are there, then clipping, the optimizer's step, and `mend`. A rule that
watches forward passes is told by `announce` what of each is padding. Where it has `watched`, it returns there the sums
that it made of its passes, as many and as large in every process: they are added up in place over all processes, before
`apply`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Literal, Protocol, cast

from torch import nn

from atesd.facts import RunFacts
from atesd.types import Method, Policy, Stateless


class GradientRule(Policy, Protocol):
    """Decides which weights an update moves, and how."""

    def prepare(self, model: nn.Module) -> None:
        """Look at the model once, before step 0. UserError where the rule does not fit it."""
        ...

    def attached(self, model: nn.Module) -> AbstractContextManager[None]:
        """Return a context in which the student's training forward passes may be watched, by hooks."""
        ...

    def apply(self, model: nn.Module) -> None:
        """Change the gradients of the trained weights in place."""
        ...

    def mend(self, model: nn.Module) -> None:
        """Change the trained weights in place after the optimizer has moved them."""
        ...


def announce(model: nn.Module, lengths: Sequence[int]) -> None:
    """Say how many positions of each row of the pass that follows are no padding, which stands behind them."""
    cast("Any", model).pass_lengths = list(lengths)


def announced(model: nn.Module) -> Sequence[int]:
    """Return what was announced of the present pass."""
    return cast("Sequence[int]", cast("Any", model).pass_lengths)


class GradientMethod(Method):
    """Base of gradient rules' sections."""

    declares: ClassVar[tuple[str, ...]] = ("describe", "build")

    watches: ClassVar[bool] = True
    """Whether the rule looks into forward passes, of which each of several processes sees its own alone, and has no
    `watched` that returns what it made of them."""


class AllGradients(Stateless, GradientMethod):
    """Every gradient as it is."""

    kind: Literal["none"] = "none"

    watches: ClassVar[bool] = False

    def describe(self) -> str:
        """Nothing to say."""
        return ""

    def build(self, run: RunFacts) -> GradientRule:  # noqa: ARG002
        """Return the rule."""
        return self

    def prepare(self, model: nn.Module) -> None:
        """Fit any model."""

    def attached(self, model: nn.Module) -> AbstractContextManager[None]:  # noqa: ARG002
        """Watch nothing."""
        return nullcontext()

    def apply(self, model: nn.Module) -> None:
        """Change nothing."""

    def mend(self, model: nn.Module) -> None:
        """Change nothing."""
