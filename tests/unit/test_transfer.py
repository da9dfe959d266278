"""Copies to a device, and numbers read together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from atesd.transfer import numbers_of, sent


def test_on_a_cpu_a_tensor_is_itself() -> None:
    tensor = torch.arange(3)
    assert sent(tensor, torch.device("cpu")) is tensor


def test_a_gpu_is_sent_pinned_memory_and_not_waited_for(monkeypatch: Any) -> None:
    order: list[Any] = []

    def pinned(self: Tensor) -> Tensor:
        order.append("pinned")
        return self

    def to(self: Tensor, device: torch.device, *, non_blocking: bool = False) -> Tensor:
        order.append((device.type, non_blocking))
        return self

    monkeypatch.setattr(Tensor, "pin_memory", pinned)
    monkeypatch.setattr(Tensor, "to", to)
    sent(torch.arange(3), torch.device("cuda", 0))
    assert order == ["pinned", ("cuda", True)]


def test_numbers_are_read_as_they_are_and_none_of_none() -> None:
    values = [torch.tensor(0.1, dtype=torch.float64), torch.tensor([1e-300], dtype=torch.float64, requires_grad=True)]
    assert numbers_of(values) == [0.1, 1e-300]
    assert numbers_of([]) == []
