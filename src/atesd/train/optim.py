"""Optimizer and learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from atesd.sections import OptimConfig

_HALF = (torch.bfloat16, torch.float16)
MASTER = "master"
"""The slot of a weight's state that holds it in float32."""


class MasterAdamW(torch.optim.AdamW):
    """AdamW of weights in half precision, which moves copies of them in float32, the masters.

    master <- AdamW's step on it, by the gradient in float32;  weight <- master, rounded to the nearest.

    A step smaller than half the distance of two neighbours (2^-9 of a weight in bfloat16) would else be lost. Gradients
    are gathered in float32, too (`grad_dtype`). State of a weight, beside AdamW's: `master`. What others write into a
    weight counts: where it is no longer its master, rounded, the master begins there anew. Weights in float32 are
    moved as AdamW does. Of AdamW's options amsgrad, maximize and closures are not offered.
    """

    def __init__(self, params: Any, **settings: Any) -> None:
        super().__init__(params, **settings)
        for weight in self._weights():
            if weight.dtype in _HALF:
                weight.grad_dtype = torch.float32

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Move every weight that has a gradient."""
        assert closure is None, "a closure is not offered"
        for group in self.param_groups:
            moved = [weight for weight in group["params"] if weight.grad is not None]
            states = [self._state_of(weight) for weight in moved]
            masters = [state.get(MASTER, weight) for weight, state in zip(moved, states, strict=True)]
            beta1, beta2 = group["betas"]
            adamw(
                masters,
                [weight.grad.to(master.dtype) for weight, master in zip(moved, masters, strict=True)],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                [state["step"] for state in states],
                fused=group["fused"],
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
            for weight, master in zip(moved, masters, strict=True):
                if master is not weight:
                    weight.copy_(master)
        return None

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; AdamW's own would round everything to the weights' precision."""
        super().load_state_dict({**state_dict, "state": {}})
        weights = list(self._weights())
        for place, slots in state_dict["state"].items():
            weight = weights[place]
            self.state[weight] = {slot: value.detach().clone().to(weight.device) for slot, value in slots.items()}

    def _weights(self) -> list[nn.Parameter]:
        return [weight for group in self.param_groups for weight in group["params"]]

    def _state_of(self, weight: nn.Parameter) -> dict[str, Tensor]:
        """Return the state of a weight, made at its first step, its master being what it was rounded from."""
        state: dict[str, Tensor] = self.state[weight]
        if not state:
            state["step"] = torch.zeros((), device=weight.device)
            state["exp_avg"] = torch.zeros_like(weight, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(weight, dtype=torch.float32)
            if weight.dtype in _HALF:
                state[MASTER] = weight.detach().float()
        elif MASTER in state:
            is_own = state[MASTER].to(weight.dtype) == weight
            state[MASTER].copy_(torch.where(is_own, state[MASTER], weight.float()))
        return state


def learning_rate_factor(config: OptimConfig, update: int, total: int) -> float:
    """Return the factor on `lr` for the update with index `update` of `total`."""
    if update < config.warmup_steps:
        return (update + 1) / config.warmup_steps
    done = (update - config.warmup_steps) / max(1, total - config.warmup_steps)
    match config.schedule:
        case "constant":
            return 1.0
        case "linear":
            return max(0.0, 1.0 - done)
        case "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))


def build_optimizer(config: OptimConfig, model: nn.Module) -> torch.optim.AdamW:
    """Return AdamW over the weights that train: one pass over each weight and its averages.

    Where some are in half precision, it moves copies of them in float32.
    """
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    kind = MasterAdamW if any(weight.dtype in _HALF for weight in trained) else torch.optim.AdamW
    return kind(
        trained,
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=all(weight.device.type in {"cpu", "cuda"} and weight.is_floating_point() for weight in trained),
    )


def build_schedule(config: OptimConfig, optimizer: Any, updates: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Return the learning-rate schedule over a run's updates; `optimizer` may be accelerate's wrapper."""
    return torch.optim.lr_scheduler.LambdaLR(
        getattr(optimizer, "optimizer", optimizer), lambda update: learning_rate_factor(config, update, updates)
    )
