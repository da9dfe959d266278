"""Experiment trackers beside the run directory, by accelerate's tracker classes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from importlib import util
from pathlib import Path
from typing import Any

from accelerate import tracking

from atesd.sections import TrackConfig
from atesd.types import UserError

_NEEDS = {"tensorboard": ("tensorboard", "tensorboardX"), "trackio": ("trackio",), "wandb": ("wandb",)}


def refuse_missing(config: TrackConfig) -> None:
    """UserError where a tracker's library is not installed, or one is named twice."""
    for name in config.to:
        if not any(util.find_spec(library) for library in _NEEDS[name]):
            raise UserError(f"track.to names {name}, which is not installed: pip install 'atesd[{name}]'")
    if len(set(config.to)) < len(config.to):
        raise UserError(f"track.to = {list(config.to)} names a tracker twice: once is enough")


class Trackers:
    """The trackers of a run; none until `start`."""

    def __init__(self, config: TrackConfig, path: Path) -> None:
        self._config = config
        self._path = path
        self._trackers: list[Any] = []

    def start(self, recipe: Mapping[str, Any], step: int) -> None:
        """Open all trackers after `step` steps, and tell them the recipe; what they hold of later steps is replaced."""
        self._trackers = [self._open(name, step) for name in self._config.to]
        for tracker in self._trackers:
            if tracker.name == "tensorboard":  # whose store of settings takes numbers alone, and makes a run of its own
                tracker.log({"recipe": f"    {json.dumps(recipe, indent=2)}".replace("\n", "\n    ")}, step=step)
            else:
                tracker.store_init_configuration(dict(recipe))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Hand on what was logged of a step, but for what is not finite."""
        finite = {key: float(value) for key, value in metrics.items() if math.isfinite(value)}
        for tracker in self._trackers:
            tracker.log(finite, step=step)

    @property
    def keep_files(self) -> bool:
        """Whether a tracker has a place for files."""
        return any(hasattr(tracker.tracker, "log_artifact") for tracker in self._trackers)

    def attach(self, report: Path) -> None:
        """Give the report to trackers that keep files."""
        for tracker in self._trackers:
            if hasattr(tracker.tracker, "log_artifact"):
                tracker.tracker.log_artifact(str(report), name=f"{self._path.name}-report", type="report")

    def finish(self) -> None:
        """Close all trackers."""
        trackers, self._trackers = self._trackers, []
        for tracker in trackers:
            tracker.finish()

    def _open(self, name: str, step: int) -> Any:
        kind, folder = tracking.LOGGER_TYPE_TO_CLASS[name], self._path / "track"
        folder.mkdir(exist_ok=True)
        if name == "tensorboard":
            tracker = kind("tensorboard", folder, purge_step=step + (step > 0))
        elif name == "trackio":
            tracker = kind(self._config.project, name=self._path.name, resume="allow")
        else:
            mode = "online" if self._config.online else "offline"
            tracker = kind(self._config.project, name=self._path.name, dir=str(folder), mode=mode)
        tracker.start()
        return tracker
