from __future__ import annotations

from pathlib import Path

import pytest

from atesd.report.compare import caution, find, pairs_of, summarise
from atesd.report.html import render
from atesd.report.load import load_study
from atesd.report.sections import finding
from atesd.runlog import RunDir
from atesd.types import UserError

from support.runs import graded_rows, write_compare, write_graded

RIGHT, WRONG, MIXED = [1.0, 1.0], [0.0, 0.0], [1.0, 0.0]


def test_the_summary_has_the_schema_of_the_command(tmp_path: Path) -> None:
    summary = summarise(write_compare(tmp_path / "cmp", steps=6, problems=6))
    assert list(summary) == ["start", "arms", "leaders", "paired", "k", "seeds", "seconds"]
    own = {"average_at_k", "low", "high", "seeds", "t_low", "t_high"}
    assert set(summary["start"]) == own
    assert list(summary["arms"]) == ["full", "half", "random", "learned"]
    assert all(set(arm) == own | {"seconds"} for arm in summary["arms"].values())
    assert list(summary["paired"]) == ["learned-full", "learned-half", "learned-random", "half-full"]
    keys = {"difference", "low", "high", "seeds", "t_low", "t_high"}
    assert all(set(pair) == keys for pair in summary["paired"].values())
    assert (summary["k"], summary["seeds"], summary["seconds"]) == (4, [1, 2], 604.0)


def test_accuracies_are_means_over_seeds_and_problems(tmp_path: Path) -> None:
    # full: seed 1 (1 + 0)/2 = .5, seed 2 (.5 + 0)/2 = .25, mean .375; learned: (1 + .5)/2 = .75 in both
    folder = write_graded(
        tmp_path / "cmp",
        {"full": {1: [RIGHT, WRONG], 2: [MIXED, WRONG]}, "learned": {1: [RIGHT, MIXED], 2: [MIXED, RIGHT]}},
    )
    summary = summarise(folder)
    assert summary["start"] == {"average_at_k": 0, "low": 0, "high": 0, "seeds": 2, "t_low": 0, "t_high": 0}
    assert summary["arms"]["full"]["average_at_k"] == pytest.approx(0.375)
    assert summary["arms"]["learned"]["average_at_k"] == pytest.approx(0.75)
    assert summary["arms"]["full"]["seconds"] == 3.0  # mean of 2 s and 4 s
    # differences: seed 1 (0, .5), seed 2 (0, 1); their extremes under resampling are 0 and 1
    pair = summary["paired"]["learned-full"]
    assert pair["difference"] == pytest.approx(0.375)
    assert 0 <= pair["low"] <= 0.375 <= pair["high"] <= 1
    # by seed .25 and .5: mean .375, error .125, t(.975, 1) = 12.7062
    assert (pair["seeds"], pair["t_low"]) == (2, pytest.approx(0.375 - 1.588275, abs=1e-5))
    assert pair["t_high"] == pytest.approx(0.375 + 1.588275, abs=1e-5)
    # full has .5 and .25: the same reach, cut to [0, 1]
    assert (summary["arms"]["full"]["t_low"], summary["arms"]["full"]["t_high"]) == (0.0, 1.0)
    # learned has .75 twice
    assert (summary["arms"]["learned"]["t_low"], summary["arms"]["learned"]["t_high"]) == (0.75, 0.75)
    assert list(summary["paired"]) == ["learned-full"]


@pytest.mark.parametrize(("seeds", "words"), [
    (1, "One seed: the intervals know of the held-out problems alone"),
    (2, "Two seeds: a bootstrap interval is too narrow"),
    (4, "Four seeds: a bootstrap interval is too narrow"),
    (5, ""),
])  # fmt: skip
def test_few_seeds_are_warned_of(seeds: int, words: str) -> None:
    assert caution([7, seeds]).startswith(words)
    assert bool(caution([7, seeds])) == bool(words)
    assert caution([]) == "", "no interval"


def test_the_seeds_that_are_counted_are_those_of_the_intervals(tmp_path: Path) -> None:
    """Five seeds were asked for and one arm has two of them; five runs named together are arms of one seed each."""
    seeds = {seed: [RIGHT] for seed in range(5)}
    folder = write_graded(tmp_path / "cmp", {"full": seeds, "half": {seed: [RIGHT] for seed in (0, 3)}})
    assert "<p>Two seeds: a bootstrap interval" in render(load_study([folder]))
    together = render(load_study([folder / "full" / f"seed_{seed}" for seed in range(5)]))
    assert "<p>One seed: the intervals know of the held-out problems alone" in together
    for path in (folder / "full").glob("*/config.json"):
        path.write_text("{}")
    assert "<p>One seed: " in render(load_study([folder / "full" / "seed_0"])), "a recipe without a seed"


def test_two_seeds_that_differ_crown_nobody(tmp_path: Path) -> None:
    """Ahead by 1 and by .5: resampling says .5 to 1, but over two seeds that is no more than a hint."""
    folder = write_graded(tmp_path / "cmp", {"full": {1: [WRONG], 2: [WRONG]}, "learned": {1: [RIGHT], 2: [MIXED]}})
    assert summarise(folder)["leaders"] == ["learned", "full"]
    same = write_graded(tmp_path / "same", {"full": {1: [WRONG], 2: [WRONG]}, "learned": {1: [RIGHT], 2: [RIGHT]}})
    assert summarise(same)["leaders"] == ["learned"]


def test_a_constant_difference_has_an_interval_of_no_width(tmp_path: Path) -> None:
    folder = write_graded(tmp_path / "cmp", {"full": {1: [WRONG, WRONG]}, "half": {1: [RIGHT, RIGHT]}})
    assert summarise(folder)["paired"]["half-full"] == {
        "difference": 1.0, "low": 1.0, "high": 1.0, "seeds": 1, "t_low": None, "t_high": None,
    }  # fmt: skip


def test_pairs_use_the_seeds_that_both_arms_have(tmp_path: Path) -> None:
    folder = write_graded(tmp_path / "cmp", {"full": {1: [WRONG], 2: [WRONG]}, "learned": {2: [RIGHT], 3: [WRONG]}})
    assert summarise(folder)["paired"]["learned-full"]["difference"] == 1.0  # seed 2 alone


def test_a_problem_that_one_run_cannot_grade_counts_for_neither_arm(tmp_path: Path) -> None:
    folder = write_graded(tmp_path / "cmp", {"full": {1: [RIGHT, [None, 1.0]]}, "learned": {1: [RIGHT, WRONG]}})
    summary = summarise(folder)
    assert summary["paired"]["learned-full"]["difference"] == 0.0
    assert summary["arms"]["full"]["average_at_k"] == 1.0
    assert summary["arms"]["learned"]["average_at_k"] == 0.5


def test_an_unfinished_run_is_left_out(tmp_path: Path) -> None:
    folder = write_graded(tmp_path / "cmp", {"full": {1: [WRONG], 2: [RIGHT]}, "half": {1: [RIGHT]}})
    (folder / "full" / "seed_2" / "result.json").unlink()
    (folder / "half" / "seed_1" / "result.json").unlink()
    summary = summarise(folder)
    assert summary["arms"]["full"]["average_at_k"] == 0.0
    assert list(summary["arms"]) == ["full"]
    assert summary["paired"] == {}


def test_other_arms_are_paired_with_the_learned_one(tmp_path: Path) -> None:
    folder = write_graded(tmp_path / "cmp", {"learned": {1: [RIGHT]}, "sft": {1: [WRONG]}, "quarter": {1: [MIXED]}})
    pairs = {name: pair["difference"] for name, pair in summarise(folder)["paired"].items()}
    assert pairs == {"learned-sft": 1.0, "learned-quarter": 0.5}


def test_arms_on_different_problems_are_not_compared(tmp_path: Path) -> None:
    folder = write_graded(tmp_path / "cmp", {"full": {1: [RIGHT]}, "learned": {1: [WRONG]}})
    rows = [row | {"problem_id": "other"} for row in graded_rows([RIGHT])]
    RunDir.open(folder / "full" / "seed_1").write_rows("eval", 10, rows)
    with pytest.raises(UserError, match="different problems"):
        summarise(folder)


def test_a_comparison_without_evaluation_is_refused(tmp_path: Path) -> None:
    folder = write_graded(tmp_path / "cmp", {"full": {1: [RIGHT]}})
    for file in (folder / "full" / "seed_1" / "eval").iterdir():
        file.unlink()
    with pytest.raises(UserError, match="no evaluation yet"):
        summarise(folder)


def leaders_of(path: Path, arms: dict[str, dict[int, list[list[float | None]]]]) -> list[str]:
    """Return the arms that a comparison of these rewards puts at the top."""
    found: list[str] = summarise(write_graded(path, arms))["leaders"]
    return found


def test_equal_arms_have_no_leader(tmp_path: Path) -> None:
    rewards: dict[int, list[list[float | None]]] = {1: [RIGHT, WRONG, MIXED], 2: [MIXED, RIGHT, WRONG]}
    assert leaders_of(tmp_path / "cmp", dict.fromkeys("abcd", rewards)) == ["a", "b", "c", "d"]


def test_arms_are_told_apart_from_the_highest_one_by_one(tmp_path: Path) -> None:
    # c is right throughout, in both problems of both seeds better than a. b equals c but for one sample of seed 2:
    # a draw of seed 1 twice has no difference, so that its interval holds 0
    arms: dict[str, dict[int, list[list[float | None]]]] = {
        "a": {1: [WRONG, MIXED], 2: [WRONG, MIXED]},
        "b": {1: [RIGHT, RIGHT], 2: [RIGHT, MIXED]},
        "c": {1: [RIGHT, RIGHT], 2: [RIGHT, RIGHT]},
    }
    assert leaders_of(tmp_path / "cmp", arms) == ["c", "b"]
    assert leaders_of(tmp_path / "two", {"a": arms["a"], "c": arms["c"]}) == ["c"]
    assert leaders_of(tmp_path / "one", {"a": arms["a"]}) == ["a"]


def test_arms_that_cannot_be_paired_are_not_told_apart(tmp_path: Path) -> None:
    assert leaders_of(tmp_path / "seeds", {"a": {1: [WRONG]}, "b": {2: [RIGHT]}}) == ["b", "a"]
    folder = write_graded(tmp_path / "problems", {"a": {1: [WRONG]}, "b": {1: [RIGHT]}})
    rows = [{**row, "problem_id": "another"} for row in graded_rows([WRONG])]
    RunDir.open(folder / "a" / "seed_1").write_rows("eval", 10, rows)
    assert summarise(folder)["leaders"] == ["b", "a"]


def test_runs_named_together_are_told_apart_by_their_own_intervals(tmp_path: Path) -> None:
    def named(name: str, rewards: list[list[float | None]]) -> Path:
        return write_graded(tmp_path / name, {name: {1: rewards}}) / name / "seed_1"

    low, middle, high = named("low", [WRONG] * 9), named("middle", [RIGHT, WRONG] * 5), named("high", [RIGHT] * 9)
    assert find(load_study([low, high])).leaders == ("seed_1 (2)",)
    # the middle one's 5 of 10 problems resample to 0.2 to 0.8: above 0, below 1
    assert find(load_study([low, middle])).leaders == ("seed_1 (2)",)
    assert find(load_study([middle, named("same", [WRONG, RIGHT] * 5), low])).leaders == ("seed_1", "seed_1 (2)")


def run_from(path: Path, start: list[list[float | None]]) -> Path:
    """Write a run whose start has these rewards."""
    run = RunDir.create(path, {"seed": 0})
    run.write_rows("eval", 0, graded_rows(start))
    run.write_rows("eval", 10, graded_rows(start))
    run.finish({"step": 10, "seconds": 1.0})
    return path


def test_runs_named_together_each_have_their_start(tmp_path: Path) -> None:
    """Starts of 0 and 1 make .5; they are no seeds of one thing, so that there is no interval over seeds."""
    low, high = run_from(tmp_path / "low", [WRONG, WRONG]), run_from(tmp_path / "high", [RIGHT, RIGHT])
    start = find(load_study([low, high])).start
    assert start is not None
    assert (start["average_at_k"], start["low"], start["high"]) == (0.5, 0.5, 0.5), "both problems have a mean of .5"
    assert "t_low" not in start
    # a comparison's two arms share the start of each seed: 0, 0, beside 1
    compared = write_graded(tmp_path / "cmp", {"a": {1: [RIGHT, RIGHT]}, "b": {1: [RIGHT, RIGHT]}})
    start = find(load_study([compared, high])).start
    assert start is not None
    assert (start["average_at_k"], start["seeds"]) == (0.5, 2)


def test_runs_named_together_on_different_sets_have_no_common_start(tmp_path: Path) -> None:
    one, two = run_from(tmp_path / "one", [WRONG]), run_from(tmp_path / "two", [RIGHT, RIGHT])
    found = find(load_study([one, two]))
    assert found.start is None
    assert {name: entry and entry["average_at_k"] for name, entry in found.arms.items()} == {"one": 0.0, "two": 1.0}


def test_an_arm_whose_name_begins_like_the_learned_one_is_not_it(tmp_path: Path) -> None:
    both: dict[str, dict[int, list[list[float | None]]]] = {"full": {1: [WRONG]}, "learned-slow": {1: [RIGHT]}}
    assert "Learned exposure" not in finding(find(load_study([write_graded(tmp_path / "cmp", both)])))
    all_three = {"learned": {1: [RIGHT]}} | both
    text = finding(find(load_study([write_graded(tmp_path / "three", all_three)])))
    assert "+0.0 against learned-slow" in text
    assert "+100.0 against full" in text


def test_nothing_complete_has_no_leader(tmp_path: Path) -> None:
    folder = write_compare(tmp_path / "cmp", arms=("full",), seeds=(1,), steps=4, problems=3, finished=False)
    assert summarise(folder)["leaders"] == []


@pytest.mark.parametrize(
    ("arms", "pairs"),
    [
        (["full", "half", "learned", "mine"], ["learned-full", "learned-half", "learned-mine", "half-full"]),
        (["mine", "full", "half"], ["full-mine", "half-mine", "half-full"]),
        (["half", "full"], ["half-full"]),
        (["aligned", "quarter"], ["quarter-aligned"]),
        (["aligned"], []),
    ],
)
def test_pairs_of_arms(arms: list[str], pairs: list[str]) -> None:
    assert [f"{a}-{b}" for a, b in pairs_of(arms)] == pairs
