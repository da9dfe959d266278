"""`atesd warmup`: what it hands to the training, and on how many threads."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from atesd.cli.warmup import run_model_warmup, run_warmup
from atesd.train import supervised, warmup, warmup_doors


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


def test_any_models_training_knows_where_its_problems_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipes = Path(__file__).parents[3] / "recipes"
    data = tmp_path / "mine.jsonl"
    data.write_text("".join(json.dumps({"problem": f"{n}", "solution": "#### 1"}) + "\n" for n in range(3)))
    seen: list[Any] = []

    def stand_in(config: Any, problems: Any, out: Path, plan: Any, *, source: Any, progress: Any) -> Any:
        seen.append((len(problems), source.place(min(problems, key=lambda each: each.id), "answer")))
        return supervised.Warmed(3, 0, 0.5, None)

    monkeypatch.setattr(supervised, "warm_up", stand_in)
    run_model_warmup("pico", str(data), recipes / "pico.toml", [], tmp_path / "out", {})
    assert seen == [(3, f"{data}:1: field 'answer'")]


def test_a_warm_start_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fills_the_disk(out: Path, **_: object) -> None:
        out.mkdir()
        (out / "config.json").touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("atesd.train.warmup.train_warm_start", fills_the_disk)
    with pytest.raises(OSError, match="No space left"):
        run_warmup(tmp_path / "warm", 1, 0, None)
    assert list(tmp_path.iterdir()) == []
