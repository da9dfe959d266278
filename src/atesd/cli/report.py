"""`atesd report`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from atesd.cli.places import check_out
from atesd.report.html import write_report
from atesd.types import UserError


def run_report(runs: Sequence[Path], out: Path | None) -> None:
    """Write the report of runs or of one comparison, and print its path."""
    if out is not None:
        check_out(out)
    for path in runs:
        if not path.is_dir():
            raise UserError(f"{path} is no directory: give the directory that `train` or `compare` wrote")
    if out is None:
        out = runs[0] / "report.html"
        check_out(out)
    print(f"report: {write_report(runs, out)}")
