"""The tasks by name."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from atesd.tasks.base import Task
from atesd.tasks.files import JsonlConfig
from atesd.tasks.gym import GymConfig
from atesd.tasks.synthetic.task import PicoTask
from atesd.types import Config


class PicoConfig(Config):
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

    def build(self, seed: int) -> Task:
        """Return the task."""
        return PicoTask(
            train_size=self.train_size,
            probe_size=self.probe_size,
            eval_size=self.eval_size,
            seed=seed if self.data_seed is None else self.data_seed,
        )


TaskConfig = Annotated[PicoConfig | JsonlConfig | GymConfig, Field(discriminator="kind")]
