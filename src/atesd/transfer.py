"""Copies between memory and device that make nobody wait.

A copy of ordinary memory to a GPU waits until the GPU has done all its work. One of pinned memory joins the queue:
torch keeps its source until the copy is done.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a CPU tensor on a device, itself on a CPU. What was given must not be written to afterwards."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def numbers_of(scalars: Sequence[Tensor]) -> list[float]:
    """Return tensors of one number each, of one type and device, as numbers: one wait, not one a number."""
    found: list[float] = torch.stack([each.detach().reshape(()) for each in scalars]).tolist() if scalars else []
    return found
