from __future__ import annotations

from pathlib import Path

import pytest

from atesd.report.compare import summarise
from atesd.runlog import RunDir
from atesd.types import UserError

from support.runs import graded_rows, write_compare, write_graded

RIGHT, WRONG, MIXED = [1.0, 1.0], [0.0, 0.0], [1.0, 0.0]


def test_the_summary_has_the_schema_of_the_command(tmp_path: Path) -> None:
    summary = summarise(write_compare(tmp_path / "cmp", steps=6, problems=6))
    assert list(summary) == ["start", "arms", "leaders", "paired", "k", "seeds", "seconds"]
    assert set(summary["start"]) == {"average_at_k", "low", "high"}
    assert list(summary["arms"]) == ["full", "half", "random", "learned"]
    assert all(set(arm) == {"average_at_k", "low", "high", "seconds"} for arm in summary["arms"].values())
    assert list(summary["paired"]) == ["learned-full", "learned-half", "learned-random", "half-full"]
    assert all(set(pair) == {"difference", "low", "high"} for pair in summary["paired"].values())
    assert (summary["k"], summary["seeds"], summary["seconds"]) == (4, [1, 2], 604.0)


def test_accuracies_are_means_over_seeds_and_problems(tmp_path: Path) -> None:
    # full: seed 1 (1 + 0)/2 = .5, seed 2 (.5 + 0)/2 = .25, mean .375; learned: (1 + .5)/2 = .75 in both
    folder = write_graded(
        tmp_path / "cmp",
        {"full": {1: [RIGHT, WRONG], 2: [MIXED, WRONG]}, "learned": {1: [RIGHT, MIXED], 2: [MIXED, RIGHT]}},
    )
    summary = summarise(folder)
    assert summary["start"] == {"average_at_k": 0, "low": 0, "high": 0}
    assert summary["arms"]["full"]["average_at_k"] == pytest.approx(0.375)
    assert summary["arms"]["learned"]["average_at_k"] == pytest.approx(0.75)
    assert summary["arms"]["full"]["seconds"] == 3.0  # mean of 2 s and 4 s
    # differences: seed 1 (0, .5), seed 2 (0, 1); their extremes under resampling are 0 and 1
    pair = summary["paired"]["learned-full"]
    assert pair["difference"] == pytest.approx(0.375)
    assert 0 <= pair["low"] <= 0.375 <= pair["high"] <= 1
    assert list(summary["paired"]) == ["learned-full"]


def test_a_constant_difference_has_an_interval_of_no_width(tmp_path: Path) -> None:
    folder = write_graded(tmp_path / "cmp", {"full": {1: [WRONG, WRONG]}, "half": {1: [RIGHT, RIGHT]}})
    assert summarise(folder)["paired"]["half-full"] == {"difference": 1.0, "low": 1.0, "high": 1.0}


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
