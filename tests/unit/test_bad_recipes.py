"""Bad recipes by the hundred: each is a recipe after all, or ends in one line that names the file, or the override."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from atesd.recipe import build_config, load_config
from atesd.types import UserError

from support.bad_recipes import COUNT, BadRecipe, bad_recipes

FEW = 70


def outcome(recipe: BadRecipe, folder: Path) -> str:
    """Return the line in which a recipe ends; empty for one that is good after all, down to its words and its file."""
    path = folder / "bad.toml"
    path.write_bytes(recipe.content)
    try:
        config = load_config(path, recipe.overrides)
    except UserError as error:
        return str(error)
    assert build_config(json.loads(json.dumps(config.model_dump(mode="json")))) == config
    config.facts()
    config.about()
    return ""


def check(recipe: BadRecipe, folder: Path) -> bool:
    """Assert that a recipe ends well; tell whether it was refused."""
    line = outcome(recipe, folder)
    assert line or not recipe.certain, f"{recipe.name} was taken for a recipe"
    if line:
        assert line.isprintable(), f"{recipe.name}: {line!r}"
        assert len(line) < 3000, f"{recipe.name}: {len(line)} letters"
        assert str(folder / "bad.toml") in line or line.startswith("override "), f"{recipe.name}: {line!r}"
        assert "Unable to extract tag" not in line
        if recipe.certain and recipe.overrides:
            assert recipe.overrides[0].partition("=")[0].partition(".")[0] in line, f"{recipe.name}: {line!r}"
    return bool(line)


@pytest.mark.parametrize("recipe", bad_recipes(FEW), ids=lambda recipe: recipe.name.encode("ascii", "replace").decode())
def test_a_bad_recipe_ends_in_one_line(recipe: BadRecipe, tmp_path: Path) -> None:
    check(recipe, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_every_bad_recipe_ends_in_one_line_and_few_are_good(seed: int, tmp_path: Path) -> None:
    refused = [check(recipe, tmp_path) for recipe in bad_recipes(seed=seed)]
    assert len(refused) == COUNT
    assert sum(refused) > 0.8 * COUNT


def test_the_bad_recipes_are_the_same_ones_in_every_run_and_of_every_way() -> None:
    first = bad_recipes()
    assert first == bad_recipes()
    assert first[:FEW] == bad_recipes(FEW)
    assert len(set(first)) > 0.9 * COUNT
    assert len({recipe.content for recipe in first}) > 90, "half of the ways change the file itself"
    assert sum(recipe.certain for recipe in first) > 0.4 * COUNT
