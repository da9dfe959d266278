"""The commands as a user types them: exit codes, messages, files."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from atesd.cli.main import main

ROOT = Path(__file__).parents[2]
PICO = str(ROOT / "recipes" / "pico.toml")
SMALL = [
    "task.train_size=8",
    "task.probe_size=2",
    "task.eval_size=2",
    "step.num_steps=2",
    "step.problems=2",
    "eval.k=2",
    "save.every=1",
    "save.rollouts_every=1",
]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run the command in process and return its exit code."""
    monkeypatch.setattr(sys, "argv", ["atesd", *arguments])
    try:
        main()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("pico*.toml")), ids=lambda path: path.stem)
def test_every_embedded_recipe_trains_two_steps(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert run(monkeypatch, "train", str(recipe), *SMALL, "--out", str(out)) == 0
    text = capsys.readouterr().out
    assert "step 2/2" in text
    assert "avg@2" in text
    assert [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()] == [0, 1, 2]
    row = json.loads((out / "rollouts" / "step_000002.jsonl").read_text().splitlines()[0])
    assert len(row["tokens"]) == len(row["divergence"]) == len(row["gate"])
    assert row["hint"] in row["teacher_prompt"]
    assert row["hint"] not in row["student_prompt"]
    assert json.loads((out / "result.json").read_text())["step"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", PICO, "exposur.ratio=1"], "unknown key 'exposur': did you mean 'exposure'?"),
        (["train", PICO, "loss.clipp=token"], "unknown key 'loss.clipp': did you mean 'clip'?"),
        (["train", PICO, 'exposure={kind="fixed", ratio=1.5}'], "less than or equal to 1 (given: 1.5)"),
        (["train", PICO, 'exposure={kind="fixed", hold=3}'], "unknown key 'exposure.fixed.hold'"),
        (["train", PICO, "step.problems"], "not of the form section.key=value"),
        (["train", PICO, "step.updates_per_batch=3"], "choose a divisor"),
        (["train", PICO, "teacher.ema_decay=0.9"], "has no effect"),
        (["train", "nothing.toml"], "recipe nothing.toml cannot be read"),
        (["train"], "nothing to train"),
        (["train", "--resume", "nowhere"], "not a run directory"),
        (["show", PICO, "--ratio", "1.5"], "1.5"),
        (["show", PICO, "model.path=nowhere"], "no tokenizer could be loaded from 'nowhere'"),
        (["train", PICO, "model.path=nowhere", "--out", "OUT"], "could be loaded from 'nowhere'"),
        (["compare", PICO, "--arms", "full,hlaf"], "unknown arm 'hlaf'"),
        (["check", "missing.jsonl"], "missing.jsonl cannot be read"),
        (["check", "gym:nosuch"], "does not make 'nosuch'"),
        (["check", "pico.txt"], "give pico, a file ending in .jsonl, or gym:NAME"),
        (["eval", "nowhere"], "name the recipe"),
        (["report", "nowhere"], "nowhere"),
        (["train", PICO, "rollout.max_new_tokens=250", "--out", "OUT"], "exceeds the model's context|do not fit"),
    ],
)
def test_a_mistake_ends_in_one_line_with_the_remedy(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [str(tmp_path / "out") if word == "OUT" else word for word in arguments]
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert any(part in error for part in message.split("|")), error


def test_an_existing_run_directory_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "metrics.jsonl").write_text("precious\n")
    assert run(monkeypatch, "train", PICO, *SMALL, "--out", str(tmp_path)) == 2
    assert "already exists and is not empty: continue it with --resume" in capsys.readouterr().err
    assert (tmp_path / "metrics.jsonl").read_text() == "precious\n"


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (["tokenizer.json", "tokenizer_config.json"], "tokenizer"),
        (["chat_template.jinja"], "has no chat template: use an instruction-tuned model"),
        (["model.safetensors"], "no causal language model could be loaded"),
    ],
)
def test_an_incomplete_model_folder_is_named(
    missing: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(ROOT / "src" / "atesd" / "assets" / "pico", folder)
    for name in missing:
        (folder / name).unlink()
    code = run(monkeypatch, "train", PICO, *SMALL, f"model.path={folder}", "--out", str(tmp_path / "run"))
    assert code == 2
    assert message in capsys.readouterr().err


def test_show_prints_both_prompts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "show", PICO, "--ratio", "0.5", "--count", "1") == 0
    text = capsys.readouterr().out
    assert "student" in text
    assert "teacher at ratio 0.5" in text
    assert "<|assistant|>" in text


def test_check_accepts_the_pico_task_and_refuses_a_broken_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "check", "pico") == 0
    assert "evaluation" in capsys.readouterr().out
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"problem": "1+1?", "solution": "#### 2"}\n{"problem": "2+2?"\n')
    assert run(monkeypatch, "check", str(broken)) == 2
    assert f"{broken}:2: not JSON" in capsys.readouterr().err


def test_compare_runs_pairs_resumes_and_extends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "study"
    base = ["compare", PICO, *SMALL, "--jobs", "2", "--out", str(out)]
    assert run(monkeypatch, *base, "--arms", "half,full", "--seeds", "1") == 0
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary) == {"start", "arms", "paired", "k", "seeds", "seconds"}
    assert set(summary["arms"]) == {"half", "full"}
    assert set(summary["paired"]["half-full"]) == {"difference", "low", "high"}
    assert (out / "report.html").stat().st_size > 100_000
    starts = [
        json.loads((out / arm / "seed_0" / "metrics.jsonl").read_text().splitlines()[0]) for arm in ("half", "full")
    ]
    assert starts[0]["eval/pico/avg@2"] == starts[1]["eval/pico/avg@2"], "arms of a seed share their start"
    stamp = (out / "half" / "seed_0" / "metrics.jsonl").stat().st_mtime_ns
    assert run(monkeypatch, *base, "--arms", "half,full,learned", "--seeds", "1") == 0
    assert set(json.loads((out / "summary.json").read_text())["arms"]) == {"half", "full", "learned"}
    assert (out / "half" / "seed_0" / "metrics.jsonl").stat().st_mtime_ns == stamp, "a finished run is not repeated"
    capsys.readouterr()
    other = [*base, "--arms", "half", "--seeds", "1", "optim.lr=0.1"]
    assert run(monkeypatch, *other) == 2
    assert "compares another recipe or other overrides" in capsys.readouterr().err


def test_eval_of_a_run_and_report_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert run(monkeypatch, "train", PICO, *SMALL, "--out", str(out)) == 0
    assert run(monkeypatch, "eval", str(out), "--k", "3", "--problems", "2", "--out", str(tmp_path / "rows.jsonl")) == 0
    assert "avg@3" in capsys.readouterr().out
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 6
    assert run(monkeypatch, "report", str(out)) == 0
    assert (out / "report.html").is_file()


def test_ctrl_c_saves_and_says_how_to_continue(tmp_path: Path) -> None:
    import signal
    import time

    out = tmp_path / "run"
    command = [sys.executable, "-m", "atesd.cli.main", "train", PICO, *SMALL, "step.num_steps=500", "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 60
    while (
        time.monotonic() < deadline
        and len((out / "metrics.jsonl").read_text().splitlines() if (out / "metrics.jsonl").exists() else []) < 3
    ):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"continue with: atesd train --resume {out}" in text
    assert list((out / "checkpoints").glob("step_*"))
