"""The public surface: every listed name loads, and light commands stay light."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import atesd

from support.runs import write_run


@pytest.mark.parametrize("name", atesd.__all__)
def test_every_public_name_loads(name: str) -> None:
    assert getattr(atesd, name).__module__.startswith("atesd.")


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Trainor'"):
        _ = atesd.Trainor


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["check", "pico"], ["report", "RUN"]])
def test_light_commands_do_not_load_torch(arguments: list[str], tmp_path: Path) -> None:
    if "RUN" in arguments:
        arguments = ["report", str(write_run(tmp_path / "run", steps=20).path)]
    code = (
        "import sys\nfrom atesd.cli.main import main\n"
        f"sys.argv = {['atesd', *arguments]!r}\n"
        "main()\nprint(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_bare_package_loads_nothing() -> None:
    code = "import sys, atesd; print(sorted(name for name in sys.modules if name.startswith('atesd')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['atesd']"
