"""Documents that are written from the code must be up to date."""

from __future__ import annotations

import importlib.util
import json
import re
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Literal

import pytest

import atesd
from atesd.exposure.controller import Controller, ExposureMethod
from atesd.facts import RunFacts

ROOT = Path(__file__).parents[2]


def make_config() -> ModuleType:
    """Return the script that writes both pages."""
    spec = importlib.util.spec_from_file_location("make_config", ROOT / "docs" / "make_config.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_config_page_matches_the_models() -> None:
    assert (ROOT / "docs" / "config.md").read_text(encoding="utf-8") == make_config().render(), "run make docs"


def test_the_schema_for_editors_matches_the_models() -> None:
    text = (ROOT / "docs" / "recipe.schema.json").read_text(encoding="utf-8")
    assert text == make_config().schema(), "run make docs"


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.toml")), ids=lambda path: path.stem)
def test_recipes_hold_to_the_schema_and_mistakes_do_not(recipe: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(json.loads((ROOT / "docs" / "recipe.schema.json").read_text()))
    tree = tomllib.loads(recipe.read_text())
    assert [error.message for error in validator.iter_errors(tree)] == []
    assert list(validator.iter_errors(tree | {"optim": {"lrr": 1}}))


def test_the_refusal_of_an_incomplete_method_reads_as_the_page_shows_it() -> None:
    with pytest.raises(TypeError) as caught:

        class Sawtooth(ExposureMethod):
            kind: Literal["sawtooth"] = "sawtooth"
            reads_length: ClassVar[bool] = False

            def describe(self) -> str:
                return ""

            def build(self, run: RunFacts) -> Controller:
                raise NotImplementedError

    assert f"\n    TypeError: {caught.value}\n" in (ROOT / "docs" / "extend.md").read_text(encoding="utf-8")


def test_the_notebook_runs_and_the_page_names_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cells = json.loads((ROOT / "docs" / "library.ipynb").read_text())["cells"]
    names: dict[str, Any] = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    assert [row["step"] for row in names["rows"]] == [0, 1, 2, 3]
    assert (tmp_path / "library-run" / "report.html").is_file()
    page = (ROOT / "docs" / "library.md").read_text()
    first = page.partition("```python\n")[2].partition("```")[0]
    exec(first.replace("step.num_steps=60", 'step.num_steps=1", "step.problems=1", "eval.problems=1'), {})
    assert (tmp_path / "runs" / "mine" / "report.html").is_file()
    public = re.findall(r"`([A-Za-z_]+)(?:\.[a-z]+)?`", "".join(line for line in page.splitlines() if line[:1] == "|"))
    assert set(public) - {"listener"} <= {*atesd.__all__, "name"}
