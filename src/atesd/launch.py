"""Whether a launcher (torchrun, accelerate) started several processes of the program, told by its environment."""

from __future__ import annotations

import os


def launched() -> tuple[int, int]:
    """Return this process's number and how many there are; (0, 1) where no launcher started it."""
    size = int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1
    return (int(os.environ.get("RANK", "0")), size) if size > 1 else (0, 1)
