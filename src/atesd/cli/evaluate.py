"""`atesd eval`."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from atesd.cli.benchmark import (
    EvalProgress,
    check_data,
    default_folder,
    lm_eval_line,
    sets,
    settings_of,
    with_official_prompt,
)
from atesd.cli.code import announce_code, announced_methods, refuse_code, refused_methods
from atesd.cli.places import check_out
from atesd.cli.progress import make_console, metrics_table, silence_libraries
from atesd.files import write_atomic
from atesd.runlog import RunDir
from atesd.seals import MANIFEST, folder_flaw
from atesd.tasks.base import content_of
from atesd.tasks.benchmarks import BENCHMARKS
from atesd.tasks.flows import refuse_points
from atesd.types import UserError

if TYPE_CHECKING:
    from atesd.config import RunConfig
    from atesd.evaluate.runner import Evaluation, Row


def run_eval(
    model: str,
    overrides: Sequence[str],
    *,
    recipe: Path | None,
    task: str | None,
    data: str | None,
    k: int | None,
    problems: int | None,
    which: str | None,
    out: Path | None,
    results: Path | None,
    run_code: bool = False,
) -> None:
    """Evaluate a run's model or any other, and print the metrics; code that the recipe names runs only if allowed."""
    check_data(data, task)
    if out is not None:
        check_out(out)
    silence_libraries()
    from atesd.recipe import load_config, with_overrides

    run = Path(model) if is_run(Path(model)) else None
    if which is not None and run is None:
        raise UserError(f"--which chooses between the models of a run directory, and {model} is none: leave it out")
    folder = model if run is None else str(model_of(run, which or "final"))
    is_benchmark = task in BENCHMARKS
    console = make_console()
    source = str(recipe or f"{run}/config.json")
    with announced_methods(console) if run_code else refused_methods(source):
        config = load_config(recipe) if recipe is not None else recipe_of(model, run, is_benchmark)
    refuse_points(config.task)
    own = config
    if task is not None and not is_benchmark:
        config = with_task(config, task)
    settings = [*([f"eval.k={k}"] if k else []), *([f"eval.problems={problems}"] if problems else [])]
    settings = [*(settings_of(str(task), data) if is_benchmark else []), *overrides, *settings]
    config = with_overrides(config, settings)
    refuse_points(config.task)
    if run_code:
        announce_code(config, console)
    else:
        refuse_code(config, source)
    if results is None and is_benchmark:
        name = model if run is None else f"{run.name}-{which or 'final'}"
        results = default_folder(name, str(task))
    if run is not None and task is not None and recipe is None:  # else the run's own task is not known
        warn_of_trained(own, config)
    result = _evaluated(config, folder, console, results, overrides if is_benchmark else None, out)
    num_problems = len(result.rows) // config.eval.k
    called = Path(task).name if task is not None else config.task.kind
    console.print(metrics_table(result.metrics, f"{folder} on {num_problems} problems of {called}"))
    if is_benchmark:
        assert results is not None
        console.print(lm_eval_line(str(task), folder, results))


def _evaluated(
    config: RunConfig,
    folder: str,
    console: Console,
    results: Path | None,
    official: Sequence[str] | None,
    out: Path | None,
) -> Evaluation:
    """Evaluate with a status line. With `results` samples are kept there, and Ctrl-C says how to go on.

    `official` holds the user's overrides of a benchmark: what they leave open is as in the paper. All samples are
    written to `out` before the metrics are computed.
    """
    from atesd.train.inspect import Keep, evaluate_model

    write = None if out is None else partial(write_rows, out)
    with console.status(f"evaluating {folder} with {config.eval.k} completions a problem") as status:
        if results is None:
            return evaluate_model(config, folder, write=write)
        show = EvalProgress(console, status, results.name)
        keep = Keep(results, show, console.print)
        if official is not None:
            think = not sets(official, "prompt.enable_thinking_student")
            keep = replace(keep, think=think, fit=not sets(official, "eval.max_new_tokens"))
            config = with_official_prompt(config)
        try:
            return evaluate_model(config, folder, keep, write=write)
        except KeyboardInterrupt:
            console.print(
                f"stopped; the samples of every complete part are kept in {results}: the same command goes on"
            )
            raise SystemExit(130) from None


def write_rows(out: Path, rows: Sequence[Row]) -> None:
    """Write one object a line, into a folder that is made where it is missing."""
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


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


def recipe_of(model: str, run: Path | None, is_benchmark: bool = False) -> RunConfig:
    """Return a run's own recipe; a benchmark needs none, as OPSD's prompts are the default."""
    from atesd.recipe import build_config

    if run is not None:
        opened = RunDir.open(run)
        flaw = opened.flaw("config.json") if (run / MANIFEST).is_file() else None
        if flaw:
            raise UserError(f"{run} is damaged: {flaw}; name the recipe with its prompts and task by --recipe")
        return build_config(opened.config(), source=f"{run}/config.json")
    if (Path(model) / "compare.json").is_file():
        raise UserError(f"{model} is a comparison: give one of its runs, {model}/ARM/seed_N")
    if is_benchmark:
        return build_config({})
    raise UserError(f"{model} is not a run directory: name the recipe with its prompts and task by --recipe")


def with_task(config: RunConfig, task: str) -> RunConfig:
    """Return the recipe with what `atesd check` takes as its task; of a file or data set every problem is evaluated."""
    from atesd.cli.check import section_of
    from atesd.recipe import with_overrides

    section = section_of(task)
    if section["kind"] in ("jsonl", "dataset"):
        section |= {"probe_size": 0, "eval_size": "all"}
        config = config.model_copy(update={"eval": config.eval.model_copy(update={"problems": None})})
    return with_overrides(
        config, [f"task={{{', '.join(f'{key}={json.dumps(value)}' for key, value in section.items())}}}"]
    )


def warn_of_trained(own: RunConfig, config: RunConfig) -> None:
    """Say how many of the problems to be evaluated the run was trained on, where its own task can still be read."""
    if not own.task.is_text:
        return
    try:
        trained = {content_of(problem) for problem in own.task.build(own.facts()).train()}
    except UserError:
        return
    problems = config.task.build(config.facts()).evaluation()[: config.eval.problems]
    known = sum(content_of(problem) in trained for problem in problems)
    if known:
        warnings.warn(
            f"{known} of the {len(problems)} problems to be evaluated are among those that the run was trained on",
            stacklevel=2,
        )
