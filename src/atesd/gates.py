"""Gates: detached weights that say which tokens of the student's completion listen, and how strongly.

Shapes: N valid completion tokens, of one micro-batch, or of the whole batch for a gate that needs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from atesd.types import Config, TokenStats


class Gate(Protocol):
    """A rule from token statistics to weights. Stateless: the same statistics give the same answer.

    The selection decides what the mean is over (the loss is divided by the number of selected tokens); the weights
    only scale, so that they can shrink the loss.
    """

    @property
    def needs_batch(self) -> bool:
        """Whether a token's answer depends on others: a score pass over the whole batch then precedes the gradient."""
        ...

    def selection(self, stats: TokenStats) -> Tensor:
        """Return 0/1 per token, [N]."""
        ...

    def weights(self, stats: TokenStats) -> Tensor:
        """Return a factor per token, [N], in [0, 1] unless the gate says otherwise."""
        ...

    def metrics(self, stats: TokenStats) -> Mapping[str, float]:
        """Return numbers of its own for the log, by keys of the metric table."""
        ...


class OpenGate(Config):
    """Every token listens fully."""

    kind: Literal["none"] = "none"

    needs_batch: ClassVar[bool] = False

    def selection(self, stats: TokenStats) -> Tensor:
        """Select everything."""
        return torch.ones_like(stats.student_logprob)

    def weights(self, stats: TokenStats) -> Tensor:
        """Leave everything as it is."""
        return torch.ones_like(stats.student_logprob)

    def metrics(self, stats: TokenStats) -> Mapping[str, float]:  # noqa: ARG002
        """Nothing of its own."""
        return {}

    def build(self) -> Gate:
        """Return the gate itself: it keeps no state."""
        return self


GateConfig = OpenGate


@dataclass(frozen=True, slots=True)
class Gated:
    """A gate's answer, detached; `weights_N` is 0 where `selection_N` is."""

    selection_N: Tensor
    weights_N: Tensor


def apply_gate(gate: Gate, stats: TokenStats) -> Gated:
    """Ask a gate about N tokens."""
    selection_N = gate.selection(stats).detach()
    return Gated(selection_N, selection_N * gate.weights(stats).detach())


def gate_metrics(gate: Gate, stats: TokenStats, gated: Gated) -> dict[str, float]:
    """Return `gate/kept_frac`, `gate/mean` and the gate's own metrics over N > 0 valid tokens."""
    return {
        "gate/kept_frac": gated.selection_N.mean().item(),
        "gate/mean": gated.weights_N.mean().item(),
        **gate.metrics(stats),
    }
