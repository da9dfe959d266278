"""The warning before a run that will not fit, with faked memory."""

from __future__ import annotations

import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen3Config

from atesd.cli.main import main
from atesd.recipe import load_config
from atesd.train import fit
from atesd.train.fit import MARGIN, free_memory, memory_warning, shortfall, this_machine
from atesd.train.plan import DEVICES, GIB, Lengths, make_plan

CPU = replace(DEVICES["h100"], name="this CPU", is_gpu=False, context=0.5 * GIB, memory=8 * GIB)


@pytest.fixture
def config(tmp_path: Path) -> Any:
    """Return a recipe whose model has half a gigabyte of weights."""
    Qwen3Config(
        vocab_size=50_000, hidden_size=1024, intermediate_size=4096, num_hidden_layers=8, head_dim=64
    ).save_pretrained(tmp_path / "model")
    return load_config("qwen3-1.7b-opsd", [f"model.path={tmp_path / 'model'}"])


def has(monkeypatch: pytest.MonkeyPatch, free: float) -> None:
    """Let this machine be a CPU with so many free bytes."""
    monkeypatch.setattr(fit, "this_machine", lambda: CPU)
    monkeypatch.setattr(fit, "free_memory", lambda device: free)


def test_the_limit_is_what_is_free_less_a_margin_and_libraries_count_once(
    config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = make_plan(config, replace(CPU, context=0.0), Lengths()).peak
    assert needed == make_plan(config, CPU, Lengths()).peak - 0.5 * GIB
    has(monkeypatch, needed / (1 - MARGIN) * 1.001)
    assert memory_warning(config) is None
    has(monkeypatch, needed / (1 - MARGIN) * 0.999)
    assert memory_warning(config) is not None
    gpu = replace(CPU, is_gpu=True)
    monkeypatch.setattr(fit, "this_machine", lambda: gpu)
    of_gpu = make_plan(config, gpu, Lengths()).peak
    monkeypatch.setattr(fit, "free_memory", lambda device: of_gpu / (1 - MARGIN) * 0.999)
    assert memory_warning(config) is not None, "a GPU's context is still to come"


def test_the_line_names_overrides_that_are_enough(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    has(monkeypatch, 4 * GIB)
    line = memory_warning(config) or ""
    assert "\n" not in line
    assert line.startswith("this run will probably not fit into memory: ")
    assert " GiB are needed, 4.0 are there; " in line
    asked = line.partition(" are enough with: ")[2].partition(";")[0].split()
    assert asked
    lowered = load_config("qwen3-1.7b-opsd", [f"model.path={config.model.path}", *asked])
    assert memory_warning(lowered) is None
    has(monkeypatch, 0.3 * GIB)
    assert " GiB are needed even with rollout.batch_tokens=" in (memory_warning(config) or "")


def test_where_nothing_is_left_to_lower_it_says_so(config: Any) -> None:
    plan = make_plan(config, CPU, Lengths())
    said = shortfall(config, CPU, Lengths(), plan, 0.1 * GIB)
    assert said.startswith(f"{plan.peak / GIB:.1f} GiB are needed, 0.1 are there, and ")
    assert said.endswith(": take a smaller model, lower rollout.max_new_tokens, or choose a larger device")


def test_a_model_that_cannot_be_planned_is_no_business_of_the_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    has(monkeypatch, 0.0)
    assert memory_warning(load_config("pico", ["model.path=/nowhere"])) is None


def test_free_memory_is_the_least_of_machine_and_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "/proc/meminfo": ["MemTotal:  9000 kB", "MemAvailable:    3000 kB"],
        f"{tmp_path}/memory.max": ["max"],
        f"{tmp_path}/memory.current": ["1000"],
    }
    monkeypatch.setattr(fit, "_CGROUPS", tmp_path)
    monkeypatch.setattr(fit, "_lines", lambda path: files.get(str(path), []))
    assert free_memory(CPU) == 3000 * 1024
    files[f"{tmp_path}/memory.max"] = ["2500000"]
    assert free_memory(CPU) == 2_499_000
    assert this_machine().memory == 2_500_000
    files[f"{tmp_path}/memory.max"] = ["3500000"]
    assert free_memory(CPU) == 3000 * 1024
    del files["/proc/meminfo"], files[f"{tmp_path}/memory.max"]
    assert free_memory(CPU) == CPU.memory
    files |= {f"{tmp_path}/memory/memory.limit_in_bytes": ["800"], f"{tmp_path}/memory/memory.usage_in_bytes": ["300"]}
    assert free_memory(CPU) == 500, "version 1"


def test_train_warns_in_one_line_before_it_loads_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    has(monkeypatch, 0.1 * GIB)

    def stop(config: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("atesd.train.loop.assemble", stop)
    monkeypatch.setattr(sys, "argv", ["atesd", "train", "pico", "--out", str(tmp_path / "run")])
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        with pytest.raises(SystemExit):
            main()
    printed = capsys.readouterr().err
    assert printed.startswith("warning: this run will probably not fit into memory: ")
    assert printed.count("\n") == 1
    assert " 0.1 are there" in printed
    assert not (tmp_path / "run").exists()
