"""Packaged recipes: by name, listed, printed and copied; what shells complete."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

from atesd.cli.compare import make_plan
from atesd.cli.main import _recipe_names, main
from atesd.cli.recipes import run_recipes
from atesd.config import RunConfig
from atesd.packaged import SECTIONS, find_recipe, packaged_recipes, refuse_unknown_sections, title_of
from atesd.recipe import load_config
from atesd.types import UserError

RECIPES = Path(__file__).parents[3] / "recipes"


def test_every_recipe_of_the_repository_is_packaged_under_its_name() -> None:
    assert {name: path.read_text() for name, path in packaged_recipes().items()} == {
        path.stem: path.read_text() for path in RECIPES.glob("*.toml")
    }


def test_a_name_means_the_packaged_recipe_unless_a_file_is_called_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config("pico", ["seed=7"]) == load_config(RECIPES / "pico.toml", ["seed=7"])
    Path("pico").mkdir()
    assert find_recipe("pico").read_text() == (RECIPES / "pico.toml").read_text(), "a folder is no recipe"
    Path("pico").rmdir()
    Path("pico").write_text("seed = 11")
    assert load_config(Path("pico")).seed == 11


def test_a_misspelt_section_is_told_before_anything_of_weight_is_imported(tmp_path: Path) -> None:
    assert set(SECTIONS) == set(RunConfig.model_fields)
    code = "import sys; from atesd.cli.main import main\ntry: main()\nfinally: print('torch' in sys.modules)"
    words = [sys.executable, "-c", code, "train", "pico", "stp.num_steps=3", "--out", str(tmp_path / "run")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "False\n")
    assert done.stderr == "error: override 'stp.num_steps=3': unknown key 'stp': did you mean 'step'?\n"
    with pytest.raises(UserError, match=r"override 'sed=': unknown key 'sed': did you mean 'seed'\?"):
        refuse_unknown_sections(["step.num_steps=3", "seed=4", "sed="])
    refuse_unknown_sections(["task.x=1", "nothing", "=3", "columns.problem=question"])


def test_a_recipe_is_utf_8_with_a_mark_in_front_or_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, text = tmp_path / "mine one.toml", "# S\u00fc\u00df, a title.\r\nseed = 3\r\n"
    path.write_text(text, encoding="utf-8-sig", newline="")
    assert load_config(path).seed == 3
    assert title_of(path) == "S\u00fc\u00df, a title"
    assert make_plan(path, [], ["full"], range(1)).text.startswith("# S")
    run_recipes(str(path), tmp_path / "copy.toml")
    assert tomllib.loads((tmp_path / "copy.toml").read_text(encoding="utf-8")) == {"seed": 3}
    (tmp_path / "with space").mkdir()
    capsys.readouterr()
    run_recipes("pico", tmp_path / "with space")
    assert capsys.readouterr().out.endswith(f"train it with `atesd train '{tmp_path}/with space/pico.toml'`\n")
    path.write_text(text, encoding="latin-1")
    for read in (load_config, title_of, lambda path: run_recipes(str(path), None)):
        with pytest.raises(UserError, match=r"mine one\.toml cannot be read \('utf-8' codec .*\): save it as UTF-8$"):
            read(path)
    os.mkfifo(tmp_path / "pipe")
    for name, what in (("pipe", "a pipe or a device"), ("with space", "a folder")):
        with pytest.raises(UserError, match=rf"{name} cannot be read \(it is {what}\): give the path of a TOML file"):
            find_recipe(tmp_path / name)


def test_what_is_neither_is_named_with_the_nearest_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match=r"recipe pico-gpro .* did you mean 'pico-grpo'\? .* one of digits-atesd, pico, pico-agents, "
    ):
        find_recipe("pico-gpro")
    with pytest.raises(UserError, match=r"recipes/pico\.toml cannot be read .* but 'pico' is packaged"):
        find_recipe(Path("recipes/pico.toml"))


def test_every_recipe_says_in_its_first_sentence_what_it_is_for(capsys: pytest.CaptureFixture[str]) -> None:
    run_recipes(None, None)
    printed = capsys.readouterr().out
    for name, path in packaged_recipes().items():
        title = title_of(path)
        assert 10 < len(title) < 180, f"{name}: {title}"
        line = next(line for line in printed.splitlines() if line.split()[:1] == [name])
        assert title.split()[0] in line


def test_a_title_ends_with_its_sentence(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text("# One thing\n# on two lines, v1.5 of it. Another sentence.\nseed = 0\n# not this")
    assert title_of(path) == "One thing on two lines, v1.5 of it"
    path.write_text("seed = 0\n# no title")
    assert title_of(path) == ""


def test_a_recipe_is_printed_and_copied_but_nothing_is_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (RECIPES / "pico.toml").read_text()
    run_recipes("pico", None)
    assert capsys.readouterr().out == text
    run_recipes("pico", tmp_path / "new" / "mine.toml")
    run_recipes("pico", tmp_path)
    assert (tmp_path / "new" / "mine.toml").read_text() == (tmp_path / "pico.toml").read_text() == text
    (tmp_path / "pico.toml").write_text("mine")
    with pytest.raises(UserError, match="already exists"):
        run_recipes("pico", tmp_path)
    assert (tmp_path / "pico.toml").read_text() == "mine"


def test_shells_complete_recipes_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("pica.toml").touch()
    (tmp_path / "sub").mkdir()
    Path("sub/other.toml").touch()
    assert [name for name in _recipe_names("pic") if "-" not in name] == ["pico", "pica.toml"]
    assert _recipe_names("sub/o") == ["sub/other.toml"]
    assert _recipe_names("nowhere/") == []
    asked = {"_ATESD_COMPLETE": "complete_bash", "COMP_WORDS": "atesd train pico-gr", "COMP_CWORD": "2"}
    code = "from atesd.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | asked, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["pico-grpo"], done.stderr


def test_the_version_is_the_packages(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["atesd", "--version"])
    main()
    assert capsys.readouterr().out == f"atesd {version('atesd')}\n"
