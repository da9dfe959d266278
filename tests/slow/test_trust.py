"""A short form of `repro/trust.sh`: what is promised never to happen does not happen."""

from __future__ import annotations

from pathlib import Path

import pytest

import trust

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]


def test_damaged_runs_are_refused_or_end_as_they_would_have(tmp_path: Path) -> None:
    found = trust.damaged_runs(30, tmp_path, seed=1)
    assert sum(found[name] for name in ("refused", "continued")) == 30
    assert found["refused"]
    assert found["continued"]
    assert not found["report traceback"]


def test_killed_runs_end_as_they_would_have(tmp_path: Path) -> None:
    assert trust.killed_runs(6, tmp_path, seed=1) == {"kills": 6, "same": 6}
