"""Reading, starting and judging the runs of a comparison."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from atesd.cli import jobs
from atesd.cli.jobs import Job, Runner, Tail, clear_stillborn, last_error
from atesd.cli.progress import make_console
from atesd.files import write_atomic
from atesd.runlog import RunDir


def line(step: int, **metrics: float) -> str:
    return json.dumps({"step": step, **metrics}) + "\n"


def test_tail_reads_each_complete_row_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    assert tail.rows() == []
    path.write_text(line(0) + line(1) + '{"step": 2')
    assert [row["step"] for row in tail.rows()] == [0, 1]
    with path.open("a") as file:
        file.write("}\n")
    assert [row["step"] for row in tail.rows()] == [2]
    assert tail.rows() == []


def test_tail_starts_again_when_a_resumed_run_rewrites_the_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    path.write_text(line(0) + line(1) + line(2))
    tail.rows()
    write_atomic(path, line(0) + line(1))
    assert [row["step"] for row in tail.rows()] == [0, 1]


@pytest.mark.parametrize("again", [1, 3, 9])
def test_tail_starts_again_when_a_resumed_run_rewinds_the_file(again: int, tmp_path: Path) -> None:
    """`RunDir.rewind` cuts the same file, which is then shorter than what was read, as long, or longer again."""
    run = RunDir(tmp_path)
    tail = Tail(run.metrics_path)
    run.log(0, {"loss/total": 1.0})
    seals = run.written()
    for step in (1, 2):
        run.log(step, {"loss/total": 0.12345})
    assert len(tail.rows()) == 3
    run.rewind(0, seals)
    for step in range(1, again):
        run.log(step, {"loss/total": 0.5})
    assert [row["step"] for row in tail.rows()] == list(range(again))
    run.log(again, {})
    assert [row["step"] for row in tail.rows()] == [again]


def test_tail_leaves_damaged_rows_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(line(0) + "\0\0\n[1]\n" + line(1))
    assert [row["step"] for row in Tail(path).rows()] == [0, 1]


def test_a_job_knows_its_share_and_its_latest_accuracy(tmp_path: Path) -> None:
    job = Job("half", 3, tmp_path, (), num_steps=8)
    (tmp_path / "metrics.jsonl").write_text(line(0, **{"eval/pico/avg@4": 0.25, "eval/pico/avg@4_low": 0.1}) + line(2))
    job.refresh()
    assert job.evaluated == 0.25
    assert job.share == 2 / 8
    (tmp_path / "result.json").touch()
    assert job.share == 1.0


@pytest.mark.parametrize("has_config", [True, False])
def test_launch_continues_a_run_that_exists_and_starts_any_other(
    has_config: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    class FakeProcess:
        def __init__(self, command: list[str], **options: Any) -> None:
            seen.update(options, command=command)

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    path = tmp_path / "half" / "seed_0"
    (path / "rollouts").mkdir(parents=True)
    (path / "env.json").touch()
    if has_config:
        (path / "config.json").touch()
    monkeypatch.setattr(subprocess, "Popen", FakeProcess)
    Job("half", 0, path, ("a.toml", "--out", str(path)), num_steps=1).launch(7)
    words = ["--resume", str(path)] if has_config else ["a.toml", "--out", str(path)]
    assert seen["command"] == [sys.executable, "-m", "atesd.cli.main", "train", *words]
    assert seen["env"]["OMP_NUM_THREADS"] == "1"
    assert seen["pass_fds"] == (7,), "the run holds the comparison's lock"
    assert path.exists() == has_config, "what was cut short while it was made is begun anew"


def test_only_a_stillborn_directory_is_cleared(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("precious")
    clear_stillborn(tmp_path / "run")
    assert (tmp_path / "run" / "notes.txt").read_text() == "precious"


def test_runs_finished_and_begun_before_count_neither_as_pace_nor_as_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(jobs, "monotonic", lambda: now[0])
    todo = [Job("half", seed, tmp_path / str(seed), (), num_steps=10) for seed in range(3)]
    for job in todo:
        job.path.mkdir()
    (todo[0].path / "result.json").touch()
    (todo[1].path / "metrics.jsonl").write_text(line(5))
    runner = Runner(todo, 1, 0, make_console())
    assert runner._left() == "?", "nothing was done yet"
    now[0] = 110.0
    with (todo[1].path / "metrics.jsonl").open("a") as file:
        file.write(line(9))
    todo[1].refresh()
    # 0.4 runs in 10 s; 0.1 + 1 runs are missing: 27.5 s, printed as a whole number.
    assert runner._left() == "28 s"


@pytest.mark.parametrize(("code", "failed"), [(130, ""), (-signal.SIGTERM, ""), (1, "no memory"), (-9, "no memory")])
def test_a_stop_excuses_only_runs_that_it_ended(code: int, failed: str, tmp_path: Path) -> None:
    job = Job("half", 0, tmp_path / "run", (), num_steps=1)
    job.log.write_text("error: no memory\n")
    runner = Runner([job], 1, 0, make_console())
    runner._num_asked = 1
    runner._collect(job, code)
    assert job.failed == failed
    job.failed = ""
    runner._num_asked = 0
    runner._collect(job, code)
    assert job.failed == "no memory", "nobody asked it to stop"


def test_a_stop_is_heard_unless_the_caller_ignores_it_and_runs_are_asked_to_save(tmp_path: Path) -> None:
    sent: list[int] = []
    job = Job("half", 0, tmp_path / "run", (), num_steps=1)
    job.process = cast("Any", SimpleNamespace(send_signal=sent.append))
    runner = Runner([job], 1, 0, make_console())
    runner._running.append(job)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with runner._stoppable():
            signal.raise_signal(signal.SIGHUP)
            assert not runner.was_stopped, "as under nohup"
            signal.raise_signal(signal.SIGTERM)
            assert runner.was_stopped
    finally:
        signal.signal(signal.SIGHUP, before)
    runner._pass_on()
    runner._pass_on()
    assert sent == [signal.SIGTERM], "once for each time that it was asked"


def test_the_last_error_of_a_log_is_found_under_notes_and_tracebacks(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("run directory x\nTraceback:\n  code\nValueError: shapes differ\ncontinue with: atesd ...\n\n")
    assert last_error(log) == "ValueError: shapes differ"
    log.write_text("warning: w\nerror: no such recipe\n")
    assert last_error(log) == "no such recipe"
    log.write_text("killed\n")
    assert last_error(log) == "killed"
    log.write_text("")
    assert last_error(log) == "no output"
