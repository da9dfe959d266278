"""`atesd warmup`."""

from __future__ import annotations

from pathlib import Path
from time import monotonic

from rich.console import Console
from rich.progress import Progress

from atesd.cli.progress import clock
from atesd.types import UserError


def run_warmup(out: Path, steps: int | None, seed: int) -> None:
    """Train the warm start into a folder that does not exist yet."""
    from atesd.train.warmup import STEPS, train_warm_start

    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} already exists and is not empty: choose another folder with --out")
    total = steps or STEPS
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"training the pico warm start, {total} steps: about {clock(total * 0.35)} on one core")
    begin = monotonic()
    with Progress(console=console) as progress:
        task = progress.add_task("warm start", total=total)
        train_warm_start(out, steps=total, seed=seed, progress=lambda step, loss: progress.update(task, completed=step))
    console.print(f"{clock(monotonic() - begin)}; use it with model.path={out}")
