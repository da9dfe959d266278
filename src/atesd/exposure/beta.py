"""The policy network of ATESD's learned exposure, and its loss.

    (ka, kb) = 1 + softplus(f_phi(s)),  alpha ~ Beta(ka, kb)
    L_ctrl   = -(1/B) sum_j A_j log pi_phi(alpha_j | s_j) + c_t max(0, H[pi_phi] - H_target)^2

arXiv 2605.11458. The only part of `exposure` that needs torch.

Shapes: B decisions of one controller update, F features, U hidden units.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import expm1, log, sqrt
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Beta
from torch.nn.functional import softplus

from atesd.exposure.window import Decision

DRAW_MARGIN = 1e-4  # draws are kept this far from 0 and 1, where log-probabilities diverge


@dataclass(frozen=True, slots=True)
class Draw:
    """One sample of the policy, kept in [1e-4, 1 - 1e-4], with the distribution that it came from; nats."""

    value: float
    logprob: float
    ka: float
    kb: float
    entropy: float


def controller_loss(
    policy: Beta,
    draws_B: Tensor,
    advantages_B: Tensor,
    *,
    entropy_coef: float,
    entropy_target: float,
    weights_B: Tensor | None = None,
) -> Tensor:
    """Return -(1/B) sum_j w_j A_j log pi(alpha_j | s_j) + c max(0, mean_j H_j - H_target)^2.

    The second term punishes entropy above the target and is 0 below it. `weights_B` are detached importance weights.
    """
    scores_B: Tensor = policy.log_prob(draws_B) * advantages_B  # type: ignore[no-untyped-call]
    if weights_B is not None:
        scores_B = scores_B * weights_B
    excess: Tensor = (policy.entropy().mean() - entropy_target).clamp(min=0.0)  # type: ignore[no-untyped-call]
    return -scores_B.mean() + entropy_coef * excess**2


class BetaPolicy:
    """The network F -> U tanh -> 2 in float64, and its Adam.

    The first layer starts as torch's `Linear` does, from a generator of its own; the last one with weights 0 and the
    bias that gives the starting parameters, whatever the features.
    """

    def __init__(self, inputs: int, hidden: int, start: tuple[float, float], seed: int, learning_rate: float) -> None:
        generator = torch.Generator().manual_seed(seed)
        bound = 1.0 / sqrt(inputs)
        self.tensors = {
            "weight_UF": (2.0 * torch.rand(hidden, inputs, generator=generator, dtype=torch.float64) - 1.0) * bound,
            "bias_U": (2.0 * torch.rand(hidden, generator=generator, dtype=torch.float64) - 1.0) * bound,
            "weight_2U": torch.zeros(2, hidden, dtype=torch.float64),
            "bias_2": torch.tensor([log(expm1(parameter - 1.0)) for parameter in start], dtype=torch.float64),
        }
        for tensor in self.tensors.values():
            tensor.requires_grad_()
        self._adam = torch.optim.Adam(self.tensors.values(), lr=learning_rate)

    def distribution(self, features_BF: Sequence[Sequence[float]]) -> Beta:
        """Return the policy's distributions, one per state."""
        inputs_BF = torch.tensor(features_BF, dtype=torch.float64)
        hidden_BU = torch.tanh(inputs_BF @ self.tensors["weight_UF"].T + self.tensors["bias_U"])
        parameters_B2 = 1.0 + softplus(hidden_BU @ self.tensors["weight_2U"].T + self.tensors["bias_2"])
        return Beta(parameters_B2[:, 0], parameters_B2[:, 1], validate_args=False)

    def draw(self, features: Sequence[float], random: np.random.Generator) -> Draw:
        """Sample one exposure in a state."""
        with torch.no_grad():
            policy = self.distribution([features])
            ka, kb = float(policy.concentration1), float(policy.concentration0)
            value = min(1.0 - DRAW_MARGIN, max(DRAW_MARGIN, float(random.beta(ka, kb))))
            logprob = policy.log_prob(torch.tensor([value], dtype=torch.float64))  # type: ignore[no-untyped-call]
            return Draw(value, float(logprob), ka, kb, float(policy.entropy()))  # type: ignore[no-untyped-call]

    def update(
        self,
        decisions: Sequence[Decision],
        advantages_B: Sequence[float],
        *,
        entropy_coef: float,
        entropy_target: float,
        importance_clip: float | None,
    ) -> float:
        """Take one Adam step on the controller loss; return the loss before it."""
        policy = self.distribution([decision.features for decision in decisions])
        draws_B = torch.tensor([decision.draw for decision in decisions], dtype=torch.float64)
        weights_B = None
        if importance_clip is not None:
            drawn_B = torch.tensor([decision.logprob for decision in decisions], dtype=torch.float64)
            now_B = policy.log_prob(draws_B).detach()  # type: ignore[no-untyped-call]
            weights_B = (now_B - drawn_B).exp().clamp(max=importance_clip)
        loss = controller_loss(
            policy,
            draws_B,
            torch.tensor(advantages_B, dtype=torch.float64),
            entropy_coef=entropy_coef,
            entropy_target=entropy_target,
            weights_B=weights_B,
        )
        self._adam.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self._adam.step()
        return float(loss.detach())

    def state_dict(self) -> dict[str, Any]:
        """Return parameters and Adam's moments as lists."""
        moments = self._adam.state_dict()["state"]
        return {
            "tensors": {name: tensor.tolist() for name, tensor in self.tensors.items()},
            "adam": {str(index): {key: value.tolist() for key, value in row.items()} for index, row in moments.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        with torch.no_grad():
            for name, tensor in self.tensors.items():
                tensor.copy_(torch.tensor(state["tensors"][name], dtype=torch.float64))
        moments = {
            int(index): {
                key: torch.tensor(value, dtype=torch.float32 if key == "step" else torch.float64)
                for key, value in row.items()
            }
            for index, row in state["adam"].items()
        }
        self._adam.load_state_dict({**self._adam.state_dict(), "state": moments})
