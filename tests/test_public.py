"""The public surface: every listed name loads, and light commands stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import atesd
from atesd.cli.main import app

from support.runs import write_run


@pytest.mark.parametrize("name", atesd.__all__)
def test_every_public_name_loads(name: str) -> None:
    assert getattr(atesd, name).__module__.startswith("atesd.")


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Trainor'"):
        _ = atesd.Trainor


COMMANDS = sorted(command.name or command.callback.__name__ for command in app.registered_commands if command.callback)
HEAVY = {
    "atesd.types",
    "torch",
    "transformers",
    "numpy",
    "scipy",
    "plotly",
    "sympy",
    "peft",
    "accelerate",
    "math_verify",
}


def loaded(code: str, modules: set[str]) -> list[str]:
    """Run code in a process of its own and return which of the modules it has loaded."""
    code += f"\nimport sys\nprint(sorted({modules!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = ast.literal_eval(done.stdout.splitlines()[-1])
    assert isinstance(found, list)
    return found


def command(*arguments: str) -> str:
    """Return code that runs a command as a user would."""
    return f"import sys\nfrom atesd.cli.main import main\nsys.argv = {['atesd', *arguments]!r}\nmain()"


@pytest.mark.parametrize("arguments", [[], *([name] for name in COMMANDS)], ids=lambda words: "".join(words) or "atesd")
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    assert loaded(command(*arguments, "--help"), HEAVY) == []


@pytest.mark.parametrize("arguments", [["check", "pico"], ["report", "RUN"]], ids=lambda words: words[0])
def test_light_commands_do_not_load_torch(arguments: list[str], tmp_path: Path) -> None:
    if "RUN" in arguments:
        arguments = ["report", str(write_run(tmp_path / "run", steps=20).path)]
    assert loaded(command(*arguments), {"torch", "transformers"}) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "pcio"],
        ["compare", "pcio"],
        ["show", "pcio"],
        ["plan", "pcio"],
        ["eval", "run", "--recipe", "pcio"],
        ["warmup", "--model", "pico", "--data", "pico", "--recipe", "pcio"],
    ],
    ids=lambda words: words[0],
)
def test_a_recipe_that_is_nowhere_is_told_at_once(arguments: list[str]) -> None:
    code = command(*arguments).replace("main()", "try: main()\nexcept SystemExit as ended: assert ended.code == 2")
    assert loaded(code, {"torch", "transformers", "pandas"}) == []


def test_the_loop_leaves_to_a_run_what_only_a_run_needs() -> None:
    """A mistake in a recipe or a question about its prompts does not wait for the code of models."""
    late = {"transformers.modeling_utils", "torch._dynamo", "sympy", "scipy", "peft", "plotly", "math_verify"}
    assert loaded("import atesd.train.loop", late) == []


def test_the_bare_package_loads_nothing() -> None:
    code = "import sys, atesd; print(sorted(name for name in sys.modules if name.startswith('atesd')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['atesd']"
