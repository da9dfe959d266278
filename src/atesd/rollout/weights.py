"""The size of a model's weights, for those who must say why its numbers are not finite."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

SHRINK = "start again with a lower optim.lr or optim.weight_decay, or a smaller optim.max_grad_norm"
"""The remedy for weights that training has driven out of their range."""


def largest_weight(model: nn.Module) -> tuple[str, float]:
    """Return the name and the size of the largest weight; of the first that is not finite, where there is one."""
    found = ("", 0.0)
    for name, weight in model.named_parameters():
        if weight.numel() and weight.is_floating_point():  # 4-bit weights are bytes
            low, high = weight.detach().aminmax()
            size = float(torch.maximum(-low, high))
            if not math.isfinite(size):
                return name, size
            found = max(found, (name, size), key=lambda each: each[1])
    return found


def why_no_distribution(model: nn.Module, scores: Tensor, temperature: float) -> str:
    """Say where the first number that is not finite comes from: weights, activations or the temperature."""
    name, size = largest_weight(model)
    if not math.isfinite(size):
        return f"nothing can be sampled, as the model's weights are not finite (first {name}): {SHRINK}"
    if bool(scores.isfinite().all()):
        return f"nothing can be sampled, as logits divided by a temperature of {temperature:g} overflow: raise it"
    largest = f"though the weights are (largest {size:.3g} in {name})"
    return f"nothing can be sampled, as the model's logits are not finite, {largest}: {SHRINK}"
