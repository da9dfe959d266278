"""What a run shows while it trains, a live panel on a terminal and plain lines elsewhere, and tables of metrics."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from time import monotonic
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import Progress
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table

_PLAIN_EVERY_S = 10.0
_BAR_WIDTH = 40
_WIDTH = 80
"""Columns of a terminal that says it has none, and the fewest of a file, where numbers would be cut."""
# Columns of the display: name, metric, format.
_SHOWN = (
    ("loss", "loss/total", "{:.4f}"),
    ("exposure", "exposure/ratio", "{:.2f}"),
    ("reward", "reward/mean", "{:.2f}"),
    ("length", "rollout/length_mean", "{:.0f}"),
    ("ended", "rollout/eos_frac", "{:.0%}"),
    ("truncated", "rollout/truncated", "{:.0f}"),
    ("tokens/s", "time/tokens_per_s", "{:.0f}"),
    ("peak MiB", "memory/peak_mib", "{:.0f}"),
)
# Evaluation metrics stand in this order, whatever is not named here comes last.
_ORDER = ("avg@", "maj@", "pass@", "level/", "trait/")


class LastingConsole(Console):
    """A console that falls silent where nobody reads it, or nothing can be written, instead of ending the program."""

    def on_broken_pipe(self) -> None:
        """Say so once, and print nothing more."""
        self._fall_silent("nobody reads the output any more")

    def _check_buffer(self) -> None:
        try:
            super()._check_buffer()
        except OSError as error:
            self._fall_silent(f"the output cannot be written ({error.strerror})")

    def _fall_silent(self, why: str) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else what is left is flushed at the end
        with suppress(OSError):
            print(f"warning: {why}; what was begun goes on", file=sys.stderr)


def make_console(*, quiet: bool = False, lasting: bool = False) -> Console:
    """Return a console that prints text as it is: no markup, no highlighting, no wrapping of sentences.

    `lasting`: what prints is worth more than its output, and goes on without a reader.
    """
    kind = LastingConsole if lasting else Console
    console = kind(highlight=False, markup=False, emoji=False, soft_wrap=True, quiet=quiet)
    if console.width < (1 if console.is_terminal else _WIDTH):  # COLUMNS=0, as some shells say: nothing would be shown
        console.width = _WIDTH
    return console


def clock(seconds: float) -> str:
    """Format a duration: `45 s`, `3:20`, `2:05:00`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def silence_libraries() -> None:
    """Switch off the progress bars of model loading and saving, which would break the display."""
    from atesd.train.model import disable_progress_bars

    disable_progress_bars()


def accuracy(row: Mapping[str, Any]) -> tuple[str, float] | None:
    """Return the name and value of the row's Average@k, if it holds an evaluation."""
    for key, value in row.items():
        if key.startswith("eval/") and "/avg@" in key and key.rsplit("@", 1)[1].isdigit():
            return key.rsplit("/", 1)[1], value
    return None


@contextmanager
def bar(console: Console, total: int) -> Iterator[Callable[[int, int, float], None]]:
    """Give what shows (step, steps, loss): a bar on a terminal, elsewhere a line now and then."""
    shown = monotonic()
    with Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("warm-up", total=total)

        def show(step: int, steps: int, loss: float) -> None:
            nonlocal shown
            progress.update(task, completed=step, description=f"loss {loss:.3f}")
            if not console.is_terminal and (monotonic() - shown >= _PLAIN_EVERY_S or step == steps):
                shown = monotonic()
                console.print(f"step {step}/{steps}  loss {loss:.3f}")

        yield show


class Pace:
    """Estimates the time left from the steps seen so far."""

    def __init__(self, num_steps: int) -> None:
        self._num_steps = num_steps
        self._begin: tuple[float, int] | None = None
        self._latest: tuple[float, int] = (0.0, 0)

    def see(self, step: int) -> None:
        """Note that a step was logged."""
        self._latest = (monotonic(), step)
        self._begin = self._begin or self._latest

    def left(self) -> str:
        """Return the time left, which counts down between steps; a question mark before the second row."""
        if self._begin is None or self._latest[1] <= self._begin[1]:
            return "?"
        seconds_a_step = (self._latest[0] - self._begin[0]) / (self._latest[1] - self._begin[1])
        due = self._latest[0] + seconds_a_step * (self._num_steps - self._latest[1])
        return clock(max(0.0, due - monotonic()))


class RunProgress:
    """Collects the rows of one run and renders its state."""

    def __init__(self, num_steps: int, console: Console) -> None:
        self._num_steps = num_steps
        self._console = console
        self._row: dict[str, Any] = {}
        self._evaluated: tuple[str, float] | None = None
        self._pace = Pace(num_steps)
        self._spinner = Spinner("dots")
        self._printed = -_PLAIN_EVERY_S
        self._is_over = False

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show the panel while the block runs; its last state stays."""
        if not self._console.is_terminal:
            yield
            return
        with Live(get_renderable=self._panel, console=self._console, refresh_per_second=4):
            try:
                yield
            finally:
                self._is_over = True

    def __call__(self, row: dict[str, Any]) -> None:
        """Take in a logged row."""
        self._row = row
        self._pace.see(row["step"])
        found = accuracy(row)
        self._evaluated = found or self._evaluated
        if self._console.is_terminal:
            return
        if found or row["step"] in (0, self._num_steps) or monotonic() - self._printed >= _PLAIN_EVERY_S:
            self._printed = monotonic()
            self._console.print(" ".join(f"{name} {value}" for name, value in self._plain()))

    def _plain(self) -> list[tuple[str, str]]:
        return [("step", self._step()), *self._values(), ("left", self._pace.left())]

    def _step(self) -> str:
        return f"{self._row.get('step', 0)}/{self._num_steps}"

    def _values(self) -> list[tuple[str, str]]:
        row = self._row
        values = [(name, form.format(row[key])) for name, key, form in _SHOWN if key in row]
        return values if self._evaluated is None else [*values, (self._evaluated[0], f"{self._evaluated[1]:.3f}")]

    def _panel(self) -> RenderableType:
        bar = ProgressBar(total=self._num_steps, completed=self._row.get("step", 0), width=_BAR_WIDTH)
        head = Table.grid(padding=(0, 1))
        state = f"{self._pace.left()} left" if self._row else "evaluating the start"
        head.add_row("step", self._step(), bar, *(() if self._is_over else (state, self._spinner)))
        values = self._values()
        table = Table(box=None, pad_edge=False)
        for name, _ in values:
            table.add_column(name, justify="right", no_wrap=True)
        table.add_row(*(value for _, value in values))
        return Group(head, table) if values else head


def metrics_table(metrics: Mapping[str, float], title: str, start: Mapping[str, float] | None = None) -> Table:
    """Return evaluation metrics as a table, accuracies first, intervals (and the value before training) beside them."""
    table = Table(title=title, title_justify="left")
    table.add_column("metric")
    for name in (["start"] if start else []) + ["value", "95 % interval"]:
        table.add_column(name, justify="right")
    bounded = [key for key in metrics if f"{key}_low" in metrics and f"{key}_high" in metrics]
    bounds = {f"{key}{end}" for key in bounded for end in ("_low", "_high")}
    for key in sorted((key for key in metrics if key not in bounds), key=_rank):
        low, high = metrics.get(f"{key}_low"), metrics.get(f"{key}_high")
        interval = "" if low is None or high is None else f"{low:.3f} to {high:.3f}"
        before = [number(start.get(key))] if start else []
        table.add_row(_short(key), *before, number(metrics[key]), interval)
    return table


def number(value: float | None) -> str:
    """Format a number that may be missing."""
    return "" if value is None else f"{value:.3f}"


def _short(key: str) -> str:
    """Drop `eval/TASK/`."""
    return key.split("/", 2)[-1] if key.startswith("eval/") else key


def _rank(key: str) -> int:
    return next((place for place, prefix in enumerate(_ORDER) if _short(key).startswith(prefix)), len(_ORDER))
