"""repro/mismatch.py and the table of repro/evidence.py that holds it: recomputed from logits, and by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from atesd.recipe import load_config
from atesd.seeds import derive_seed
from atesd.train.setup import assemble

import evidence
from mismatch import RATIOS, main, measure, summary
from support.folders import write_byte_model
from support.runs import write_graded

RECIPE = Path(__file__).parents[2] / "recipes" / "smollm2-cpu-opsd.toml"
SMALL = [
    "task.train_size=4",
    "task.probe_size=0",
    "task.eval_size=3",
    "step.problems=4",
    "rollout.max_new_tokens=6",
    "step.token_budget=300",
]


def test_mismatch_is_that_of_the_models_own_logits(tmp_path: Path) -> None:
    folder = write_byte_model(tmp_path / "model")
    peaked = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for weight in peaked.parameters():
            weight.mul_(4.0)  # a fresh model is all but uniform
    peaked.save_pretrained(folder)
    config = load_config(RECIPE, [*SMALL, f"model.path={folder}", "model.dtype=float32", "rollout.temperature=0.7"])
    parts = assemble(config)
    found = measure(config, parts, 2)
    assert found["kl"].shape == (2, 5)
    assert found["kl"].min() > 0.01
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    problems = parts.task.evaluation()[:2]
    sampling = config.rollout.model_copy(update={"group_size": 1})
    groups = parts.driver.rollout(problems, sampling, seed=derive_seed(config.seed, "mismatch"))
    for row, group in enumerate(groups):
        completion = group.trajectories[0].final.completion_ids

        def log_probs(prompt: tuple[int, ...], completion: tuple[int, ...] = completion) -> torch.Tensor:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
            return logits.double().log_softmax(-1)

        student = log_probs(parts.hints.student_ids(group.problem))
        for column, ratio in enumerate(RATIOS):
            teacher = log_probs(parts.hints.teacher_ids(group.problem, ratio))
            kl = (teacher.exp() * (teacher - student)).sum(-1).mean()
            differ = (teacher.argmax(-1) != student.argmax(-1)).double().mean()
            assert found["kl"][row, column] == pytest.approx(float(kl), rel=1e-4)
            assert found["top1"][row, column] == pytest.approx(float(differ))


def test_growth_is_paired_by_problem() -> None:
    kl = np.array([[0.0, 0.1, 0.2, 0.3, 0.4], [1.0, 1.1, 1.2, 1.3, 1.4]])  # problems differ, the growth does not
    found = summary({"kl": kl, "top1": np.zeros((2, 5))})
    assert found["problems"] == 2
    assert [row["ratio"] for row in found["ratios"]] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert [row["kl"] for row in found["ratios"]] == pytest.approx([0.5, 0.6, 0.7, 0.8, 0.9])
    assert (found["ratios"][0]["kl_low"], found["ratios"][0]["kl_high"]) == (0.0, 1.0)
    for step, (low, high) in zip(found["growth"], [(0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1)], strict=True):
        assert (step["from"], step["to"]) == (low, high)
        assert [step["kl"], step["kl_low"], step["kl_high"]] == pytest.approx([0.1] * 3)
        assert [step["top1"], step["top1_low"], step["top1_high"]] == [0.0] * 3


def test_the_command_writes_and_prints_its_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_byte_model(tmp_path / "model")
    out = tmp_path / "deep" / "out.json"
    main([str(RECIPE), str(out), "problems=2", *SMALL, f"model.path={folder}", "model.dtype=float32"])
    found = json.loads(out.read_text())
    assert (found["problems"], found["model"]) == (2, str(folder))
    text = capsys.readouterr().out
    assert sum(line.startswith("| ") for line in text.splitlines()) == 6
    assert "from 0.75 to 1: kl " in text


def test_the_study_on_a_real_model_becomes_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Two problems, two samples: full .5 and .75, half all right; every start is all wrong.
    graded = {
        "full": {1: [[1.0, 0.0], [1.0, 0.0]], 2: [[1.0, 1.0], [1.0, 0.0]]},
        "half": {1: [[1.0, 1.0]] * 2, 2: [[1.0, 1.0]] * 2},
    }
    folder = write_graded(tmp_path / "study", graded)
    measured = tmp_path / "mismatch.json"
    measured.write_text('{"problems": 3}')
    monkeypatch.setattr(evidence, "OUT", tmp_path)
    evidence.main(["smollm2", str(folder), str(measured)])
    found = json.loads((tmp_path / "smollm2.json").read_text())
    assert found["mismatch"] == {"problems": 3}
    assert found["start"]["average_at_k"] == 0.0
    assert found["arms"]["full"]["average_at_k"] == pytest.approx(0.625)
    assert found["arms"]["full"]["gain"]["difference"] == pytest.approx(0.625)
    assert found["arms"]["half"]["gain"]["difference"] == pytest.approx(1.0)
    assert found["arms"]["half"]["minus_full"]["difference"] == pytest.approx(0.375)
    assert found["arms"]["full"]["minutes"] == pytest.approx(0.05), "runs of 2 and 4 seconds"
    assert (tmp_path / "smollm2.svg").is_file()
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("| `half` | 1.000 |")
