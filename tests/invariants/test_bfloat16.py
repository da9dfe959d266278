"""A run whose base is in bfloat16: scores, updates, checkpoints and what goes on from them, on a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from atesd.recipe import build_config
from atesd.train.loop import Trainer

from support import adapter_runs
from support.adapter_runs import finished

TREE = adapter_runs.TREE | {"model": adapter_runs.TREE["model"] | {"dtype": "bfloat16"}}
pytestmark = pytest.mark.filterwarnings("ignore:.*LoRA.*:UserWarning")


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
    assert whole[0] == cut[0]
    assert whole[1].keys() == cut[1].keys()
    for name, weight in whole[1].items():
        assert torch.equal(weight, cut[1][name]), name
    assert all(row["loss/distil"] > 0 for row in whole[0] if row["step"])
