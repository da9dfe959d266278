"""A run that is killed at any moment and resumed gives the same numbers as one that was not, bit for bit."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from atesd.metrics import is_timing
from atesd.recipe import build_config
from atesd.runlog import RunDir
from atesd.train import checkpoint
from atesd.train.loop import Interrupted, Trainer
from atesd.types import UserError

STEPS = 12
TREE: dict[str, Any] = {
    "threads": 1,
    "task": {"kind": "pico", "train_size": 20, "probe_size": 3, "eval_size": 4},
    "prompt": {"student": "{problem}", "teacher": "{problem}\n>{hint}", "answer": "\n#{answer}"},
    # Windows of 2 steps scored over 4: at every checkpoint some decision waits for its reward.
    "exposure": {"kind": "beta", "hold": 2, "look_ahead": 4, "decisions_per_update": 2, "progress_metric": "probe_kl"},
    "teacher": {"weights": "ema", "ema_decay": 0.9},
    "rollout": {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 40},
    "optim": {"lr": 1e-3, "schedule": "cosine", "warmup_steps": 2},
    "step": {"num_steps": STEPS, "problems": 4, "updates_per_batch": 2},
    "eval": {"every": 5, "k": 2},
    "save": {"every": 2, "keep": 2, "rollouts_every": 3},
}


def outcome(run: Path) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, bytes]]:
    """Return everything reproducible that a finished run leaves: metrics, weights, sampled text."""
    rows = [{k: v for k, v in row.items() if not is_timing(k)} for row in RunDir.open(run).metrics()]
    weights = {name: value.numpy().tobytes() for name, value in load_file(run / "final" / "model.safetensors").items()}
    texts = {path.name: path.read_bytes() for folder in ("eval", "rollouts") for path in (run / folder).iterdir()}
    return rows, weights, texts


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    run = tmp_path_factory.mktemp("whole") / "run"
    Trainer.start(build_config(TREE), run).train()
    rows, weights, texts = outcome(run)
    assert [row["step"] for row in rows] == list(range(STEPS + 1))
    assert any("exposure/loss" in row for row in rows), "the controller must have learned something"
    return rows, weights, texts


def in_child(action: Callable[[], None]) -> int:
    """Run an action in a forked process and return its process id; the child never returns to pytest."""
    child = os.fork()
    if child:
        return child
    try:
        action()
    finally:
        os._exit(0)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_killed_at_random_moments(tmp_path: Path, uninterrupted: Any) -> None:
    run, seed = tmp_path / "run", random.SystemRandom().randrange(10**6)
    rng = random.Random(seed)
    RunDir.create(run, build_config(TREE).model_dump(mode="json")).unlock()
    for _ in range(4):
        child = in_child(lambda: void(Trainer.resume(run).train()))
        time.sleep(rng.uniform(0.3, 2.5))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    Trainer.resume(run).train()
    assert outcome(run) == uninterrupted, f"kill times of seed {seed}"


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("place", ["save_file", "_replace", "rmtree"])
def test_killed_inside_the_writing_of_a_checkpoint(place: str, tmp_path: Path, uninterrupted: Any) -> None:
    """Die at the second checkpoint: before its tensors, before it gets its name, while the old ones are removed."""
    run = tmp_path / "run"

    def train_and_die() -> None:
        calls = {"steps": 0}
        trainer = Trainer.start(build_config(TREE), run)
        trainer.listener = lambda row: calls.update(steps=row["step"])
        home = checkpoint.shutil if place == "rmtree" else checkpoint
        original = getattr(home, place)

        def deadly(*arguments: Any, **options: Any) -> Any:
            if calls["steps"] >= 6:
                die()
            return original(*arguments, **options)

        setattr(home, place, deadly)
        trainer.train()

    _, status = os.waitpid(in_child(train_and_die), 0)
    assert os.WIFSIGNALED(status)
    assert checkpoint.find_checkpoints(run / "checkpoints"), "an earlier checkpoint must have survived"
    Trainer.resume(run).train()
    assert outcome(run) == uninterrupted


def test_an_interrupt_saves_and_the_run_goes_on_as_if_nothing_had_happened(tmp_path: Path, uninterrupted: Any) -> None:
    run = tmp_path / "run"
    trainer = Trainer.start(build_config(TREE), run)
    trainer.listener = lambda row: os.kill(os.getpid(), signal.SIGTERM) if row["step"] == 5 else None
    with pytest.raises(Interrupted, match=f"after step 5; continue with: atesd train --resume {run}"):
        trainer.train()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    Trainer.resume(run).train()
    assert outcome(run) == uninterrupted


def test_a_listener_may_stop_a_run_which_then_only_resume_continues(tmp_path: Path, uninterrupted: Any) -> None:
    run = tmp_path / "run"
    trainer = Trainer.start(build_config(TREE), run)
    trainer.listener = lambda row: row["step"] == 5 and trainer.stop()
    with pytest.raises(Interrupted, match="after step 5"):
        trainer.train()
    with pytest.raises(UserError, match=r"this trainer ended at step 5: Trainer\.resume\('.*run'\) goes on"):
        trainer.train()
    resumed = Trainer.resume(run)
    resumed.listener = lambda row: row["step"] == uninterrupted[0][-1]["step"] and resumed.stop()
    result = resumed.train()
    assert outcome(run) == uninterrupted
    assert resumed.train() == result


def test_a_best_model_behind_the_last_checkpoint_stays_what_result_says_it_is(tmp_path: Path) -> None:
    """Its steps are made again, and where a score comes out otherwise, another model would be named."""
    run, scores = tmp_path / "run", {0: 0.1, 1: 0.2, 2: 0.3, 3: 0.9, 4: 0.4, 5: 0.5}

    def scored(trainer: Trainer) -> Trainer:
        trainer._evaluate = lambda: (trainer._keep_best(scores[trainer.step]), {})[1]  # type: ignore[method-assign]
        return trainer

    tree = TREE | {"step": TREE["step"] | {"num_steps": 5}, "eval": TREE["eval"] | {"every": 1}}
    trainer = scored(Trainer.start(build_config(tree), run))
    trainer.listener = lambda row: 1 // (3 - row["step"])
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    third = load_file(run / "best" / "model.safetensors")
    scores[3] = 0.8
    resumed = scored(Trainer.resume(run))
    resumed.listener = lambda row: row["step"] == 4 and resumed.stop()
    with pytest.raises(Interrupted, match="after step 4"):
        resumed.train()
    assert scored(Trainer.resume(run)).train()["best"] == {"step": 3, "score": 0.9}
    kept = load_file(run / "best" / "model.safetensors")
    assert all(kept[name].equal(weight) for name, weight in third.items())


def test_a_best_model_is_of_a_later_step_where_its_manifest_says_so(tmp_path: Path) -> None:
    assert checkpoint.kept_best(tmp_path, 2) is None
    for said, step, kept in (
        ({"step": 3, "score": 0.5}, 2, {"step": 3, "score": 0.5}),
        ({"step": 2, "score": 0.5}, 2, None),
        ({"step": 3}, 2, None),
        ({"step": "3", "score": 0.5}, 2, None),
        ({}, 2, None),
    ):
        (tmp_path / "manifest.json").write_text(json.dumps({"files": {}, **said}))
        assert checkpoint.kept_best(tmp_path, step) == kept


def test_the_first_signal_behind_a_stop_still_lets_the_step_be_saved(tmp_path: Path) -> None:
    trainer = Trainer.start(build_config(TREE), tmp_path / "run")

    def twice(row: dict[str, Any]) -> None:
        if row["step"] == 5:
            trainer.stop()
            os.kill(os.getpid(), signal.SIGTERM)

    trainer.listener = twice
    with pytest.raises(Interrupted, match="after step 5"):
        trainer.train()
    assert checkpoint.find_checkpoints(tmp_path / "run" / "checkpoints")[-1].name == "step_000005"


def test_a_second_signal_ends_a_run_at_once_and_saves_nothing(tmp_path: Path, uninterrupted: Any) -> None:
    run = tmp_path / "run"
    trainer = Trainer.start(build_config(TREE), run)

    def impatient(row: dict[str, Any]) -> None:
        if row["step"] == 5:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)

    trainer.listener = impatient
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert checkpoint.find_checkpoints(run / "checkpoints")[-1].name == "step_000004"
    Trainer.resume(run).train()
    assert outcome(run) == uninterrupted


@pytest.mark.parametrize(("step", "written"), [(4, 1), (5, 1)])
def test_a_stop_writes_a_step_once(step: int, written: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Step 4 is saved anyway, step 5 for the stop; the checkpoint of a step is never replaced by itself."""
    names: list[str] = []
    save = checkpoint.save_checkpoint
    monkeypatch.setattr(
        "atesd.train.loop.save_checkpoint", lambda *given, **named: (names.append(given[1]), save(*given, **named))[1]
    )
    trainer = Trainer.start(build_config(TREE), tmp_path / "run")
    trainer.listener = lambda row: os.kill(os.getpid(), signal.SIGTERM) if row["step"] == step else None
    with pytest.raises(Interrupted, match=f"after step {step}"):
        trainer.train()
    assert names.count(step) == written


@pytest.fixture
def hangs_up() -> Iterator[None]:
    """Let a hang-up end the process, as in a terminal, also where the tests themselves run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("hangs_up")
def test_a_terminal_that_hangs_up_stops_a_run_with_its_state_saved(tmp_path: Path, uninterrupted: Any) -> None:
    run = tmp_path / "run"
    trainer = Trainer.start(build_config(TREE), run)
    trainer.listener = lambda row: os.kill(os.getpid(), signal.SIGHUP) if row["step"] == 5 else None
    with pytest.raises(Interrupted, match="after step 5"):
        trainer.train()
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    resumed = Trainer.resume(run)
    resumed.listener = lambda row: os.kill(os.getpid(), signal.SIGHUP)
    resumed.train()
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    assert outcome(run) == uninterrupted


def test_a_finished_run_is_let_go(tmp_path: Path) -> None:
    run = tmp_path / "run"
    Trainer.start(build_config(TREE | {"step": {"num_steps": 1, "problems": 4}, "optim": {"lr": 1e-3}}), run).train()
    again = Trainer.resume(run)
    again.train()
    other = Trainer.resume(run)
    assert other.step == again.step == 1


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    run = tmp_path / "run"
    tree = TREE | {"step": {"num_steps": 1, "problems": 4}, "optim": {"lr": 1e-3}}
    result = Trainer.start(build_config(tree), run).train()
    before = (run / "metrics.jsonl").read_bytes()
    assert Trainer.resume(run).train() == result
    assert (run / "metrics.jsonl").read_bytes() == before


ALIGNED = TREE | {
    # Windows of 2 steps, credits from 2 steps before: at every checkpoint a window, buffers and sums are open.
    "exposure": {"kind": "influence", "reference": "reward", "by": "level", "hold": 2, "grid": [0.0, 0.5, 1.0]},
    "routing": {"kind": "aligned", "every": 3, "grid": [0.0, 1.0], "margin": 1.0},
    "gate": {"kind": "aligned"},
    "target": {"kind": "extrapolate", "lambda_x": 1.25, "aligned": True},
    "probe": {"credit_steps": 2, "credit_problems": 4},
    "rollout": {"temperature": 1.0, "max_new_tokens": 40, "group_size": 2},
    "step": {"num_steps": 8, "problems": 4},
}


@pytest.mark.parametrize(
    ("sections", "seen"),
    [
        ({}, ("exposure/short/credit/0", "route/short/best_credit", "target/lambda_credit", "gate/agree_frac")),
        (
            {
                "exposure": {"kind": "beta", "reward": "aligned", "hold": 2, "decisions_per_update": 2},
                "routing": {"kind": "aligned", "otherwise": "skip", "by": "none", "every": 2},
                "rollout": {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 40, "group_size": 1},
            },
            ("exposure/reward_lp", "route/best_credit"),
        ),
    ],
    ids=["levels", "beta"],
)
def test_credit_from_graded_rollouts_goes_on_as_if_nothing_had_happened(
    sections: dict[str, Any], seen: tuple[str, ...], tmp_path: Path
) -> None:
    tree = ALIGNED | sections
    Trainer.start(build_config(tree), tmp_path / "whole").train()
    expected = outcome(tmp_path / "whole")
    assert set(seen) <= {key for row in expected[0] for key in row}
    run = tmp_path / "cut"
    trainer = Trainer.start(build_config(tree), run)
    for stop in (3, 4, 7):
        trainer.listener = lambda row, at=stop, of=trainer: row["step"] == at and of.stop()
        with pytest.raises(Interrupted):
            trainer.train()
        trainer = Trainer.resume(run)
    trainer.train()
    assert outcome(run) == expected


def void(_: object) -> None:
    """Drop a result."""
