"""`atesd train`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from atesd.cli.progress import RunProgress, clock, metrics_table, silence_libraries
from atesd.types import UserError


def run_train(recipe: Path | None, overrides: Sequence[str], out: Path | None, resume: Path | None) -> None:
    """Start or continue a run, show it, and print its final evaluation."""
    from atesd.recipe import load_config
    from atesd.train.loop import Interrupted, Trainer
    from atesd.train.step import NonFiniteError

    silence_libraries()
    console = Console(highlight=False, soft_wrap=True)
    if resume is not None:
        if recipe is not None or out is not None:
            raise UserError("--resume continues a run with its own recipe: give neither a recipe, overrides nor --out")
        trainer = Trainer.resume(resume)
        console.print(f"continuing {resume} after step {trainer.step}")
    elif recipe is not None:
        config = load_config(recipe, overrides)
        trainer = Trainer.start(config, out or Path("runs") / f"{recipe.stem}-{config.seed}")
        console.print(f"run directory {trainer.run.path}")
    else:
        raise UserError("nothing to train: give a recipe, such as recipes/pico.toml, or --resume RUN_DIR")
    progress = RunProgress(trainer.config.step.num_steps, console)
    trainer.listener = progress
    try:
        with progress.shown():
            result = trainer.train()
    except Interrupted as stop:
        console.print(str(stop))
        raise SystemExit(130) from None
    except NonFiniteError as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print(
            f"error: step {trainer.step}: {error}; nothing was updated. Lower optim.lr, or look at the rollouts in "
            f"{trainer.run.path}; atesd train --resume {trainer.run.path} continues from the last checkpoint"
        )
        raise SystemExit(1) from None
    console.print(metrics_table(result["final"], f"after step {result['step']}"))
    console.print(f"{clock(result['seconds'])}; models in {trainer.run.path}/final and {trainer.run.path}/best")
