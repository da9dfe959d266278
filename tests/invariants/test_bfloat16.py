"""Runs in bfloat16, of adapters and of all weights: scores, updates, checkpoints and what goes on from them."""

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


WHOLE: dict[str, Any] = adapter_runs.TREE | {"model": {"path": "pico", "dtype": "bfloat16"}, "optim": {"lr": 1e-5}}


def ended(run: Path) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """Return what was logged, times left out, and all that the last checkpoint holds."""
    rows = [{k: v for k, v in row.items() if not is_timing(k)} for row in RunDir.open(run).metrics()]
    folder = run / "checkpoints" / "step_000003"
    return rows, {f"{path.stem}/{k}": v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


@pytest.mark.parametrize("teacher", [{"weights": "frozen"}, {"weights": "ema", "ema_decay": 0.5}])
@pytest.mark.filterwarnings("ignore:.*EMA.*:UserWarning")
def test_all_weights_train_in_bfloat16_over_float32_masters(teacher: dict[str, Any], tmp_path: Path) -> None:
    """Steps of 1e-5 move masters, and hardly a weight; a resumed run is the same, bit for bit."""
    config = build_config(WHOLE | {"teacher": teacher})
    Trainer.start(config, tmp_path / "whole").train()
    trainer = Trainer.start(config, tmp_path / "cut")
    trainer._begin()
    model = trainer.parts.model
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    trainer._one_step()
    own = trainer.parts.teacher
    with own.in_place():
        assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
        for name, weight in model.named_parameters():
            average = own.tensors().get(name)
            assert torch.equal(weight, before[name] if average is None else average.bfloat16())
    trainer.run.unlock()
    Trainer.resume(tmp_path / "cut").train()
    (rows, tensors), (again, others) = ended(tmp_path / "whole"), ended(tmp_path / "cut")
    assert rows == again
    assert tensors.keys() == others.keys()
    for name, value in tensors.items():
        assert torch.equal(value, others[name]), name
    assert all(row["loss/distil"] > 0 for row in rows if row["step"])
    for name, first in before.items():
        weight, master = tensors[f"model/{name}"], tensors[f"optimizer/{name}/master"]
        assert (weight.dtype, master.dtype) == (torch.bfloat16, torch.float32)
        assert torch.equal(weight, master.bfloat16()), name
        assert not torch.equal(master, first.float()), name
        if teacher["weights"] == "ema":
            average = tensors[f"teacher/{name}"]
            assert average.dtype == torch.float32
            assert float((average - first.float()).abs().max()) <= float((weight.float() - first.float()).abs().max())


def test_bfloat16_learns_what_float32_does(tmp_path: Path) -> None:
    """Supervised training, whose data are the same: losses and the way that masters go are near each other."""
    tree = WHOLE | {"routing": {"kind": "sft"}, "exposure": {"kind": "fixed"}, "optim": {"lr": 1e-3}}
    found = {}
    for dtype in ("float32", "bfloat16"):
        run = tmp_path / dtype
        Trainer.start(build_config(tree | {"model": {"path": "pico", "dtype": dtype}}), run).train()
        found[dtype] = ended(run)
    (exact, plain), (rounded, masters) = found["float32"], found["bfloat16"]
    for one, other in zip(exact, rounded, strict=True):
        if one["step"]:
            assert one["loss/nll"] == pytest.approx(other["loss/nll"], rel=0.02)
            assert one["optim/grad_norm"] == pytest.approx(other["optim/grad_norm"], rel=0.05)
    names = [name.removeprefix("optimizer/").removesuffix("/exp_avg") for name in plain if name.endswith("/exp_avg")]
    ours = torch.cat([masters[f"optimizer/{name}/exp_avg"].flatten() for name in names])
    theirs = torch.cat([plain[f"optimizer/{name}/exp_avg"].flatten() for name in names])
    assert float(torch.nn.functional.cosine_similarity(ours, theirs, dim=0)) > 0.98


def test_a_virtual_step_on_weights_in_bfloat16_is_the_optimizers_next(tmp_path: Path) -> None:
    """It begins at the masters, which are not the weights, and is put back."""
    trainer = Trainer.start(build_config(WHOLE | {"optim": {"lr": 1e-3, "weight_decay": 0.1}}), tmp_path / "run")
    trainer.train()
    credit, optimizer = trainer.parts.credit, trainer.parts.optimizer
    weights = [weight for weight in trainer.parts.model.parameters() if weight.requires_grad]
    draws = torch.Generator().manual_seed(0)
    gradient = [1e-4 * torch.randn(weight.shape, generator=draws) for weight in weights]
    before = [weight.detach().clone() for weight in weights]
    with credit._stepped(weights, gradient):
        stepped = [weight.detach().clone() for weight in weights]
    assert all(torch.equal(weight, was) for weight, was in zip(weights, before, strict=True))
    for group in optimizer.param_groups:
        group["lr"] = credit._rate
    for weight, part in zip(weights, gradient, strict=True):
        weight.grad = credit._clip(gradient) * part
    optimizer.step()
    same = torch.cat([(weight == found).flatten() for weight, found in zip(weights, stepped, strict=True)])
    moved = torch.cat([(weight != was).flatten() for weight, was in zip(weights, before, strict=True)])
    assert float(moved.float().mean()) > 0.05
    assert float(same.float().mean()) > 0.9999, "a rounding to either side may differ"


@pytest.mark.parametrize("kind", ["influence", "paired"])
def test_credit_is_taken_on_weights_in_bfloat16(kind: str, tmp_path: Path) -> None:
    """A virtual step leaves weights and masters as they were: the run is that without credit, but for its exposure."""
    tree = WHOLE | {"exposure": {"kind": kind, "hold": 1}, "optim": {"lr": 1e-3}}
    trainer = Trainer.start(build_config(tree), tmp_path / "run")
    trainer.train()
    rows, tensors = ended(tmp_path / "run")
    assert any(key.startswith("exposure/") for key in rows[-1])
    weights = [name for name in tensors if name.startswith("model/")]
    for name in weights:
        master = tensors[name.replace("model/", "optimizer/") + "/master"]
        assert torch.equal(tensors[name], master.bfloat16()), name
