"""What a run says where memory runs out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from atesd.recipe import build_config, load_config
from atesd.train.loop import Trainer
from atesd.train.memory import advice, is_out_of_memory, within_memory
from atesd.types import UserError

RECIPES = Path(__file__).parents[3] / "recipes"
SMALL = {"step": {"problems": 8}, "rollout": {"group_size": 2, "max_new_tokens": 64}}
"""16 completions of at most 64 tokens: 1024."""


def test_a_real_allocation_on_the_cpu_is_recognised() -> None:
    with (
        pytest.raises(UserError, match=r"while updating: lower step\.token_budget from 16384 to 512; or set"),
        within_memory(build_config(SMALL), "updating"),
    ):
        torch.empty(2**55)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError()])
def test_a_gpus_and_pythons_own_are_recognised(error: Exception) -> None:
    assert is_out_of_memory(error)
    with (
        pytest.raises(UserError, match=r"while sampling: lower rollout\.batch_tokens from 262144 to 512;"),
        within_memory(build_config(SMALL), "sampling"),
    ):
        raise error


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="something else"), within_memory(build_config({}), "updating"):
        raise RuntimeError("something else")


def test_what_is_in_use_is_halved_and_what_is_set_is_not_advised_again() -> None:
    tight = {"step": {"problems": 8, "token_budget": 64}, "rollout": {"max_new_tokens": 64, "batch_tokens": 300}}
    checkpointing = {"model": {"gradient_checkpointing": True}}
    assert advice(build_config(tight), "sampling")[0] == "lower rollout.batch_tokens from 300 to 150"
    assert advice(build_config(tight), "updating")[0] == "set model.gradient_checkpointing = true"
    assert advice(build_config(tight | checkpointing), "updating") == [
        "lower rollout.max_new_tokens = 64",
        "train adapters with model.lora = {}",
        "take a smaller model",
    ]
    evaluation = {"eval": {"k": 3, "problems": 5, "max_new_tokens": 10}}
    assert advice(build_config(evaluation), "evaluating")[0] == "lower rollout.batch_tokens from 262144 to 75"


def test_weights_get_smaller_in_steps() -> None:
    def loading(**model: Any) -> list[str]:
        return advice(build_config({"model": model}), "loading the model")

    four = 'set model.quantization = "4bit"'
    assert loading() == ["train adapters with model.lora = {}", "take a smaller model"]
    assert loading(lora={}) == ['set model.dtype = "bfloat16"', four, "take a smaller model"]
    assert loading(lora={}, dtype="bfloat16") == [four, "take a smaller model"]
    assert loading(lora={}, quantization="4bit") == ["take a smaller model"]


def test_a_run_names_the_phase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    overrides = ["step.problems=2", "eval.problems=2", "eval.k=1", "step.num_steps=1"]
    config = load_config(RECIPES / "pico.toml", overrides)
    with monkeypatch.context() as patch:
        patch.setattr("atesd.train.loop.assemble", full)
        with pytest.raises(UserError, match="out of memory while loading the model"):
            Trainer.start(config, tmp_path / "run")
    trainer = Trainer.start(config, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr("atesd.train.loop.evaluate", full)
        with pytest.raises(UserError, match="out of memory while evaluating"):
            trainer.train()
    with monkeypatch.context() as patch:
        patch.setattr(trainer.parts.stepper, "optimize", full)
        with pytest.raises(UserError, match="out of memory while updating"):
            trainer._one_step()
    monkeypatch.setattr(type(trainer.parts.driver), "rollout", full)
    with pytest.raises(UserError, match="out of memory while sampling"):
        trainer._one_step()
