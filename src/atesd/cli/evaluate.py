"""`atesd eval`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from atesd.cli.progress import metrics_table, silence_libraries
from atesd.runlog import RunDir, write_atomic
from atesd.types import UserError


def run_eval(
    model: str,
    overrides: Sequence[str],
    *,
    recipe: Path | None,
    task: str | None,
    k: int | None,
    problems: int | None,
    which: str,
    out: Path | None,
) -> None:
    """Evaluate a run's model or any other, and print the metrics."""
    from atesd.recipe import build_config, load_config, with_overrides
    from atesd.train.inspect import evaluate_model

    silence_libraries()
    folder: str | Path = model
    if (Path(model) / "config.json").is_file() and (Path(model) / "metrics.jsonl").is_file():
        folder = Path(model) / which
        if not folder.is_dir():
            raise UserError(
                f"{model} has no {which!r} model yet: choose --which final or best, or finish the run first"
            )
        config = build_config(RunDir.open(Path(model)).config(), source=f"{model}/config.json")
    elif recipe is not None:
        config = load_config(recipe)
    else:
        raise UserError(f"{model} is not a run directory: name the recipe with its prompts and task by --recipe")
    settings = list(overrides) + ([task_override(task)] if task else [])
    settings += [f"eval.k={k}"] if k else []
    settings += [f"eval.problems={problems}"] if problems else []
    result = evaluate_model(with_overrides(config, settings), folder)
    if out is not None:
        write_atomic(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in result.rows))
    Console(highlight=False).print(metrics_table(result.metrics, str(folder)))


def task_override(task: str) -> str:
    """Turn `pico`, `FILE.jsonl` or `gym:NAME` into an override of the task section."""
    if task == "pico":
        return 'task={kind="pico"}'
    if task.startswith("gym:"):
        return f'task={{kind="gym", dataset={json.dumps(task[4:])}}}'
    if task.endswith(".jsonl"):
        return f'task={{kind="jsonl", path={json.dumps(task)}}}'
    raise UserError(f"task {task!r} is not known: give pico, a file ending in .jsonl, or gym:NAME")
