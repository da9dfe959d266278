"""docs/extend.md: a method by import path, through the command line; seven more, each by one new file and its entry."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from atesd.cli.main import main
from atesd.files import read_jsonl
from atesd.runlog import RunDir

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "extend.md").read_text(encoding="utf-8")
PATCHES = re.findall(r"```diff\n(.*?)```", PAGE, re.DOTALL)
NAMES = ["sawtooth", "spread", "threshold", "struggling", "frozen", "retry", "alone"]
RECIPE: dict[str, Any] = {
    "threads": 1,
    "task": {"kind": "pico", "train_size": 8, "probe_size": 2, "eval_size": 2},
    "prompt": {"student": "{problem}", "teacher": "{problem}\n>{hint}", "answer": "\n#{answer}"},
    "exposure": {"kind": "sawtooth", "high": 0.75, "low": 0.25, "period": 2},
    "reveal": {"kind": "spread", "unit": "line"},
    "gate": {"kind": "threshold", "bound": 0.01},
    "routing": {"kind": "struggling", "bound": 1.0},
    "gradient": {"kind": "frozen", "word": "norm"},
    "env": {"kind": "retry", "limit": 2, "again": "5"},
    "rollout": {
        "engine": {"kind": "alone"},
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "max_new_tokens": 40,
        "group_size": 2,
    },
    "optim": {"lr": 1e-3},
    "step": {"num_steps": 2, "problems": 4},
    "eval": {"every": 2, "k": 1},
    "save": {"rollouts_every": 1, "rollouts": 40},
}


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a copy of the package and all seven methods."""
    folder = tmp_path_factory.mktemp("extended")
    shutil.copytree(ROOT / "src" / "atesd", folder / "src" / "atesd", ignore=shutil.ignore_patterns("__pycache__"))
    for patch in PATCHES:
        subprocess.run(["git", "apply", "-"], input=patch, text=True, cwd=folder, check=True)
    return folder / "src"


def test_each_method_is_one_new_file_and_its_entry_in_one_union() -> None:
    assert len(PATCHES) == len(NAMES)
    for patch, name in zip(PATCHES, NAMES, strict=True):
        files = re.findall(r"^\+\+\+ b/(\S+)", patch, re.MULTILINE)
        assert [file.endswith(f"/{name}.py") for file in files] == [True, False]
        assert files[1] == "src/atesd/kinds.py"
        assert "--- /dev/null" in patch
        union = patch[patch.index("+++ b/src/atesd/kinds.py") :]
        removed, added = (re.findall(rf"^\{sign}(?!\{sign}\{sign})(.*)$", union, re.MULTILINE) for sign in "-+")
        assert len(added) - len(removed) == 2, "an import and an entry"
        assert [line.replace(",  #", "  #") for line in removed] == added[1:-1], "at most a comma moves"


def test_all_seven_train_together_and_do_what_they_say(package: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(RECIPE), encoding="utf-8")
    code = (
        "import json, sys\n"
        "from pathlib import Path\n"
        "from atesd.recipe import build_config\n"
        "from atesd.train.loop import Trainer\n"
        "trainer = Trainer.start(build_config(json.loads(Path(sys.argv[1]).read_text())), Path(sys.argv[2]))\n"
        "before = {name: weight.clone() for name, weight in trainer.parts.model.named_parameters()}\n"
        "trainer.train()\n"
        "moved = {name for name, weight in trainer.parts.model.named_parameters() if (weight != before[name]).any()}\n"
        "print(json.dumps([sorted(moved), sorted(before)]))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(package)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(recipe), str(tmp_path / "run")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    moved, names = json.loads(done.stdout.splitlines()[-1])
    assert moved == [name for name in names if "norm" not in name]
    run = RunDir.open(tmp_path / "run")
    metrics, groups = run.metrics(), run.groups()
    rows = [row for step in (1, 2) for row in read_jsonl(run.path / "rollouts" / f"step_{step:06d}.jsonl")]
    about = run.about()

    assert about["exposure"] == (
        "segments spread evenly over the solution, at most a share that falls from 0.75 to 0.25 every 2 steps"
    )
    assert len(about["controls"]) == 5, "every other method has its sentence"
    assert {group["ratio"] for group in groups} <= {0.75, 0.25, None}
    assert {group["route"] for group in groups} == {
        "rl" if min(group["rewards"]) == 1.0 else "distil" for group in groups
    }
    assert max(row["rollout/turns_mean"] for row in metrics[1:]) > 1
    again = [row for row in rows if row["turn"] == 2]
    assert again
    assert all(row["student_prompt"].endswith("<|end|><|user|>5<|assistant|>") for row in again)
    assert all(set(row["gate"]) <= {0.0, 1.0} for row in rows if "distil" in row["components"])
    hints = {row["problem"]: row["hint"] for row in rows if row["ratio"] == 0.75 and row["hint"]}
    assert hints, "some group was distilled at the first step"


def atesd(monkeypatch: pytest.MonkeyPatch, line: str) -> int:
    """Run a command of the page and return its exit code."""
    words = shlex.split(line)
    assert words[0] == "atesd"
    monkeypatch.setattr(sys, "argv", words)
    try:
        main()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    return 0


def comparable(run: Path) -> list[dict[str, float]]:
    """Return the logged rows without what differs between two runs of one recipe."""
    rows = RunDir.open(run).metrics()
    return [{key: row[key] for key in row if not key.startswith(("time/", "memory/"))} for row in rows]


@pytest.mark.filterwarnings("ignore:the run goes on to step 5 instead of 3")
def test_the_method_by_import_path_trains_resumes_and_compares_as_the_page_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = next(block for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "class Weaning" in block)
    recipe = next(block for block in re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL) if "weaning.py:Weaning" in block)
    (tmp_path / "weaning.py").write_text(code, encoding="utf-8")
    (tmp_path / "weaning.toml").write_text(recipe, encoding="utf-8")
    begin, go_on, side_by_side = re.findall(r"^atesd .*weaning.*$", PAGE, re.MULTILINE)
    monkeypatch.chdir(tmp_path)

    for line in (begin, go_on, f"{begin.replace('runs/weaning', 'runs/whole')} step.num_steps=5"):
        assert atesd(monkeypatch, line) == 0
        named = f"code of yours, with your rights: method 'Weaning' in {tmp_path}/weaning.py"
        assert (named in " ".join(capsys.readouterr().out.split())) == ("--resume" in line)
    assert comparable(tmp_path / "runs/weaning") == comparable(tmp_path / "runs/whole"), "resumed equals uninterrupted"
    run = RunDir.open(tmp_path / "runs/weaning")
    assert run.config()["exposure"] == {"kind": "weaning.py:Weaning", "drop": 0.25, "bound": 0.1}
    shown, ratios = 1.0, []
    for row in run.metrics()[1:]:  # by hand: what the page says the controller does
        ratios.append(shown)
        shown = max(0.0, shown - 0.25 * (row["reward/mean"] >= 0.1))
    assert len(set(ratios)) > 1, "the share moved"
    by_step: dict[int, set[float]] = {}
    for group in run.groups():
        by_step.setdefault(group["step"], set()).add(group["ratio"])
    assert by_step == {step: {ratio} for step, ratio in enumerate(ratios, start=1)}

    assert atesd(monkeypatch, side_by_side) == 0
    arms = {arm: RunDir.open(tmp_path / "runs/compare" / arm / "seed_0") for arm in ("full", "fast")}
    assert {arm: run.config()["exposure"]["kind"] for arm, run in arms.items()} == {
        "full": "fixed",
        "fast": "weaning.py:Weaning",
    }
    assert arms["fast"].config()["exposure"]["drop"] == 0.5

    capsys.readouterr()
    for line in ("atesd eval runs/weaning --k 1", "atesd export runs/weaning --out exported"):
        assert atesd(monkeypatch, line) == 2
        assert f"method 'Weaning' in {tmp_path}/weaning.py. It was not run: " in capsys.readouterr().err
        assert atesd(monkeypatch, f"{line} --run-code") == 0
