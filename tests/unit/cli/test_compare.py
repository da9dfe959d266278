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

from atesd.cli.compare import (
    finish,
    leaders_line,
    locked,
    make_plan,
    paired_table,
    quality_table,
    run_compare,
    run_plan,
)
from atesd.recipe import load_config, with_overrides
from atesd.types import UserError

from support.runs import write_graded

PICO = Path(__file__).parents[3] / "recipes" / "pico.toml"


def printed(table: Table) -> str:
    out = io.StringIO()
    Console(file=out, width=100).print(table)
    return out.getvalue()


def test_the_embedded_recipe_is_aligned_and_its_other_arms_are_distilled(tmp_path: Path) -> None:
    """Without an [arms] table `aligned` is the same from any recipe; else fixed ratios would be routed, too."""
    config = load_config(PICO)
    assert (config.exposure.kind, config.routing.kind) == ("influence", "aligned")
    for name, overrides in config.arms.items():
        expected = {"aligned": "aligned", "sft": "sft"}.get(name, "distil")
        assert with_overrides(config, overrides).routing.kind == expected, name
    bare = tmp_path / "bare.toml"
    bare.write_text('[model]\npath = "pico"\n[task]\nkind = "pico"\n')
    plan = make_plan(bare, [], ["aligned", "learned"], range(1))
    found = with_overrides(plan.config, plan.arms["aligned"])
    assert (found.exposure, found.routing) == (config.exposure, config.routing)
    learned = with_overrides(plan.config, plan.arms["learned"])
    assert (learned.exposure.kind, learned.routing.kind) == ("beta", "distil")


def test_without_arms_a_recipes_own_are_compared(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text('[model]\npath = "pico"\n[task]\nkind = "pico"\n')
    assert list(make_plan(recipe, [], None, range(1)).arms) == ["full", "half", "learned", "aligned"]
    recipe.write_text(f'{recipe.read_text()}[arms]\nslow = ["optim.lr=1e-6"]\nas_it_is = []\n')
    plan = make_plan(recipe, [], None, range(1))
    assert plan.arms == {"slow": ("optim.lr=1e-6",), "as_it_is": ()}
    assert list(make_plan(recipe, [], ["full"], range(1)).arms) == ["full"]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        (
            "seed=7",
            r"arm 'odd' sets seed = 7, but compare sets the seed of every run: remove it, and give --first-seed",
        ),
        (
            "eval.k=4",
            r"arm 'odd' sets eval\.k = 4 where others have 2, .* set it for all, in the recipe or on the comm",
        ),
    ],
)
def test_an_arm_that_sets_what_all_share_is_refused(override: str, says: str, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text('[model]\npath = "pico"\n[task]\nkind = "pico"\n[eval]\nk = 2\n')
    recipe.write_text(f'{recipe.read_text()}[arms]\nodd = ["{override}"]\nsame = ["seed=0", "eval.k=2"]\n')
    assert list(make_plan(recipe, [], ["same"], range(1)).arms) == ["same"]
    with pytest.raises(UserError, match=says):
        make_plan(recipe, [], ["odd"], range(1))


def test_an_arm_that_is_wrong_is_named_with_its_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text('[model]\npath = "pico"\n[task]\nkind = "pico"\n[arms]\nbad = ["optim.lr=11"]\nfine = []\n')
    with pytest.raises(UserError, match=rf"{recipe}: arm 'bad': optim\.lr: "):
        make_plan(recipe, [], ["fine", "bad"], range(1))
    assert list(make_plan(recipe, [], ["fine", ""], range(1)).arms) == ["fine"], "a comma at the end names no arm"


def test_seeds_begin_where_they_are_asked_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[range, Path, int]] = []
    monkeypatch.setattr(
        "atesd.cli.compare.run_plan", lambda plan, folder, jobs, nursery: seen.append((plan.seeds, folder, jobs))
    )
    run_compare(PICO, [], arms=["full"], seeds=3, first_seed=5, jobs=2, out=tmp_path / "here")
    assert seen == [(range(5, 8), tmp_path / "here", 2)]


def test_a_comparison_goes_on_with_its_seconds(tmp_path: Path) -> None:
    plan = make_plan(PICO, [], ["full"], range(1))
    header = plan.write(tmp_path)
    assert header["seconds"] == 0.0
    (tmp_path / "compare.json").write_text(json.dumps(header | {"seconds": 7.5}))
    more = make_plan(PICO, [], ["half"], range(1, 3)).write(tmp_path)
    assert (more["seconds"], more["seeds"], list(more["arms"])) == (7.5, [0, 1, 2], ["full", "half"])


def test_a_run_is_told_the_commands_overrides_and_behind_them_its_arms(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text('[model]\npath = "pico"\n[task]\nkind = "pico"\n[arms]\nhalf = ["optim.lr=1e-6", "threads=3"]\n')
    plan = make_plan(recipe, ["optim.lr=1e-5", "step.num_steps=9"], ["half", "full"], range(2, 3))
    assert [job.train for job in plan.jobs(tmp_path)] == [
        (str(recipe), "optim.lr=1e-5", "step.num_steps=9", *own, "seed=2", "--out", str(tmp_path / arm / "seed_2"))
        for arm, own in (
            ("half", ("optim.lr=1e-6", "threads=3", "threads=3")),
            ("full", ('exposure={kind="fixed", ratio=1.0}', "threads=1")),
        )
    ]
    assert [job.num_steps for job in plan.jobs(tmp_path)] == [9, 9]


@pytest.mark.parametrize(
    ("jobs", "accelerator", "at_once"), [(0, False, 2), (3, False, 3), (9, False, 4), (0, True, 1), (2, True, 2)]
)
def test_as_many_runs_go_on_as_asked_or_as_the_arm_of_most_threads_leaves_room_for(
    jobs: int, accelerator: bool, at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    class Stopped:
        was_stopped, failures = True, ()

        def __init__(self, todo: Sequence[Any], at_once: int, lock: int, console: Console, nursery: Any) -> None:
            with (
                pytest.raises(UserError, match=rf"runs of {tmp_path}/out are still going on"),
                locked(tmp_path / "out"),
            ):
                pass
            seen.append((len(todo), at_once, nursery))

        def run(self) -> None:
            pass

    recipe = tmp_path / "mine.toml"
    recipe.write_text('[model]\npath = "pico"\n[task]\nkind = "pico"\n[arms]\nwide = ["threads=3"]\nnarrow = []\n')
    monkeypatch.setattr("atesd.cli.compare.Runner", Stopped)
    monkeypatch.setattr("atesd.train.model.has_accelerator", lambda: accelerator)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(6))
    plan = make_plan(recipe, [], None, range(2))
    nursery: Any = object()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "compare.json").write_text(json.dumps(plan.write(tmp_path / "out") | {"seconds": 7.5}))
    with pytest.raises(SystemExit) as stop:
        run_plan(plan, tmp_path / "out", jobs, nursery)
    assert (stop.value.code, seen) == (130, [(4, at_once, None if accelerator else nursery)])
    assert 7.5 < json.loads((tmp_path / "out" / "compare.json").read_text())["seconds"] < 60


def test_pairs_are_read_by_their_intervals() -> None:
    many = {"seeds": 8, "t_low": None, "t_high": None}
    pairs: dict[str, dict[str, float | None]] = {
        "learned-a": {"difference": 0.2, "low": 0.1, "high": 0.3, **many},
        "learned-b": {"difference": -0.2, "low": -0.3, "high": -0.1, **many},
        "learned-c": {"difference": 0.2, "low": -0.1, "high": 0.5, **many},
        "learned-d": {"difference": 0.0, "low": 0.0, "high": 0.0, **many},
    }
    assert [row[-1] for row in rows_of(pairs)] == ["higher", "lower", "not told apart", "not told apart"]
    assert {len(row) for row in rows_of(pairs)} == {4}
    pairs["learned-a"] |= {"seeds": 2, "t_low": -0.4, "t_high": 0.8}
    assert rows_of(pairs)[0][2:] == ["+0.100 to +0.300", "-0.400 to +0.800", "not told apart"]
    assert rows_of(pairs)[1][2:] == ["-0.300 to -0.100", "", "lower"]


def rows_of(pairs: dict[str, dict[str, float | None]]) -> list[list[str]]:
    """Cells of the printed table of pairs."""
    text = printed(paired_table({"paired": pairs}, ["learned", *"abcd"]))
    return [[cell.strip() for cell in line.split("\u2502")[1:-1]] for line in text.splitlines() if "learned" in line]


def test_the_end_of_a_comparison_of_few_seeds_says_so(tmp_path: Path) -> None:
    """Accuracies .5 and 1: mean .75, error .25; 12.7062 errors reach beyond 0 and 1."""
    folder = write_graded(tmp_path / "cmp", {"half": {1: [[1.0, 0.0]], 2: [[1.0, 1.0]]}})
    out = io.StringIO()
    finish(folder, Console(file=out, width=120))
    row = next(line for line in out.getvalue().splitlines() if "half" in line and "\u2502" in line)
    assert [cell.strip() for cell in row.split("\u2502")[1:-2]] == ["half", "0.750", "0.500 to 1.000", "0.000 to 1.000"]
    assert "Two seeds: a bootstrap interval is too narrow where seeds differ" in out.getvalue()
    folder = write_graded(tmp_path / "many", {"half": {seed: [[1.0, 0.0]] for seed in range(5)}})
    out = io.StringIO()
    finish(folder, Console(file=out, width=120))
    assert "seeds:" not in out.getvalue()
    assert "t over seeds" not in out.getvalue()


def test_pairs_are_split_between_arms_not_at_a_hyphen() -> None:
    """Without a learned arm all are compared with the first."""
    difference = {"difference": 0.2, "low": 0.1, "high": 0.3, "seeds": 8, "t_low": None, "t_high": None}
    arms = ["gt-full", "no-gt-full", "other"]
    text = printed(paired_table({"paired": {"no-gt-full-gt-full": difference}}, arms))
    assert "no-gt-full - gt-full" in text
    assert "other" not in text, "a pair without a common seed has no row"
    entry = {"mean": 0.5, "low": None, "high": None, "seeds": 1}
    found = {"start": None, "arms": {}, "paired": {"no-gt-full-gt-full": entry}}
    assert "no-gt-full - gt-full" in printed(quality_table("distance", found, arms))


def test_no_arm_takes_the_name_of_the_start(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text('[model]\npath = "pico"\n[task]\nkind = "pico"\n[arms]\nstart = []\nstarted = []\n')
    assert list(make_plan(recipe, [], ["started"], range(1)).arms) == ["started"]
    with pytest.raises(UserError, match=r"no arm can be called 'start'.*: rename it"):
        make_plan(recipe, [], None, range(1))


@pytest.mark.parametrize(
    ("leaders", "line"),
    [
        ([], "highest accuracy: no run is complete"),
        (["a"], "highest accuracy: a"),
        (["a", "b"], "not told apart from the highest: a, b (no pair has all its 95 % intervals above 0)"),
    ],
)
def test_a_tie_is_not_crowned(leaders: Sequence[str], line: str) -> None:
    assert leaders_line(leaders) == line


def test_leaders_of_few_seeds_are_not_said_to_have_intervals_that_hold_0(tmp_path: Path) -> None:
    """Ahead by 1 and by .5: resampling's interval lies above 0, the t interval over two seeds does not."""
    arms = {"half": {1: [[1.0, 1.0]], 2: [[1.0, 0.0]]}, "full": {1: [[0.0, 0.0]], 2: [[0.0, 0.0]]}}
    folder = write_graded(tmp_path / "cmp", arms)
    out = io.StringIO()
    finish(folder, Console(file=out, width=140))
    assert "+0.500 to +1.000" in out.getvalue()
    assert "highest: half, full (no pair has all its 95 % intervals above 0)" in out.getvalue()


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
