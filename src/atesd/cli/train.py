"""`atesd train`."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

from atesd.cli.code import announce_code, announced_methods
from atesd.cli.errors import fail
from atesd.cli.progress import RunProgress, clock, make_console, metrics_table, silence_libraries
from atesd.types import NonFiniteError, UserError

if TYPE_CHECKING:
    from rich.console import Console

    from atesd.config import RunConfig


def run_train(recipe: str | None, overrides: Sequence[str], out: Path | None, resume: Path | None) -> None:
    """Start or continue a run, show it, and print its final evaluation beside that of the start.

    Of several processes one speaks.
    """
    from atesd.train.world import World

    world = World.join()
    with world.sound():
        _run_train(recipe, overrides, out, resume, is_main=world.is_main)


def _run_train(
    recipe: str | None, overrides: Sequence[str], out: Path | None, resume: Path | None, *, is_main: bool
) -> None:
    silence_libraries()
    from atesd.recipe import load_config
    from atesd.train.loop import Interrupted
    from atesd.trainers import resume_run, start_run

    console = make_console(quiet=not is_main, lasting=True)
    if resume is not None:
        overrides = [*([] if recipe is None else [recipe]), *overrides]
        if out is not None or (recipe is not None and "=" not in recipe):
            raise UserError("--resume continues a run with its own recipe: give neither a recipe nor --out")
        with announced_methods(console):
            trainer = resume_run(resume, overrides, before=lambda config: _before_resumed(config, console))
        console.print(f"continuing {resume} after step {trainer.step}")
    elif recipe is not None:
        config = load_config(Path(recipe), overrides)
        place = out or Path("runs") / f"{Path(recipe).stem}-{config.seed}"
        trainer = start_run(config, place, say=console.print, before=_warn_of_memory)
        console.print(f"run directory {trainer.run.path}")
    else:
        raise UserError("nothing to train: give a recipe, such as pico, or --resume RUN_DIR")
    path = trainer.run.path
    carry_on = f"continue with: atesd train --resume {quote(str(path))}"
    progress = RunProgress(trainer.config.step.num_steps, console)
    trainer.listener = progress if is_main else None
    trainer.report = _report
    try:
        with progress.shown():
            result = trainer.train()
    except Interrupted as stop:
        console.print(f"stopped after step {stop.step}; {carry_on}")
        raise SystemExit(130) from None
    except KeyboardInterrupt:
        console.print(f"stopped at once, without saving step {trainer.step}; {carry_on}")
        raise SystemExit(130) from None
    except NonFiniteError as error:
        fail(f"after step {trainer.step}: {error}; metrics and rollouts until there are in {path}", 1)
    except Exception as error:
        if isinstance(error, FileNotFoundError) and not path.exists():
            raise UserError(
                f"{path} is gone, moved or removed under way: continue it where it lies now with --resume"
            ) from error
        if "--resume" not in str(error):
            error.add_note(carry_on)
        raise
    title = f"after step {result['step']}, on {trainer.parts.task.name}"
    console.print(metrics_table(result["final"], title, start=start_of(trainer.run.metrics())))
    console.print(f"{clock(result['seconds'])}; models in {path}/final and {path}/best")


def _before_resumed(config: RunConfig, console: Console) -> None:
    announce_code(config, console)
    _warn_of_memory(config)


def _warn_of_memory(config: RunConfig) -> None:
    from atesd.train.fit import memory_warning

    line = memory_warning(config)
    if line:
        warnings.warn(line, stacklevel=2)


def _report(run: Path) -> Path:
    from atesd.report.html import write_report

    return write_report([run], run / "report.html")


def start_of(rows: Sequence[dict[str, float]]) -> dict[str, float] | None:
    """Return the metrics before the first update."""
    return rows[0] if rows and rows[0]["step"] == 0 else None
