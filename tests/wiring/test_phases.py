"""Which work the seconds of a phase are of, by a clock that each part of a step moves by an amount of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from atesd.config import RunConfig
from atesd.runlog import RunDir
from atesd.train.loop import Trainer

from support.wired import BASE

BETA = {"kind": "beta", "hold": 1, "look_ahead": 1, "lambda_gt": 0.0}
TAKES = {"rollout": 1.0, "propose": 2.0, "route": 4.0, "build": 8.0, "optimize": 16.0, "nll": 32.0, "observe": 64.0}


def test_phases_are_of_what_they_are_called_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("atesd.runlog.perf_counter", lambda: now)

    def slow(owner: Any, name: str) -> None:
        work: Callable[..., Any] = getattr(owner, name)

        def slowly(*arguments: Any, **named: Any) -> Any:
            nonlocal now
            now += TAKES[name]
            return work(*arguments, **named)

        monkeypatch.setattr(owner, name, slowly)

    config = RunConfig.model_validate(BASE | {"exposure": BETA})
    trainer = Trainer.start(config, tmp_path / "run")
    parts = trainer.parts
    slow(type(parts.driver), "rollout")
    slow(type(parts.controller), "propose")
    slow(type(parts.controller), "observe")
    slow(type(parts.router), "route")
    slow(type(parts.rows), "build")
    slow(type(parts.stepper), "optimize")
    slow(type(parts.probe), "nll")
    trainer.train()
    first = next(row for row in RunDir.open(tmp_path / "run").metrics() if row["step"] == 1)
    found = {name: first[f"time/{name}_s"] for name in ("sample", "exposure", "rows", "update", "probe")}
    assert found == {
        "sample": TAKES["rollout"],
        "exposure": TAKES["propose"] + TAKES["observe"],
        "rows": TAKES["route"] + TAKES["build"],
        "update": TAKES["optimize"],
        "probe": TAKES["nll"],
    }
