"""What a resumed run may believe: the newest checkpoint that is whole, with the logs and the recipe that go with it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from atesd.config import RunConfig
from atesd.recipe import build_config
from atesd.runlog import FORMAT, RunDir
from atesd.seals import folder_flaw
from atesd.train.checkpoint import find_checkpoints, load_state
from atesd.types import UserError


def open_for_resume(path: Path) -> RunDir:
    """Open and lock a run. UserError for one that an earlier version wrote: its state has another form."""
    run = RunDir.open(path)
    run.lock()
    written = run.about().get("format")
    if written != FORMAT:
        raise UserError(
            f"{path} was written by another version of atesd (format {written or 1}, this one continues {FORMAT}): "
            "finish it with that version, or start a new run; `atesd report` and `atesd eval` still read it"
        )
    flaw = run.flaw("about.json", "env.json", "result.json")
    if flaw:
        raise UserError(f"{path} is damaged: {flaw}; restore it from a copy, or start a new run")
    return run


def newest_whole(run: RunDir) -> tuple[Path, dict[str, Any]] | None:
    """Return the newest checkpoint that is whole, with its state; None for a run that has none yet.

    It is whole if its files are as sealed, and the logs still begin as they did when it was written. Newer ones are
    passed over with a warning. UserError where there are checkpoints, but none is whole.
    """
    reasons: list[str] = []
    for folder in reversed(find_checkpoints(run.checkpoints)):
        flaw = folder_flaw(folder)
        state = load_state(folder) if flaw is None else {}
        flaw = flaw or run.written_flaw(state["written"])
        if flaw is None:
            for reason in reasons:
                warnings.warn(f"passed over {reason}", stacklevel=2)
            return folder, state
        reasons.append(f"{folder.name}: {flaw}")
    if reasons:
        raise UserError(
            f"no checkpoint of {run.path} can be believed ({'; '.join(reasons)}): restore the files from a copy, or "
            "start a new run"
        )
    return None


def resumed_config(run: RunDir, began: Mapping[str, Any] | None) -> RunConfig:
    """Return the recipe to go on with; `began` is the one of the checkpoint, None where there is none.

    An edited config.json is told from the run's own: a longer run is allowed where nothing depends on its length, every
    other change is refused by name.
    """
    path = run.path / "config.json"
    config = build_config(run.config(), source=str(path))
    if run.flaw("config.json") is None:
        return config
    if began is None:
        raise UserError(f"{path} is not the one that this run began with: start a new run with the recipe you want")
    now = config.model_dump(mode="json")
    changed = {key: (was, now_) for key, was, now_ in _differences(began, now)}
    steps = changed.pop("step.num_steps", None)
    for key, (was, value) in changed.items():
        raise UserError(
            f"{path}: {key} is {value!r}, but this run began with {was!r} and cannot change it under way: put it back, "
            "or start a new run"
        )
    if steps is not None:
        _check_longer(path, config, *steps)
        warnings.warn(f"the run goes on to step {steps[1]} instead of {steps[0]}", stacklevel=2)
        run.lengthen(*steps)
    return config


def _check_longer(path: Path, config: RunConfig, was: int, now: int) -> None:
    if now < was:
        raise UserError(f"{path}: step.num_steps is {now}, but this run was to have {was} steps: put it back")
    for name, depends in (
        (f'optim.schedule = "{config.optim.schedule}"', config.optim.schedule != "constant"),
        (f'exposure.kind = "{config.exposure.kind}"', config.exposure.reads_length),
    ):
        if depends:
            raise UserError(
                f"{path}: step.num_steps is {now} instead of {was}, but {name} depends on the length of the run, so "
                "that its first steps would have been others: put it back, or start a new run"
            )


def _differences(was: Any, now: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield dotted key, old and new value of everything that differs."""
    if isinstance(was, Mapping) and isinstance(now, Mapping):
        for name in sorted({*was, *now}):
            yield from _differences(was.get(name), now.get(name), f"{key}.{name}" if key else name)
    elif was != now:
        yield key, was, now
