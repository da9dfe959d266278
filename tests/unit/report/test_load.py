from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from atesd.report.load import load_evaluation, load_run, load_study
from atesd.runlog import RunDir
from atesd.types import UserError

from support.runs import graded_rows, write_compare, write_graded, write_run


def evaluation_of(tmp_path: Path, rewards: list[list[float | None]], step: int = 7) -> Path:
    return RunDir.create(tmp_path / "run", {}).write_rows("eval", step, graded_rows(rewards))


def test_an_evaluation_becomes_a_matrix_whose_ungradable_samples_are_not_zero(tmp_path: Path) -> None:
    found = load_evaluation(evaluation_of(tmp_path, [[1.0, 0.0], [None, 1.0], [1.0, 1.0]]))
    assert found.step == 7
    assert found.problem_ids == ("p0", "p1", "p2")
    np.testing.assert_array_equal(found.rewards, [[1, 0], [np.nan, 1], [1, 1]])
    # p1 cannot be scored at all: one of its two samples is unknown
    np.testing.assert_array_equal(found.accuracies, [0.5, np.nan, 1.0])
    np.testing.assert_array_equal(found.correct, [[True, False], [True, True]])
    assert found.graded_answers == [("1.0", "0.0"), ("1.0", "1.0")]
    assert found.traits["cites_hint"] == pytest.approx(1 / 6)
    assert found.lengths_mean == 10


def test_a_reward_between_0_and_1_is_not_a_right_answer(tmp_path: Path) -> None:
    found = load_evaluation(evaluation_of(tmp_path, [[0.5, 1.0]]))
    assert found.accuracies.tolist() == [0.5]


def test_start_and_final_are_the_first_and_the_highest_step(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path / "run", steps=12).path, "learned", 1)
    assert run.start is not None
    assert run.start.step == 0
    assert run.final is not None
    assert run.final.step == 12


def test_a_run_that_only_evaluated_its_start_has_no_final(tmp_path: Path) -> None:
    folder = RunDir.create(tmp_path / "run", {})
    folder.write_rows("eval", 0, graded_rows([[1.0]]))
    folder.finish({"step": 0, "seconds": 1.0})
    assert load_run(folder.path, "a", None).final is None


def test_an_evaluation_in_the_middle_of_a_run_is_no_result(tmp_path: Path) -> None:
    folder = RunDir.create(tmp_path / "run", {})
    folder.write_rows("eval", 10, graded_rows([[1.0]]))
    assert load_run(folder.path, "a", None).final is None
    folder.finish({"step": 10, "seconds": 1.0})
    assert load_run(folder.path, "a", None).final is not None


def test_a_series_keeps_the_steps_that_logged_every_key(tmp_path: Path) -> None:
    folder = RunDir.create(tmp_path / "run", {})
    folder.log(1, {"loss/total": 0.5, "exposure/ratio": 1.0})
    folder.log(2, {"loss/total": 0.25})
    folder.log(3, {"loss/total": 0.125, "exposure/ratio": 0.5})
    run = load_run(folder.path, "a", None)
    assert run.series("loss/total", "exposure/ratio").tolist() == [[1, 0.5, 1.0], [3, 0.125, 0.5]]
    assert run.series("no/such").shape == (0, 2)


def test_a_comparison_names_what_is_missing(tmp_path: Path) -> None:
    folder = write_compare(tmp_path / "cmp", arms=("full", "half"), steps=6, problems=4)
    (folder / "half" / "seed_2" / "result.json").unlink()
    about = json.loads((folder / "compare.json").read_text())
    (folder / "compare.json").write_text(json.dumps(about | {"seeds": [1, 2, 3]}))
    study = load_study([folder])
    assert study.missing == ("full, seed 3: not started", "half, seed 2: not finished", "half, seed 3: not started")
    assert [run.label for run in study.runs] == ["full, seed 1", "full, seed 2", "half, seed 1", "half, seed 2"]


def test_runs_named_together_are_arms_of_their_own_with_distinct_names(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / parent / "run", steps=6, problems=4).path for parent in ("a", "b")]
    compared = write_graded(tmp_path / "c", {"full": {1: [[1.0] * 4]}})
    study = load_study([*paths, compared])
    assert [arm.name for arm in study.arms] == ["run", "run (2)", "c/full"]
    assert study.arms[1].runs[0].label == "run (2)"
    assert not study.is_comparison
    assert study.missing == ()
    (paths[0] / "result.json").unlink()
    (compared / "full" / "seed_1" / "result.json").unlink()
    assert load_study([*paths, compared]).missing == ("run: not finished", "full, seed 1: not finished")


def test_runs_with_different_numbers_of_samples_are_not_reported_as_one_average(tmp_path: Path) -> None:
    twice, four = (write_run(tmp_path / f"k{k}", steps=6, problems=4, k=k).path for k in (2, 4))
    with pytest.raises(UserError, match=r"samples a problem \(k2 has 2, k4 has 4\).*report them apart"):
        load_study([twice, four])
    empty = write_run(tmp_path / "empty", steps=6, problems=4)
    for file in (empty.path / "eval").iterdir():
        file.unlink()
    assert load_study([empty.path, twice]).k == 2, "a run without evaluations has no k"


def test_a_path_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run directory"):
        load_study([tmp_path])
    with pytest.raises(UserError, match="at least one"):
        load_study([])


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=6, problems=4)
    (folder.path / "eval" / "step_000000.jsonl").write_text('{"problem_id": \n')
    with pytest.raises(UserError, match=r"eval/step_000000\.jsonl, line 1 is damaged"):
        load_study([folder.path])
