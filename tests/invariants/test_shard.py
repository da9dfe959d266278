"""Sharded weights: the run of one process but for rounding, counted gathers, shares on disk, one end for all."""

from __future__ import annotations

import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from atesd.runlog import RunDir
from atesd.train.loop import Trainer
from atesd.train.model import resolve
from atesd.train.shard import local
from atesd.train.world import LostError
from atesd.types import Elsewhere, UserError

from support.processes import NEEDS_SHARDS, start, together, wait, well
from support.several import RECIPES, TREE, assert_as_one, begin, followed, outcome

pytestmark = [
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
    NEEDS_SHARDS,
]

PICO = Path(resolve("pico")) / "model.safetensors"
SHARDED = {"model": {"shard": True}}
FOUND = {
    # A frozen teacher of all weights, and a measurement of it; some processes have fewer micro-batches than others.
    "frozen": RECIPES["learned"] | {"step": {"problems": 5, "token_budget": 120}} | SHARDED,
    "ema": RECIPES["distil"] | SHARDED,
    "adapters": RECIPES["rl"] | {"model": {**RECIPES["rl"]["model"], "shard": True, "gradient_checkpointing": True}},
}
for each in FOUND.values():
    each["step"] = each["step"] | {"num_steps": 2}
    each["eval"] = {"every": 2, "k": 1}


def alone(tree: dict[str, Any]) -> dict[str, Any]:
    return tree | {"model": {name: value for name, value in tree["model"].items() if name != "shard"}}


@pytest.mark.parametrize("name", FOUND)
def test_two_processes_with_half_the_weights_train_as_one(name: str, tmp_path: Path) -> None:
    tree = TREE | FOUND[name]
    one, two = tmp_path / "one", tmp_path / "two"
    found = together(tmp_path / "left", 2, lambda rank: followed(begin(two, tree)))
    (rows, marks), (other_rows, other_marks) = found
    assert other_rows == rows, "a process went by other numbers"
    assert other_marks == marks, "a process has other weights or decisions"
    assert any(row.get("optim/grad_norm", 0.0) > 1e-3 for row in rows[1:]), "hardly a step moved anything"
    begin(one, alone(tree)).train()
    assert_as_one(one, two)


def test_each_process_keeps_and_writes_its_half(tmp_path: Path) -> None:
    run = tmp_path / "run"
    tree = TREE | SHARDED | {"teacher": {"weights": "ema"}, "step": {"num_steps": 1, "problems": 3}}

    def kept(rank: int) -> Any:
        trainer = begin(run, tree)
        trainer.train()
        parts = trainer.parts
        state = parts.optimizer.optimizer.state
        numbers = [local(each["exp_avg"]).numel() for each in state.values()]
        averages = [local(each).numel() for each in parts.teacher.tensors().values()]
        return sum(numbers), sum(averages), sum(weight.numel() for weight in parts.model.parameters())

    (first, first_average, whole), (second, second_average, _) = together(tmp_path / "left", 2, kept)
    assert first + second == whole
    assert first_average + second_average == whole
    assert abs(first - second) < 0.05 * whole
    folder = run / "checkpoints" / "step_000001"
    names = {f"{kind}-{number:05d}-of-00002.safetensors" for kind in ("optimizer", "teacher") for number in (1, 2)}
    assert names <= {path.name for path in folder.iterdir()}
    assert not (folder / "optimizer.safetensors").exists()
    saved, final = (load_file(next(place.glob("model*.safetensors"))) for place in (folder, run / "final"))
    assert all(torch.equal(saved[name], value) for name, value in final.items()), "checkpoints hold whole weights"


def test_a_run_goes_on_bit_for_bit_or_with_another_number_and_a_warning(tmp_path: Path) -> None:
    tree = TREE | {"teacher": {"weights": "ema", "ema_decay": 0.9}, "step": {"num_steps": 2, "problems": 3}} | SHARDED
    whole, run = tmp_path / "whole", tmp_path / "run"
    well(tmp_path / "a", 2, lambda rank: begin(whole, tree).train())

    def killed(rank: int) -> Any:
        trainer = begin(run, tree)
        trainer.listener = lambda row: os.kill(os.getpid(), signal.SIGKILL) if (row["step"], rank) == (2, 1) else None
        return trainer.train()

    found = wait(tmp_path / "b", start(tmp_path / "b", 2, killed))
    assert type(found[0]) is LostError
    assert found[1] is None
    others = {size: tmp_path / f"with_{size}" for size in (1, 3)}
    for place in others.values():
        shutil.copytree(run, place)
    well(tmp_path / "c", 2, lambda rank: Trainer.resume(run).train())
    assert outcome(run) == outcome(whole)
    with pytest.warns(UserWarning, match="goes on with 1 process instead of 2"):
        Trainer.resume(others[1]).train()
    assert_as_one(whole, others[1])

    def go_on(rank: int) -> Any:
        with pytest.warns(UserWarning, match="goes on with 3 processes instead of 2"):
            return Trainer.resume(others[3]).train()

    well(tmp_path / "d", 3, go_on)
    assert_as_one(whole, others[3])


def test_weights_in_bfloat16_have_shares_in_float32(tmp_path: Path) -> None:
    """Steps of 1e-5 move the shares, which are the masters, and hardly a weight.

    The run goes on bit for bit with as many processes, and with one, whose optimizer holds the masters; it is that of
    one process but for bfloat16's rounding.
    """
    half = {"model": {"shard": True, "dtype": "bfloat16"}, "optim": {"lr": 1e-5, "eps": 1e-5}}
    tree = TREE | half | {"teacher": {"weights": "ema", "ema_decay": 0.9}, "step": {"num_steps": 2, "problems": 3}}
    whole, run, lone = tmp_path / "whole", tmp_path / "run", tmp_path / "lone"

    def trained(rank: int) -> set[torch.dtype]:
        trainer = begin(whole, tree)
        trainer.train()
        model = trainer.parts.model
        shares = trainer.parts.shards.masters().values()
        assert len(shares) == len(list(model.parameters()))
        return {each.dtype for each in (*shares, *trainer.parts.teacher.tensors().values())}

    def killed(rank: int) -> Any:
        trainer = begin(run, tree)
        trainer.listener = lambda row: os.kill(os.getpid(), signal.SIGKILL) if row["step"] == 2 else None
        return trainer.train()

    assert together(tmp_path / "a", 2, trained) == [{torch.float32}] * 2
    wait(tmp_path / "b", start(tmp_path / "b", 2, killed))
    shutil.copytree(run, tmp_path / "one")
    well(tmp_path / "c", 2, lambda rank: Trainer.resume(run).train())
    assert outcome(run) == outcome(whole)
    with pytest.warns(UserWarning, match="goes on with 1 process instead of 2"):
        Trainer.resume(tmp_path / "one").train()
    begin(lone, tree).train()
    first = RunDir(whole).metrics()
    for other in (tmp_path / "one", lone):
        for row, expected in zip(RunDir(other).metrics(), first, strict=True):
            for key in ("loss/distil", "optim/grad_norm"):
                if row["step"]:
                    assert row[key] == pytest.approx(expected[key], rel=0.05)
    masters = {place: masters_of(place / "checkpoints" / "step_000002") for place in (whole, tmp_path / "one", lone)}
    began = {name: weight.bfloat16().float() for name, weight in load_file(PICO).items()}
    saved = load_file(whole / "checkpoints" / "step_000002" / "model.safetensors")
    assert masters[whole].keys() == saved.keys()
    for name, master in masters[whole].items():
        assert torch.equal(saved[name], master.bfloat16()), name
        moved = [(found[name] - began[name]).abs().max() for found in masters.values()]
        assert all(1e-6 < float(each) < 3e-5 for each in moved), (name, moved)


def masters_of(folder: Path) -> dict[str, torch.Tensor]:
    parts = [load_file(path) for path in sorted(folder.glob("optimizer*.safetensors"))]
    names = [key for key in parts[0] if key.endswith("/master")]
    return {key.removesuffix("/master"): torch.cat([part[key] for part in parts]) for key in names}


def test_a_process_that_fails_while_gradients_are_taken_ends_all(tmp_path: Path) -> None:
    def fails(rank: int) -> Any:
        trainer = begin(tmp_path / "run", TREE | SHARDED)
        stepper = trainer.parts.stepper
        original = stepper._score

        def score(*given: Any) -> Any:
            if rank == 1:
                raise UserError("the data of this process is broken")
            return original(*given)

        stepper._score = score  # type: ignore[method-assign]
        return trainer.train()

    found = wait(tmp_path / "left", start(tmp_path / "left", 2, fails))
    assert type(found[1]) is UserError
    assert type(found[0]) is LostError
    assert "see its own output" in str(found[0])


def test_machines_that_do_not_share_the_run_directory_are_told_before_the_first_step(tmp_path: Path) -> None:
    """As on two machines with disks of their own: the first save would fail, hours later."""

    def begins(rank: int) -> Any:
        os.chdir(tmp_path / f"disk_{rank}")
        return begin(Path("run"), TREE | SHARDED)

    for rank in range(2):
        (tmp_path / f"disk_{rank}").mkdir()
    found = together(tmp_path / "left", 2, begins)
    assert type(found[0]) is UserError
    assert str(found[0]).startswith("processes 0 and 1 have different folders at run, where each saves its share of")
    assert "--out on a disk that all machines have" in str(found[0])


def test_what_cannot_be_sharded_is_refused_by_name(tmp_path: Path) -> None:
    refused = {
        "the controller asks for influence": RECIPES["aligned"] | {"exposure": {"kind": "influence"}},
    }

    def lines(rank: int) -> list[str]:
        from atesd.train.world import World

        said = []
        for change in refused.values():
            with pytest.raises((UserError, Elsewhere)) as error, World.join().sound():
                begin(tmp_path / "run", TREE | SHARDED | change)
            said.append(str(error.value))
            World.join()._left = False
        return said

    for line, expected in zip(together(tmp_path / "left", 2, lines)[0], refused, strict=True):
        assert re.search(re.escape(expected), line), line
    assert not (tmp_path / "run").exists()
