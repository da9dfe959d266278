"""Several processes as a launcher starts them, forked from this one: what they import is there already."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch.torch_version import TorchVersion

from atesd.train import world

from support.ports import held_port

NEEDS_SHARDS = pytest.mark.skipif(torch.__version__ < TorchVersion("2.13"), reason="model.shard is refused there")
LIMIT_S = 900.0
_held: dict[int, socket.socket] = {}
"""The port at which processes meet, by the first one's id."""


def start(folder: Path, size: int, action: Callable[[int], Any]) -> list[int]:
    """Fork processes that know of each other, and return their ids; each leaves what `action(rank)` gave."""
    folder.mkdir(parents=True, exist_ok=True)
    held, port = held_port()
    children = [_fork(folder, size, rank, port, action) for rank in range(size)]
    _held[children[0]] = held
    return children


def _fork(folder: Path, size: int, rank: int, port: int, action: Callable[[int], Any]) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.environ |= {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(size),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "OMP_NUM_THREADS": "1",
        }
        torch.set_num_threads(1)  # those that this process had are not here, and would be waited for
        AcceleratorState._reset_state(reset_partial_state=True)
        world._join.cache_clear()
        result: Any
        try:
            result = action(rank)
        except Exception as error:
            traceback.print_exc()
            result = error
        (folder / f"result_{rank}").write_bytes(pickle.dumps(result))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def wait(folder: Path, children: list[int]) -> list[Any]:
    """Wait until all processes are over; return what each gave or raised, None for one that was killed."""
    end = time.monotonic() + LIMIT_S
    left = dict(enumerate(children))
    while left:
        for rank, child in list(left.items()):
            if os.waitpid(child, os.WNOHANG)[0]:
                del left[rank]
        if time.monotonic() > end:
            for child in left.values():
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
            raise AssertionError(f"processes {sorted(left)} did not end within {LIMIT_S:g} s")
        time.sleep(0.02)
    _held.pop(children[0]).close()
    paths = [folder / f"result_{rank}" for rank in range(len(children))]
    return [pickle.loads(path.read_bytes()) if path.exists() else None for path in paths]


def together(folder: Path, size: int, action: Callable[[int], Any]) -> list[Any]:
    """Run an action in several processes and return what each gave or raised."""
    return wait(folder, start(folder, size, action))
