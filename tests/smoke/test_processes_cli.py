"""The command in several processes: one speaks, one writes, and one line says what went wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from atesd.cli.main import app, main

from support.processes import together

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

RECIPE = """\
threads = 1
[task]
kind = "pico"
train_size = 8
probe_size = 2
eval_size = 2
[prompt]
student = "{problem}"
teacher = "{problem}\\n>{hint}"
answer = "\\n#{answer}"
[exposure]
kind = "fixed"
[rollout]
max_new_tokens = 8
[step]
num_steps = 1
problems = 2
[eval]
k = 1
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(RECIPE)
    return path


def said(folder: Path, *arguments: str, first: tuple[str, ...] | None = None) -> tuple[list[int], list[str], list[str]]:
    """Run the command in two processes; return their exit codes, and what each wrote on stdout and stderr."""

    def run(rank: int) -> int:
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(folder / f"{name}_{rank}", os.O_WRONLY | os.O_CREAT), number)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        warnings.simplefilter("default")
        sys.argv = ["atesd", *(first if first and rank == 0 else arguments)]
        try:
            main()
        except SystemExit as stop:
            return int(stop.code or 0)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
        return 0

    codes = together(folder / "left", 2, run)
    outputs = [[(folder / f"{name}_{rank}").read_text() for rank in range(2)] for name in ("out", "err")]
    return codes, outputs[0], outputs[1]


def test_a_run_of_two_is_shown_and_warned_of_once(tmp_path: Path, recipe: Path) -> None:
    run = tmp_path / "run"
    codes, out, err = said(tmp_path, "train", str(recipe), "task.train_size=1", "--out", str(run))
    assert codes == [0, 0]
    assert out[0].count("models in ") == 1
    assert out[1] == ""
    assert err[0].count("warning: step.problems = 2") == 1
    assert err[1] == ""
    assert json.loads((run / "env.json").read_text())["processes"] == 2
    assert json.loads((run / "result.json").read_text())["step"] == 1


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["train", "RECIPE", "exposure.ratio=7", "--out", "RUN"], "exposure"),
        (["train", "RECIPE", "--nonsense"], "No such option"),
        (["compare", "RECIPE"], "2 processes were launched, which only `atesd train` uses: start atesd compare"),
        (["train", "ring-atesd", "--out", "RUN"], "a flow trains in one process, 2 were started"),
        (["train", "RECIPE", "codes={}", "model.shard=true", "--out", "RUN"], "cannot be used with 2 processes yet"),
    ],
)
def test_a_mistake_is_one_line_of_all_processes(arguments: list[str], line: str, tmp_path: Path, recipe: Path) -> None:
    places = {"RECIPE": str(recipe), "RUN": str(tmp_path / "run")}
    codes, out, err = said(tmp_path, *(places.get(each, each) for each in arguments))
    assert codes == [2, 2]
    assert "".join(out) == ""
    assert len("".join(err).splitlines()) == 1
    assert err[0].startswith("error: ")
    assert line in err[0]
    assert not (tmp_path / "run").exists()


def test_a_mistake_of_one_process_is_told_by_it(tmp_path: Path, recipe: Path) -> None:
    run = str(tmp_path / "run")
    gone = str(tmp_path / "gone.toml")
    codes, _, err = said(tmp_path, "train", gone, "--out", run, first=("train", str(recipe), "--out", run))
    assert codes == [2, 2]
    assert err[0] == ""
    assert len(err[1].splitlines()) == 1
    assert "gone.toml" in err[1]


@pytest.mark.parametrize("how", [["--multi_gpu"], ["--use_fsdp", "--fsdp_version", "2"]])
def test_accelerates_launcher_trains(how: list[str], tmp_path: Path, recipe: Path) -> None:
    """The documented commands, as they stand; what sharded processes leave is a model as any other."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", *how, "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command = [*launch, "--module", "atesd", "train", str(recipe), "--out", str(tmp_path / "run")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("models in ") == 1
    assert json.loads((tmp_path / "run" / "env.json").read_text())["processes"] == 2
    is_sharded = "--use_fsdp" in how
    assert json.loads((tmp_path / "run" / "config.json").read_text())["model"]["shard"] is is_sharded
    if is_sharded:
        app(["export", str(tmp_path / "run"), "--out", str(tmp_path / "exported")], standalone_mode=False)
        app(["eval", str(tmp_path / "run")], standalone_mode=False)
        assert next((tmp_path / "exported").glob("model*.safetensors")).stat().st_size > 0
