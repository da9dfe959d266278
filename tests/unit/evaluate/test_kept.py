"""Evaluations that are kept: stopped anywhere they end in the same numbers, and sample nothing twice."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from atesd.evaluate.kept import Progress, evaluate_kept, part_size
from atesd.evaluate.runner import Evaluation
from atesd.rewards.exact import exact_reward
from atesd.rollout.sampler import SamplingConfig
from atesd.runlog import RunDir
from atesd.seeds import derive_seed
from atesd.types import Problem, UserError

from support.rollouts import FakeSampler, fake_driver

PROBLEMS = [Problem(str(n), f"problem {n}", "", answer=str(n % 2)) for n in range(5)]
SAMPLING = SamplingConfig(group_size=2, max_new_tokens=10, batch_tokens=40)  # two problems a part
SETTINGS = {"temperature": 1.0, "group_size": 2}


class StopError(Exception):
    pass


def run(
    folder: Path,
    *,
    problems: Sequence[Problem] = PROBLEMS,
    settings: dict[str, Any] = SETTINGS,
    stop_at: int | None = None,
    shown: list[Progress] | None = None,
) -> tuple[Evaluation, FakeSampler]:
    driver, sampler = fake_driver(lambda prompt, place: f"#{place % 2}", exact_reward)

    def show(progress: Progress) -> None:
        if shown is not None:
            shown.append(progress)
        if progress.problems == stop_at:
            raise StopError

    result = evaluate_kept(folder, settings, "toy", problems, driver, SAMPLING, seed=7, traits=lambda *_: {}, show=show)
    return result, sampler


def test_all_rows_are_written_before_the_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Any] = []
    driver, _ = fake_driver(lambda prompt, place: f"#{place % 2}", exact_reward)
    monkeypatch.setattr("atesd.evaluate.kept.summarise", lambda task, tables: 1 / 0)
    how: dict[str, Any] = {"seed": 7, "traits": lambda *_: {}, "show": lambda _: None, "write": written.extend}
    with pytest.raises(ZeroDivisionError):
        evaluate_kept(tmp_path / "kept", SETTINGS, "toy", PROBLEMS, driver, SAMPLING, **how)
    assert [(row["problem_id"], row["sample"]) for row in written] == [(str(n), k) for n in range(5) for k in range(2)]


def test_a_stopped_evaluation_goes_on_and_ends_in_the_same_numbers(tmp_path: Path) -> None:
    whole, sampler = run(tmp_path / "whole")
    assert sampler.requests == [4, 4, 2]
    assert sampler.seeds == [derive_seed(7, "part", start) for start in (0, 2, 4)]
    with pytest.raises(StopError):
        run(tmp_path / "torn", stop_at=2)
    kept = tmp_path / "torn" / "samples" / "part_0000.jsonl"
    before = kept.stat().st_mtime_ns
    shown: list[Progress] = []
    again, sampler = run(tmp_path / "torn", shown=shown)
    assert sampler.requests == [4, 2], "the first part is not sampled again"
    assert kept.stat().st_mtime_ns == before
    assert again == whole
    assert [(each.problems, each.sampled) for each in shown] == [(2, 0), (4, 2), (5, 3)]
    assert {each.total for each in shown} == {5}
    assert [path.name for path in sorted((tmp_path / "torn" / "samples").iterdir())] == [
        path.name for path in sorted((tmp_path / "whole" / "samples").iterdir())
    ]
    assert json.loads((tmp_path / "torn" / "result.json").read_text()) == whole.metrics
    assert whole.metrics["eval/toy/avg@2"] == 0.5, "one of two replies is right"
    assert shown[-1].correct == 0.5


def test_a_finished_evaluation_is_read_alone(tmp_path: Path) -> None:
    whole, _ = run(tmp_path / "a")
    again, sampler = run(tmp_path / "a")
    assert (again, sampler.requests) == (whole, [])


def test_problems_without_a_grade_have_no_accuracy_so_far(tmp_path: Path) -> None:
    shown: list[Progress] = []
    with pytest.warns(UserWarning, match="no completion could be graded"):
        run(tmp_path / "a", problems=[Problem("a", "why", "", answer=None)], shown=shown)
    assert shown[0].correct is None


@pytest.mark.parametrize(
    ("batch_tokens", "k", "longest", "expected"),
    [
        (40, 2, 10, 2),
        (39, 2, 10, 1),
        (262_144, 12, 38_912, 1),  # less than one problem fits: one is a part nevertheless
        (262_144, 12, 2048, 10),  # 262144 / (12 * 2048) = 10.7
        (262_144, 1, 16, 16),
    ],
)
def test_a_part_is_what_one_call_of_the_engine_holds(batch_tokens: int, k: int, longest: int, expected: int) -> None:
    assert part_size(SamplingConfig(batch_tokens=batch_tokens, group_size=k, max_new_tokens=longest)) == expected


def test_results_of_other_settings_are_left_alone(tmp_path: Path) -> None:
    run(tmp_path / "a")
    with pytest.raises(UserError, match=r"another evaluation \(temperature = 1.0 there, 0.6 here\): choose another"):
        run(tmp_path / "a", settings={**SETTINGS, "temperature": 0.6})
    with pytest.raises(UserError, match=r"\(top_p = None there, 0.9 here\)") as held:
        run(tmp_path / "a", settings={**SETTINGS, "top_p": 0.9})
    run(tmp_path / "a")  # a refusal lets go of the folder, though whoever caught it still looks at it
    assert held.tb is not None
    with pytest.raises(UserError, match=r"\(group_size = 2 there, None here\)"):
        run(tmp_path / "a", settings={"temperature": 1.0})


def test_damage_and_other_files_are_named(tmp_path: Path) -> None:
    run(tmp_path / "a")
    part = tmp_path / "a" / "samples" / "part_0001.jsonl"
    part.write_text("".join(part.read_text().splitlines(keepends=True)[:3]))
    with pytest.raises(UserError, match=r"part_0001.jsonl is damaged \(3 samples where 4 belong\): delete it"):
        run(tmp_path / "a")
    (tmp_path / "a" / "settings.json").write_text("[")
    with pytest.raises(UserError, match=r"settings.json is damaged"):
        run(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine.txt").write_text("x")
    with pytest.raises(UserError, match="holds other files and is left as it is"):
        run(tmp_path / "b")
    with pytest.raises(UserError, match="'toy' has no evaluation problem"):
        run(tmp_path / "c", problems=[])


def test_only_one_process_writes(tmp_path: Path) -> None:
    run(tmp_path / "a")
    other = RunDir(tmp_path / "a")
    other.lock()
    with pytest.raises(UserError, match="another process is writing"):
        run(tmp_path / "a")
    other.unlock()
    run(tmp_path / "a")
