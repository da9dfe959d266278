"""How often the CPU waits for the GPU in an update, as torch itself notices it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from support.models import ragged_rows, tiny_model
from support.steppers import make_stepper

pytestmark = pytest.mark.gpu


def test_an_update_waits_a_few_times_however_many_rows_it_has(
    device: torch.device, waits: Callable[[Callable[[], object]], int], say: Callable[[str], None]
) -> None:
    """Five times: one look of transformers' in each of two passes, one transfer, the norms of gradient and weights."""
    found = {}
    for count in (6, 48):
        rows = [replace(row, ratio=1.0) for row in ragged_rows(count)]
        stepper, _ = make_stepper(tiny_model().to(device), step={"token_budget": 10_000})
        stepper.optimize(rows)
        found[count] = waits(lambda stepper=stepper, rows=rows: stepper.optimize(rows))
    say(f"waits of an update of 6 rows, of 48 rows: {found[6]}, {found[48]}")
    if device.type == "cuda":
        assert found[6] == found[48] <= 5
    else:  # where rows of other lengths go through the model in more passes, and what is logged lies on the device
        assert found[48] <= found[6] + 8
