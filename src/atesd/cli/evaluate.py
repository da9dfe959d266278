"""`atesd eval`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from atesd.cli.code import announce_code, refuse_code
from atesd.cli.places import check_out
from atesd.cli.progress import make_console, metrics_table, silence_libraries
from atesd.runlog import RunDir, write_atomic
from atesd.seals import MANIFEST, folder_flaw
from atesd.types import UserError

if TYPE_CHECKING:
    from atesd.config import RunConfig


def run_eval(
    model: str,
    overrides: Sequence[str],
    *,
    recipe: Path | None,
    task: str | None,
    k: int | None,
    problems: int | None,
    which: str | None,
    out: Path | None,
    run_code: bool = False,
) -> None:
    """Evaluate a run's model or any other, and print the metrics; code that the recipe names runs only if allowed."""
    if out is not None:
        check_out(out)
    silence_libraries()
    from atesd.recipe import load_config, with_overrides
    from atesd.train.inspect import evaluate_model

    run = Path(model) if is_run(Path(model)) else None
    if which is not None and run is None:
        raise UserError(f"--which chooses between the models of a run directory, and {model} is none: leave it out")
    folder = model if run is None else str(model_of(run, which or "final"))
    config = load_config(recipe) if recipe is not None else recipe_of(model, run)
    settings = [*overrides, *([task_override(task)] if task else [])]
    settings += [f"eval.k={k}"] if k else []
    settings += [f"eval.problems={problems}"] if problems else []
    config = with_overrides(config, settings)
    console = make_console()
    if run_code:
        announce_code(config, console)
    else:
        refuse_code(config, str(recipe or f"{run}/config.json"))
    with console.status(f"evaluating {folder} with {config.eval.k} completions a problem"):
        result = evaluate_model(config, folder)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in result.rows))
    num_problems = len(result.rows) // config.eval.k
    console.print(metrics_table(result.metrics, f"{folder} on {num_problems} problems of {config.task.kind}"))


def is_run(path: Path) -> bool:
    """Tell a run directory from a model folder, which has a config.json too."""
    return (path / "config.json").is_file() and (path / "checkpoints").is_dir()


def model_of(run: Path, which: str) -> Path:
    """Return one of a run's two models."""
    if not (run / which).is_dir():
        raise UserError(f"{run} has no model {which!r} yet: finish the run, or choose the other with --which")
    flaw = folder_flaw(run / which) if (run / MANIFEST).is_file() else None  # runs of version 1 have no seals
    if flaw:
        raise UserError(f"{run / which} is damaged: {flaw}; choose the other model with --which, or a checkpoint")
    return run / which


def recipe_of(model: str, run: Path | None) -> RunConfig:
    """Return a run's own recipe."""
    from atesd.recipe import build_config

    if run is not None:
        opened = RunDir.open(run)
        flaw = opened.flaw("config.json") if (run / MANIFEST).is_file() else None
        if flaw:
            raise UserError(f"{run} is damaged: {flaw}; name the recipe with its prompts and task by --recipe")
        return build_config(opened.config(), source=f"{run}/config.json")
    if (Path(model) / "compare.json").is_file():
        raise UserError(f"{model} is a comparison: give one of its runs, {model}/ARM/seed_N")
    raise UserError(f"{model} is not a run directory: name the recipe with its prompts and task by --recipe")


def task_override(task: str) -> str:
    """Turn what `atesd check` takes into an override of the task section."""
    from atesd.cli.check import section_of

    return f"task={{{', '.join(f'{key}={json.dumps(value)}' for key, value in section_of(task).items())}}}"
