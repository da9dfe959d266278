"""The recipes that come with the package, by name: `pico` stands for `recipes/pico.toml`.

In the repository `src/atesd/recipes` is a link to `recipes/`; a wheel holds the files themselves.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from pathlib import Path

FOLDER = Path(__file__).with_name("recipes")


# fmt: off
SECTIONS = (
    "seed", "model", "task", "reward", "prompt", "reveal", "exposure", "teacher", "target", "loss",
    "selection", "gate", "routing", "rl", "cliff", "curriculum", "gradient", "codes", "env", "rollout",
    "optim", "step", "probe", "eval", "save", "flow", "track", "threads", "arms",
)
# fmt: on
"""What a recipe holds at its top: the fields of `tree.py`, which takes seconds to import."""


def packaged_recipes() -> dict[str, Path]:
    """Return the packaged recipes by name, in alphabetical order."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.toml"), key=lambda path: path.stem)}


def find_recipe(given: str | Path) -> Path:
    """Return the file that is meant: one of that path, else the packaged recipe of that name.

    UserError where neither exists, with the nearest name.
    """
    path, known = Path(given), packaged_recipes()
    if path.is_file():
        return path
    if str(given) in known:
        return known[str(given)]
    from atesd.types import UserError, one_line

    if path.exists() and path != Path():
        what = "a folder" if path.is_dir() else "a pipe or a device"
        raise UserError(f"recipe {one_line(str(path))} cannot be read (it is {what}): give the path of a TOML file")
    if path.stem in known:
        raise UserError(
            f"recipe {one_line(str(path))} cannot be read (there is no such file), but {path.stem!r} is packaged: "
            "name it so"
        )
    near = difflib.get_close_matches(str(given)[:100], known, n=1, cutoff=0.5)
    meant = f"did you mean {near[0]!r}? " if near else ""
    raise UserError(
        f"recipe {one_line(str(given))} cannot be read (there is no such file, nor a packaged recipe of that name): "
        f"{meant}give the path of a TOML file, or one of {', '.join(known)}"
    )


def recipe_text(path: Path) -> str:
    """Return the text of a recipe's file. UserError where it cannot be read."""
    from atesd.types import UserError, one_line

    try:
        return path.read_text(encoding="utf-8-sig")  # some editors put a mark of three bytes in front
    except OSError as error:
        why = error.strerror
        raise UserError(f"recipe {one_line(str(path))} cannot be read ({why}): give the path of a TOML file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"recipe {one_line(str(path))} cannot be read ({error}): save it as UTF-8") from error


def refuse_unknown_sections(overrides: Iterable[str]) -> None:
    """UserError for an override whose section is nearly one of a recipe's; others may be meant for no recipe."""
    for override in overrides:
        name = override.partition("=")[0].partition(".")[0].strip()
        if "=" not in override or not name or name in SECTIONS:
            continue
        from atesd.types import UserError, shown

        near = difflib.get_close_matches(name[:100], SECTIONS, n=1)
        if near:
            raise UserError(f"override {shown(override)}: unknown key {shown(name)}: did you mean {near[0]!r}?")


def title_of(recipe: Path) -> str:
    """Return what a recipe's first comment says, its first sentence."""
    lines: list[str] = []
    for line in recipe_text(recipe).splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# "))
    return re.split(r"(?<=[?]) |[.] ", " ".join(lines))[0].rstrip(".")
