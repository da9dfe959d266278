"""Code of the user's is named before it runs."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from atesd.cli.code import announce_code, code_of, refuse_code
from atesd.recipe import load_config
from atesd.types import UserError

PICO = Path(__file__).parents[3] / "recipes" / "pico.toml"


def config_with(function: str | None) -> Any:
    return load_config(PICO, [f'reward={{kind="python", function="{function}"}}'] if function else [])


def test_a_file_is_named_by_its_whole_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert code_of(config_with("mine/rewards.py:score")) == f"reward function 'score' in {tmp_path}/mine/rewards.py"


def test_a_module_is_named_with_its_file_and_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "noisy"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('was imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert code_of(config_with("noisy.rewards:score")) == (
        f"reward function 'score' in module noisy.rewards ({package}/__init__.py)"
    )
    assert str(code_of(config_with("no_such_package.rewards:score"))).endswith("no_such_package.rewards (not found)")


def test_every_one_of_several_functions_is_named() -> None:
    rewards = 'reward=[{kind="exact"}, {kind="python", function="/a/b.py:f"}, {kind="python", function="/a/b.py:g"}]'
    assert code_of(load_config(PICO, [rewards])) == "reward function 'f' in /a/b.py, reward function 'g' in /a/b.py"


def test_code_is_announced_and_refused_where_there_is_some() -> None:
    out = io.StringIO()
    console = Console(file=out, width=500)
    announce_code(config_with(None), console)
    refuse_code(config_with(None), "r")
    assert out.getvalue() == ""
    announce_code(config_with("/a/b.py:f"), console)
    assert out.getvalue() == "this recipe runs code of yours, with your rights: reward function 'f' in /a/b.py\n"
    with pytest.raises(UserError, match=r"^r would run code with your rights: .*'f' in /a/b.py.* with --run-code$"):
        refuse_code(config_with("/a/b.py:f"), "r")
