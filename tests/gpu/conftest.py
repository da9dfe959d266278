"""The suite for a user with one GPU: `make gpu`. docs/gpu.md says what each test asserts and how to report it.

ATESD_GPU_SUITE_DEVICE=cpu runs the same bodies on a CPU, on tiny sizes: so that no line has never run.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch.utils._python_dispatch import TorchDispatchMode

from support.peaks import peak_of

WHERE = os.environ.get("ATESD_GPU_SUITE_DEVICE", "cuda")
_SAID: list[str] = []


@pytest.fixture(autouse=True)
def device() -> Iterator[torch.device]:
    """Return where the bodies run. Skips, in one line, where there is no GPU."""
    if WHERE == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device here: make gpu is for a machine with one (docs/gpu.md)")
    AcceleratorState._reset_state(reset_partial_state=True)
    before = os.environ.get("ACCELERATE_TORCH_DEVICE")
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu" if WHERE == "cpu" else "cuda:0"
    yield torch.device(os.environ["ACCELERATE_TORCH_DEVICE"])
    os.environ.pop("ACCELERATE_TORCH_DEVICE")
    if before is not None:
        os.environ["ACCELERATE_TORCH_DEVICE"] = before
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def say() -> Callable[[str], None]:
    """Keep a line for the end of the output: what was measured."""
    return _SAID.append


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print what was measured, and where."""
    if not _SAID:
        return
    terminalreporter.section("measured: paste this into a report (docs/gpu.md)")
    name = torch.cuda.get_device_name(0) if WHERE != "cpu" else "a CPU: these numbers say nothing of a GPU"
    for line in (f"torch {torch.__version__}, CUDA {torch.version.cuda}, {name}", *_SAID):
        terminalreporter.write_line(line)


@pytest.fixture
def peak(device: torch.device) -> Callable[[Callable[[], object]], float]:
    """Return what tells the most bytes that a call holds at once, above what was there before."""

    def of_gpu(call: Callable[[], object]) -> float:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return float(torch.cuda.max_memory_allocated() - before)

    return peak_of if device.type == "cpu" else of_gpu


class _Reads(TorchDispatchMode):
    """Counts numbers that are read of tensors: on a CPU the stand-in for what makes a GPU's work be waited for."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.fixture
def waits(device: torch.device) -> Callable[[Callable[[], object]], int]:
    """Return what counts how often a call waits for the device, as torch itself notices it."""

    def of_gpu(call: Callable[[], object]) -> int:
        with _noticing() as caught:
            call()
        return sum("synchronizing CUDA operation" in str(each.message) for each in caught)

    def of_cpu(call: Callable[[], object]) -> int:
        with _Reads() as reads:
            call()
        return reads.count

    return of_cpu if device.type == "cpu" else of_gpu


@contextmanager
def _noticing() -> Iterator[list[warnings.WarningMessage]]:
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield caught
        finally:
            torch.cuda.set_sync_debug_mode("default")
