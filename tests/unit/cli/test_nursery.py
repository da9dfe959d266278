"""Runs that are forked: what they are given, how they end, in which order they start, and what a stop does to them.

The nursery of these tests loads nothing, and its runs are programs of a line or two; the real one is in tests/smoke.
"""

from __future__ import annotations

import fcntl
import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from atesd.cli import compare, jobs, nursery
from atesd.cli.compare import make_plan, prepared, room, run_plan
from atesd.cli.jobs import Job, Runner
from atesd.cli.nursery import Forked, Nursery

PICO = Path(__file__).parents[3] / "recipes" / "pico.toml"
TOY = (
    "import socket, sys\nfrom atesd.cli.nursery import serve\n"
    "words = serve(socket.socket(fileno=int(sys.argv[1])))\n"
    "if words is not None:\n    exec(words[0])"
)
SAVES = (
    "import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(130))\n"
    "open({!r}, 'w')\ntime.sleep(600)"
)


def until(true: Callable[[], Any]) -> None:
    """Wait for something."""
    deadline = time.monotonic() + 300
    while not true():
        assert time.monotonic() < deadline, "never came true"
        time.sleep(0.01)


@pytest.fixture
def toy() -> Iterator[Nursery]:
    made = Nursery([sys.executable, "-c", TOY])
    yield made
    made.close()


def start(toy: Nursery, code: str, log: Path) -> Forked:
    """Fork a run; its lock is the log, too."""
    with log.open("ab") as file:
        run = toy.fork([code], file.fileno(), file.fileno())
    assert run is not None
    return run


def end(run: Forked) -> int | None:
    until(lambda: run.poll() is not None)
    return run.returncode


def test_a_run_has_its_log_no_input_one_thread_and_a_session_of_its_own(toy: Nursery, tmp_path: Path) -> None:
    code = (
        "import os, sys\nprint(sys.stdin.read() == '', os.getsid(0) == os.getpid(), os.environ['OMP_NUM_THREADS'])\n"
        "print('to stderr', file=sys.stderr)"
    )
    assert end(start(toy, code, tmp_path / "log")) == 0
    assert sorted((tmp_path / "log").read_text().splitlines()) == ["True True 1", "to stderr"]


@pytest.mark.parametrize(
    ("code", "ends"),
    [
        ("", 0),
        ("import sys; sys.exit(3)", 3),
        ("raise ValueError('shapes differ')", 1),
        ("import os; os.kill(os.getpid(), 15)", -15),
    ],
)
def test_a_run_ends_as_a_process_of_its_own_would(code: str, ends: int, toy: Nursery, tmp_path: Path) -> None:
    assert end(start(toy, code, tmp_path / "log")) == ends
    assert end(start(toy, "", tmp_path / "log")) == 0, "and the next one starts as if nothing had been"
    if ends == 1:
        assert jobs.last_error(tmp_path / "log") == "ValueError: shapes differ"


def test_a_signal_sent_at_once_reaches_the_run(toy: Nursery, tmp_path: Path) -> None:
    """Before the comparison has heard of the fork."""
    run = start(toy, "import time; time.sleep(600)", tmp_path / "log")
    other = start(toy, "import time; time.sleep(.3)", tmp_path / "other")
    run.send_signal(signal.SIGTERM)
    assert end(run) == -signal.SIGTERM
    assert end(other) == 0, "one run's signal is not another's"
    run.send_signal(signal.SIGTERM)
    assert end(start(toy, "", tmp_path / "log")) == 0, "a signal to what has ended harms nobody"


def is_free(path: Path) -> bool:
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def test_a_run_holds_the_lock_as_long_as_it_lives_and_outlives_the_nursery(toy: Nursery, tmp_path: Path) -> None:
    lock, begun, over = tmp_path / "lock", tmp_path / "begun", tmp_path / "over"
    code = f"import os, time\nopen({str(begun)!r}, 'w')\nwhile not os.path.exists({str(over)!r}): time.sleep(.01)"
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        run = toy.fork([code], os.open(os.devnull, os.O_WRONLY), file.fileno())
        assert run is not None
        until(lambda: begun.exists() and run.poll() is None and run.pid)
    toy.close()
    assert run.poll() is None
    assert not is_free(lock), "the comparison and the nursery are gone, the run is not"
    over.touch()
    assert end(run) == -signal.SIGKILL, "nobody is left who knows how it ended"
    until(lambda: is_free(lock))


def test_a_nursery_lets_go_of_the_lock(toy: Nursery, tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        run = toy.fork([""], os.open(os.devnull, os.O_WRONLY), file.fileno())
        assert run is not None
        end(run)
    assert is_free(lock)


def test_no_run_is_forked_by_a_nursery_that_is_gone(tmp_path: Path) -> None:
    broken = Nursery([sys.executable, "-c", "raise ImportError('torch')"])
    until(lambda: not broken.is_loading)
    assert broken.fork([""], 0, 0) is None
    broken.close()


class Toys:
    """Jobs of a line of code each, under a runner; the order of their starts and the most that ran at once."""

    def __init__(self, folder: Path, codes: dict[str, str]) -> None:
        self.out = io.StringIO()
        self.started: list[str] = []
        self.most = 0
        self.jobs = [ToyJob(arm, 0, folder / arm / "seed_0", (code,), num_steps=1) for arm, code in codes.items()]
        for job in self.jobs:
            job.toys = self

    def run(self, toy: Nursery, at_once: int) -> Runner:
        runner = Runner(self.jobs, at_once, 2, Console(file=self.out, width=200), toy)
        runner.run()
        return runner


class ToyJob(Job):
    toys: Toys

    def launch(self, lock: int, nursery: Nursery | None = None) -> None:
        super().launch(lock, nursery)
        assert isinstance(self.process, Forked)
        self.toys.started.append(self.arm)
        going = [job for job in self.toys.jobs if job.process is not None and job.process.returncode is None]
        self.toys.most = max(self.toys.most, len(going))


def done(folder: Path, arm: str, seconds: float = 0.0) -> str:
    """Return the code of a run that completes."""
    return f"import time\ntime.sleep({seconds})\nimport os\nos.makedirs({str(folder / arm / 'seed_0')!r})\n" + (
        f"open({str(folder / arm / 'seed_0' / 'result.json')!r}, 'w')"
    )


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "_POLL_S", 0.02)


def meets(folder: Path, number: int) -> str:
    """Return the code of what goes no further until so many runs have begun."""
    return (
        f"import os, time\nopen(os.path.join({str(folder)!r}, str(os.getpid())), 'w')\n"
        f"while len(os.listdir({str(folder)!r})) < {number}: time.sleep(.01)\n"
    )


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_runs_start_in_order_a_few_at_a_time_and_a_failing_one_stops_no_other(
    at_once: int, toy: Nursery, tmp_path: Path
) -> None:
    (tmp_path / "begun").mkdir()
    codes = {arm: done(tmp_path, arm, 0.1) for arm in "abde"}
    codes = {"a": codes["a"], "x": "raise ValueError('not this one')", **codes}
    toys = Toys(tmp_path, {arm: meets(tmp_path / "begun", at_once) + code for arm, code in codes.items()})
    runner = toys.run(toy, at_once)
    assert toys.started == ["a", "x", "b", "d", "e"]
    assert toys.most == at_once
    assert [(job.arm, job.failed) for job in runner.failures] == [("x", "ValueError: not this one")]
    assert "x seed 0 failed: ValueError: not this one (log: " in toys.out.getvalue()
    assert toys.out.getvalue().count(" done (") == 4


@pytest.mark.parametrize("known", [True, False])
def test_the_arms_of_a_further_seed_start_longest_first(known: bool, toy: Nursery, tmp_path: Path) -> None:
    """By what they took with the seeds before; arms that have not ended yet come before all others."""
    seconds = {"a": 0.05, "b": 0.5, "c": 0.25}
    toys = Toys(tmp_path, {arm: done(tmp_path, arm, seconds[arm]) for arm in "abc"})
    code = {seed: done(tmp_path, "{arm}", 0.0).replace("seed_0", f"seed_{seed}") for seed in (1, 2)}
    toys.jobs += [
        ToyJob(arm, seed, tmp_path / arm / f"seed_{seed}", (code[seed].replace("{arm}", arm),), num_steps=1)
        for seed in (1, 2)
        for arm in ("abc" if known else "abcd")
    ]
    for job in toys.jobs:
        job.toys = toys
    toys.run(toy, 1)
    assert toys.started[:6] == (["a", "b", "c", "b", "c", "a"] if known else ["a", "b", "c", "d", "b", "c"])
    assert sorted(toys.started[-3:]) == ["a", "b", "c"] or not known
    assert all(job.is_done for job in toys.jobs)


def test_runs_that_end_together_are_counted_one_by_one(
    toy: Nursery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "_POLL_S", 0.5)
    toys = Toys(tmp_path, {arm: done(tmp_path, arm) for arm in "ab"})
    toys.run(toy, 2)
    assert [f"({count} of 2 runs)" in toys.out.getvalue() for count in (1, 2)] == [True, True]


def test_ctrl_c_stops_what_runs_and_starts_nothing_more(toy: Nursery, tmp_path: Path) -> None:
    begun = [tmp_path / f"{name} begun" for name in "ab"]
    toys = Toys(tmp_path, {name: SAVES.format(str(tmp_path / f"{name} begun")) for name in "abc"})

    def press() -> None:
        until(lambda: all(path.exists() for path in begun))
        os.kill(os.getpid(), signal.SIGINT)

    pressing = threading.Thread(target=press)
    pressing.start()
    runner = toys.run(toy, 2)
    pressing.join()
    assert runner.was_stopped
    assert toys.started == ["a", "b"]
    assert [job.process and job.process.returncode for job in toys.jobs] == [130, 130, None]
    assert not runner.failures, "saved, to be continued"
    assert "stopping: 2 runs end their step and save" in toys.out.getvalue()


def test_nothing_starts_while_the_nursery_loads_and_a_stop_is_heard_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Nursery([sys.executable, "-c", "import time; time.sleep(60)"])
    toys = Toys(tmp_path, {"a": ""})
    waits: list[float] = []

    def press(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(jobs, "sleep", press)
    try:
        assert toys.run(slow, 1).was_stopped
    finally:
        slow.close()
    assert toys.started == []
    assert len(waits) == 3


def test_runs_start_from_nothing_where_the_nursery_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Nursery([sys.executable, "-c", "raise ImportError('torch')"])
    until(lambda: not broken.is_loading)
    seen: list[list[str]] = []
    monkeypatch.setattr(subprocess, "Popen", lambda command, **_: seen.append(command))
    Job("half", 0, tmp_path / "half" / "seed_0", ("a.toml",), num_steps=1).launch(0, broken)
    monkeypatch.undo()
    broken.close()
    assert seen == [[sys.executable, "-m", "atesd.cli.main", "train", "a.toml"]]


def test_what_is_loaded_is_not_forked_beside_other_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(nursery, "import_module", asked.append)
    monkeypatch.setattr("atesd.train.model.preload", lambda: asked.append("models"))
    monkeypatch.setattr(nursery.gc, "freeze", lambda: None)
    over = threading.Event()
    other = threading.Thread(target=over.wait)
    other.start()
    assert not nursery._load()
    over.set()
    other.join()
    assert asked == ["atesd.cli.train", "atesd.recipe", "atesd.trainers", "models"]


@pytest.mark.parametrize(("cores", "threads", "runs"), [(2, 1, 2), (8, 3, 2), (8, 8, 1), (4, 6, 1)])
def test_as_many_runs_as_have_cores_of_their_own(
    cores: int, threads: int, runs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    assert room(threads) == runs


@pytest.mark.parametrize(("given", "used"), [("threads=0", 1), ("threads=1", 1), ("threads=2", 2)])
def test_a_run_has_the_recipes_threads_or_one_whatever_runs_beside(given: str, used: int, tmp_path: Path) -> None:
    plan = make_plan(PICO, [given], ["full", "half"], range(1))
    for job in plan.jobs(tmp_path):
        assert [word for word in job.train if word.startswith("threads=")][-1] == f"threads={used}"


@pytest.mark.parametrize(
    ("accelerator", "asked", "at_once", "forks"),
    [(False, 0, 3, True), (False, 2, 2, True), (True, 0, 1, False), (True, 2, 2, False)],
)
def test_one_run_a_core_or_one_on_an_accelerator_where_nothing_is_forked(
    accelerator: bool, asked: int, at_once: int, forks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    class FakeRunner:
        was_stopped = False

        def __init__(self, jobs: list[Job], at_once: int, lock: int, console: Console, nursery: object) -> None:
            seen.extend([at_once, nursery])
            self.failures = jobs

        def run(self) -> None:
            pass

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    monkeypatch.setattr("atesd.train.model.has_accelerator", lambda: accelerator)
    monkeypatch.setattr(compare, "Runner", FakeRunner)
    a_nursery: Any = object()
    with pytest.raises(SystemExit):
        run_plan(make_plan(PICO, [], ["full", "half"], range(2)), tmp_path / "out", asked, a_nursery)
    assert seen == [at_once, a_nursery if forks else None]


def test_there_is_a_nursery_on_linux_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with prepared() as nothing:
        assert nothing is None
