"""SDAR's gate: a sigmoid of the gap between teacher and student, of the student's entropy, or of both.

Shapes: N valid completion tokens of one micro-batch.

    gap      g_t = sigmoid(beta Delta_t)                              Delta_t = log p_T(y_t) - log p_S(y_t)
    entropy  g_t = sigmoid(beta h_t)                                  h_t = entropy of the student, nats
    soft_or  g_t = sigmoid(beta [1 - (1 - h_t)(1 - Delta_t)])

SDAR, arXiv 2605.15155. A gate is detached: the gradient of its surrogate g_t (log p_T - log p_S) is
-g_t grad log p_S(y_t), without the term beta Delta g (1 - g) that an undetached gate would add.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from atesd.gates.gate import GateMethod
from atesd.losses.divergence import TokenStreams
from atesd.losses.stats import TokenStats

_SCORES = {
    "gap": "the log-probability gap between teacher and student",
    "entropy": "the student's entropy",
    "soft_or": "the gap or the student's entropy",
}
_TARGETS = {"surrogate": "log-probability gap", "divergence": "divergence"}


class SdarGate(GateMethod):
    """SDAR's sigmoid gate (2605.15155). Defaults: the paper's; its coefficient .01 is `routing.coef` of `both`.

    The surrogate pushes every sampled token up with weight g_t in (0, 1), so the teacher acts through the gate alone;
    its value is minus a gated estimate of a divergence and says nothing about progress. So a gate that does not know
    the sampled token teaches nothing: on-policy, with untruncated sampling, the expected gradient of a position,
    E_y [-g grad log p_S(y)] = -g grad 1, is 0 for `score = "entropy"`, as for beta = 0. What is left is noise (and,
    where sampling is truncated, a pull to what was sampled). Ours: `centered`, which has the same expected gradient
    on-policy and less variance, and `target = "divergence"`, the gate as a multiplier, which is free of all this.
    """

    kind: Literal["sdar"] = "sdar"
    score: Literal["gap", "entropy", "soft_or"] = "gap"
    """What opens the gate. `entropy` is at least 1/2, and under the surrogate has no teacher in it; `soft_or` falls
    with the gap where the entropy exceeds 1 nat."""
    beta: Annotated[float, Field(ge=0)] = 5.0
    """Steepness (beta_gate); 0 is the constant 1/2, which under the surrogate has no teacher in it."""
    centered: bool = False
    """Subtract 1/2: weights in (-1/2, 1/2). For the surrogate only; recommended there."""
    target: Literal["surrogate", "divergence"] = "surrogate"
    """What the gate multiplies: log p_T(y_t) - log p_S(y_t) of the sampled token (the paper), or the divergence."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.centered and self.target == "divergence":
            raise ValueError(
                "a centred gate has negative weights, which would maximise the divergence: "
                'set centered = false, or target = "surrogate"'
            )
        return self

    @property
    def reads_divergence(self) -> bool:
        """The surrogate looks at the sampled token alone."""
        return self.target == "divergence"

    @property
    def _knows_token(self) -> bool:
        """Whether the gate of a position depends on the token that was sampled there."""
        return self.score != "entropy" and self.beta > 0

    def warning(self) -> str | None:
        """Warn of a surrogate whose expected gradient is 0 on-policy, whatever the teacher says."""
        if self.reads_divergence or self._knows_token:
            return None
        field = "gate.beta = 0" if self.beta == 0 else f'gate.score = "{self.score}"'
        return (
            f"{field} with the surrogate: this gate is the same whatever token was sampled, so on-policy the expected "
            'gradient is 0 and the teacher has no say; set gate.score = "gap" with beta above 0, or gate.target = '
            '"divergence"'
        )

    def describe(self) -> str:
        """Name score and target."""
        centred = ", less 1/2" if self.centered else ""
        return (
            f"Every token's {_TARGETS[self.target]} is weighed by a gate: the sigmoid of {self.beta:g} times "
            f"{_SCORES[self.score]}{centred} (SDAR)"
        )

    def values(self, streams: TokenStreams) -> Tensor:
        """Return the surrogate or the divergence."""
        if self.reads_divergence:
            return streams.divergence_N
        return streams.stats.teacher_logprob - streams.logprob_N

    def weights(self, stats: TokenStats) -> Tensor:
        """Return sigmoid(beta score), centred if asked for."""
        gate = torch.sigmoid(self.beta * self._score(stats))
        return gate - 0.5 if self.centered else gate

    def metrics(self, stats: TokenStats) -> Mapping[str, float]:
        """Return the share of gates above 1/2, and the gap's mean and share below 0."""
        gap = _gap(stats)
        return {
            "gate/open_frac": float((self._score(stats) * self.beta > 0).double().mean()),
            "gate/gap": float(gap.double().mean()),
            "gate/gap_negative": float((gap < 0).double().mean()),
        }

    def _score(self, stats: TokenStats) -> Tensor:
        gap, entropy = _gap(stats), stats.student_entropy
        match self.score:
            case "gap":
                return gap
            case "entropy":
                return entropy
            case "soft_or":
                return 1 - (1 - entropy) * (1 - gap)


def _gap(stats: TokenStats) -> Tensor:
    return stats.teacher_logprob - stats.student_logprob
