"""docs/extend.md adds seven methods, each by one new file and its entry in one union: apply them and train."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from atesd.runlog import RunDir, read_jsonl

ROOT = Path(__file__).parents[2]
PATCHES = re.findall(r"```diff\n(.*?)```", (ROOT / "docs" / "extend.md").read_text(encoding="utf-8"), re.DOTALL)
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
