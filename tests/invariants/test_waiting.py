"""How often an update makes the CPU wait for the device: whatever reads a tensor's numbers does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from atesd.train import step
from atesd.train.batch import Row

from support.models import ragged_rows, tiny_model
from support.steppers import make_stepper

READS = ("item", "tolist", "cpu", "numpy", "nonzero", "__float__", "__int__", "__bool__", "__index__")


def waits(monkeypatch: pytest.MonkeyPatch, rows: list[Row], budget: int, **sections: Any) -> tuple[Counter[str], int]:
    """Return what was read of tensors while an update worked on its device, and the number of its micro-batches.

    What is fetched lies on the CPU from then on, and is not counted.
    """
    counted: Counter[str] = Counter()
    is_on = False

    def counting(name: str) -> Callable[..., Any]:
        plain = getattr(Tensor, name)

        def read(self: Tensor, *arguments: Any) -> Any:
            if is_on:
                counted[name] += 1
            return plain(self, *arguments)

        return read

    index = Tensor.__getitem__

    def by_mask(self: Tensor, key: Any) -> Any:
        keys = key if isinstance(key, tuple) else (key,)
        if is_on and any(isinstance(each, Tensor) and each.dtype == torch.bool for each in keys):
            counted["mask"] += 1
        return index(self, key)

    fetched = step.fetched

    def fetching(taken: Any) -> Any:
        nonlocal is_on
        found = fetched(taken)
        is_on = False
        return found

    with monkeypatch.context() as patch:
        for name in READS:
            patch.setattr(Tensor, name, counting(name))
        patch.setattr(Tensor, "__getitem__", by_mask)
        patch.setattr(step, "fetched", fetching)
        stepper, _ = make_stepper(tiny_model(), step={"token_budget": budget}, **sections)
        rows = list(rows)
        plain_update = stepper._update

        def update(*arguments: Any) -> None:
            nonlocal is_on
            is_on = True
            plain_update(*arguments)

        patch.setattr(stepper, "_update", update)
        outcome = stepper.optimize(rows)
    return counted, int(outcome.metrics["optim/micro_batches"])


def test_an_update_waits_once_however_many_rows_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for transformers' look at positions (does it see packed sequences?), in each pass of the model."""
    few, _ = waits(monkeypatch, ragged_rows(4), 10_000)
    many, parts = waits(monkeypatch, ragged_rows(24), 10_000)
    assert parts == 1
    assert few.pop("__bool__") == 2  # a student's pass, a teacher's
    many.pop("__bool__")
    # Fetched is what is logged; the number of tokens and the loss are read on the CPU.
    assert few == many == Counter(cpu=1, item=1, __float__=1)


def test_micro_batches_wait_no_more_often_but_for_passes_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    found, parts = waits(monkeypatch, ragged_rows(24), 80)
    assert parts >= 4
    passes = found.pop("__bool__")
    assert parts * 2 <= passes <= parts * 5
    assert found == Counter(cpu=1, item=parts, __float__=parts)
