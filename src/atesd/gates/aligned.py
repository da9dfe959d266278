"""The aligned gate (ours): a token listens where the teacher's pull agrees with what became of the attempt.

Shapes: N valid completion tokens of one micro-batch.

    g_t = sigmoid(beta A (p_T(y_t) - p_S(y_t)))        A: the attempt's reward minus what was to be expected of it

To first order a step along the teacher's pull on the logits of a position, p_T - p_S, changes the policy-gradient
surrogate A log p_S(y_t), whose gradient is A (e_y - p_S), by

    A [p_T(y_t) - p_S(y_t) - sum_i p_S(i) (p_T(i) - p_S(i))]

Deviation: the sum, which is the same whatever was sampled, is left out. The credit is that of alignment.py, token by
token, in the space of logits instead of weights. Where A is not known the gate is 1/2, which changes the scale alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from atesd.gates.gate import GateMethod
from atesd.losses.divergence import TokenStreams
from atesd.losses.stats import TokenStats

NOTHING = 1e-6
"""An attempt's advantage up to this is rounding: it came out as expected."""


class AlignedGate(GateMethod):
    """Tokens listen where teacher and outcome agree (ours)."""

    kind: Literal["aligned"] = "aligned"
    beta: Annotated[float, Field(gt=0, le=1e6)] = 5.0
    """Steepness."""

    reads_divergence: ClassVar[bool] = True

    def describe(self) -> str:
        """Say when a token listens."""
        return (
            f"Every token's divergence is weighed by the sigmoid of {self.beta:g} times the attempt's advantage times "
            "what the teacher gives to the token beyond the student"
        )

    def values(self, streams: TokenStreams) -> Tensor:
        """Listen to the divergence."""
        return streams.divergence_N

    def weights(self, stats: TokenStats) -> Tensor:
        """Return sigmoid(beta A (p_T - p_S))."""
        return torch.sigmoid(self.beta * agreement(stats))

    def metrics(self, stats: TokenStats) -> Mapping[str, float]:
        """Return the share of tokens at which teacher and outcome agree, of those whose outcome is known."""
        known = agreement(stats)[stats.advantage.abs() > NOTHING]
        return {"gate/agree_frac": float((known > 0).double().mean())} if known.numel() else {}


def agreement(stats: TokenStats) -> Tensor:
    """Return A (p_T(y) - p_S(y)), [N]."""
    return stats.advantage * (stats.teacher_logprob.exp() - stats.student_logprob.exp())
