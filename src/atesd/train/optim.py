"""Optimizer and learning-rate schedule."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from atesd.sections import OptimConfig


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
    """Return AdamW over the weights that train: one pass over each weight and its averages."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    return torch.optim.AdamW(
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
