"""`atesd plan` as a user reads it."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import Qwen3Config

from atesd.cli.plan import device_of, run_plan
from atesd.recipe import load_config
from atesd.train.fit import MARGIN
from atesd.train.plan import DEVICES, GIB, Lengths, make_plan
from atesd.types import UserError


@pytest.fixture
def model(tmp_path: Path) -> str:
    """Return overrides that name a config of half a gigabyte of weights."""
    Qwen3Config(
        vocab_size=50_000, hidden_size=1024, intermediate_size=4096, num_hidden_layers=8, head_dim=64
    ).save_pretrained(tmp_path / "model")
    return f"model.path={tmp_path / 'model'}"


def plan(model: str, *overrides: str, memory: float | None = None) -> None:
    run_plan(
        Path("qwen3-1.7b-opsd"),
        [model, *overrides],
        device="h100",
        memory=memory,
        flops=None,
        bandwidth=None,
        prompt=200,
        solution=1000,
    )


def test_a_run_that_fits_is_said_to(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    plan(model)
    printed = capsys.readouterr().out
    assert "it fits: " in printed
    assert "warning" not in printed
    for part in ("weights", "optimizer", "key-value cache", "activations", "a step: ", "prompts of 200 tokens"):
        assert part in printed
    assert "teacher copies" not in printed, "adapters need none"


def test_one_that_does_not_is_told_what_to_lower_and_that_is_enough(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    plan(model, memory=4)
    warning = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: "))
    lowered = warning.partition(" with: ")[2].split()
    assert lowered, warning
    plan(model, *lowered, memory=4)
    assert "it fits" in capsys.readouterr().out
    plan(model, memory=0.3)
    assert "take a smaller model" in capsys.readouterr().out


def test_a_run_that_leaves_no_margin_does_not_fit(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("atesd.train.fit.shortfall", lambda *_: "lower something")
    config = load_config("qwen3-1.7b-opsd", [model])
    peak = make_plan(config, DEVICES["h100"], Lengths(200, 1000)).peak / GIB
    for share, says in ((1 - 1.1 * MARGIN, "it fits"), (1 - 0.9 * MARGIN, "it does not fit: lower something")):
        plan(model, memory=peak / share)
        assert says in capsys.readouterr().out


def test_what_the_numbers_do_not_know_is_said(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    plan(model)
    plain = capsys.readouterr().out
    assert "model.compile" not in plain
    assert "--flops" not in plain
    plan(model, "model.compile=true")
    assert "model.compile is left out" in capsys.readouterr().out
    plan(model, "model.dtype=float32")
    assert "the rate is bfloat16's: give that of float32 with --flops" in " ".join(capsys.readouterr().out.split())


def test_a_tiny_model_takes_little_and_not_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    run_plan(Path("pico"), [], device=None, memory=None, flops=None, bandwidth=None, prompt=28, solution=30)
    printed = capsys.readouterr().out
    (weights,) = (line for line in printed.splitlines() if line.startswith("\u2502 weights"))
    assert [cell.strip() for cell in weights.split("\u2502")[2:-1]] == ["< 0.01"] * 3
    assert "0.4 million weights, 0.4 train" in printed
    assert "bfloat16's" not in printed, "this machine's rate is measured in float32"


def test_devices_by_name_and_by_numbers() -> None:
    assert device_of("H100", None, None, None) == DEVICES["h100"]
    mine = device_of("h100", 24, 80, 900)
    assert (mine.memory, mine.flops, mine.bandwidth) == (24 * GIB, 80e12, 900e9)
    here = device_of(None, None, None, None)
    assert here.memory > GIB
    assert 1e8 < here.flops < 1e14
    with pytest.raises(UserError, match="device 'h1000' is not known: give one of this, h100"):
        device_of("h1000", None, None, None)
