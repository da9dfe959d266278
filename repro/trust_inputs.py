"""The inputs of `trust.py` that come from the tests: hostile completions and bad recipes, counted by outcome."""

from __future__ import annotations

import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from atesd.recipe import load_config
from atesd.rewards.math import MathReward
from atesd.types import UserError

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support.bad_recipes import bad_recipes as make_recipes
from support.hostile import GOLD, hostile

LIMIT_S = 1.0
SLACK_S = 1.0


def hostile_completions(count: int) -> Counter[str]:
    """Grade hostile completions, none of which is right, each followed by an honest answer.

    0             as it should be
    false 1       promised never to happen, as is code that was run
    hang          longer than the limit and a second: promised on an idle machine
    honest lost   the right answer behind it was not graded 1
    """
    found: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        marker = Path(folder) / "made"
        completions = [text for texts in hostile(marker).values() for text in texts][:count]
        reward = MathReward(timeout_s=LIMIT_S)
        reward(["p"], [r"\boxed{0.5}"], answer=["1/2"])
        for completion in completions:
            began = time.monotonic()
            (score,) = reward(["p"], [completion], answer=[GOLD])
            found["hang"] += time.monotonic() - began > LIMIT_S + SLACK_S
            found["false 1" if score or marker.exists() else "0"] += 1
            found["honest lost"] += reward(["p"], [r"\boxed{0.5}"], answer=["1/2"]) != [1.0]
    return found


def bad_recipes(count: int) -> Counter[str]:
    """Read bad recipes.

    refused       one line says what is wrong
    read          good after all
    traceback     promised never to happen
    """
    found: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bad.toml"
        for recipe in make_recipes(count):
            path.write_bytes(recipe.content)
            try:
                load_config(path, recipe.overrides).about()
                found["read"] += 1
            except UserError as error:
                found["refused" if "\n" not in str(error) else "traceback"] += 1
            except Exception as error:
                print(f"traceback of {recipe.name}: {type(error).__name__}: {error}", file=sys.stderr)
                found["traceback"] += 1
    return found
