"""What decides which part of the privileged context a teacher sees.

A revealer answers one question on top of the four verbs of every policy, so it may keep state, learn and be
checkpointed. It may cut a solution into segments, an expert's trajectory into turns, or choose words; and it may look
at the rollout that the teacher is about to score.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

from atesd.exposure.reveal import Reveal
from atesd.types import Method, Policy, Problem, Trajectory


class Revealer(Policy, Protocol):
    """Turns an exposure ratio into what is visible of a problem's solution."""

    def reveal(self, problem: Problem, ratio: float, rollout: Trajectory | None = None) -> Reveal:
        """Return what the teacher sees at a ratio in [0, 1]; 1 bounds it from above.

        `rollout` is the attempt to be scored; None where there is none: prompts that are shown or measured. The
        result's `ratio` is the share in force, at most the one asked for.
        """
        ...


@runtime_checkable
class Crediting(Revealer, Protocol):
    """A revealer that learns from the attempts that its teacher was heard on."""

    def heard(self, problem: Problem, rollout: Trajectory) -> None:
        """Take in an attempt that the update distils, once a step, before it is made. `reveal` must learn nothing.

        Measurements reveal, too, and for attempts of any route.
        """
        ...


class Budget(NamedTuple):
    """How many tokens of a hint attention reaches, in every layer and head or on average over them."""

    keep: int
    kept: tuple[int, ...] | None
    """Which ones, by their place in the hint, in order; None where gates choose them."""


class ModelSize(NamedTuple):
    """What gates must know of a model."""

    layers: int
    key_heads: int
    width: int
    """Of the states between layers."""
    device: Any


class Masker(Revealer, Protocol):
    """A revealer that shows the whole solution and hides tokens of it from attention, where `Reveal.masked` says so."""

    gates: Any
    """What chooses tokens by the states of the model (`exposure/retention_gates.py`), after `prepare`; or None."""

    def prepare(self, size: ModelSize) -> None:
        """Look at the model's size once, before step 0 and before any state is restored."""
        ...

    def kept(self, problem: Problem, ratio: float, pieces: Sequence[str]) -> Budget:
        """Return what is kept of a hint at a ratio; `pieces` are the texts of its tokens."""
        ...

    def learned(self, numbers: Mapping[str, float]) -> None:
        """Take in the parts of the loss of the gates' latest update."""
        ...


class RevealMethod(Method):
    """Base of revealers' sections."""

    declares: ClassVar[tuple[str, ...]] = ("reads_rollout", "describe", "build")
    """`reads_rollout`: whether the share in force is known only after the rollout."""

    masks: ClassVar[bool] = False
    """Whether what is built is a `Masker`."""

    def warning(self, solutions: Sequence[str]) -> str | None:  # noqa: ARG002
        """Return what to warn of before step 0, seeing the training problems' solutions; None for nothing."""
        return None
