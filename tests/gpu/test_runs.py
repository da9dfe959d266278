"""Whole runs: the precision that `auto` takes, and that a resumed run goes on as it would have."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from atesd.recipe import build_config
from atesd.train.loop import Trainer
from atesd.train.model import bfloat16_speed, choose_dtype

from support.adapter_runs import TREE, finished

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:.*LoRA.*:UserWarning")]


def test_auto_takes_what_the_device_computes_in(device: torch.device, say: Callable[[str], None]) -> None:
    """bfloat16 for adapters where the GPU has it, and float32 for all weights."""
    dtype, why = choose_dtype()
    say(f'model.dtype = "auto": {dtype}, {why}')
    if device.type == "cuda":
        has_it = torch.cuda.is_bf16_supported(including_emulation=False)
        assert dtype == ("bfloat16" if has_it else "float32")
    else:
        assert bfloat16_speed() > 0


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
def test_a_run_is_resumed(dtype: str, device: torch.device, tmp_path: Path, say: Callable[[str], None]) -> None:
    """What was saved comes back bit for bit; what follows too on a CPU, and within 2 % of the loss on a GPU.

    There sums of many threads may come in another order: attention's and embeddings' backward passes add up so.
    """
    tree = TREE | {"model": TREE["model"] | {"dtype": dtype}}
    Trainer.start(build_config(tree), tmp_path / "whole").train()
    trainer = Trainer.start(build_config(tree), tmp_path / "cut")
    trainer._begin()
    trainer._one_step()
    trainer.run.unlock()
    held = {name: each.detach().clone() for name, each in trainer.parts.model.named_parameters() if each.requires_grad}
    resumed = Trainer.resume(tmp_path / "cut")
    assert {each.device.type for each in resumed.parts.model.parameters()} == {device.type}
    for name, weight in resumed.parts.model.named_parameters():
        assert name not in held or torch.equal(weight, held[name]), name
    resumed.train()
    whole, cut = finished(tmp_path / "whole"), finished(tmp_path / "cut")
    equal = whole[0] == cut[0] and all(torch.equal(whole[1][name], cut[1][name]) for name in whole[1])
    decided = json.loads((tmp_path / "whole" / "config.json").read_text())["model"]["dtype"]
    say(f"resumed, {dtype} ({decided}): {'equal bit for bit' if equal else 'NOT equal bit for bit'}")
    for expected, found in zip(whole[0], cut[0], strict=True):
        loss = expected.get("loss/distil", 0.0)
        assert math.isfinite(loss)
        assert found.get("loss/distil", 0.0) == pytest.approx(loss, rel=0.02)
    if device.type == "cpu":
        assert equal


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compiled_layers_train_as_written_ones(
    dtype: str, device: torch.device, tmp_path: Path, say: Callable[[str], None]
) -> None:
    """The same losses, within rounding: completions are drawn by layers as written, from weights that moved by it."""
    losses: list[list[float]] = []
    seconds: list[float] = []
    for name, is_compiled in (("written", False), ("compiled", True)):
        model = TREE["model"] | {"dtype": dtype, "compile": is_compiled}
        trainer = Trainer.start(build_config(TREE | {"model": model}), tmp_path / name)
        trainer.train()
        assert {each.device.type for each in trainer.parts.model.parameters()} == {device.type}
        rows = trainer.run.metrics()
        losses.append([row["loss/distil"] for row in rows if "loss/distil" in row])
        seconds.append(sum(row.get("time/update_s", 0.0) for row in rows))
    torch._dynamo.reset()
    say(f"model.compile, {dtype}: updates of three steps {seconds[0]:.2f} s as written, {seconds[1]:.1f} s compiling")
    assert len(losses[0]) == 3
    assert losses[1] == pytest.approx(losses[0], rel=1e-3 if dtype == "float32" else 0.1)
