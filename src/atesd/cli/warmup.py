"""`atesd warmup`: of the pico tier from nothing, or of any model on problems of its own."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from atesd.cli.progress import bar, clock, make_console, silence_libraries
from atesd.files import refuse_unwritable
from atesd.types import UserError

if TYPE_CHECKING:
    from atesd.config import RunConfig
    from atesd.tasks.base import Task

_SECONDS_A_STEP = 0.35


def run_warmup(out: Path | None, steps: int | None, seed: int, shortcut: float | None, world: str = "pico") -> None:
    """Train the warm start of the task `pico` or `doors` into a folder that does not exist yet."""
    silence_libraries()
    from atesd.tasks.synthetic import doors, pico
    from atesd.train import warmup, warmup_doors
    from atesd.train.model import set_threads

    of_doors = world == "doors"
    default, planted = (
        (warmup_doors.DEFAULT_STEPS, doors.SHORTCUT) if of_doors else (warmup.DEFAULT_STEPS, pico.SHORTCUT)
    )
    train_it = warmup_doors.train_doors_warm_start if of_doors else warmup.train_warm_start
    out = out or Path(f"runs/{world}-warm-start")
    _refuse_filled(out)
    total = steps or default
    set_threads(1)  # so small a model gains nothing by a second one, which a busy machine makes many times slower
    console = make_console()
    console.print(f"training the {world} warm start, {total} steps: about {clock(total * _SECONDS_A_STEP)} on one core")
    begin = monotonic()
    with bar(console, total) as show:
        shortcut = planted if shortcut is None else shortcut
        try:
            train_it(out, steps=total, seed=seed, shortcut=shortcut, progress=show)
        except BaseException:
            shutil.rmtree(out, ignore_errors=True)  # a part of a model, or nothing: it was empty
            raise
    console.print(f"took {clock(monotonic() - begin)}; use it with model.path={out}")


def run_model_warmup(
    model: str,
    data: str | None,
    recipe: Path | None,
    overrides: Sequence[str],
    out: Path | None,
    settings: Mapping[str, Any],
) -> None:
    """Warm a model up into a folder that does not exist yet. `settings` are those of the warm-up, None where unset."""
    if data is None:
        raise UserError(
            "--model needs --data: a recipe, a file, a folder or gym:NAME with problems for the warm-up alone"
        )
    out = out or Path("runs") / f"{Path(model).name}-warm"
    _refuse_filled(out)
    silence_libraries()
    from pydantic import ValidationError

    from atesd.train.supervised import WarmupConfig, warm_up

    try:
        plan = WarmupConfig(**{name: value for name, value in settings.items() if value is not None})
    except ValidationError as error:
        wrong = error.errors()[0]
        raise UserError(f"--{wrong['loc'][0]}: {wrong['msg']} (given: {wrong['input']})") from error
    config, source = chosen(model, data, recipe, overrides)
    console = make_console()
    console.print(f"warming {model} up: {plan.steps} steps of {plan.batch} samples, {plan.hinted:.0%} of them hinted")
    begin = monotonic()
    try:
        with bar(console, plan.steps) as show:
            found = warm_up(config, source.train(), out, plan, source=source, progress=show)
    except KeyboardInterrupt:
        console.print("stopped; nothing was written")
        raise SystemExit(130) from None
    if found.left_out:
        console.print(f"left out {found.left_out} problems that are the recipe's own; {found.problems} were its own")
    losses = {"without a hint": found.loss, "with one": found.hinted_loss}
    shown = ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items() if loss is not None)
    console.print(f"loss a token at the end: {shown}; took {clock(monotonic() - begin)}")
    console.print(f"use it with model.path={out}")


def chosen(model: str, data: str, recipe: Path | None, overrides: Sequence[str]) -> tuple[RunConfig, Task]:
    """Return the recipe that will train the model, with this model, and the task that trains on the warm-up's data.

    Overrides of the task choose the data, all others change the recipe. Without `recipe`, `data` must be one.
    """
    from atesd.recipe import load_config

    of_data = [override for override in overrides if override.strip().startswith("task.")]
    others = [override for override in overrides if override not in of_data]
    if any(override.partition("=")[0].strip() == "model.path" for override in others):
        raise UserError("model.path is given by --model: remove the override")
    is_recipe = data.endswith(".toml")
    if recipe is None and not is_recipe:
        raise UserError(
            f"--data {data} says nothing of prompts: name the recipe that is to train the model with --recipe; its "
            "prompts, reveal and adapters are taken, and its problems left out"
        )
    config = load_config(recipe or Path(data), [*others, f'model.path="{model}"'])
    if is_recipe:
        source = load_config(Path(data), of_data)
        return config, source.task.build(source.facts())
    from atesd.cli.check import whole_task_of

    return config, whole_task_of(data, of_data)


def refuse_unused(needed: str | None, **options: object) -> None:
    """UserError naming an option that would be ignored."""
    given = next((name for name, value in options.items() if value is not None), None)
    if given is None:
        return
    word = "an override" if given == "overrides" else f"--{given}"
    raise UserError(
        f"{word} has no effect with --model: remove it" if needed is None else f"{word} has no effect without {needed}"
    )


def _refuse_filled(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} already exists and is not empty: choose another folder with --out")
    refuse_unwritable(out)
