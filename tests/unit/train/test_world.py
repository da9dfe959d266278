"""What processes exchange, and how they end together."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from atesd.launch import launched
from atesd.train import world as module
from atesd.train.world import LostError, World, fingerprint
from atesd.types import Elsewhere, UserError

from support.processes import start, together, wait

forks = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def exchanges(rank: int) -> dict[str, Any]:
    world = World.join()
    weights = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(1))]
    weights[0].grad = torch.tensor([1.0, 10.0]) * (rank + 1)
    if rank == 1:  # the second weight has a gradient in one process, the third in none
        weights[1].grad = torch.tensor([1.0, 2.0, 3.0])
    rounded = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))  # whose gradient is kept in float32
    rounded.grad_dtype = torch.float32
    weights.append(rounded)
    if rank == 2:
        rounded.grad = torch.tensor([1 + 2**-20])
    world.sum_gradients(weights)
    halves = torch.full((5,), 0.1, dtype=torch.bfloat16)
    module._BUCKET = 4
    parts = [torch.full((3,), float(rank)), torch.full((2, 2), 1.0), torch.ones(1)]
    world.sum([halves, *parts])
    return {
        "who": (world.rank, world.size, world.is_main),
        "share": world.share(range(7)),
        "again": world.gather([each * 10 for each in world.share(range(7))]),
        "few": world.gather(world.share(["only"])),
        "none": world.gather(world.share([])),
        "collect": world.collect(rank * rank),
        "pool": world.pool(list(range(rank))),
        "total": world.total({"all": 1.0, f"own {rank}": 2.0}),
        "agreed": world.agreed({"mine": rank}),
        "any": (world.any(rank == 2), world.any(False)),
        "gradients": [None if weight.grad is None else weight.grad.tolist() for weight in weights],
        "halves": halves.tolist(),
        "parts": [each.tolist() for each in parts],
        "same": world.join() is world,
    }


@forks
def test_three_processes_exchange_what_one_alone_has(tmp_path: Path) -> None:
    found = together(tmp_path, 3, exchanges)
    for rank, each in enumerate(found):
        assert each.pop("who") == (rank, 3, rank == 0)
        assert each.pop("share") == list(range(7))[rank::3]
    assert found[0] == found[1] == found[2]
    assert found[0] == {
        "again": [0, 10, 20, 30, 40, 50, 60],
        "few": ["only"],
        "none": [],
        "collect": [0, 1, 4],
        "pool": [0, 0, 1],
        "total": {"all": 3.0, "own 0": 2.0, "own 1": 2.0, "own 2": 2.0},
        "agreed": {"mine": 0},
        "any": (True, False),
        "gradients": [[6.0, 60.0], [1.0, 2.0, 3.0], None, [1 + 2**-20]],
        # Three times bfloat16's .1, .10009765625, added up in float32 and rounded once.
        "halves": [torch.tensor(3 * 0.10009765625).bfloat16().item()] * 5,
        "parts": [[3.0] * 3, [[3.0, 3.0], [3.0, 3.0]], [3.0]],
        "same": True,
    }
    alone = World()
    assert alone.gather(alone.share(range(7))) == list(range(7))
    assert (alone.collect(5), alone.total({"a": 1.0}), alone.agreed("x"), alone.any(True)) == (
        [5],
        {"a": 1.0},
        "x",
        True,
    )


@forks
def test_what_breaks_beside_a_joint_exchange_is_no_lost_process(tmp_path: Path) -> None:
    """Process 1 fails in its own computation and says so; 0 finds that it is gone."""

    def ends(rank: int) -> float:
        world = World.join()
        with world.joined():
            dist.all_reduce(torch.ones(1))
        with world.sound(), world.joined():
            if rank:
                raise RuntimeError("shapes do not match")
            dist.all_reduce(torch.ones(1))
        return 0.0

    found = together(tmp_path, 2, ends)
    assert [type(each) for each in found] == [LostError, RuntimeError]
    assert str(found[1]) == "shapes do not match"
    with World().joined():
        pass  # one alone waits for nobody


@forks
def test_those_that_fail_at_once_have_one_speaker(tmp_path: Path) -> None:
    """Processes 1 and 2 fail, 0 waits for them: the first that failed speaks."""

    def ends(rank: int) -> None:
        with World.join().sound():
            if rank:
                raise UserError(f"error of {rank}\nin two lines")
            World.join().collect(1)

    found = together(tmp_path, 3, ends)
    assert [type(each) for each in found] == [Elsewhere, UserError, Elsewhere]
    assert str(found[0]) == "process 1 failed: error of 1\\nin two lines"
    assert str(found[1]) == "error of 1\nin two lines"


@forks
def test_an_error_is_told_once_through_nested_blocks_and_what_all_expect_is_not(tmp_path: Path) -> None:
    def ends(rank: int) -> str:
        world = World.join()
        with pytest.raises(KeyError), world.sound(KeyError):
            raise KeyError("all of them")
        world.barrier()
        try:
            with world.sound(), world.sound():
                if rank == 0:
                    raise UserError("once")
                world.barrier()
        except (UserError, Elsewhere) as error:
            return f"{type(error).__name__}: {error}"
        return ""

    assert together(tmp_path, 2, ends) == ["UserError: once", "Elsewhere: process 0 failed: once"]


@forks
@pytest.mark.parametrize("breaks", [False, True])
def test_a_process_that_ends_parts_from_the_others_unless_an_exchange_broke_off(tmp_path: Path, breaks: bool) -> None:
    """Else a thread of the last exchange may abort it; one that waits for what never comes would be waited for."""

    def ends(rank: int) -> list[bool]:
        ends: list[tuple[Any, ...]] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module.atexit, "register", lambda *call: ends.append(call))
            world = World.join()
            world.barrier()
            if breaks:
                with suppress(KeyboardInterrupt), world.joined():
                    raise KeyboardInterrupt
        before = dist.is_initialized()
        [(leave, *arguments)] = [call for call in ends if call[0] is module._leave]
        leave(*arguments)
        return [before, dist.is_initialized()]

    assert together(tmp_path, 2, ends) == [[True, breaks]] * 2


@forks
def test_the_first_process_goes_before_the_others(tmp_path: Path) -> None:
    def turns(rank: int) -> bool:
        with World.join().in_turn():
            was_there = (tmp_path / "written").exists()
            if rank == 0:
                torch.randn(500, 500).svd()
                (tmp_path / "written").touch()
        World.join().barrier()
        return was_there

    assert together(tmp_path / "left", 2, turns) == [False, True]


@forks
def test_a_difference_names_two_processes(tmp_path: Path) -> None:
    def differs(rank: int) -> str:
        World.join().refuse_difference("different recipes", "same", "remedy")
        try:
            World.join().refuse_difference("different recipes", "ab"[rank // 2], "start alike")
        except UserError as error:
            return str(error)
        return ""

    first, second, third = together(tmp_path, 3, differs)
    assert first == "processes 0 and 2 have different recipes: start alike"
    assert second == "processes 1 and 2 have different recipes: start alike"
    assert third == first


def test_an_error_of_one_process_alone_is_its_own() -> None:
    with pytest.raises(ValueError, match="mine"), World().sound():
        raise ValueError("mine")


def test_a_fingerprint_sees_a_bit_a_name_and_the_state() -> None:
    tensors = {"a": torch.tensor([1.0, 2.0]), "b": torch.ones(3, dtype=torch.bfloat16), "c": torch.ones(2).bool()}
    mark = fingerprint(tensors, "state")
    assert fingerprint({name: each.clone() for name, each in tensors.items()}, "state") == mark
    changed = {
        "bit": {**tensors, "a": torch.tensor([1.0, 2.0]).nextafter(torch.tensor([1.0, 3.0]))},
        "half": {**tensors, "b": torch.tensor([1.0, 1.0, 1.0078125], dtype=torch.bfloat16)},
        "flag": {**tensors, "c": torch.tensor([True, False])},
        "name": {"d" if name == "a" else name: each for name, each in tensors.items()},
    }
    assert len({mark, fingerprint(tensors, "other"), *(fingerprint(each, "state") for each in changed.values())}) == 6


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 1)),
        ({"WORLD_SIZE": "4", "RANK": "2"}, (0, 1)),  # a cluster's own variables: no launcher gave a local rank
        ({"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}, (0, 1)),
        ({"WORLD_SIZE": "4", "RANK": "2", "LOCAL_RANK": "0"}, (2, 4)),
    ],
)
def test_a_launcher_is_told_by_its_environment(
    environment: dict[str, str], expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launched() == expected


@forks
def test_processes_meet_on_a_cpu_whatever_torch_was_built_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A build for CUDA names its accelerator where there is none."""

    def named(check_available: bool = False) -> torch.device | None:
        return None if check_available else torch.device("cuda")

    monkeypatch.setattr(torch.accelerator, "current_accelerator", named)
    assert together(tmp_path, 2, lambda rank: World.join().collect(rank)) == [[0, 1], [0, 1]]


@forks
def test_a_process_that_is_gone_is_told_of_through_nested_blocks(tmp_path: Path) -> None:
    def noticing(rank: int) -> Any:
        world = World.join()
        if rank == 1:
            os._exit(1)
        with world.sound(), world.sound():
            return world.collect(rank)

    found = wait(tmp_path, start(tmp_path, 2, noticing))
    assert (type(found[0]), found[1]) == (LostError, None)
