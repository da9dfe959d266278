from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from atesd.report.load import load_study
from atesd.report.rollouts import CHARACTERS, TOKENS, pack_rollouts, pack_row
from atesd.runlog import RunDir

from support.runs import rollout_rows, write_compare, write_run


def row() -> dict[str, object]:
    return dict(rollout_rows(5, 0.5, np.random.default_rng(0), hostile=False)[0])


def test_a_row_keeps_its_streams_in_a_fixed_order() -> None:
    given = row() | {
        "tokens": ["a", "b"],
        "divergence": [0.12345, 0.0],
        "student_logprob": [-1.0, -2.0],
        "teacher_logprob": [-3.0, -4.0],
        "student_entropy": [0.5, 0.25],
        "gate": [1.0, 0.0],
    }
    packed = pack_row(given)
    assert packed["streams"] == [[0.123, 0.0], [-1.0, -2.0], [-3.0, -4.0], [0.5, 0.25], [1.0, 0.0]]
    assert packed["hidden"] == 0


def test_long_completions_and_texts_are_cut_and_say_so() -> None:
    number = TOKENS + 25
    streams = dict.fromkeys(
        ("divergence", "student_logprob", "teacher_logprob", "student_entropy", "gate"), [0.0] * number
    )
    packed = pack_row(row() | streams | {"tokens": ["x"] * number, "hint": "h" * (CHARACTERS + 7)})
    assert (len(packed["tokens"]), packed["hidden"]) == (TOKENS, 25)
    assert {len(stream) for stream in packed["streams"]} == {TOKENS}
    assert packed["hint"].endswith("h ... (7 more characters)")


def test_a_completion_outside_every_loss_has_no_streams() -> None:
    given = {key: value for key, value in row().items() if key not in {"divergence", "gate"}}
    assert pack_row(given)["streams"] == []


def test_everything_is_shown_while_it_fits(tmp_path: Path) -> None:
    study = load_study([write_compare(tmp_path / "cmp", steps=8, problems=2)])
    packed = pack_rollouts(study)
    # 8 runs, files at steps 1, 2, 4, 6, 8 with 8 completions each
    assert packed["shown"] == packed["total"] == 8 * 5 * 8
    assert [run["label"] for run in packed["runs"]][:3] == ["full, seed 1", "full, seed 2", "half, seed 1"]
    assert [step["step"] for step in packed["runs"][0]["steps"]] == [1, 2, 4, 6, 8]


def test_a_small_budget_is_shared_between_runs(tmp_path: Path) -> None:
    study = load_study([write_compare(tmp_path / "cmp", steps=8, problems=2)])
    packed = pack_rollouts(study, budget=60_000)
    assert packed["total"] == 320
    assert len(json.dumps(packed["runs"], ensure_ascii=False)) < 66_000
    counts = [sum(len(step["rows"]) for step in run["steps"]) for run in packed["runs"]]
    assert len(counts) == 8
    assert sum(counts) == packed["shown"] < 320
    assert max(counts) - min(counts) <= 1
    assert all(run["steps"][-1]["step"] == 8 for run in packed["runs"])  # the last step comes first


def test_the_colour_scale_is_the_99th_percentile(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run", {})
    values = [float(n) for n in range(101)]  # 0..100: the 99th percentile is 99
    streams = {"divergence": values, "student_logprob": values, "teacher_logprob": values}
    streams |= {"student_entropy": values, "gate": values}
    run.write_rows("rollouts", 1, [row() | streams | {"tokens": ["t"] * 101}])
    assert pack_rollouts(load_study([run.path]))["scale"] == pytest.approx(99.0)


def test_a_run_without_completions_shows_none(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=4, problems=2)
    for file in (run.path / "rollouts").iterdir():
        file.unlink()
    assert pack_rollouts(load_study([run.path])) == {"runs": [], "shown": 0, "total": 0, "scale": 1.0}
