"""Checkpoints: loadable by others, kept in number, harmless when they fail."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from atesd.recipe import build_config
from atesd.rollout.sampler import Weights
from atesd.runlog import step_name
from atesd.train import checkpoint
from atesd.train.checkpoint import find_checkpoints, restore_interrupted
from atesd.train.loop import Trainer
from atesd.types import UserError

TREE: dict[str, Any] = {
    "threads": 1,
    "task": {"kind": "pico", "train_size": 8, "probe_size": 2, "eval_size": 2},
    "prompt": {"student": "{problem}", "teacher": "{problem}\n>{hint}", "answer": "\n#{answer}"},
    "rollout": {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 40},
    "optim": {"lr": 1e-3},
    "step": {"num_steps": 5, "problems": 2},
    "eval": {"every": 5, "k": 1},
    "save": {"every": 1, "keep": 2},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    trainer = Trainer.start(build_config(TREE), tmp_path_factory.mktemp("checkpoints") / "run")
    trainer.train()
    return trainer


@pytest.mark.parametrize("folder", ["checkpoints/step_000005", "final", "best"])
def test_models_load_with_from_pretrained(folder: str, finished: Trainer) -> None:
    path = finished.run.path / folder
    model = AutoModelForCausalLM.from_pretrained(path)
    prompt = AutoTokenizer.from_pretrained(path).apply_chat_template(
        [{"role": "user", "content": "3a+1"}], add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    with torch.no_grad():
        logits = model(prompt).logits
        own = finished.parts.model.eval()(prompt).logits
    assert torch.equal(logits, own) == (folder != "best" or finished._best["step"] == 5)


def test_only_the_latest_are_kept(finished: Trainer) -> None:
    assert [path.name for path in find_checkpoints(finished.run.checkpoints)] == ["step_000004", "step_000005"]


def test_a_full_disk_leaves_the_earlier_checkpoints_and_the_log_intact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer.start(build_config(TREE), tmp_path / "run")
    saved = checkpoint.save_file

    def full(tensors: object, path: Path) -> None:
        if "step_000003" in str(path):
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        saved(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        trainer.train()
    monkeypatch.undo()
    assert [path.name for path in sorted((tmp_path / "run" / "checkpoints").iterdir())] == [
        "step_000001",
        "step_000002",
    ]
    resumed = Trainer.resume(tmp_path / "run")
    assert resumed.step == 2
    assert resumed.train()["step"] == 5


def test_a_half_written_checkpoint_is_cleared_away_and_never_resumed(finished: Trainer, tmp_path: Path) -> None:
    (tmp_path / "step_000009.partial").mkdir()
    (tmp_path / "step_000009.partial" / "state.json").write_text("{")
    assert find_checkpoints(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_had_stepped_aside_comes_back(tmp_path: Path) -> None:
    """Killed between the two renames of a replacement, and behind them."""
    for name in ("step_000003.old", "step_000003.partial", "step_000004.old", "step_000004"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.json").write_text(name)
    assert [path.name for path in find_checkpoints(tmp_path)] == ["step_000003", "step_000004"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000003", "step_000004"]
    assert (tmp_path / "step_000003" / "state.json").read_text() == "step_000003.old"
    assert (tmp_path / "step_000004" / "state.json").read_text() == "step_000004"


def test_a_model_that_had_stepped_aside_comes_back(tmp_path: Path) -> None:
    (tmp_path / "best.old").mkdir()
    (tmp_path / "best.old" / "config.json").write_text("{}")
    restore_interrupted(tmp_path / "best")
    assert (tmp_path / "best" / "config.json").is_file()


def test_a_damaged_state_is_named(finished: Trainer, tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(UserError, match=r"is damaged .*resume from the one before"):
        checkpoint.load_state(tmp_path)


def test_a_checkpoint_of_another_model_is_refused(finished: Trainer, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"other": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="written by another run"):
        checkpoint.load_weights(tmp_path, finished.parts.model)


def test_the_best_model_is_that_of_the_highest_evaluation_and_the_result_says_so(finished: Trainer) -> None:
    result = finished.run.result()
    assert result is not None
    scores = {row["step"]: row["eval/pico/avg@1"] for row in finished.run.metrics() if "eval/pico/avg@1" in row}
    first_best = min(step for step, score in scores.items() if score == max(scores.values()))
    assert result["best"] == {"step": first_best, "score": max(scores.values())}


def test_of_equal_evaluations_the_first_is_the_best(tmp_path: Path) -> None:
    """At temperature 0 a student that hardly moves answers the same at every step."""
    tree = TREE | {"optim": {"lr": 1e-12}, "eval": {"every": 1, "k": 1, "temperature": 0.0}}
    trainer = Trainer.start(build_config(tree | {"step": {"num_steps": 2, "problems": 2}}), tmp_path / "run")
    result = trainer.train()
    scores = [row["eval/pico/avg@1"] for row in trainer.run.metrics()]
    assert len(scores) == 3
    assert len(set(scores)) == 1, "or this shows nothing"
    assert result["best"] == {"step": 0, "score": scores[0]}


def test_the_sampler_gets_the_weights_of_every_step_and_their_version(tmp_path: Path) -> None:
    trainer = Trainer.start(build_config(TREE | {"step": {"num_steps": 2, "problems": 2}}), tmp_path / "run")
    seen: list[tuple[int, bool, bool]] = []

    def sync(weights: Weights) -> None:
        own = dict(trainer.parts.model.named_parameters())
        same = all(torch.equal(value, own[name]) for name, value in weights.tensors().items())
        seen.append((weights.version, weights.is_adapter, same and len(weights.tensors()) == len(own)))

    trainer.parts.driver.sampler.sync = sync  # type: ignore[method-assign]
    trainer.train()
    assert seen == [(1, False, True), (2, False, True)]


def test_a_millionth_step_is_newer_than_the_ones_before(tmp_path: Path) -> None:
    """Else it would be removed as soon as it is written."""
    for step in (999_975, 1_000_000, 25):
        (tmp_path / step_name(step)).mkdir()
    assert [path.name for path in find_checkpoints(tmp_path)] == ["step_000025", "step_999975", "step_1000000"]
