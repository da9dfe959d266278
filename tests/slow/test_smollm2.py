"""A real model on a CPU: SmolLM2-135M-Instruct is warmed up; with LoRA it trains, is killed, resumes, is reported."""

from __future__ import annotations

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
from transformers import AutoModelForCausalLM, AutoTokenizer

from atesd.facts import RunFacts
from atesd.metrics import is_timing
from atesd.recipe import load_config
from atesd.report.html import write_report
from atesd.runlog import RunDir
from atesd.seals import folder_flaw
from atesd.tasks.gym import GymConfig
from atesd.train.inspect import evaluate_model
from atesd.train.loop import Trainer
from atesd.train.model import resolve
from atesd.train.smollm2 import cache_folder
from atesd.train.supervised import WarmupConfig, warm_up

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not cache_folder().is_dir(), reason="needs make smollm2"),
]
RECIPE = Path(__file__).parents[2] / "recipes" / "smollm2-gsm.toml"
CPU = RECIPE.parent
STEPS = 4


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    path = tmp_path_factory.mktemp("data") / "gsm.jsonl"
    problems = GymConfig(train_size=24, probe_size=0, eval_size=0).build(RunFacts()).train()
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


def test_the_fetched_model_is_whole_and_speaks() -> None:
    folder = Path(resolve("smollm2"))
    assert folder_flaw(folder) is None
    assert sum(value.numel() for value in load_file(folder / "model.safetensors").values()) == 134_515_008
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    said = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(said)


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few steps of warm-up: the format is learned, arithmetic hardly."""
    out = tmp_path_factory.mktemp("warm") / "model"
    study = load_config(CPU / "smollm2-cpu-opsd.toml", ["model.path=smollm2", "task.train_size=16"])
    others = load_config(CPU / "smollm2-cpu-opsd.toml", ["task.train_size=48", "task.data_seed=1"])
    losses: list[float] = []
    warm_up(
        study,
        others.task.build(others.facts()).train(),
        out,
        WarmupConfig(steps=12, batch=4),
        progress=lambda step, steps, loss: losses.append(loss),
    )
    assert sum(losses[-3:]) < 0.6 * sum(losses[:3])
    return out


@pytest.mark.parametrize("recipe", ["opsd", "atesd", "aligned", "sft"])
def test_the_recipes_of_the_study_train_the_warmed_up_model(recipe: str, warm: Path, tmp_path: Path) -> None:
    small = ["task.train_size=16", "task.probe_size=2", "task.eval_size=4", "step.num_steps=4", "step.problems=2"]
    config = load_config(CPU / f"smollm2-cpu-{recipe}.toml", [*small, f"model.path={warm}", "eval.k=1"])
    trainer = Trainer.start(config, tmp_path / "run")
    result = trainer.train()
    assert result["step"] == 4
    rows = trainer.run.metrics()
    assert all(row["optim/grad_norm"] > 0 for row in rows[1:])
    assert rows[-1]["rollout/eos_frac"] > 0.5 or recipe == "sft", "the warm-up taught where an answer ends"
