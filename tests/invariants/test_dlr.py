"""Whole runs with DLR's two forms: latent codes and exposure arms. Resumed, saved, evaluated, composed."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from atesd.codes.model import FILE, codes_of, load_codes
from atesd.files import read_jsonl
from atesd.metrics import METRICS, is_timing
from atesd.recipe import build_config
from atesd.runlog import RunDir
from atesd.train.export import copy_model, merge_model
from atesd.train.inspect import evaluate_model
from atesd.train.loop import Interrupted, Trainer
from atesd.types import UserError

BASE: dict[str, Any] = {
    "threads": 1,
    "task": {"kind": "pico", "train_size": 12, "probe_size": 2, "eval_size": 3},
    "prompt": {"student": "{problem}", "teacher": "{problem}\n>{hint}", "answer": "\n#{answer}"},
    "exposure": {"kind": "fixed", "ratio": 0.5},
    "rollout": {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 40},
    "optim": {"lr": 2e-2, "max_grad_norm": 1.0},
    "step": {"num_steps": 4, "problems": 4},
    "eval": {"every": 4, "k": 1, "temperature": 0.0},
    "save": {"every": 1, "keep": 2, "rollouts_every": 2},
}
CODES: dict[str, Any] = {"codes": {"count": 4, "chunk": 3, "draws": 2}}
ARMS: dict[str, Any] = {"exposure": {"kind": "dlr", "hold": 2, "grid": [0.5, 0.0, 1.0], "decay": 0.5}}
LORA: dict[str, Any] = {"model": {"path": "pico", "lora": {"r": 4}}}


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if not is_timing(key)} for row in RunDir.open(run).metrics()]


def weights_of(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.iterdir() if path.suffix == ".safetensors"]
    return {f"{path.name}/{name}": each.numpy().tobytes() for path in files for name, each in load_file(path).items()}


def outcome(run: Path) -> tuple[list[dict[str, Any]], dict[str, bytes], dict[str, bytes]]:
    """Return everything reproducible that a run leaves."""
    texts = {path.name: path.read_bytes() for folder in ("eval", "rollouts") for path in (run / folder).iterdir()}
    return rows_of(run), weights_of(run / "final"), texts


@pytest.mark.parametrize(
    "sections",
    [
        BASE | CODES | {"step": BASE["step"] | {"updates_per_batch": 2}},
        BASE | CODES | LORA | {"teacher": {"weights": "ema", "ema_decay": 0.5}},
        BASE | ARMS,
        BASE | ARMS | CODES,
    ],
    ids=["codes", "codes_lora_ema", "arms", "both"],
)
def test_a_resumed_run_ends_as_one_that_was_never_interrupted(sections: dict[str, Any], tmp_path: Path) -> None:
    Trainer.start(build_config(sections), tmp_path / "whole").train()
    whole = outcome(tmp_path / "whole")
    if "codes" in sections:
        assert any(row["codes/size"] > 0 for row in whole[0][1:])
        assert f"{FILE}/router" in whole[1]
    if "dlr" in str(sections["exposure"]):
        assert any("exposure/router/kl" in row for row in whole[0])
    trainer = Trainer.start(build_config(sections), tmp_path / "cut")
    trainer.listener = lambda row: os.kill(os.getpid(), signal.SIGTERM) if row["step"] == 3 else None
    with pytest.raises(Interrupted):
        trainer.train()
    Trainer.resume(tmp_path / "cut").train()
    assert outcome(tmp_path / "cut") == whole
    unknown = {key for row in whole[0] for key in row if key.startswith(("codes/", "exposure/router"))}
    assert {key.rpartition("/")[0] + "/{}" if "share" in key else key for key in unknown} <= set(METRICS)


def test_the_final_folder_is_evaluated_as_the_run_did_and_loads_with_plain_transformers(tmp_path: Path) -> None:
    """Greedy evaluation at the last step, and of the folder: the same completions, and others without its codes."""
    run = tmp_path / "run"
    config = build_config(BASE | CODES)
    trainer = Trainer.start(config, run)
    trained = codes_of(trainer.parts.model)
    assert trained is not None
    with torch.no_grad():  # larger than four steps would make them
        trained.vectors_CH.normal_(0, 3, generator=torch.Generator().manual_seed(0))
        trained.router_CH.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    trainer.train()
    completions = [row["completion"] for row in read_jsonl(run / "eval" / "step_000004.jsonl")]
    found = [row["completion"] for row in evaluate_model(config, run / "final").rows]
    assert found == completions
    codes = load_codes(run / "final")
    assert torch.equal(codes.vectors_CH, trained.vectors_CH)
    model = AutoModelForCausalLM.from_pretrained(run / "final")
    assert codes_of(model) is None
    copy_model(run / "final", tmp_path / "copy", "card")
    assert (tmp_path / "copy" / FILE).is_file()
    (tmp_path / "copy" / FILE).unlink()
    assert [row["completion"] for row in evaluate_model(config, tmp_path / "copy").rows] != completions


def test_merged_adapters_keep_their_codes(tmp_path: Path) -> None:
    config = build_config(BASE | CODES | LORA)
    Trainer.start(config, tmp_path / "run").train()
    merge_model(config, tmp_path / "run" / "final", tmp_path / "merged", "card", "float32")
    assert (
        weights_of(tmp_path / "merged")[f"{FILE}/vectors"] == weights_of(tmp_path / "run" / "final")[f"{FILE}/vectors"]
    )
    assert not [name for name in load_file(tmp_path / "merged" / "model.safetensors") if "latent" in name]
    rows = [evaluate_model(config, tmp_path / folder).rows for folder in ("merged", "run/final")]
    assert [row["completion"] for row in rows[0]] == [row["completion"] for row in rows[1]]


def test_training_goes_on_from_a_folder_with_codes(tmp_path: Path) -> None:
    Trainer.start(build_config(BASE | CODES), tmp_path / "run").train()
    further = {"model": {"path": str(tmp_path / "run" / "final")}}
    trainer = Trainer.start(build_config(BASE | CODES | further), tmp_path / "more")
    codes = codes_of(trainer.parts.model)
    assert codes is not None
    assert torch.equal(codes.router_CH, load_codes(tmp_path / "run" / "final").router_CH)
    assert codes.router_CH.requires_grad
    with pytest.raises(UserError, match="which this recipe does not train"):
        Trainer.start(build_config(BASE | further), tmp_path / "without")


@pytest.mark.parametrize(
    "sections",
    [
        {"target": {"kind": "residual"}, "selection": {"kind": "tip"}},
        {"target": {"kind": "extrapolate", "lambda_x": 1.25}, "loss": {"divergence": {"kind": "reverse_kl"}}},
        {"gate": {"kind": "sdar"}, "gradient": {"kind": "longact", "ratio": 0.5, "strict": True}},
        {"loss": {"divergence": {"kind": "sampled"}}, "step": {"num_steps": 2, "problems": 4, "updates_per_batch": 2}},
        {"routing": {"kind": "aligned", "every": 1, "otherwise": "skip"}, "target": {"kind": "paint", "mismatch": 0.1}},
        {"exposure": {"kind": "paired", "hold": 1}, "teacher": {"weights": "live"}},
        {"exposure": {"kind": "beta", "hold": 1, "look_ahead": 1, "decisions_per_update": 1}},
        {"exposure": {"kind": "dlr", "hold": 1, "draws": 2}, "curriculum": {"kind": "reverse_ppl"}},
        {"reveal": {"kind": "retention", "hidden": 4}, "target": {"kind": "avsd"}},
        {"reveal": {"kind": "overlap", "unit": "line", "n": 3}, "gate": {"kind": "aligned"}},
    ],
    ids="_".join,
)
def test_codes_compose(sections: dict[str, Any], tmp_path: Path) -> None:
    short = {"step": {"num_steps": 2, "problems": 4}, "eval": {"every": 2, "k": 1}}
    Trainer.start(build_config(BASE | CODES | short | sections), tmp_path / "run").train()
    last = rows_of(tmp_path / "run")[-1]
    assert last["step"] == 2
    if "updates_per_batch" not in sections.get("step", {}):  # a second update scores with other weights than sampled
        assert last.get("rollout/logprob_gap", 0.0) < 1e-4
