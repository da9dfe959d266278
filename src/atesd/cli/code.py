"""Code of the user's that a recipe names: it runs with the user's rights, so the commands say so before they run it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import util
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from atesd.own import before_import
from atesd.rewards.kinds import PythonConfig
from atesd.types import UserError

if TYPE_CHECKING:
    from atesd.config import RunConfig


def code_of(config: RunConfig) -> str | None:
    """Return which functions and environments a recipe has run, with their files; None where there are none.

    Methods by import path are named before they are imported: `announced_methods`, `refused_methods`.
    """
    rewards = config.reward if isinstance(config.reward, tuple) else (config.reward,)
    places = [reward.function.rpartition(":") for reward in rewards if isinstance(reward, PythonConfig)]
    named = (f"reward function {name!r} in {_file_of(source)}" for source, _, name in places)
    own = config.env.code
    source, _, name = (own or "").rpartition(":")
    environments = [f"environment {name!r} in {_file_of(source)}"] if own else []
    return ", ".join(dict.fromkeys([*named, *environments])) or None


@contextmanager
def announced_methods(console: Console) -> Iterator[None]:
    """Say which methods of the user's a recipe names, once each, before they are imported."""
    said: set[str] = set()

    def say(place: str) -> None:
        if place not in said:
            said.add(place)
            console.print(f"this recipe runs code of yours, with your rights: {_method(place)}")

    with before_import(say):
        yield


@contextmanager
def refused_methods(source: str) -> Iterator[None]:
    """UserError where a recipe names methods of its own, before they are imported."""

    def refuse(place: str) -> None:
        raise _refusal(source, _method(place))

    with before_import(refuse):
        yield


def announce_code(config: RunConfig, console: Console) -> None:
    """Say which code is about to run."""
    code = code_of(config)
    if code:
        console.print(f"this recipe runs code of yours, with your rights: {code}")


def refuse_code(config: RunConfig, source: str) -> None:
    """UserError where a recipe has code run; `source` is where the recipe comes from."""
    code = code_of(config)
    if code:
        raise _refusal(source, code)


def _refusal(source: str, code: str) -> UserError:
    return UserError(
        f"{source} would run code with your rights: {code}. It was not run: look at it, then allow it with --run-code"
    )


def _method(place: str) -> str:
    source, _, name = place.rpartition(":")
    return f"method {name!r} in {_file_of(source)}"


def _file_of(source: str) -> str:
    """Return the file of a module, without importing it, not even a package above it."""
    if source.endswith(".py"):
        return str(Path(source).absolute())
    top = source.partition(".")[0]
    spec = util.find_spec(top) if top.isidentifier() and top != "__main__" else None
    return f"module {source} ({spec.origin if spec and spec.origin else 'not found'})"
