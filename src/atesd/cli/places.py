"""Where commands write."""

from __future__ import annotations

from pathlib import Path

from atesd.files import refuse_unwritable
from atesd.types import UserError


def check_out(path: Path) -> None:
    """UserError where a file cannot be put, before the work whose result it is to hold: a device, a link, a folder.

    Or where this user can write nothing.
    """
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise UserError(f"{path} is no ordinary file and is left as it is: choose another place with --out")
    refuse_unwritable(path)
