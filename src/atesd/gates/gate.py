"""What a gate is: how strongly each token of the student's completion listens, and what it listens to.

Shapes: N valid completion tokens of one micro-batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from atesd.losses.divergence import TokenStreams
from atesd.losses.stats import TokenStats
from atesd.types import Method


class Gate(Protocol):
    """A rule from a token's statistics to its weight. Stateless, and blind to other tokens: `selection` sees those.

    Weights only scale (the loss is divided by the number of selected tokens), so that they can shrink the loss.
    """

    @property
    def reads_divergence(self) -> bool:
        """Whether `values` is the divergence; else it is made of the sampled token's log-probability."""
        ...

    def values(self, streams: TokenStreams) -> Tensor:
        """Return the loss per token that the weights multiply, [N], differentiable."""
        ...

    def weights(self, stats: TokenStats) -> Tensor:
        """Return a factor per token, [N], in [0, 1] unless the gate says otherwise."""
        ...

    def metrics(self, stats: TokenStats) -> Mapping[str, float]:
        """Return numbers of its own over all tokens of an update, by keys of the metric table."""
        ...


class GateMethod(Method):
    """Base of gates. A gate says whether the divergence reaches its gradient, and what it does in words."""

    declares: ClassVar[tuple[str, ...]] = ("reads_divergence", "describe", "values", "weights", "metrics")

    def warning(self) -> str | None:
        """Return what to warn of before step 0; None for nothing."""
        return None


class OpenGate(GateMethod):
    """Every token listens fully."""

    kind: Literal["none"] = "none"

    reads_divergence: ClassVar[bool] = True

    def describe(self) -> str:
        """Nothing to say."""
        return ""

    def values(self, streams: TokenStreams) -> Tensor:
        """Listen to the divergence."""
        return streams.divergence_N

    def weights(self, stats: TokenStats) -> Tensor:
        """Leave everything as it is."""
        return torch.ones_like(stats.student_logprob)

    def metrics(self, stats: TokenStats) -> Mapping[str, float]:  # noqa: ARG002
        """Nothing of its own."""
        return {}
