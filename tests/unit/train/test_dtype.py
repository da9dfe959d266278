"""Which precision `model.dtype = "auto"` takes, what it says, and that a run keeps it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from atesd.cli.compare import decide_once, make_plan
from atesd.recipe import build_config, load_config
from atesd.sections import LoraConfig, ModelConfig
from atesd.train import inspect as inspecting
from atesd.train import model as models
from atesd.train.inspect import evaluate_model
from atesd.train.loop import Trainer
from atesd.train.model import bfloat16_speed, choose_dtype, decide_dtype, load
from atesd.types import UserError

RECIPES = Path(__file__).parents[3] / "recipes"
ADAPTERS = ModelConfig(dtype="auto", lora=LoraConfig())
SMALL: dict[str, Any] = {
    "threads": 1,
    "task": {"kind": "pico", "train_size": 4, "probe_size": 1, "eval_size": 1},
    "prompt": {"student": "{problem}", "teacher": "{problem}\n>{hint}", "answer": "\n#{answer}"},
    "rollout": {"max_new_tokens": 8},
    "step": {"num_steps": 2, "problems": 2},
    "eval": {"k": 1},
    "save": {"every": 1},
    "model": {"dtype": "auto", "lora": {"r": 2}},
}


@pytest.fixture
def speed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let bfloat16 be so many times as fast, on a machine without accelerator."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(models, "has_accelerator", lambda: False)
    return lambda value: monkeypatch.setattr(models, "bfloat16_speed", lambda: value)


@pytest.mark.parametrize(
    ("value", "dtype"), [(0.13, "float32"), (1.29, "float32"), (1.3, "bfloat16"), (8.0, "bfloat16")]
)
def test_bfloat16_is_taken_where_it_is_much_faster(value: float, dtype: str, speed: Any) -> None:
    speed(value)
    chosen, why = choose_dtype()
    assert chosen == dtype
    assert f"in bfloat16 is {value:.2g} times as fast as in float32" in why


def test_all_weights_and_adapters_train_in_what_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(models, "has_accelerator", lambda: False)
    monkeypatch.setattr(models, "bfloat16_speed", lambda: 2.0)
    for model in ({}, {"shard": True}, {"lora": {}}):
        config = build_config(SMALL | {"model": {"dtype": "auto", **model}})
        assert decide_dtype(config).model.dtype == "bfloat16"


@pytest.mark.parametrize(("supported", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_a_gpu_says_itself_whether_it_computes_in_bfloat16(
    supported: bool, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torch answers, a GPU that only emulates it supports it, too."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: supported or including_emulation
    )
    monkeypatch.setattr(models, "bfloat16_speed", lambda: pytest.fail("a CPU's speed says nothing of the GPU"))
    assert choose_dtype()[0] == dtype


def test_another_accelerator_computes_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(models, "has_accelerator", lambda: True)
    assert choose_dtype()[0] == "float32"


def ticks(*seconds: float) -> Iterator[float]:
    """Yield what a clock shows before and after spans of so many seconds."""
    now = 0.0
    for span in seconds:
        yield now
        now += span
        yield now


def test_speed_is_the_ratio_of_the_least_behind_a_first_product_of_each() -> None:
    # In turn float32, bfloat16: the first of each warms up, and would be the least; then 4 and 2 are.
    pairs = [(1.0, 0.5), (6.0, 3.0), (5.0, 9.0), (4.0, 3.0), (9.0, 2.0), (5.0, 5.0), (7.0, 4.0), (6.0, 3.0)]
    clock = ticks(*(seconds for pair in pairs for seconds in pair))
    assert bfloat16_speed(lambda: next(clock)) == 2.0
    with pytest.raises(StopIteration):
        next(clock)


def test_a_clock_too_coarse_for_a_product_does_not_divide_by_zero() -> None:
    assert bfloat16_speed(lambda: 0.0) == 0.0


def test_a_named_precision_stays_and_auto_is_said_in_a_line(speed: Any) -> None:
    speed(2.0)
    said: list[str] = []
    named = load_config(RECIPES / "smollm2-gsm.toml", ["model.dtype=float32"])
    assert decide_dtype(named, said.append) is named
    assert said == []
    decided = decide_dtype(load_config(RECIPES / "smollm2-gsm.toml"), said.append)
    assert decided.model.dtype == "bfloat16", "the packaged recipe leaves it to the machine"
    (line,) = said
    assert line.startswith("model.dtype = bfloat16: a matrix product in bfloat16 is 2 times as fast")
    assert "\n" not in line


def test_the_threads_of_the_recipe_are_measured(monkeypatch: pytest.MonkeyPatch, speed: Any) -> None:
    order: list[Any] = []
    monkeypatch.setattr(models, "set_threads", order.append)
    monkeypatch.setattr(models, "bfloat16_speed", lambda: order.append("measured") or 1.0)
    decide_dtype(build_config(SMALL | {"threads": 3}))
    assert order == [3, "measured"]


def test_a_model_is_loaded_in_a_precision_that_was_decided() -> None:
    with pytest.raises(AssertionError, match="decide_dtype"):
        load(ADAPTERS, 0)


@pytest.mark.parametrize(("here", "dtype"), [(2.0, "bfloat16"), (1.0, "float32")])
def test_a_run_writes_what_was_decided_and_keeps_it_on_another_machine(
    here: float, dtype: str, speed: Any, tmp_path: Path
) -> None:
    speed(here)
    said: list[str] = []
    trainer = Trainer.start(build_config(SMALL), tmp_path / "run", say=said.append)
    assert [line for line in said if "dtype" in line] == said[:1]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["model"]["dtype"] == dtype
    frozen = {weight.dtype for weight in trainer.parts.model.parameters() if not weight.requires_grad}
    assert frozen == {getattr(torch, dtype)}
    trainer._begin()
    trainer._one_step()
    trainer.run.unlock()
    speed(3.0 - here)  # the other one would be chosen there
    resumed = Trainer.resume(tmp_path / "run")
    assert (resumed.step, resumed.config.model.dtype) == (1, dtype)
    assert frozen == {weight.dtype for weight in resumed.parts.model.parameters() if not weight.requires_grad}
    assert resumed.train()["step"] == 2


def test_evaluation_decides_as_training_would(speed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    speed(2.0)
    seen: list[str] = []

    def stop(config: ModelConfig, seed: int, *rest: object, merges: bool) -> None:
        assert merges
        seen.append(config.dtype)
        raise UserError("far enough")

    monkeypatch.setattr(inspecting, "load", stop)
    with pytest.raises(UserError, match="far enough"):
        evaluate_model(build_config(SMALL), "pico")
    assert seen == ["bfloat16"], "adapters are merged for it, which makes no difference"


def test_all_runs_of_a_comparison_compute_in_one_precision(speed: Any, tmp_path: Path) -> None:
    """What an earlier call decided holds, wherever the comparison is continued."""
    console = Console(quiet=True)
    recipe = ["model.dtype=auto", "model.lora.r=2"]

    def dtypes() -> list[list[str]]:
        plan = make_plan(RECIPES / "pico.toml", recipe, ["full", "half"], range(1))
        header = plan.write(tmp_path)
        jobs = plan.jobs(tmp_path, decide_once(plan, header, console))
        (tmp_path / "compare.json").write_text(json.dumps(header))
        return [[word for word in job.train if word.startswith("model.dtype=")] for job in jobs]

    speed(2.0)
    assert dtypes() == [["model.dtype=auto", "model.dtype=bfloat16"]] * 2
    speed(1.0)
    assert dtypes() == [["model.dtype=auto", "model.dtype=bfloat16"]] * 2


def test_arms_that_train_all_weights_or_name_a_precision_are_left_alone(speed: Any, tmp_path: Path) -> None:
    speed(2.0)
    for recipe in ([], ["model.dtype=auto"], ["model.dtype=float32", "model.lora.r=2"]):
        plan = make_plan(RECIPES / "pico.toml", recipe, ["half"], range(1))
        assert decide_once(plan, {"auto_dtype": "bfloat16"}, Console(quiet=True)) is None
        (job,) = plan.jobs(tmp_path)
        assert not [word for word in job.train if word.startswith("model.dtype=b")]


def test_a_damaged_decision_is_not_continued(tmp_path: Path) -> None:
    plan = make_plan(RECIPES / "pico.toml", [], ["half"], range(1))
    (tmp_path / "compare.json").write_text(json.dumps(plan.write(tmp_path) | {"auto_dtype": ["int8"]}))
    with pytest.raises(UserError, match="field 'auto_dtype'"):
        plan.write(tmp_path)
