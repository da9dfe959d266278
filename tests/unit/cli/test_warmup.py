"""`atesd warmup` of the embedded tasks: what it hands to the training, and on how many threads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from atesd.cli.warmup import run_warmup
from atesd.train import warmup, warmup_doors


@pytest.mark.parametrize(
    ("world", "module", "name", "steps", "planted"),
    [
        ("pico", warmup, "train_warm_start", 1000, 0.12),
        ("doors", warmup_doors, "train_doors_warm_start", warmup_doors.DEFAULT_STEPS, 0.9),
    ],
)
def test_it_trains_on_one_thread_whatever_the_machine_has(
    world: str, module: Any, name: str, steps: int, planted: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def stand_in(out: Path, **asked: Any) -> None:
        asked.pop("progress")(1, 2, 0.5)
        seen.append((out, asked, torch.get_num_threads()))

    monkeypatch.setattr(module, name, stand_in)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        run_warmup(tmp_path / "given", None, 3, None, world)
        run_warmup(tmp_path / "given", 7, 0, 0.0, world)
    finally:
        torch.set_num_threads(before)
    assert seen == [
        (tmp_path / "given", {"steps": steps, "seed": 3, "shortcut": planted}, 1),
        (tmp_path / "given", {"steps": 7, "seed": 0, "shortcut": 0.0}, 1),
    ]
