"""`atesd export`."""

from __future__ import annotations

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Literal

from atesd.cli.code import announced_methods, refused_methods
from atesd.cli.evaluate import is_run, model_of, recipe_of
from atesd.cli.progress import make_console, silence_libraries
from atesd.cli.train import start_of
from atesd.files import refuse_unwritable
from atesd.runlog import RunDir
from atesd.tasks.flows import refuse_points
from atesd.types import UserError

if TYPE_CHECKING:
    from atesd.config import RunConfig

_REPORT = "report.html"


def run_export(
    run: Path,
    *,
    out: Path | None,
    merge: bool,
    dtype: Literal["float32", "bfloat16"] | None,
    which: Literal["final", "best"],
    push_to_hub: str | None,
    private: bool,
    run_code: bool = False,
) -> None:
    """Write a run's model with card and report to a folder, push it, or both."""
    silence_libraries()
    if out is None and push_to_hub is None:
        raise UserError("nothing to do: name a folder with --out, or a place on the hub with --push-to-hub OWNER/NAME")
    if not is_run(run):
        raise UserError(f"{run} is not a run directory: give the folder that `train` wrote")
    if dtype is not None and not merge:
        raise UserError("--dtype is that of merged weights: add --merge, or leave it out")
    if out is not None and (out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir())))):
        raise UserError(f"{out} already exists and is not empty: choose another folder with --out")
    if out is not None:
        refuse_unwritable(out)
    from atesd.train.export import push, refuse_nothing_to_merge, refuse_unreachable_hub

    console = make_console()
    folder = model_of(run, which)
    with announced_methods(console) if run_code else refused_methods(f"{run}/config.json"):
        config = recipe_of(str(run), run)
    refuse_points(config.task)
    if merge:
        refuse_nothing_to_merge(folder)
    if push_to_hub is not None:
        refuse_unreachable_hub(push_to_hub)
    with TemporaryDirectory() as place:
        target = out or Path(place) / "model"
        try:
            _write(run, config, folder, target, which, merge, dtype or config.model.dtype)
        except BaseException:
            shutil.rmtree(target, ignore_errors=True)
            raise
        if out is not None:
            console.print(f"model, card and report in {out}")
        if push_to_hub is not None:
            console.print(f"pushed to {push(target, push_to_hub, private=private, stays=out is not None)}")


def _write(run: Path, config: RunConfig, folder: Path, out: Path, which: str, merge: bool, dtype: str) -> None:
    from atesd.report.html import write_report
    from atesd.train.card import model_card
    from atesd.train.export import copy_model, merge_model

    opened = RunDir.open(run)
    rows = opened.metrics()
    result = opened.result() or {}
    best = result.get("best") or {}
    step = int(best.get("step", 0)) if which == "best" else int(result.get("step", rows[-1]["step"] if rows else 0))
    metrics = next((row for row in rows if row["step"] == step), {})
    out.mkdir(parents=True, exist_ok=True)
    card = model_card(config, step=step, metrics=metrics, start=start_of(rows) or {}, merged=merge, report=_REPORT)
    if merge:
        merge_model(config, folder, out, card, "bfloat16" if dtype == "bfloat16" else "float32")
    else:
        copy_model(folder, out, card)
    write_report([run], out / _REPORT)
