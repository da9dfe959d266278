"""Steps of whole runs on a pretended GPU, and how often each phase would have waited for it. A process of its own.

    python -m support.counted '{"name": {section: {...}}}'       writes a line of JSON for each: its name and counts

What is counted is the second step: the first one compares and makes what later ones keep. The same steps are taken on
the CPU before.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState

from atesd.losses.gradient import TiledScores
from atesd.recipe import build_config
from atesd.runlog import Phases
from atesd.sections import ModelConfig
from atesd.train import step
from atesd.train.loop import Trainer
from atesd.train.model import load
from atesd.train.scorer import Scorer
from atesd.train.step import Stepper

from support.pretended import WAITS, pretend

SMALL: dict[str, Any] = {
    "threads": 1,
    "task": {"kind": "pico", "train_size": 16, "probe_size": 4, "eval_size": 1},
    "prompt": {"student": "{problem}", "teacher": "{problem}\n>{hint}", "answer": "\n#{answer}"},
    "rollout": {"max_new_tokens": 16},
    "step": {"num_steps": 3, "problems": 4},
    "eval": {"k": 1, "every": 100},
    "save": {"every": 100, "rollouts_every": 2},
}


def within(owner: Any, name: str, phase: str) -> None:
    """Count what a function does under a phase."""
    plain = getattr(owner, name)

    @functools.wraps(plain)
    def wrapped(*arguments: Any, **options: Any) -> Any:
        with WAITS.within(phase):
            return plain(*arguments, **options)

    is_static = isinstance(owner.__dict__.get(name), staticmethod)
    setattr(owner, name, staticmethod(wrapped) if is_static else wrapped)


def watch() -> None:
    """Tell phases apart: those of the log, and the parts of an update."""
    for name, phase in (("view", "teacher"), ("streams", "student"), ("log_likelihood", "labels")):
        within(Scorer, name, phase)
    within(TiledScores, "forward", "loss tiles")
    within(TiledScores, "backward", "backward")
    within(step, "fetched", "statistics")
    within(Stepper, "_move", "optimizer")
    within(Stepper, "_select", "selection")
    plain = Phases.phase

    @contextmanager
    def phase(self: Phases, name: str) -> Iterator[None]:
        with plain(self, name), WAITS.within(name):
            yield

    Phases.phase = phase  # type: ignore[method-assign]


def started(device: str, folder: Path, sections: dict[str, Any]) -> Trainer:
    """Start a run on a device."""
    tree = dict(SMALL)
    for name, more in sections.items():
        tree[name] = {**tree.get(name, {}), **more} if isinstance(more, dict) else more
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ["ACCELERATE_TORCH_DEVICE"] = device
    trainer = Trainer.start(build_config(tree), folder)
    found = {str(weight.device) for weight in trainer.parts.model.parameters()}
    assert found == {device}, f"the run is on {found}, not on {device}"
    return trainer


def losses(folder: Path, sections: dict[str, Any]) -> list[float | None]:
    """Return the losses of two steps on the CPU."""
    trainer = started("cpu", folder, sections)
    trainer._begin()
    for _ in range(2):
        trainer._one_step()
    trainer.run.unlock()
    return [row.get("loss/total") for row in trainer.run.metrics()[1:]]


def counted(folder: Path, sections: dict[str, Any]) -> dict[str, Any]:
    """Return what the second step of a run waited for, and how large it was."""
    trainer = started("cuda:0", folder, sections)
    before = trainer.parts.stepper._accelerator.backward
    trainer.parts.stepper._accelerator.backward = lambda loss: _backward(before, loss)  # type: ignore[method-assign]
    trainer._begin()
    trainer._one_step()
    with WAITS.counting():
        trainer._one_step()
    logged = trainer.run.metrics()[-1]
    trainer._save()
    trainer.run.unlock()
    return {
        "phases": {name: dict(counts) for name, counts in WAITS.by_phase.items()},
        "places": [[count, *place] for place, count in sorted(WAITS.places.items())],
        "tokens": logged["optim/tokens"],
        "micro_batches": logged["optim/micro_batches"],
        "losses": [row.get("loss/total") for row in trainer.run.metrics()[1:]],
    }


def _backward(plain: Any, loss: torch.Tensor) -> None:
    with WAITS.within("backward"):
        plain(loss)


def main(asked: dict[str, dict[str, Any]]) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        load(ModelConfig(path="pico"), 0)
        pretend()
        expected = {name: losses(Path(folder) / f"{name} on the CPU", sections) for name, sections in asked.items()}
        watch()
        for name, sections in asked.items():
            try:
                found = counted(Path(folder) / name, sections) | {"expected": expected[name]}
            except Exception as error:
                traceback.print_exc()
                found = {"failed": f"{type(error).__name__}: {error}"[:500]}
            print(json.dumps([name, found]), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
