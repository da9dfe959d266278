"""The public surface: every listed name loads, and light commands stay light."""

from __future__ import annotations

import subprocess
import sys

import pytest

import atesd


@pytest.mark.parametrize("name", atesd.__all__)
def test_every_public_name_loads(name: str) -> None:
    assert getattr(atesd, name).__module__.startswith("atesd.")


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Trainor'"):
        _ = atesd.Trainor


@pytest.mark.parametrize(
    "statement",
    [
        "import atesd",
        "import atesd.cli.main",
        "from atesd.report.html import write_report",
        "from atesd.cli.check import run_check",
    ],
)
def test_light_commands_do_not_load_torch(statement: str) -> None:
    code = f"import sys; {statement}; print(sorted({{'torch', 'transformers'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
