"""`atesd warmup`."""

from __future__ import annotations

from pathlib import Path
from time import monotonic

from rich.progress import Progress

from atesd.cli.progress import clock, make_console, silence_libraries
from atesd.types import UserError

_SECONDS_A_STEP = 0.35


def run_warmup(out: Path, steps: int | None, seed: int, shortcut: float | None) -> None:
    """Train the warm start into a folder that does not exist yet."""
    silence_libraries()
    from atesd.tasks.synthetic.pico import SHORTCUT
    from atesd.train.warmup import DEFAULT_STEPS, train_warm_start

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} already exists and is not empty: choose another folder with --out")
    total = steps or DEFAULT_STEPS
    console = make_console()
    console.print(f"training the pico warm start, {total} steps: about {clock(total * _SECONDS_A_STEP)} on one core")
    begin = monotonic()
    with Progress(console=console) as progress:
        task = progress.add_task("warm start", total=total)

        def show(step: int, steps: int, loss: float) -> None:  # noqa: ARG001
            progress.update(task, completed=step, description=f"loss {loss:.3f}")

        shortcut = SHORTCUT if shortcut is None else shortcut
        train_warm_start(out, steps=total, seed=seed, shortcut=shortcut, progress=show)
    console.print(f"took {clock(monotonic() - begin)}; use it with model.path={out}")
