from __future__ import annotations

import re
from pathlib import Path

import pytest

from atesd.report.compare import find
from atesd.report.load import load_study
from atesd.report.tables import behaviour_table, interval_drawing, paired_table, percent, points, result_table, verdict

from support.runs import write_graded


def cells(html: str) -> list[list[str]]:
    """Text of a table's body, row by row."""
    rows = re.findall(r"<tr>(.*?)</tr>", html.split("<tbody>")[1], re.DOTALL)
    return [[re.sub(r"<.*?>", "", cell) for cell in re.findall(r"<t[hd].*?</t[hd]>", row, re.DOTALL)] for row in rows]


def test_behaviour_puts_pass_and_majority_beside_the_average(tmp_path: Path) -> None:
    # p0: two of three right: average 2/3, pass@3 1, majority right; p1: one of three: 1/3, 1, majority wrong
    # so Average@3 50 %, pass@3 100 %, majority 50 %; three of six samples are wrong and "cite the hint"
    folder = write_graded(tmp_path / "cmp", {"full": {1: [[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]}})
    start, full = cells(behaviour_table(load_study([folder])))
    assert [text.replace("\u00a0", " ") for text in full] == [
        "full", "50.0 %", "100.0 %", "50.0 %", "10.0", "0.0 %", "50.0 %",
    ]  # fmt: skip
    assert start[1] == "0.0\u00a0%"


def test_an_ungradable_arm_shows_no_number(tmp_path: Path) -> None:
    folder = write_graded(tmp_path / "cmp", {"full": {1: [[1.0]]}, "half": {1: [[None]]}})
    rows = cells(behaviour_table(load_study([folder])))
    assert rows[2][:4] == ["half", "n/a", "n/a", "n/a"]
    study = load_study([folder])
    assert "no final accuracy" in result_table(study, find(study))


def test_a_majority_of_no_answers_shows_no_number(tmp_path: Path) -> None:
    folder = write_graded(tmp_path / "cmp", {"full": {1: [[1.0, 0.0]]}})
    file = folder / "full" / "seed_1" / "eval" / "step_000010.jsonl"
    file.write_text(re.sub(r'"answer": "[\d.]+"', '"answer": null', file.read_text()))
    start, full = cells(behaviour_table(load_study([folder])))
    assert [text.replace("\u00a0", " ") for text in full[1:4]] == ["50.0 %", "100.0 %", "n/a"]
    assert start[3] == "0.0\u00a0%"


def test_the_paired_table_reads_its_intervals(tmp_path: Path) -> None:
    folder = write_graded(tmp_path / "cmp", {"full": {1: [[0.0], [0.0]]}, "learned": {1: [[1.0], [1.0]]}})
    study = load_study([folder])
    ((pair, difference, _, interval, reading),) = cells(paired_table(study, find(study)))
    assert pair == "learned \u2212 full"
    assert (difference, interval, reading) == ("+100.0", "+100.0 to +100.0", "higher")


@pytest.mark.parametrize(("sign", "word"), [(1, "higher"), (-1, "lower"), (0, "not told apart")])
def test_a_reading_is_the_sign_of_the_difference(sign: int, word: str) -> None:
    assert verdict(sign) == word


def test_two_seeds_have_their_own_interval_beside_that_of_resampling(tmp_path: Path) -> None:
    """learned - full is 1 and .5: mean .75, error .25, t(.975, 1) = 12.7062, so -2.42655 to 3.92655.

    An accuracy's is the same, cut where no accuracy can be.
    """
    wrong, half, right = [[0.0, 0.0]], [[1.0, 0.0]], [[1.0, 1.0]]
    two = {"full": {1: wrong, 2: wrong}, "learned": {1: right, 2: half}}
    study = load_study([write_graded(tmp_path / "two", two)])
    pairs, arms = paired_table(study, find(study)), result_table(study, find(study))
    assert "<th scope=col class=number>t over seeds, 95\u00a0%</th>" in pairs
    assert "<th scope=col class=number>t over seeds, 95\u00a0%</th>" in arms
    assert cells(pairs)[0][3:] == ["+50.0 to +100.0", "\u2212242.7 to +392.7", "not told apart"]
    assert cells(arms)[2][4:6] == ["50.0\u00a0% to 100.0\u00a0%", "0.0\u00a0% to 100.0\u00a0%"]


def test_five_seeds_need_no_interval_of_their_own(tmp_path: Path) -> None:
    seeds = {seed: [[1.0, 0.0]] for seed in range(5)}
    study = load_study([write_graded(tmp_path / "five", {"full": seeds, "learned": seeds})])
    assert "t over seeds" not in paired_table(study, find(study)) + result_table(study, find(study))


def test_an_interval_is_drawn_in_place() -> None:
    # 190 wide with margins of 6: 0 at x = 6, 1 at x = 184, so .5 at 95, .25 at 50.5, .75 at 139.5
    drawing = interval_drawing((0.25, 0.5, 0.75), (0.0, 1.0), 2, 1.0)
    assert '<line class=bar x1="50.5" x2="139.5"' in drawing
    assert '<circle cx="95.0"' in drawing
    assert '<line class=reference x1="184.0"' in drawing


def test_numbers_are_written_with_their_sign() -> None:
    assert percent(0.1234) == "12.3\u00a0%"
    assert points(-0.021) == "\u22122.1"
    assert points(0.0) == "+0.0"


def test_arms_without_any_spread_are_drawn(tmp_path: Path) -> None:
    """Everything wrong in every arm: accuracies, intervals and differences are all 0."""
    wrong = {1: [[0.0, 0.0], [0.0, 0.0]]}
    study = load_study([write_graded(tmp_path / "cmp", {"learned": wrong, "full": wrong})])
    assert cells(result_table(study, find(study)))[1][2].replace("\u00a0", " ") == "0.0 %"
    assert len(cells(paired_table(study, find(study)))) == 1
