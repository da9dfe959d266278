"""Retention gates: how long a token of the hint is remembered, and which entries are kept under a global budget.

    log beta_i = logsigmoid(W_2 silu(W_1 x_i) + b)                 one beta per layer, key head and token
    logit_ti   = q_t . k_i / sqrt(d) + (t - i) log beta_i          for tokens i of the hint, while gates learn
    cap        = (1/T) sum_t (1/t) max(0, sum_{i<=t} beta_i^(t-i) - M)
    kept       = of all entries (layer, head, i) the E H M of largest (t - i) log beta_i       E layers, H key heads

x_i is the state that enters a layer. Make Each Token Count, arXiv 2605.09649 (losses: its predecessor 2512.03324). The
public code multiplies the logit by beta^(t-i); this is the paper's sum. Ours: 1. silu, torch's own start of the weights
by a seed, and float32 whatever the model's dtype, where the paper's text is silent; 2. tokens outside the hint have no
gate and are never forgotten, so that no buffer of recent tokens is needed; 3. in `cap` t counts from the hint's first
token, i runs over the hint alone, and layers and heads are averaged.

Shapes: B rows, L positions, Q queries, K keys, I tokens of the hint, T positions from its first one, W width of states.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, relu

from atesd.types import UserError


class Gates:
    """The networks of all layers, the AdamW that moves them, and the weights `ntp` and `cap` in their loss."""

    def __init__(
        self,
        *,
        layers: int,
        heads: int,
        width: int,
        hidden: int,
        bias: float,
        learning_rate: float,
        weight_decay: float,
        ntp: float,
        cap: float,
        seed: int,
        device: torch.device,
    ) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.networks = nn.ModuleList(
                nn.Sequential(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, heads)) for _ in range(layers)
            )
        for network in self.networks:
            nn.init.constant_(network[-1].bias, bias)  # type: ignore[index]
        self.networks.to(device)
        self._optimizer = torch.optim.AdamW(self.networks.parameters(), lr=learning_rate, weight_decay=weight_decay)
        self.updates = 0
        self.ntp, self.cap = ntp, cap

    @property
    def weights(self) -> list[nn.Parameter]:
        """All that learns."""
        return list(self.networks.parameters())

    def log_beta(self, layer: int, states_BLW: Tensor) -> Tensor:
        """Return log beta, [B, H, L] in float32, of the states that enter a layer."""
        scores_BLH: Tensor = self.networks[layer](states_BLW.float())
        return logsigmoid(scores_BLH).transpose(1, 2)

    def update(self, gradients: Sequence[Tensor]) -> None:
        """Take one step of AdamW."""
        for weight, gradient in zip(self.weights, gradients, strict=True):
            weight.grad = gradient
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.updates += 1

    def state_dict(self) -> dict[str, Any]:
        """Return weights and moments, each tensor as the base64 of its float32 numbers."""
        moments = self._optimizer.state_dict()["state"]
        return {
            "updates": self.updates,
            "weights": {name: _packed(weight) for name, weight in self.networks.state_dict().items()},
            "moments": {
                str(index): {key: _packed(value) for key, value in row.items()} for index, row in moments.items()
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned. UserError where the gates are of another size."""
        own = self.networks.state_dict()
        if state["weights"].keys() != own.keys():
            raise UserError("the checkpoint holds retention gates of another model: it was written by another run")
        self.updates = int(state["updates"])
        self.networks.load_state_dict({name: _unpacked(state["weights"][name], own[name]) for name in own})
        moments = {
            int(index): {
                key: _unpacked(value, torch.tensor(0.0) if key == "step" else self.weights[int(index)])
                for key, value in row.items()
            }
            for index, row in state["moments"].items()
        }
        self._optimizer.load_state_dict({**self._optimizer.state_dict(), "state": moments})


def decay_bias(log_beta_BHL: Tensor) -> Tensor:
    """Return (q - k) log beta_k for keys before their query, else 0: what is added to logits, [B, H, Q, K]."""
    places = torch.arange(log_beta_BHL.shape[-1], device=log_beta_BHL.device)
    past_QK = (places[:, None] - places).clamp(min=0)
    return past_QK * log_beta_BHL[:, :, None, :]


def capacity_excess(log_beta_HI: Tensor, positions: int, budget: int) -> Tensor:
    """Return (1/T) sum_t (1/t) max(0, sum_{i<=t} beta_i^(t-i) - M), averaged over heads; T = `positions`, M = `budget`.

    0 for M >= T or M >= I, with gradient 0.
    """
    t_T = torch.arange(1, positions + 1, device=log_beta_HI.device)
    age_TI = t_T[:, None] - t_T[: log_beta_HI.shape[-1]]
    held_HTI = (age_TI.clamp(min=0) * log_beta_HI[:, None, :]).exp() * (age_TI >= 0)
    return (relu(held_HTI.sum(-1) - budget) / t_T).mean()


def evict(log_beta_EHI: Tensor, last: int, budget: int) -> Tensor:
    """Return which entries are kept, [E, H, I] as bool: the E H M largest of (last - i) log beta_i, M = `budget`.

    `last` is the place of t, counted from the hint's first token. Of equal entries the later token is kept, then the
    first layer and head.
    """
    layers, heads, tokens = log_beta_EHI.shape
    ages_I = last - torch.arange(tokens, device=log_beta_EHI.device)
    scores_IEH = (ages_I * log_beta_EHI).permute(2, 0, 1).flip(0)
    order = scores_IEH.flatten().argsort(descending=True, stable=True)
    kept = torch.zeros(tokens * layers * heads, dtype=torch.bool, device=log_beta_EHI.device)
    kept[order[: layers * heads * budget]] = True
    return kept.view(tokens, layers, heads).flip(0).permute(1, 2, 0)


def _packed(tensor: Tensor) -> str:
    return base64.b64encode(tensor.detach().float().cpu().numpy().tobytes()).decode()


def _unpacked(text: str, like: Tensor) -> Tensor:
    numbers = np.frombuffer(base64.b64decode(text), dtype=np.float32)
    if numbers.size != like.numel():
        raise UserError("the checkpoint holds retention gates of another size: it was written by another run")
    return torch.from_numpy(numbers.copy()).view(like.shape)
