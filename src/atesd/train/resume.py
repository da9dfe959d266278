"""What a resumed run may believe: the newest checkpoint that is whole, with the logs and the recipe that go with it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from atesd.config import RunConfig
from atesd.own import file_of, places_in, without_folder
from atesd.recipe import apply_overrides, build_config
from atesd.rewards.kinds import PythonConfig
from atesd.runlog import FORMAT, RunDir
from atesd.seals import folder_flaw, seal
from atesd.sections import SaveConfig
from atesd.train.checkpoint import find_checkpoints, load_state
from atesd.types import UserError

_MEMORY = ("step.token_budget", "rollout.batch_tokens")
_SERVER = tuple(f"rollout.engine.{name}" for name in ("url", "timeout_s", "wait_s", "concurrency", "adapters"))
_CHANGEABLE = (*_MEMORY, *_SERVER, "save.", "track.")
"""What a run may change under way, besides its length: none of it decides what is computed, but for rounding."""


def open_for_resume(path: Path, kind: type[RunDir] = RunDir) -> RunDir:
    """Open and lock a run. UserError for one that an earlier version wrote: its state has another form."""
    run = kind.open(path)
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
    passed over with a warning. UserError where there are checkpoints, but none is whole, or where they are gone.
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
    _refuse_gone(run)
    return None


def _refuse_gone(run: RunDir) -> None:
    """UserError where a run without a checkpoint has logged more steps than it makes before the first one."""
    every = run.config().get("save", {}).get("every", SaveConfig().every)
    logged = max((row["step"] for row in run.metrics()), default=0)
    if isinstance(every, int) and logged > every:
        raise UserError(
            f"{run.path} has logged {logged} steps, but none of its checkpoints is left, of which one was due every "
            f"{every}: restore the folder checkpoints from a copy, or start a new run"
        )


class Resumed(NamedTuple):
    """The recipe to go on with, and what it changes: key, what it was, what it is."""

    config: RunConfig
    changes: Sequence[tuple[str, Any, Any]]

    def keep(self, run: RunDir) -> None:
        """Let the run's own recipe be this one, once nothing more can refuse it."""
        if self.changes:
            run.amend(self.config.model_dump(mode="json"), self.changes)


def resumed_config(run: RunDir, began: Mapping[str, Any] | None, overrides: Sequence[str] = ()) -> Resumed:
    """Return the recipe to go on with; `began` is the one of the checkpoint, None where there is none.

    What overrides or an edited config.json change is told from the run's own: a longer run is allowed where nothing
    depends on its length, what is saved and how much memory is used always; every other change is refused by name.
    """
    path = run.path / "config.json"
    source = f"--resume {run.path}" if overrides else str(path)
    stored = run.config()
    config = build_config(apply_overrides(stored, overrides, source=str(path)), source=source)
    is_edited = run.flaw("config.json") is not None
    if not is_edited:
        if not overrides:
            return Resumed(config, ())
        began = build_config(stored, source=str(path)).model_dump(mode="json")
    elif began is None:
        raise UserError(f"{path} is not the one that this run began with: start a new run with the recipe you want")
    changes = list(_differences(began, config.model_dump(mode="json")))
    for key, was, now in changes:
        if key == "step.num_steps":
            _check_longer(source, config, was, now)
        elif not key.startswith(_CHANGEABLE):
            raise UserError(
                f"{source}: {key} is {now!r}, but this run began with {was!r} and cannot change it under way: "
                "put it back, or start a new run"
            )
    for key, was, now in changes:
        if key == "step.num_steps":
            warnings.warn(f"the run goes on to step {now} instead of {was}", stacklevel=2)
        elif key.startswith(_MEMORY):
            warnings.warn(
                f"{key} is {now} from here on instead of {was}: sums are taken in another order, so that the run is no "
                "longer bit for bit the one that it would have been",
                stacklevel=2,
            )
    return Resumed(config, changes)


def as_it_began(config: RunConfig, run: RunDir) -> RunConfig:
    """Return the recipe with the commit of the model that the run began with, wherever its branch stands now."""
    commit = run.env().get("model_commit")
    if commit is None:
        return config
    return config.model_copy(update={"model": config.model.model_copy(update={"revision": commit})})


def digests_of_code(config: RunConfig) -> dict[str, str]:
    """Return the digest of every file of the user's code that a recipe names, by the place that names it."""
    rewards = config.reward if isinstance(config.reward, tuple) else (config.reward,)
    places = [*places_in(config.model_dump(mode="json", exclude_unset=True)), config.env.code]
    places += [reward.function for reward in rewards if isinstance(reward, PythonConfig)]
    files = {place: file_of(place) for place in places if place}
    return {place: seal(file)["sha256"] for place, file in files.items() if file is not None and file.is_file()}


def warn_of_code(run: RunDir, config: RunConfig) -> None:
    """Say which code of the user's is no longer what the run began with."""
    now = digests_of_code(config)
    for place, digest in run.env().get("code", {}).items():
        if now.get(place, digest) != digest:
            warnings.warn(
                f"{place} is no longer the code that the run began with: what follows is of another method; put it "
                "back, or start a new run, where that matters",
                stacklevel=2,
            )


def warn_of_processes(now: int, before: int) -> None:
    """Say that a run goes on with another number of processes."""
    if now != before:
        warnings.warn(
            f"the run goes on with {now} process{'es' * (now > 1)} instead of {before}: sums are taken in another "
            "order, so that the run is no longer bit for bit the one that it would have been",
            stacklevel=2,
        )


def refuse_other_parts(run: Path, now: Mapping[str, str], saved: Mapping[str, str]) -> None:
    """UserError where a part is of another class than the one whose state was saved: it was assigned by hand.

    Classes from files are told by the file's name, wherever it lies: the recipe names its place.
    """
    for name, kind in saved.items():
        if without_folder(now.get(name, "")) != without_folder(kind):
            raise UserError(
                f"{run} was trained with a {name} of its own, {without_folder(kind)}, where its recipe names "
                f"{without_folder(now.get(name, 'none'))}: give a class that was renamed its name back, or put what "
                f"you assigned in place with Trainer.resume(..., prepare=lambda parts: setattr(parts, {name!r}, ...))"
            )


def _check_longer(source: str, config: RunConfig, was: int, now: int) -> None:
    if now < was:
        raise UserError(f"{source}: step.num_steps is {now}, but this run was to have {was} steps: put it back")
    for name, depends in (
        (f'optim.schedule = "{config.optim.schedule}"', config.optim.schedule != "constant"),
        (f'exposure.kind = "{config.exposure.kind}"', config.exposure.reads_length),
        (f"rollout.ahead = {config.rollout.ahead}", config.rollout.ahead > 0),
    ):
        if depends:
            raise UserError(
                f"{source}: step.num_steps is {now} instead of {was}, but {name} depends on the length of the run, so "
                "that its first steps would have been others: put it back, or start a new run"
            )


def _differences(was: Any, now: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield dotted key, old and new value of everything that differs."""
    if isinstance(was, Mapping) and isinstance(now, Mapping):
        for name in sorted({*was, *now}):
            yield from _differences(was.get(name), now.get(name), f"{key}.{name}" if key else name)
    elif was != now:
        yield key, was, now
