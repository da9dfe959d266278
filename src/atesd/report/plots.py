"""Panels and what draws most of them: lines over steps, by arm, by seed or by run.

The table of panels is `panels.py`; figures of a shape of their own are in `special.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from atesd.report.study import Floats, Run, Study
from atesd.report.traces import Figure, figure, line, of_no_arm, with_legend

SAME = 1e-6  # numbers that differ by less do not change
FROM_ZERO = {"rangemode": "tozero"}  # of a y axis

Choices = Mapping[str, Figure]  # by the label that the reader chooses; empty where the runs hold no data
Draw = Callable[[Study], Choices]


@dataclass(frozen=True)
class Shown:
    """A panel of a study: one figure, or several among which the reader chooses by label."""

    name: str
    description: str
    caption: str
    choices: Choices


@dataclass(frozen=True)
class Panel:
    """A row of the table of panels: where it stands, its words, and what draws it.

    `description` is for readers who do not see the figure; `{k}` in it is the number of samples a problem. Of the
    choices at most `most` are kept, and the caption says so. `note` may end the caption.
    """

    name: str
    section: str
    description: str
    caption: str
    draw: Draw
    note: Callable[[Study], str] | None = None
    most: int | None = 24

    def show(self, study: Study) -> Shown | None:
        """Draw the panel; None where the runs hold no data for it."""
        choices = self.draw(study)
        if not choices:
            return None
        kept = dict(list(choices.items())[: self.most])
        caption = self.caption + (self.note(study) if self.note else "")
        if len(kept) < len(choices):
            caption += f" Shown for {len(kept)} of {len(choices)}."
        return Shown(self.name, self.description.format(k=study.k), caption, kept)


@dataclass(frozen=True)
class Quantity:
    """A logged number. `{}` in its key stands for any name, in its label for that name.

    `shown` is asked with the points of every arm, [n, 2]; the quantity is drawn where one says so.
    """

    key: str
    label: str
    percent: bool = False
    shown: Callable[[Floats], bool] = lambda points: len(points) > 0


def changes(points: Floats) -> bool:
    """Tell whether a quantity changes."""
    return bool(np.ptp(points[:, 1]) > SAME)


def leaves_one(points: Floats) -> bool:
    """Tell whether a quantity is not 1 throughout."""
    return bool(np.abs(points[:, 1] - 1).max() > SAME)


def mean_lines(*quantities: Quantity, **yaxis: Any) -> Draw:
    """A line an arm, mean over seeds; one choice a quantity."""

    def draw(study: Study) -> Choices:
        choices = {}
        for quantity, key, label in spelled(quantities, study.runs):
            arms = by_arm(study, [mean_by_step(run.series(key) for run in arm.runs) for arm in study.arms])
            if any(quantity.shown(points) for _, _, points in arms):
                traces = [line(*arm) for arm in arms]
                choices[label] = figure(traces, "step", label, percent=quantity.percent, **yaxis)
        return choices

    return draw


def seed_lines(quantity: Quantity, **yaxis: Any) -> Draw:
    """A line an arm of what steps with a teacher logged; the mean over seeds, and one choice a seed."""

    def draw(study: Study) -> Choices:
        seeds = list(dict.fromkeys(run.seed for run in study.runs))
        shown = {"mean over seeds": seeds} | {f"seed {seed}": [seed] for seed in seeds}
        choices = {}
        for label, chosen in shown.items() if len(seeds) > 1 else [("", seeds)]:
            runs = [[run.distilled for run in arm.runs if run.seed in chosen] for arm in study.arms]
            arms = by_arm(study, [mean_by_step(run.series(quantity.key) for run in found) for found in runs])
            if arms:
                traces = [line(*arm, shape="hv", width=1.8) for arm in arms]
                choices[label] = figure(traces, "step", quantity.label, **yaxis)
        return choices

    return draw


def run_lines(quantity: Quantity, y: str, **yaxis: Any) -> Draw:
    """What a quantity stands for as lines of ever stronger colour; one choice a run."""

    def draw(run: Run, _: int) -> Choices:
        found = [(label, run.series(key)) for _, key, label in spelled([quantity], [run])]
        shades = [f"@heat-high/{share:.2f}" for share in np.linspace(0.45, 1, len(found))]
        traces = [
            of_no_arm(line(number, *found[number], markers=True, width=1.8), shade, dash="solid")
            for number, shade in enumerate(shades)
        ]
        return {run.label: with_legend(figure(traces, "step", y, **yaxis))} if traces else {}

    return per_run(draw)


def per_run(draw: Callable[[Run, int], Choices]) -> Draw:
    """Put together what `draw` returns for every run and the index of its arm."""

    def draw_all(study: Study) -> Choices:
        runs = [(run, index) for index, arm in enumerate(study.arms) for run in arm.runs]
        return {label: drawn for run, index in runs for label, drawn in draw(run, index).items()}

    return draw_all


def spelled(quantities: Iterable[Quantity], runs: Sequence[Run]) -> list[tuple[Quantity, str, str]]:
    """Return the keys with their labels that quantities stand for in the logs of some runs."""
    return [
        (quantity, quantity.key.format(name), quantity.label.format(name))
        for quantity in quantities
        for name in (names_in(runs, quantity.key) if "{}" in quantity.key else [""])
    ]


def names_in(runs: Sequence[Run], pattern: str) -> list[str]:
    """Return the names that `{}` in a key stands for in the logs of some runs."""
    start, end = map(re.escape, pattern.split("{}"))
    keys = {key for run in runs for row in run.rows for key in row}
    return sorted({found[1] for key in keys if (found := re.fullmatch(f"{start}(.+){end}", key))}, key=natural)


def natural(name: str) -> list[tuple[float, str]]:
    """Sort `5 steps` before `10 steps`, and 0.5 before 1."""
    number = re.compile(r"\d+(\.\d+)?")
    return [(float(word), "") if number.fullmatch(word) else (0.0, word) for word in name.split()]


def by_arm(study: Study, series: Sequence[Floats]) -> list[tuple[int, str, Floats]]:
    """Return index, name and points of every arm that has points, given those of all arms in order."""
    found = zip(study.arms, series, strict=True)
    return [(index, arm.name, points) for index, (arm, points) in enumerate(found) if len(points)]


def mean_by_step(series: Iterable[Floats]) -> Floats:
    """Return one row a step: the mean of the rows that the series have for it; [0, 2] without a series."""
    stacked = np.concatenate(list(series) or [np.empty((0, 2))])
    steps = np.unique(stacked[:, 0])
    means = np.array([stacked[stacked[:, 0] == step].mean(axis=0) for step in steps])
    return means.reshape(-1, stacked.shape[1])
