"""Which trainer a recipe needs: the one place that chooses between language models and flows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from atesd.config import RunConfig
from atesd.flow.loop import FlowTrainer
from atesd.runlog import RunDir
from atesd.tasks.flows import FlowTaskMethod
from atesd.train.loop import Trainer


def start_run(config: RunConfig, out: Path, **options: Any) -> Trainer:
    """Begin a run in a new directory; options are those of `Trainer.start`."""
    return (Trainer if config.task.is_text else FlowTrainer).start(config, out, **options)


def resume_run(out: Path, overrides: Sequence[str] = (), **options: Any) -> Trainer:
    """Continue a run; options are those of `Trainer.resume`, which looks into everything that is not looked at here."""
    section = RunDir.open(out).config().get("task")
    kind = section.get("kind") if isinstance(section, Mapping) else None
    flows = {each.model_fields["kind"].default for each in FlowTaskMethod.__subclasses__()}
    return (FlowTrainer if kind in flows else Trainer).resume(out, overrides, **options)
