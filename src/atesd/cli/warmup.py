"""`atesd warmup`."""

from __future__ import annotations

from pathlib import Path
from time import monotonic

from rich.console import Console
from rich.progress import Progress

from atesd.cli.progress import clock, silence_libraries
from atesd.types import UserError


def run_warmup(out: Path, steps: int | None, seed: int, shortcut: float | None) -> None:
    """Train the warm start into a folder that does not exist yet."""
    from atesd.tasks.synthetic.pico import SHORTCUT
    from atesd.train.warmup import DEFAULT_STEPS, train_warm_start

    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} already exists and is not empty: choose another folder with --out")
    silence_libraries()
    total = steps or DEFAULT_STEPS
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"training the pico warm start, {total} steps: about {clock(total * 0.35)} on one core")
    begin = monotonic()
    with Progress(console=console) as progress:
        task = progress.add_task("warm start", total=total)
        train_warm_start(
            out,
            steps=total,
            seed=seed,
            shortcut=SHORTCUT if shortcut is None else shortcut,
            progress=lambda step, steps, loss: progress.update(task, completed=step, description=f"loss {loss:.3f}"),  # noqa: ARG005
        )
    console.print(f"{clock(monotonic() - begin)}; use it with model.path={out}")
