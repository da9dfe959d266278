"""The section of the embedded task."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from atesd.facts import RunFacts
from atesd.tasks.base import Task, TaskMethod
from atesd.tasks.synthetic.task import PicoTask


class PicoConfig(TaskMethod):
    """The embedded task: chains of digit arithmetic whose idea comes first (see `tasks/synthetic/pico.py`)."""

    kind: Literal["pico"] = "pico"
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
        return PicoTask(
            train_size=self.train_size,
            probe_size=self.probe_size,
            eval_size=self.eval_size,
            seed=run.seed if self.data_seed is None else self.data_seed,
        )
