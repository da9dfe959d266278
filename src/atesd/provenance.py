"""What the numbers of a run depend on besides its recipe."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any


def environment() -> dict[str, Any]:
    """Record what a number depends on: versions, platform, commit."""
    packages = (
        "atesd",
        "torch",
        "transformers",
        "accelerate",
        "peft",
        "datasets",
        "numpy",
        "safetensors",
        "math-verify",
    )
    versions = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "packages": versions,
        "commit": _git("rev-parse", "HEAD"),
        "changed_files": _git("status", "--porcelain", "--untracked-files=no").splitlines(),
    }


def _git(*arguments: str) -> str:
    """Ask git about the package's own checkout; empty where it does not lie in one, whatever folder is around it."""
    here = Path(__file__)
    answers = []
    for command in (["ls-files", "--error-unmatch", here.name], list(arguments)):
        try:
            done = subprocess.run(
                ["git", "-C", str(here.parent), *command], capture_output=True, text=True, timeout=5, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return ""
        if done.returncode:
            return ""
        answers.append(done.stdout.strip())
    return answers[-1]
