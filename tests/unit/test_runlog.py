"""The run directory: what it refuses, what it writes, and what it forgets."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
from collections.abc import Iterator
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest

from atesd import runlog
from atesd.files import dump_json, read_jsonl, write_atomic
from atesd.metrics import METRICS, is_timing
from atesd.provenance import environment
from atesd.runlog import Phases, ReadRunDir, RunDir
from atesd.seals import seal
from atesd.types import UserError


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir.create(tmp_path / "run", {"seed": 3})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_new_run_has_its_config_its_environment_and_its_folders(run: RunDir) -> None:
    assert names(run.path) == [
        ".lock",
        "about.json",
        "checkpoints",
        "config.json",
        "env.json",
        "eval",
        "manifest.json",
        "rollouts",
    ]
    assert RunDir.open(run.path).config() == {"seed": 3}
    environment = json.loads((run.path / "env.json").read_text())
    assert {"torch", "transformers", "numpy"} <= set(environment["packages"])
    assert re.fullmatch(r"[0-9a-f]{40}|", environment["commit"])


@pytest.mark.parametrize("tracked", [True, False])
def test_a_commit_is_that_of_the_packages_own_checkout(
    tracked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not of a repository around an environment that the package is installed in."""
    package = tmp_path / "env" / "provenance.py"
    package.parent.mkdir()
    package.write_text("")
    (tmp_path / "own.txt").write_text("")
    me = ("-c", "user.name=a", "-c", "user.email=a@b")
    for command in (["init"], ["add", "." if tracked else "own.txt"], [*me, "commit", "-m", "x"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True, capture_output=True)
    head = subprocess.run(["git", "-C", str(tmp_path), "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    monkeypatch.setattr("atesd.provenance.__file__", str(package))
    found = environment()
    assert found["commit"] == (head.stdout.strip() if tracked else "")
    (tmp_path / "own.txt").write_text("changed")
    assert environment()["changed_files"] == (["M own.txt"] if tracked else [])


def test_a_run_says_what_it_is_in_words(run: RunDir, tmp_path: Path) -> None:
    assert run.about() == {"format": 2}
    about = {"format": 2, "exposure": "nothing: λ", "controls": ["A. b"], "distils": False, "reinforces": True}
    RunDir.create(tmp_path / "other", {}, about)
    assert RunDir.open(tmp_path / "other").about() == about
    assert json.loads((tmp_path / "other" / "about.json").read_text(encoding="utf-8")) == about


def test_a_run_directory_of_version_1_says_nothing_of_itself(run: RunDir) -> None:
    (run.path / "about.json").unlink()
    assert RunDir.open(run.path).about() == {}
    assert RunDir.open(run.path).config() == {"seed": 3}


def test_a_folder_that_is_not_empty_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("precious")
    with pytest.raises(UserError, match=f"{tmp_path} already exists and is not empty: continue it with --resume"):
        RunDir.create(tmp_path, {})
    assert names(tmp_path) == ["notes.txt"]


def test_an_empty_folder_may_become_a_run(tmp_path: Path) -> None:
    assert RunDir.create(tmp_path, {"seed": 1}).config() == {"seed": 1}


def test_a_folder_without_a_config_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')
    with pytest.raises(UserError, match=f"{tmp_path} is not a run directory: it has no config.json"):
        RunDir.open(tmp_path)


def test_numbers_that_are_not_finite_are_left_out_of_the_log(run: RunDir) -> None:
    run.log(0, {"loss/total": 0.5, "loss/nll": nan, "divergence/p99": inf, "optim/lr": -inf})
    run.log(1, {"loss/total": nan})
    assert run.metrics_path.read_text() == '{"step": 0, "loss/total": 0.5}\n{"step": 1}\n'
    assert run.metrics() == [{"step": 0, "loss/total": 0.5}, {"step": 1}]


def test_a_config_with_a_number_that_json_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        dump_json({"lr": nan})


@pytest.mark.parametrize("torn", ['{"step": 2, "loss/to', '{"step": 2}', "\n", ""])
def test_a_torn_last_line_is_left_out(torn: str, tmp_path: Path) -> None:
    """Even one that happens to be whole: its writer had not come to the line's end."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n' + torn)
    assert list(read_jsonl(path)) == [{"step": 0}, {"step": 1}]


def test_a_damaged_line_before_the_last_is_not_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0\n{"step": 1}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl, line 1 is damaged .*: restore it from a copy"):
        list(read_jsonl(path))


def test_a_missing_file_has_no_rows(tmp_path: Path) -> None:
    assert list(read_jsonl(tmp_path / "metrics.jsonl")) == []


def test_rows_come_back_as_they_were_written(run: RunDir) -> None:
    rows: list[dict[str, Any]] = [
        {"completion": 'a\r\n\t"\\b\x0c', "reward": None},
        {"completion": "½ 数 🙂", "reward": 1.0},
    ]
    path = run.write_rows("eval", 42, iter(rows))
    assert path == run.path / "eval" / "step_000042.jsonl"
    assert list(read_jsonl(path)) == rows
    run.write_rows("eval", 42, rows[:1])
    assert list(read_jsonl(path)) == rows[:1]


def test_rewind_forgets_what_came_after_the_seals(run: RunDir) -> None:
    for step in range(12):
        run.log(step, {"loss/total": step / 10})
        run.log_groups(step, [{"problem_id": "a"}])
        run.write_rows("rollouts", step, [{"step": step}])
        run.write_rows("eval", step, [{"step": step}])
        if step == 9:
            seals = run.written()
    assert run.written_flaw(seals) is None, "what came after does not matter"
    run.rewind(9, seals)
    assert run.metrics() == [{"step": step, "loss/total": step / 10} for step in range(10)]
    assert [row["step"] for row in run.groups()] == list(range(10))
    kept = [f"step_{step:06d}.jsonl" for step in range(10)]
    assert names(run.path / "rollouts") == names(run.path / "eval") == kept


def test_files_that_have_not_changed_are_read_once_for_their_seals(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run of ten thousand steps would else read all it has written whenever it saves."""
    read: list[str] = []
    monkeypatch.setattr(runlog, "seal", lambda path: read.append(path.name) or seal(path))
    for step in (1, 2):
        run.log(step, {"loss/total": 0.5})
        run.write_rows("eval", step, [{"step": step}])
        first = run.written()
    assert read == ["metrics.jsonl", "step_000001.jsonl", "metrics.jsonl", "step_000002.jsonl"]
    run.write_rows("eval", 1, [{"step": 7}])
    second = run.written()
    assert read[4:] == ["step_000001.jsonl"]
    assert second == first | {"eval/step_000001.jsonl": seal(run.path / "eval" / "step_000001.jsonl")}
    assert second != first


def test_logs_are_on_disk_before_a_checkpoint_remembers_them(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a machine that crashes keeps the checkpoint, and not the lines without which it is not believed."""
    run.log(1, {"loss/total": 0.5})
    run.log_groups(1, [{"problem_id": "a"}])
    settled: set[int] = set()
    monkeypatch.setattr("os.fsync", lambda file: settled.add(os.fstat(file).st_ino))
    run.written()
    assert settled == {path.stat().st_ino for path in (run.metrics_path, run.groups_path)}


def test_a_process_that_only_reads_seals_nothing(run: RunDir) -> None:
    run.log(1, {"loss/total": 0.5})
    reader = ReadRunDir(run.path)
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    assert reader.written() == {}
    reader.lock()
    reader.seal("config.json")
    reader.remember(sampling="another")
    reader.amend({"seed": 9}, [("seed", 3, 9)])
    reader.log(2, {"loss/total": 0.25})
    reader.log_groups(2, [{"problem_id": "a"}])
    reader.rewind(0, {})
    reader.write_rows("eval", 2, [])
    reader.finish({"step": 2})
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before


def test_rewind_mends_a_torn_line_before_the_next_is_appended(run: RunDir) -> None:
    run.log(0, {})
    run.log(1, {})
    seals = run.written()
    with run.metrics_path.open("a") as file:
        file.write('{"step": 2, "lo')
    run.rewind(1, seals)
    run.log(2, {"loss/total": 0.5})
    assert run.metrics() == [{"step": 0}, {"step": 1}, {"step": 2, "loss/total": 0.5}]


def test_rewind_to_before_the_first_step_leaves_strangers_files_alone(run: RunDir) -> None:
    run.log(0, {})
    stray = run.path / "rollouts" / "step_of_mine.jsonl"
    stray.write_text("mine")
    run.rewind(-1, {})
    assert run.metrics() == []
    assert stray.read_text() == "mine"


@pytest.mark.parametrize(
    ("damage", "flaw"),
    [
        (
            lambda path: path.write_bytes(path.read_bytes().replace(b"0", b"7", 1)),
            "metrics.jsonl is not what was written",
        ),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "metrics.jsonl has 23 bytes instead of 24"),
        (lambda path: path.unlink(), "metrics.jsonl is missing"),
    ],
)
def test_logs_that_do_not_begin_as_they_did_are_told(run: RunDir, damage: Any, flaw: str) -> None:
    run.log(0, {})
    run.log(1, {})
    seals = run.written()
    assert seals["metrics.jsonl"]["size"] == 24
    damage(run.metrics_path)
    assert run.written_flaw(seals) == flaw


def test_one_writer_a_run(run: RunDir) -> None:
    """The fixture holds the lock, and may ask for it again; a second holder is refused until it lets go."""
    run.lock()
    other = RunDir.open(run.path)
    with pytest.raises(UserError, match=f"another process is writing {run.path}: wait for it, or stop it first"):
        other.lock()
    run.unlock()
    other.lock()
    other.unlock()


@pytest.mark.parametrize("name", ["checkpoints", "best", "final", "metrics.jsonl"])
def test_nothing_is_written_through_a_link(run: RunDir, tmp_path: Path, name: str) -> None:
    run.unlock()
    place = run.path / name
    if place.is_dir():
        place.rmdir()
    place.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=f"{name} is a link and is not written through"):
        RunDir.open(run.path).lock()


def test_a_run_that_cannot_be_written_is_copied_to_be_continued(run: RunDir) -> None:
    run.unlock()
    (run.path / ".lock").unlink()
    (run.path / ".lock").mkdir()
    with pytest.raises(UserError, match=r"cannot be written: \.lock: Is a directory; .* or copy the folder to where"):
        RunDir.open(run.path).lock()


def test_a_start_that_came_to_no_step_may_be_repeated(run: RunDir) -> None:
    run.unlock()
    again = RunDir.create(run.path, {"seed": 4})
    assert again.config() == {"seed": 4}
    assert again.flaw("config.json") is None
    again.log(0, {})
    again.unlock()
    with pytest.raises(UserError, match="already exists and is not empty"):
        RunDir.check_free(run.path)


def test_a_place_that_is_no_folder_is_left_alone(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path)
    for name in ("pipe", "link"):
        with pytest.raises(UserError, match=f"{name} is no folder and is left as it is"):
            RunDir.check_free(tmp_path / name)
        with pytest.raises(UserError, match=f"{name} is no ordinary file and is left as it is"):
            write_atomic(tmp_path / name, "text")


def test_sealed_files_prove_themselves(run: RunDir) -> None:
    assert run.flaw("config.json", "about.json", "env.json") is None
    (run.path / "config.json").write_text('{"seed": 4}')
    assert run.flaw("about.json") is None
    assert "config.json has" in (run.flaw("config.json") or "")
    (run.path / "manifest.json").write_text('{"files": {"a": 3}}')
    assert run.flaw("about.json") == "manifest.json is missing or damaged"


def test_every_change_under_way_is_remembered(run: RunDir) -> None:
    run.amend({"seed": 3, "threads": 2}, [("threads", 1, 2)])
    run.amend({"seed": 3, "threads": 4}, [("threads", 2, 4), ("save.keep", 1, 2)])
    assert run.env()["amended"] == [
        {"key": "threads", "from": 1, "to": 2},
        {"key": "threads", "from": 2, "to": 4},
        {"key": "save.keep", "from": 1, "to": 2},
    ]


def test_a_file_that_was_removed_is_sealed_no_more(run: RunDir) -> None:
    run.log(1, {})
    run.seal("metrics.jsonl")
    run.metrics_path.unlink()
    assert run.flaw("metrics.jsonl") == "metrics.jsonl is missing"
    run.seal("about.json")
    assert run.flaw("metrics.jsonl", "about.json") is None


@pytest.mark.parametrize("content", [b"[]", b"\xff", b'{"a": ', b""])
def test_a_damaged_json_file_is_named(run: RunDir, content: bytes) -> None:
    (run.path / "result.json").write_bytes(content)
    with pytest.raises(UserError, match=r"result.json is damaged \(.*\): restore it from a copy"):
        run.result()


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "result.json"
    write_atomic(path, "old")
    seen: list[str] = []

    def full_disk(number: int) -> None:
        seen.extend(names(tmp_path))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, "new")
    assert len(seen) == 2, "the failure must come after the partial file was made"
    assert names(tmp_path) == ["result.json"]
    assert path.read_text() == "old"


def test_rows_that_cannot_be_written_leave_the_old_ones(run: RunDir) -> None:
    run.write_rows("eval", 1, [{"reward": 1.0}])

    def rows() -> Iterator[dict[str, Any]]:
        yield {"reward": 0.0}
        yield {"reward": nan}

    with pytest.raises(ValueError, match="not JSON compliant"):
        run.write_rows("eval", 1, rows())
    assert names(run.path / "eval") == ["step_000001.jsonl"]
    assert list(read_jsonl(run.path / "eval" / "step_000001.jsonl")) == [{"reward": 1.0}]


def test_a_run_is_complete_once_it_has_a_result(run: RunDir) -> None:
    assert run.result() is None
    run.finish({"step": 12, "best": {"step": 5}})
    assert RunDir.open(run.path).result() == {"step": 12, "best": {"step": 5}}


def test_only_seconds_and_memory_differ_between_two_runs() -> None:
    assert {key for key in METRICS if is_timing(key)} == {
        "time/{}_s",
        "time/ahead_s",
        "time/tokens_per_s",
        "memory/peak_mib",
    }
    assert is_timing("time/sample_s")
    assert not is_timing("reward/timeouts")
    assert not is_timing("measure/time/x")


def test_phases_add_up_and_start_again(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([1.0, 3.0, 10.0, 14.5, 20.0, 20.25, 30.0, 37.0])
    monkeypatch.setattr(runlog, "perf_counter", lambda: next(clock))
    phases = Phases()
    for name in ("sample", "step", "sample"):
        with phases.phase(name):
            pass
    assert phases.take() == {"time/sample_s": 2.25, "time/step_s": 4.5}
    assert phases.take() == {}

    def fail() -> None:
        with phases.phase("step"):
            raise UserError("stop")

    with pytest.raises(UserError):
        fail()
    assert phases.take() == {"time/step_s": 7.0}, "a phase that fails has taken its time"


def test_a_disk_that_fills_under_a_file_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors of writing name no file by themselves."""

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        write_atomic(tmp_path / "result.json", "text")
    assert caught.value.filename == str(tmp_path / "result.json")


class Killed(BaseException):
    """The process ends at once."""


def killed_at(place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the process end before the file of a place is replaced, its partial one left."""
    calls = iter(range(100))
    original = runlog.write_atomic

    def write(path: Path, text: str) -> None:
        if next(calls) == place:
            path.with_name(f".{path.name}.123.partial").write_text(text)
            raise Killed
        original(path, text)

    monkeypatch.setattr(runlog, "write_atomic", write)


@pytest.mark.parametrize("place", range(5))  # manifest, env, about, config, manifest
def test_a_start_that_is_killed_in_between_is_begun_anew_or_whole(
    place: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed_at(place, monkeypatch)
    with pytest.raises(Killed):
        RunDir.create(tmp_path / "run", {"seed": 4}, {"exposure": "x"})
    monkeypatch.undo()
    if (tmp_path / "run" / "config.json").is_file():
        assert RunDir.open(tmp_path / "run").flaw("config.json", "about.json", "env.json") is None
    again = RunDir.create(tmp_path / "run", {"seed": 5}, {"exposure": "another"})
    assert again.config() == {"seed": 5}
    assert again.flaw("config.json", "about.json", "env.json") is None


@pytest.mark.parametrize("place", range(4))  # manifest, env, config, manifest
def test_a_change_that_is_killed_in_between_leaves_a_whole_run(
    place: int, run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.finish({"step": 1})
    before = run.config()
    killed_at(place, monkeypatch)
    with pytest.raises(Killed):
        run.amend({**before, "seed": 5}, [("seed", 3, 5)])
    monkeypatch.undo()
    sealed = ("config.json", "about.json", "env.json", "result.json")
    assert run.flaw(*sealed) is None
    run.amend({**before, "seed": 6}, [("seed", 3, 6)])
    assert run.config() == {**before, "seed": 6}
    assert run.flaw(*sealed) is None
    assert "was" not in (run.path / "manifest.json").read_text()
    (run.path / "config.json").write_text(dump_json(before))
    assert run.result() is None, "a run that goes on is not complete"
    assert run.flaw("config.json") is not None, "once the change is made, what was before is no longer the run's"


def test_what_the_run_began_with_is_remembered_whole(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    killed_at(2, monkeypatch)  # env.json is there, its last seal is not
    with pytest.raises(Killed):
        run.remember(parts={"a": "b"})
    assert run.flaw("env.json") is None
    assert run.env()["parts"] == {"a": "b"}
