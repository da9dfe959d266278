"""What `atesd compare` prints at its end, and what it makes of a damaged compare.json."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from atesd.cli.compare import finish, leaders_line, make_plan, paired_table
from atesd.types import UserError

from support.runs import write_graded

PICO = Path(__file__).parents[3] / "recipes" / "pico.toml"


def printed(table: Table) -> str:
    out = io.StringIO()
    Console(file=out, width=100).print(table)
    return out.getvalue()


def test_pairs_are_read_by_their_intervals() -> None:
    pairs = {
        "learned-a": {"difference": 0.2, "low": 0.1, "high": 0.3},
        "learned-b": {"difference": -0.2, "low": -0.3, "high": -0.1},
        "learned-c": {"difference": 0.2, "low": -0.1, "high": 0.5},
        "learned-d": {"difference": 0.0, "low": 0.0, "high": 0.0},
    }
    text = printed(paired_table({"paired": pairs}))
    rows = [[cell.strip() for cell in line.split("\u2502")[1:-1]] for line in text.splitlines() if "learned" in line]
    assert [row[-1] for row in rows] == ["higher", "lower", "not told apart", "not told apart"]


@pytest.mark.parametrize(
    ("leaders", "line"),
    [
        ([], "highest accuracy: no run is complete"),
        (["a"], "highest accuracy: a"),
        (["a", "b"], "not told apart from the highest: a, b (paired 95 % intervals hold 0)"),
    ],
)
def test_a_tie_is_not_crowned(leaders: Sequence[str], line: str) -> None:
    assert leaders_line(leaders) == line


def test_the_end_of_a_comparison_names_its_leaders(tmp_path: Path) -> None:
    folder = write_graded(tmp_path / "cmp", {name: {1: [[1.0, 0.0]]} for name in ("half", "full")})
    out = io.StringIO()
    finish(folder, Console(file=out, width=100))
    assert "not told apart from the highest: half, full" in out.getvalue()
    assert json.loads((folder / "summary.json").read_text())["leaders"] == ["half", "full"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"arms": []}, "field 'arms'"),
        ({"recipe_text": None}, "field 'recipe_text' is null"),
        ({"overrides": "x"}, "field 'overrides'"),
        ({"seconds": float("nan")}, "field 'seconds' is NaN"),
    ],
)
def test_a_damaged_comparison_is_not_continued(damage: dict[str, Any], message: str, tmp_path: Path) -> None:
    plan = make_plan(PICO, [], ["full"], range(2))
    header = plan.write(tmp_path)
    assert plan.write(tmp_path) == header
    (tmp_path / "compare.json").write_text(json.dumps(header | damage))
    with pytest.raises(UserError, match=f"compare.json is damaged .*{message}"):
        plan.write(tmp_path)
