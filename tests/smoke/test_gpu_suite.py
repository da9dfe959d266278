"""`make gpu` without a GPU: everything is skipped with the reason; and its bodies run on a CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def suite(**environment: str) -> str:
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-rs", "-q", "-p", "no:cacheprovider", "tests/gpu"]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False, timeout=900
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    return done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine with a GPU runs the suite")
def test_without_a_gpu_every_test_is_skipped_with_the_reason() -> None:
    said = suite()
    lines = [line for line in said.splitlines() if line.startswith("SKIPPED")]
    assert len(lines) >= 9
    assert all("no CUDA device here: make gpu is for a machine with one (docs/gpu.md)" in line for line in lines)
    assert " passed" not in said
    assert "failed" not in said


@pytest.mark.slow
def test_its_bodies_run_on_a_cpu() -> None:
    said = suite(ATESD_GPU_SUITE_DEVICE="cpu")
    assert "skipped" not in said
    assert "measured: paste this into a report" in said
