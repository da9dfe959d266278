"""Hostile completions: none is taken for its gold answer, none hangs, none spoils the next grade, none runs."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from atesd.rewards.math import MathReward

from support.hostile import GOLD, hostile


def grade_all(completions: Sequence[str], limit_s: float, seconds_over: float) -> None:
    """Grade each one and, behind it, an honest answer; the machine's load stretches what a second of its work takes."""
    reward = MathReward(timeout_s=limit_s)
    for completion in completions:
        begin = time.monotonic()
        assert reward(["p"], [completion], answer=[GOLD]) == [0.0], completion[:200]
        seconds = time.monotonic() - begin
        assert seconds < (limit_s + seconds_over) * max(1.0, *os.getloadavg()), completion[:200]
        assert reward(["p"] * 2, [r"\boxed{0.5}"] * 2, answer=["1/2", "2"]) == [1.0, 0.0], completion[:200]


def test_forty_hostile_completions(tmp_path: Path) -> None:
    marker = tmp_path / "made"
    chosen = [text for texts in hostile(marker).values() for text in texts[:: len(texts) // 5][:5]]
    assert len(chosen) == 40
    grade_all(chosen, limit_s=0.2, seconds_over=30.0)
    assert not marker.exists()


@pytest.mark.slow
@pytest.mark.parametrize("family", hostile(Path("/marker")))
def test_three_hundred_hostile_completions(family: str, tmp_path: Path) -> None:
    marker = tmp_path / "made"
    assert sum(map(len, hostile(marker).values())) == 300
    grade_all(hostile(marker)[family], limit_s=1.0, seconds_over=1.0)
    assert not marker.exists()
