"""One recording and one oracle a recipe, shared by all tests of the folder."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from support.oracle import Oracle
from support.recording import record
from support.wired import SKEWS, recipe


@pytest.fixture(scope="session")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Oracle]:
    """Return the oracle of a recipe by its name; the run is made when first asked for."""
    made: dict[str, Oracle] = {}

    def of(name: str) -> Oracle:
        if name not in made:
            folder = tmp_path_factory.mktemp(name) / "run"
            made[name] = Oracle(record(recipe(name), folder, skew=SKEWS.get(name, 0.0)))
        return made[name]

    return of
