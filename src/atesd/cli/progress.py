"""What a run shows while it trains: a live panel on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from time import monotonic
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

_PLAIN_EVERY_S = 10.0


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


class RunProgress:
    """Collects the rows of one run and renders its state."""

    def __init__(self, num_steps: int, console: Console) -> None:
        self._num_steps = num_steps
        self._console = console
        self._row: dict[str, Any] = {}
        self._evaluated: tuple[str, float] | None = None
        self._begin: tuple[float, int] | None = None
        self._printed = -_PLAIN_EVERY_S
        self._live: Live | None = None

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show the panel while the block runs."""
        if not self._console.is_terminal:
            yield
            return
        with Live(self._table(), console=self._console, refresh_per_second=4) as self._live:
            yield

    def __call__(self, row: dict[str, Any]) -> None:
        """Take in a logged row."""
        if self._begin is None:
            self._begin = (monotonic(), row["step"])
        self._row = row
        self._evaluated = accuracy(row) or self._evaluated
        if self._live is not None:
            self._live.update(self._table())
        elif monotonic() - self._printed >= _PLAIN_EVERY_S or row["step"] in (0, self._num_steps) or accuracy(row):
            self._printed = monotonic()
            self._console.print(" ".join(f"{name} {value}" for name, value in self._fields()), soft_wrap=True)

    def _fields(self) -> list[tuple[str, str]]:
        row = self._row
        fields = [("step", f"{row.get('step', 0)}/{self._num_steps}")]
        wanted = (
            ("loss", "loss/total", "{:.4f}"),
            ("exposure", "exposure/ratio", "{:.2f}"),
            ("reward", "reward/mean", "{:.2f}"),
            ("length", "rollout/length_mean", "{:.0f}"),
            ("ended", "rollout/eos_frac", "{:.0%}"),
            ("truncated", "rollout/truncated", "{:.0f}"),
            ("tokens/s", "time/tokens_per_s", "{:.0f}"),
            ("peak MiB", "memory/peak_mib", "{:.0f}"),
        )
        fields += [(name, form.format(row[key])) for name, key, form in wanted if key in row]
        if self._evaluated is not None:
            fields.append((self._evaluated[0], f"{self._evaluated[1]:.3f}"))
        return [*fields, ("left", self._left())]

    def _left(self) -> str:
        step = self._row.get("step", 0)
        if self._begin is None or step <= self._begin[1]:
            return "?"
        pace = (monotonic() - self._begin[0]) / (step - self._begin[1])
        return clock(pace * (self._num_steps - step))

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False)
        fields = self._fields() if self._row else [("step", f"0/{self._num_steps}"), ("", "evaluating the start")]
        for name, _ in fields:
            table.add_column(name, justify="right", no_wrap=True)
        table.add_row(*(value for _, value in fields))
        return table


def metrics_table(metrics: Mapping[str, float], title: str) -> Table:
    """Return evaluation metrics as a table, intervals beside their value."""
    table = Table(title=title, title_justify="left")
    table.add_column("metric")
    table.add_column("value", justify="right")
    table.add_column("95 % interval", justify="right")
    for key, value in metrics.items():
        if key.endswith(("_low", "_high")):
            continue
        low, high = metrics.get(f"{key}_low"), metrics.get(f"{key}_high")
        interval = f"{low:.3f} to {high:.3f}" if low is not None and high is not None else ""
        table.add_row(key.split("/", 2)[-1] if key.startswith("eval/") else key, f"{value:.3f}", interval)
    return table
