"""`atesd compare`: paired runs of several arms, a few at a time, resumable."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, sleep
from types import FrameType
from typing import IO, Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from atesd.cli.progress import accuracy, clock
from atesd.runlog import RunDir, dump_json, write_atomic
from atesd.types import UserError

BUILT_IN_ARMS: dict[str, tuple[str, ...]] = {
    "none": ('exposure={kind="fixed", ratio=0.0}',),
    "quarter": ('exposure={kind="fixed", ratio=0.25}',),
    "half": ('exposure={kind="fixed", ratio=0.5}',),
    "three_quarters": ('exposure={kind="fixed", ratio=0.75}',),
    "full": ('exposure={kind="fixed", ratio=1.0}',),
    "random": ('exposure={kind="random"}',),
    "learned": ('exposure={kind="beta"}',),
    "sft": ('exposure={kind="fixed"}', 'routing={kind="sft"}'),
}
_POLL_S = 0.5


@dataclass(slots=True)
class Job:
    """One run of the comparison."""

    arm: str
    seed: int
    path: Path
    overrides: tuple[str, ...]
    process: subprocess.Popen[bytes] | None = None
    started: tuple[float, int] | None = None
    failed: str = ""
    last: dict[str, Any] = field(default_factory=dict)
    evaluated: float | None = None

    @property
    def done(self) -> bool:
        """Whether the run is complete."""
        return (self.path / "result.json").is_file()

    def refresh(self) -> None:
        """Read the latest logged row."""
        for row in read_new_rows(self.path / "metrics.jsonl", self.last.get("step", -1)):
            self.last = row
            found = accuracy(row)
            self.evaluated = found[1] if found else self.evaluated
        if self.started is None and self.process is not None and self.last:
            self.started = (monotonic(), self.last["step"])


def run_compare(
    recipe: Path,
    overrides: Sequence[str],
    *,
    arms: Sequence[str],
    seeds: int,
    first_seed: int,
    jobs: int,
    out: Path | None,
) -> None:
    """Run what is missing of every arm and seed, then summarise."""
    from atesd.recipe import load_config, with_overrides

    config = load_config(recipe, overrides)
    known = BUILT_IN_ARMS | config.arms
    for arm in arms:
        if arm not in known:
            raise UserError(f"unknown arm {arm!r}: the recipe and the built-in arms are {', '.join(known)}")
        with_overrides(config, known[arm])
    folder = out or Path("runs") / f"{recipe.stem}-compare"
    plan = Plan(recipe, tuple(overrides), {arm: known[arm] for arm in arms}, range(first_seed, first_seed + seeds))
    header = plan.write(folder, config.eval.k, config.task.kind)
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{len(arms)} arms x {seeds} seeds in {folder}")
    runner = Runner(plan, folder, config.step.num_steps, jobs or os.cpu_count() or 1, console)
    begin = monotonic()
    try:
        runner.run()
    finally:
        header["seconds"] = header.get("seconds", 0.0) + monotonic() - begin
        write_atomic(folder / "compare.json", dump_json(header))
    finish(folder, console)
    if runner.failures:
        for job in runner.failures:
            print(f"error: {job.arm} seed {job.seed} failed: {job.failed} (log: {job.path}.log)", file=sys.stderr)
        raise SystemExit(1)


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be run: every arm with every seed."""

    recipe: Path
    overrides: tuple[str, ...]
    arms: Mapping[str, tuple[str, ...]]
    seeds: range

    def jobs(self, folder: Path) -> list[Job]:
        """Return the runs, all arms of a seed before the next seed."""
        return [
            Job(arm, seed, folder / arm / f"seed_{seed}", (*self.overrides, *overrides, f"seed={seed}"))
            for seed in self.seeds
            for arm, overrides in self.arms.items()
        ]

    def write(self, folder: Path, k: int, task: str) -> dict[str, Any]:
        """Write `compare.json`, or extend that of an earlier call; UserError if it compared something else."""
        path = folder / "compare.json"
        text = self.recipe.read_text(encoding="utf-8")
        before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if before and (before["recipe_text"], before["overrides"]) != (text, list(self.overrides)):
            raise UserError(f"{folder} compares another recipe or other overrides: choose another folder with --out")
        for arm, overrides in self.arms.items():
            if list(overrides) != before.get("arms", {}).get(arm, list(overrides)):
                raise UserError(f"{folder} already holds an arm {arm!r} with other overrides: choose another --out")
        if not before and folder.exists() and any(folder.iterdir()):
            raise UserError(f"{folder} already exists and holds no comparison: choose another folder with --out")
        header = {
            "recipe": str(self.recipe),
            "recipe_text": text,
            "overrides": list(self.overrides),
            "arms": before.get("arms", {}) | {arm: list(overrides) for arm, overrides in self.arms.items()},
            "seeds": sorted({*before.get("seeds", []), *self.seeds}),
            "k": k,
            "task": task,
            "seconds": before.get("seconds", 0.0),
        }
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(path, dump_json(header))
        return header


class Runner:
    """Keeps a number of runs going until all are done."""

    def __init__(self, plan: Plan, folder: Path, num_steps: int, at_once: int, console: Console) -> None:
        self._plan = plan
        self._jobs = plan.jobs(folder)
        self._num_steps = num_steps
        self._at_once = at_once
        self._console = console
        self._begin = monotonic()
        self._stop = False
        self._already = sum(job.done for job in self._jobs)

    @property
    def failures(self) -> list[Job]:
        """Return the runs that ended without a result."""
        return [job for job in self._jobs if job.failed]

    def run(self) -> None:
        """Run everything that has no result yet. SystemExit 130 after an interrupt, all states saved."""
        waiting = [job for job in self._jobs if not job.done]
        running: list[Job] = []
        with self._stoppable(running), self._shown(running) as show:
            while running or (waiting and not self._stop):
                while waiting and len(running) < self._at_once and not self._stop:
                    running.append(self._launch(waiting.pop(0)))
                sleep(_POLL_S)
                for job in list(running):
                    job.refresh()
                    if job.process is not None and job.process.poll() is not None:
                        running.remove(job)
                        self._collect(job)
                show()
        if self._stop:
            self._console.print("stopped, all states saved; the same command continues")
            raise SystemExit(130)

    def _launch(self, job: Job) -> Job:
        """Start or resume a run in a process of its own."""
        command = [sys.executable, "-m", "atesd.cli.main", "train"]
        if (job.path / "config.json").is_file():
            command += ["--resume", str(job.path)]
        else:
            command += [str(self._plan.recipe), *job.overrides, "--out", str(job.path)]
        job.path.parent.mkdir(parents=True, exist_ok=True)
        environment = dict(os.environ)
        if self._at_once > 1:
            environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        with open_log(job) as log:
            # A session of its own: the terminal's Ctrl-C reaches only this process, which passes it on once.
            job.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
        return job

    def _collect(self, job: Job) -> None:
        """Note how a run ended."""
        assert job.process is not None
        if job.done:
            if not self._console.is_terminal:
                value = "" if job.evaluated is None else f" accuracy {job.evaluated:.3f}"
                self._console.print(f"{job.arm} seed {job.seed} done{value}, left {self._left()}")
        elif not (self._stop and job.process.returncode == 130):
            job.failed = last_line(job.path.with_name(job.path.name + ".log"))

    @contextmanager
    def _stoppable(self, running: list[Job]) -> Iterator[None]:
        """Pass SIGINT and SIGTERM on to the runs, and wait for their checkpoints."""

        def stop(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
            self._stop = True
            for job in running:
                if job.process is not None:
                    with suppress(ProcessLookupError):
                        job.process.send_signal(signal.SIGTERM)

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def _shown(self, running: Sequence[Job]) -> Iterator[Any]:
        """Show one row a running run on a terminal; yields a function that brings it up to date."""
        if not self._console.is_terminal:
            yield lambda: None
            return
        with Live(self._table(running), console=self._console, refresh_per_second=4) as live:
            yield lambda: live.update(self._table(running))

    def _table(self, running: Sequence[Job]) -> Table:
        finished = sum(job.done for job in self._jobs)
        table = Table(title=f"{finished} of {len(self._jobs)} runs done, left {self._left()}", title_justify="left")
        for name in ("arm", "seed", "step", "loss", "exposure", "reward", "accuracy", "left"):
            table.add_column(name, justify="left" if name == "arm" else "right")
        for job in self._jobs:
            if job.done and job.process is not None:
                table.add_row(job.arm, str(job.seed), "done", "", "", "", form(job.evaluated, 3), "")
        for job in running:
            row = job.last
            values = [form(row.get(key), 3) for key in ("loss/total", "exposure/ratio", "reward/mean")]
            step = f"{row.get('step', 0)}/{self._num_steps}"
            table.add_row(job.arm, str(job.seed), step, *values, form(job.evaluated, 3), self._left_of(job))
        return table

    def _left_of(self, job: Job) -> str:
        step = job.last.get("step", 0)
        if job.started is None or step <= job.started[1]:
            return "?"
        return clock((monotonic() - job.started[0]) / (step - job.started[1]) * (self._num_steps - step))

    def _left(self) -> str:
        """Estimate from the pace of this call: whole runs and the steps of running ones."""
        work = sum(1.0 if job.done else job.last.get("step", 0) / self._num_steps for job in self._jobs)
        if work - self._already <= 0:
            return "?"
        return clock((monotonic() - self._begin) / (work - self._already) * (len(self._jobs) - work))


def finish(folder: Path, console: Console) -> None:
    """Write summary and report from what is there, and print the table."""
    from atesd.report.compare import summarise
    from atesd.report.html import write_report

    summary = summarise(folder)
    write_atomic(folder / "summary.json", dump_json(summary))
    console.print(summary_table(summary))
    console.print(paired_table(summary))
    console.print(f"{folder}/summary.json\n{write_report([folder], folder / 'report.html')}")


def summary_table(summary: Mapping[str, Any]) -> Table:
    """Return accuracy per arm."""
    table = Table(title=f"Average@{summary['k']} over {len_of(summary['seeds'])} seeds", title_justify="left")
    for name in ("arm", "accuracy", "95 % interval", "time a run"):
        table.add_column(name, justify="left" if name == "arm" else "right")
    start = summary["start"]
    table.add_row("start", form(start["average_at_k"], 3), interval(start), "")
    for name, arm in summary["arms"].items():
        table.add_row(name, form(arm["average_at_k"], 3), interval(arm), clock(arm["seconds"]))
    return table


def paired_table(summary: Mapping[str, Any]) -> Table:
    """Return paired differences."""
    table = Table(title="paired differences", title_justify="left")
    for name in ("pair", "difference", "95 % interval"):
        table.add_column(name, justify="left" if name == "pair" else "right")
    for name, pair in summary["paired"].items():
        table.add_row(name, f"{pair['difference']:+.3f}", interval(pair))
    return table


def interval(entry: Mapping[str, float]) -> str:
    """Format an interval."""
    return f"{entry['low']:.3f} to {entry['high']:.3f}"


def form(value: float | None, digits: int) -> str:
    """Format a number that may be missing."""
    return "" if value is None else f"{value:.{digits}f}"


def len_of(seeds: Any) -> int:
    """Return the number of seeds, given as a list or a number."""
    return seeds if isinstance(seeds, int) else len(seeds)


def open_log(job: Job) -> IO[bytes]:
    """Open the run's console log for appending."""
    return job.path.with_name(job.path.name + ".log").open("ab")


def last_line(path: Path) -> str:
    """Return the last non-empty line of a log."""
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "no output"


def read_new_rows(path: Path, after: int) -> list[dict[str, Any]]:
    """Return the complete rows behind a step."""
    if not path.is_file():
        return []
    return [row for row in RunDir(path.parent).metrics() if row["step"] > after]
