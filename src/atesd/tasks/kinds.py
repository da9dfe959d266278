"""The sections of the embedded tasks."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from atesd.facts import RunFacts
from atesd.tasks.base import Task, TaskMethod
from atesd.tasks.synthetic import pico
from atesd.tasks.synthetic.task import DoorsTask, PicoTask


class PicoConfig(TaskMethod):
    """The embedded task: chains of digit arithmetic whose idea comes first (see `tasks/synthetic/pico.py`)."""

    kind: Literal["pico"] = "pico"
    length: Literal["usual", "long"] = "usual"
    """Three to six steps a problem, as the packaged warm start was trained on; or seven to ten."""
    train_size: Annotated[int, Field(ge=1)] = 4800
    """Training problems."""
    probe_size: Annotated[int, Field(ge=0)] = 24
    """Problems on which progress is measured."""
    eval_size: Annotated[int, Field(ge=1)] = 128
    """Held-out problems."""
    data_seed: Annotated[int, Field(ge=0)] | None = None
    """Fixes training and held-out problems; unset, every seed of a run draws its own."""

    def build(self, run: RunFacts) -> Task:
        """Return the task."""
        levels = pico.LONG_LEVELS if self.length == "long" else pico.LEVELS
        return PicoTask(
            levels=levels,
            train_size=self.train_size,
            probe_size=self.probe_size,
            eval_size=self.eval_size,
            seed=run.seed if self.data_seed is None else self.data_seed,
        )


class DoorsConfig(TaskMethod):
    """The embedded task in several turns: rows of doors with hidden locks (see `tasks/synthetic/doors.py`)."""

    kind: Literal["doors"] = "doors"
    train_size: Annotated[int, Field(ge=1, le=1000)] = 1000
    """Training problems; the three-door half has some 570 of them, the four-door half ten times as many."""
    probe_size: Annotated[int, Field(ge=0, le=100)] = 24
    """Problems on which progress is measured."""
    eval_size: Annotated[int, Field(ge=1, le=100)] = 96
    """Held-out problems."""
    data_seed: Annotated[int, Field(ge=0)] | None = None
    """Fixes training and held-out problems; unset, every seed of a run draws its own."""

    def build(self, run: RunFacts) -> Task:
        """Return the task."""
        return DoorsTask(
            train_size=self.train_size,
            probe_size=self.probe_size,
            eval_size=self.eval_size,
            seed=run.seed if self.data_seed is None else self.data_seed,
        )
