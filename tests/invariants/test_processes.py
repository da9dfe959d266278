"""Several processes train as one does: the same losses, weights and decisions, one writer, and one end for all."""

from __future__ import annotations

import os
import shutil
import signal
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from atesd.runlog import RunDir
from atesd.train import loop
from atesd.train.loop import Interrupted, Trainer
from atesd.train.teacher import trained_tensors
from atesd.train.world import LostError, World
from atesd.types import Elsewhere, NonFiniteError, UserError

from support.models import ragged_rows, tiny_model
from support.processes import start, together, wait
from support.several import RECIPES, TREE, assert_as_one, begin, followed, outcome
from support.steppers import make_stepper

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@pytest.mark.parametrize("name", RECIPES)
def test_two_processes_train_as_one(name: str, tmp_path: Path) -> None:
    tree = TREE | RECIPES[name]
    one, two, other = (tmp_path / place for place in ("one", "two", "other"))
    found = together(tmp_path / "left", 2, lambda rank: followed(begin(other if rank else two, tree)))
    (rows, marks), (other_rows, other_marks) = found
    assert other_rows == rows, "a process went by other numbers"
    assert other_marks == marks, "a process has other weights or decisions"
    norms = [row.get("optim/grad_norm", 0.0) for row in rows[1:]]
    assert sum(norm > 1e-3 for norm in norms) >= 2, f"hardly a step moved anything, which shows nothing: {norms}"
    assert not other.exists(), "a process that is not the first one wrote"
    begin(one, tree).train()
    assert_as_one(one, two)


def test_every_row_is_read_by_one_process(tmp_path: Path) -> None:
    def read(rank: int) -> int:
        trainer = begin(tmp_path / "run", TREE | {"step": {"num_steps": 1, "problems": 5}})
        scorer, rows = trainer.parts.stepper._scorer, []
        original = scorer.streams
        scorer.streams = lambda passages, *given, **named: (  # type: ignore[method-assign]
            rows.append(len(passages)) or original(passages, *given, **named)
        )
        trainer.train()
        return sum(rows)

    assert together(tmp_path / "left", 2, read) == [5, 5]  # 5 problems of 2 attempts


def test_more_processes_than_groups_and_rows(tmp_path: Path) -> None:
    tree = TREE | {"step": {"num_steps": 2, "problems": 2}, "rollout": TREE["rollout"] | {"group_size": 1}}
    one, three = tmp_path / "one", tmp_path / "three"
    found = together(tmp_path / "left", 3, lambda rank: followed(begin(three, tree)))
    assert found[0] == found[1] == found[2]
    begin(one, tree).train()
    assert_as_one(one, three)


def test_what_is_measured_otherwise_elsewhere_is_what_the_first_measured(tmp_path: Path) -> None:
    """Machines round differently: decisions must not."""

    def measured(rank: int) -> Any:
        trainer = begin(tmp_path / "run", TREE | RECIPES["learned"])
        measurer, original = trainer.parts.measurer, trainer.parts.measurer.measure

        def rounded(*given: Any) -> Any:
            return {key: value * (1 + 1e-3 * rank) for key, value in original(*given).items()}

        measurer.measure = rounded  # type: ignore[method-assign]
        return followed(trainer)

    first, second = together(tmp_path / "left", 2, measured)
    assert any("exposure/reward" in row for row in first[0])
    assert [{k: v for k, v in row.items() if not k.startswith("probe/")} for row in second[0]] == [
        {k: v for k, v in row.items() if not k.startswith("probe/")} for row in first[0]
    ]
    assert second[1] == first[1]


def test_all_stop_after_the_same_step_and_go_on_bit_for_bit(tmp_path: Path) -> None:
    """One process alone is asked to stop. Its run is continued by as many processes, and by one."""
    tree = TREE | RECIPES["learned"]
    whole, run, alone = (tmp_path / place for place in ("whole", "run", "alone"))
    together(tmp_path / "a", 2, lambda rank: begin(whole, tree).train())

    def stopped(rank: int) -> Any:
        trainer = begin(run, tree)
        trainer.listener = lambda row: os.kill(os.getpid(), signal.SIGTERM) if (row["step"], rank) == (2, 1) else None
        with pytest.raises(Interrupted) as stop:
            trainer.train()
        return stop.value.step

    assert together(tmp_path / "b", 2, stopped) == [2, 2]
    os.system(f"cp -r {run} {alone}")
    together(tmp_path / "c", 2, lambda rank: Trainer.resume(run).train())
    assert outcome(run) == outcome(whole)
    with pytest.warns(UserWarning, match="goes on with 1 process instead of 2"):
        trainer = Trainer.resume(alone)
    trainer.train()
    assert_as_one(whole, alone)


def test_a_finished_run_that_is_changed_ends_again_in_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first process takes the old result away, and is slow to."""
    run = tmp_path / "run"
    tree = TREE | {"step": {"num_steps": 1, "problems": 2}}
    amend = RunDir.amend

    def slowly(*given: Any) -> None:
        time.sleep(2)
        amend(*given)

    monkeypatch.setattr(RunDir, "amend", slowly)

    def again(rank: int) -> dict[str, Any]:
        begin(run, tree).train()
        return Trainer.resume(run, ["save.keep=1"]).train()

    found = together(tmp_path / "left", 2, again)
    assert [each["step"] for each in found] == [1, 1]
    assert RunDir(run).result() == found[0]


def test_processes_that_find_different_checkpoints_are_told_before_they_go_on(tmp_path: Path) -> None:
    """As where a file system shows one machine what was there before."""
    run, stale = tmp_path / "run", tmp_path / "stale"

    def stopped(rank: int) -> None:
        trainer = begin(run, TREE)
        trainer.listener = lambda row: row["step"] == 2 and trainer.stop()
        with pytest.raises(Interrupted):
            trainer.train()

    together(tmp_path / "a", 2, stopped)
    shutil.copytree(run, stale)
    shutil.rmtree(stale / "checkpoints" / "step_000002")
    found = together(tmp_path / "b", 2, lambda rank: Trainer.resume(stale if rank else run))
    assert [type(each) for each in found] == [UserError, Elsewhere]
    assert f"processes 0 and 1 have found different checkpoints of {run} to go on from: all machines" in str(found[0])


@pytest.mark.parametrize("name", ["agents", "retention", "codes"])
def test_what_is_shared_out_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    """Stopped after its first step: played episodes, gates and codes."""
    recipe = RECIPES[name]
    steps = {"step": recipe["step"] | {"num_steps": 2}, "eval": {"every": 2, "k": 1}}
    whole, run = tmp_path / "whole", tmp_path / "run"

    def cut(rank: int) -> int:
        begin(whole, TREE | recipe | steps).train()
        trainer = begin(run, TREE | recipe | steps)
        trainer.listener = lambda row: row["step"] == 1 and trainer.stop()
        with pytest.raises(Interrupted):
            trainer.train()
        again = Trainer.resume(run)
        again.train()
        return again.step

    assert together(tmp_path / "left", 2, cut) == [2, 2]
    assert outcome(run) == outcome(whole)


def test_a_signal_that_a_launcher_hands_on_at_once_is_one(tmp_path: Path) -> None:
    """The clock stands still between the two: on a busy machine seconds may pass."""

    def stopped(rank: int) -> Any:
        trainer = begin(tmp_path / "run", TREE)

        def twice(row: dict[str, Any]) -> None:
            if row["step"] == 1:
                clock, now = loop.perf_counter, loop.perf_counter()
                loop.perf_counter = lambda: now
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)
                loop.perf_counter = clock

        trainer.listener = twice
        with pytest.raises(Interrupted):
            trainer.train()
        return trainer.step

    assert together(tmp_path / "left", 2, stopped) == [1, 1]


def in_step(rank: int, step: int, action: Callable[[Trainer], object], out: Path) -> Callable[[int], Any]:
    """Train, and do something in one process once a step is logged."""

    def train(here: int) -> Any:
        trainer = begin(out, TREE)
        trainer.listener = lambda row: action(trainer) if (here, row["step"]) == (rank, step) else None
        return trainer.train()

    return train


def fail(trainer: Trainer) -> None:
    raise UserError("the data of this process is broken")


@pytest.mark.parametrize("rank", [0, 1])
def test_one_that_fails_ends_all_and_alone_says_why(rank: int, tmp_path: Path) -> None:
    found = together(tmp_path / "left", 2, in_step(rank, 1, fail, tmp_path / "run"))
    assert type(found[rank]) is UserError
    assert str(found[rank]) == "the data of this process is broken"
    assert type(found[1 - rank]) is Elsewhere
    assert f"process {rank} failed: the data of this process is broken" in str(found[1 - rank])


def test_what_all_find_is_said_by_the_first(tmp_path: Path) -> None:
    tree = TREE | {"model": {"path": str(tmp_path / "nowhere")}}
    found = together(tmp_path / "left", 2, lambda rank: begin(tmp_path / "run", tree).train())
    assert [type(each) for each in found] == [UserError, Elsewhere]
    assert not (tmp_path / "run").exists()


def test_a_directory_in_use_is_refused_once(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").touch()
    found = together(tmp_path / "left", 2, lambda rank: begin(tmp_path / "run", TREE))
    assert [type(each) for each in found] == [UserError, Elsewhere]
    assert "already exists and is not empty" in str(found[0])


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_the_others_and_the_run_goes_on(rank: int, tmp_path: Path) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    together(tmp_path / "a", 2, lambda rank: begin(whole, TREE).train())
    die = in_step(rank, 2, lambda trainer: os.kill(os.getpid(), signal.SIGKILL), run)
    found = wait(tmp_path / "left", start(tmp_path / "left", 2, die))
    assert type(found[1 - rank]) is LostError
    assert "--resume" in str(found[1 - rank])
    assert found[rank] is None
    together(tmp_path / "b", 2, lambda rank: Trainer.resume(run).train())
    assert outcome(run) == outcome(whole)


def test_processes_that_drift_apart_are_stopped_before_they_are_saved(tmp_path: Path) -> None:
    def push(trainer: Trainer) -> None:
        weight = next(iter(trained_tensors(trainer.parts.model).values()))
        weight.view(-1)[0] += 1e-6

    found = together(tmp_path / "left", 2, in_step(1, 2, push, tmp_path / "run"))
    assert type(found[0]) is UserError
    assert "processes 0 and 1 have come to other weights or decisions by step 2, which is not saved" in str(found[0])
    assert not (tmp_path / "run" / "checkpoints" / "step_000002").exists()


def test_other_recipes_and_what_is_not_shared_yet_are_refused(tmp_path: Path) -> None:
    def refused(rank: int) -> list[str]:
        lines = []
        for change in (
            {"seed": rank},
            {"gradient": {"kind": "longact"}, "model": {"shard": True}},
            {"reveal": {"kind": "retention"}, "model": {"shard": True}},
            {"codes": {}, "model": {"shard": True}},
        ):
            with pytest.raises((UserError, Elsewhere)) as error, World.join().sound():
                begin(tmp_path / "run", TREE | change)
            lines.append(str(error.value))
            World.join()._left = False
        return lines

    others, *methods = together(tmp_path / "left", 2, refused)[0]
    assert "processes 0 and 1 have different recipes: start all with the same command" in others
    for line, name in zip(methods, ("gradient.kind", "reveal.kind", "[codes]"), strict=True):
        assert line.startswith(name)
        assert "cannot be used with 2 processes yet" in line
    assert not (tmp_path / "run").exists()


def test_a_loss_that_breaks_in_one_process_is_explained_by_the_first(tmp_path: Path) -> None:
    """The broken row is process 1's: the longest ones are dealt out first, to 0 and then to 1."""
    rows = ragged_rows(4)
    second = sorted(range(4), key=lambda index: -rows[index].cost)[1]
    rows[second] = replace(rows[second], weight=float("inf"))

    def breaks(rank: int) -> tuple[str, bool]:
        model = tiny_model()
        stepper, _ = make_stepper(model, world=World.join())
        try:
            with World.join().sound():
                stepper.optimize(rows)
        except (NonFiniteError, Elsewhere) as error:
            moved = any((a != b).any() for a, b in zip(model.parameters(), tiny_model().parameters(), strict=True))
            return f"{type(error).__name__}: {error}", moved
        return "", True

    (said, moved), (heard, also_moved) = together(tmp_path, 2, breaks)
    assert said.startswith("NonFiniteError: loss inf")
    assert "the loss component distil overflows" in said
    assert heard.startswith("Elsewhere")
    assert not moved
    assert not also_moved


def test_one_process_alone_meets_nobody() -> None:
    with warnings.catch_warnings():
        world = World.join()
    assert (world.rank, world.size) == (0, 1)
    assert not torch.distributed.is_initialized()
