"""`atesd recipes`: the packaged recipes, listed, printed or copied."""

from __future__ import annotations

from pathlib import Path
from shlex import quote

from rich.table import Table

from atesd.cli.places import check_out
from atesd.cli.progress import make_console
from atesd.packaged import find_recipe, packaged_recipes, recipe_text, title_of
from atesd.types import UserError


def run_recipes(name: str | None, out: Path | None) -> None:
    """List all recipes; print the named one, or copy it to a file or into a folder."""
    if name is None:
        if out is not None:
            raise UserError("--out copies one recipe: name it, as in `atesd recipes pico --out mine.toml`")
        show_all()
        return
    text = recipe_text(find_recipe(name))
    if out is None:
        print(text, end="")
        return
    place = out / f"{find_recipe(name).stem}.toml" if out.is_dir() else out
    check_out(place)
    if place.exists():
        raise UserError(f"{place} already exists and is left as it is: choose another place with --out")
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(text, encoding="utf-8")
    print(f"{place}: train it with `atesd train {quote(str(place))}`")


def show_all() -> None:
    """Print names and what each is for."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column("name", no_wrap=True)
    table.add_column("for")
    for name, path in packaged_recipes().items():
        table.add_row(name, title_of(path))
    console = make_console()
    console.print(table)
    console.print("`atesd recipes NAME` prints one, `--out FILE` copies it; `atesd train NAME` trains it as it is")
