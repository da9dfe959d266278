"""Runs of a comparison as processes: a few at a time, shown live, stopped together, continued later."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from time import monotonic, sleep
from types import FrameType
from typing import Any, BinaryIO

from rich.console import Console
from rich.live import Live
from rich.table import Table

from atesd.cli.nursery import Nursery, Process, spawn
from atesd.cli.progress import Pace, accuracy, clock, number
from atesd.signals import handled

_POLL_S = 0.1
_PLAIN_EVERY_S = 30.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# How a run ends after SIGTERM: with its state saved, or before it had anything to save.
_STOPPED = (130, -signal.SIGTERM)
_ERROR_LINE = re.compile(r"(error|[\w.]+(Error|Exception|Exit|Interrupt)):? ?(?P<message>.*)")


class Tail:
    """Reads what was appended to a JSON Lines file since the last call.

    It starts again when the file was replaced or rewound: another inode, a file shorter than what was read, or no whole
    row where the next one belongs. Damaged rows are left out: the run and the report say which they are.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inode = self._offset = 0

    def rows(self) -> list[dict[str, Any]]:
        """Return the complete new rows, all of them where it starts again."""
        try:
            file = self._path.open("rb")
        except FileNotFoundError:
            return []
        with file:
            found = os.fstat(file.fileno())
            if found.st_ino != self._inode or found.st_size < self._offset:
                self._inode, self._offset = found.st_ino, 0
            began = self._offset
            rows = self._read(file)
            if began and None in rows:
                self._offset = 0
                rows = self._read(file)
        return [row for row in rows if row is not None]

    def _read(self, file: BinaryIO) -> list[dict[str, Any] | None]:
        """Read the complete lines behind the offset, None for one that is no row."""
        file.seek(self._offset)
        *lines, rest = file.read().split(b"\n")
        self._offset = file.tell() - len(rest)
        return [_row(line) for line in lines]


@dataclass(slots=True)
class Job:
    """One run of the comparison."""

    arm: str
    seed: int
    path: Path
    train: tuple[str, ...]
    """The words behind `atesd train` that begin the run."""
    num_steps: int
    process: Process | None = None
    failed: str = ""
    last: dict[str, Any] = field(default_factory=dict)
    evaluated: float | None = None
    tail: Tail = field(init=False)
    pace: Pace = field(init=False)
    begun: float = 0.0

    def __post_init__(self) -> None:
        self.tail = Tail(self.path / "metrics.jsonl")
        self.pace = Pace(self.num_steps)

    @property
    def name(self) -> str:
        """The run as messages call it."""
        return f"{self.arm} seed {self.seed}"

    @property
    def log(self) -> Path:
        """The file with the run's console output."""
        return self.path.with_name(f"{self.path.name}.log")

    @property
    def is_done(self) -> bool:
        """Whether the run is complete."""
        return (self.path / "result.json").is_file()

    @property
    def share(self) -> float:
        """How much of the run is done, as far as it was read."""
        return 1.0 if self.is_done else float(self.last.get("step", 0)) / self.num_steps

    def refresh(self) -> None:
        """Read what was logged since the last call."""
        for row in self.tail.rows():
            self.last = row
            found = accuracy(row)
            self.evaluated = found[1] if found else self.evaluated
            if self.process is not None:
                self.pace.see(row["step"])

    def launch(self, lock: int, nursery: Nursery | None = None) -> None:
        """Start or continue the run in a process of its own, which holds the comparison's lock while it lives.

        The nursery forks it, if there is one.
        """
        words = ("--resume", str(self.path)) if (self.path / "config.json").is_file() else self.train
        if words is self.train:
            clear_stillborn(self.path)
        self.begun = monotonic()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            forked = nursery.fork(words, log.fileno(), lock) if nursery is not None else None
            self.process = forked or spawn(words, log.fileno(), lock)


class Runner:
    """Keeps a number of runs going until all are done or the user stops them."""

    def __init__(
        self, jobs: Sequence[Job], at_once: int, lock: int, console: Console, nursery: Nursery | None = None
    ) -> None:
        self._jobs = jobs
        self._at_once = at_once
        self._lock = lock
        self._console = console
        self._nursery = nursery
        self._running: list[Job] = []
        self._took: dict[str, float] = {}  # seconds of an arm's last run
        self._num_asked = self._num_passed_on = 0
        self._printed = self._begin = monotonic()
        for job in jobs:
            job.refresh()
        self._share_before = self._share

    @property
    def failures(self) -> list[Job]:
        """Return the runs that ended without a result."""
        return [job for job in self._jobs if job.failed]

    @property
    def was_stopped(self) -> bool:
        """Whether the user asked for an end."""
        return self._num_asked > 0

    def run(self) -> None:
        """Run everything that has no result yet."""
        waiting = [job for job in self._jobs if not job.is_done]
        with self._stoppable(), self._shown() as show:
            while self._running or (waiting and not self.was_stopped):
                while waiting and len(self._running) < self._at_once and not self.was_stopped and self._can_start:
                    job = self._next(waiting)
                    waiting.remove(job)
                    job.launch(self._lock, self._nursery)
                    self._running.append(job)
                sleep(_POLL_S)
                self._pass_on()
                for job in list(self._running):
                    job.refresh()
                    code = job.process.poll() if job.process is not None else None
                    if code is not None:
                        self._running.remove(job)
                        self._collect(job, code)
                show()

    def _next(self, waiting: Sequence[Job]) -> Job:
        """Return what to run next: all arms of a seed before the next seed, and of these the longest first.

        So that no core waits long for the last run. An arm that has not ended yet may be the longest of all.
        """
        arms = [job for job in waiting if job.seed == waiting[0].seed]
        return max(arms, key=lambda job: self._took.get(job.arm, inf))

    @property
    def _can_start(self) -> bool:
        return self._nursery is None or not self._nursery.is_loading

    def _collect(self, job: Job, code: int) -> None:
        """Say how a run ended."""
        if job.is_done:
            self._took[job.arm] = monotonic() - job.begun
            value = "" if job.evaluated is None else f", accuracy {job.evaluated:.3f}"
            finished = sum(other.is_done and other not in self._running for other in self._jobs)
            self._console.print(f"{job.name} done{value} ({finished} of {len(self._jobs)} runs)")
        elif not (self.was_stopped and code in _STOPPED):
            job.failed = last_error(job.log)
            self._console.print(f"{job.name} failed: {job.failed} (log: {job.log})")

    def _pass_on(self) -> None:
        """Pass a stop on to the runs; a second one makes them end without saving."""
        if self._num_asked == self._num_passed_on:
            return
        self._num_passed_on = self._num_asked
        for job in self._running:
            if job.process is not None:
                with suppress(ProcessLookupError):
                    job.process.send_signal(signal.SIGTERM)
        self._console.print(
            f"stopping: {len(self._running)} runs end their step and save; once more stops them at once"
        )

    @contextmanager
    def _stoppable(self) -> Iterator[None]:
        """Note signals that ask for an end; those that the caller ignores (nohup, background jobs) stay ignored."""

        def ask(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
            self._num_asked += 1

        heard = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        with handled(heard, ask):
            yield

    @contextmanager
    def _shown(self) -> Iterator[Callable[[], None]]:
        """Show one row a running run on a terminal, a line now and then elsewhere; yields the function to call."""
        if not self._console.is_terminal:
            yield self._print_line
            return
        with Live(get_renderable=self._table, console=self._console, refresh_per_second=2, transient=True):
            yield lambda: None

    def _print_line(self) -> None:
        if monotonic() - self._printed < _PLAIN_EVERY_S or not self._running:
            return
        self._printed = monotonic()
        steps = ", ".join(f"{job.name} step {job.last.get('step', 0)}/{job.num_steps}" for job in self._running)
        self._console.print(f"{steps}; all runs: {self._left()} left")

    def _table(self) -> Table:
        finished = sum(job.is_done for job in self._jobs)
        title = f"{finished} of {len(self._jobs)} runs done, {self._left()} left"
        table = Table(title=title, title_justify="left")
        for name in ("arm", "seed", "step", "loss", "exposure", "reward", "accuracy", "left"):
            table.add_column(name, justify="left" if name == "arm" else "right")
        for job in list(self._running):
            row = job.last
            values = [number(row.get(key)) for key in ("loss/total", "exposure/ratio", "reward/mean")]
            step = f"{row.get('step', 0)}/{job.num_steps}"
            table.add_row(job.arm, str(job.seed), step, *values, number(job.evaluated), job.pace.left())
        return table

    @property
    def _share(self) -> float:
        return sum(job.share for job in self._jobs)

    def _left(self) -> str:
        """Estimate from the pace of this call, failed runs aside."""
        done = self._share - self._share_before
        if done <= 0:
            return "?"
        missing = sum(1.0 - job.share for job in self._jobs if not job.failed)
        return clock((monotonic() - self._begin) / done * missing)


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and "step" in row else None


def clear_stillborn(path: Path) -> None:
    """Remove a run directory whose making was cut short: nothing in it but empty folders and the environment."""
    if path.is_dir() and all(
        file.name.lstrip(".").startswith("env.json") for file in path.rglob("*") if file.is_file()
    ):
        shutil.rmtree(path)


def last_error(log: Path) -> str:
    """Return the message of the last error line of a log, or its last line."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    for line in reversed(lines):
        if _ERROR_LINE.match(line):
            return line.removeprefix("error: ")
    return lines[-1] if lines else "no output"
