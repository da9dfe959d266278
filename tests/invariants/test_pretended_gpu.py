"""Whole steps on a pretended GPU: nothing mixes devices, and what makes the CPU wait is counted by phase.

`support/pretended.py` says what is pretended, and what it cannot tell.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
ASKED: dict[str, dict[str, Any]] = {
    "plain": {},
    "longer and more rows": {"rollout": {"max_new_tokens": 40}, "step": {"num_steps": 3, "problems": 12}},
    "tiles": {"loss": {"tile_logits": 320}},
}
WAITING = ("scalar", "sizes", "fetch", "send")
LOOK_EVERY = 8
PASS = 1
"""transformers looks in every pass whether positions are those of packed sequences."""
UPDATE = 3
"""An update's one transfer of all that is logged; the gradient's norm before the step, the weights' after it."""


@pytest.fixture(scope="module")
def counts() -> dict[str, dict[str, Any]]:
    """Run every recipe in one process, which alone is told of a GPU."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'tests'}:{ROOT}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "support.counted", json.dumps(ASKED)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith('["')]
    assert len(lines) == len(ASKED), done.stderr[-2000:]
    return dict(json.loads(line) for line in lines)


def waits(found: dict[str, Any], phase: str) -> int:
    return sum(found["phases"].get(phase, {}).get(kind, 0) for kind in WAITING)


@pytest.mark.parametrize("name", ASKED)
def test_a_step_runs_without_mixing_devices(counts: dict[str, Any], name: str) -> None:
    assert "failed" not in counts[name], counts[name]["failed"]


@pytest.mark.parametrize("name", ASKED)
def test_its_losses_are_the_cpus(counts: dict[str, Any], name: str) -> None:
    """Of both steps: what is taken another way on a GPU, as the blocks of scores, gives the same."""
    assert counts[name]["losses"] == pytest.approx(counts[name]["expected"], rel=1e-5)
    assert len(counts[name]["losses"]) == 2


@pytest.mark.parametrize("name", ASKED)
def test_nothing_is_sent_from_memory_that_is_not_pinned(counts: dict[str, Any], name: str) -> None:
    sent = [place for place in counts[name]["places"] if place[2] == "send"]
    assert sent == []
    assert any("pinned" in kinds for kinds in counts[name]["phases"].values()), "nothing was seen at all"


def test_an_update_waits_as_often_for_more_tokens_and_more_rows(counts: dict[str, Any]) -> None:
    few, many = counts["plain"], counts["longer and more rows"]
    assert many["tokens"] >= 4 * few["tokens"]
    for found in (few, many):
        assert found["micro_batches"] == 1
        assert waits(found, "teacher") == waits(found, "student") == PASS
        assert waits(found, "loss tiles") == waits(found, "backward") == waits(found, "update") == 0
        assert waits(found, "statistics") + waits(found, "optimizer") == UPDATE


def test_tiles_of_a_trained_head_wait_once_a_micro_batch_however_many_there_are(counts: dict[str, Any]) -> None:
    """64 tokens in tiles of ten rows of 32 entries; the other recipes have one tile."""
    assert waits(counts["tiles"], "loss tiles") == 0
    assert waits(counts["tiles"], "backward") == 1


@pytest.mark.parametrize("name", ["plain", "longer and more rows"])
def test_sampling_looks_every_eighth_token_and_fetches_once(counts: dict[str, Any], name: str) -> None:
    longest = ASKED[name].get("rollout", {}).get("max_new_tokens", 16)
    assert 2 <= waits(counts[name], "sample") <= -(-longest // LOOK_EVERY) + 1
