"""A run whose base is in bfloat16: scores, updates, checkpoints and what goes on from them, on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from atesd.metrics import is_timing
from atesd.recipe import build_config
from atesd.runlog import RunDir
from atesd.train.loop import Trainer

TREE: dict[str, Any] = {
    "threads": 1,
    "model": {"path": "pico", "dtype": "bfloat16", "lora": {"r": 4, "alpha": 8}},
    "task": {"kind": "pico", "train_size": 12, "probe_size": 2, "eval_size": 2},
    "prompt": {"student": "{problem}", "teacher": "{problem}\n>{hint}", "answer": "\n#{answer}"},
    "exposure": {"kind": "beta", "hold": 1, "look_ahead": 1},
    "rollout": {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 16},
    "optim": {"lr": 1e-3},
    "step": {"num_steps": 3, "problems": 3},
    "eval": {"every": 3, "k": 1},
    "save": {"every": 1, "keep": 3},
}
pytestmark = pytest.mark.filterwarnings("ignore:.*LoRA.*:UserWarning")


def finished(run: Path) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    rows = [{k: v for k, v in row.items() if not is_timing(k)} for row in RunDir.open(run).metrics()]
    adapter = load_file(run / "final" / "adapter_model.safetensors")
    return rows, {name: value.numpy().tobytes() for name, value in adapter.items()}


def test_a_run_in_bfloat16_is_resumed_bit_for_bit(tmp_path: Path) -> None:
    """Adapters, their gradients and both moments stay in float32; the base is never moved."""
    Trainer.start(build_config(TREE), tmp_path / "whole").train()
    trainer = Trainer.start(build_config(TREE), tmp_path / "cut")
    trainer._begin()
    base = {name: each.clone() for name, each in trainer.parts.model.named_parameters() if not each.requires_grad}
    assert {each.dtype for each in base.values()} == {torch.bfloat16}
    trainer._one_step()
    trainer.run.unlock()
    model = trainer.parts.model
    assert {each.dtype for each in model.parameters() if each.requires_grad} == {torch.float32}
    for name, weight in model.named_parameters():
        assert name not in base or torch.equal(weight, base[name]), name
    moments = load_file(tmp_path / "cut" / "checkpoints" / "step_000001" / "optimizer.safetensors")
    assert {each.dtype for each in moments.values()} == {torch.float32}
    assert any(float(each.abs().max()) > 0 for name, each in moments.items() if "step" not in name)
    Trainer.resume(tmp_path / "cut").train()
    whole, cut = finished(tmp_path / "whole"), finished(tmp_path / "cut")
    assert whole == cut
    assert all(row["loss/distil"] > 0 for row in whole[0] if row["step"])
