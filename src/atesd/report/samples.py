"""What a flow's samples look like: points as a scatter, images as a grid, before training and after."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from atesd.report.checked import is_number, is_text, list_of, read_rows
from atesd.report.plots import Choices
from atesd.report.study import Evaluation, Floats, Run, Study
from atesd.report.traces import Figure, colour, figure, short, with_legend

POINTS = 400  # of a scatter
ACROSS = 8  # images in a row of the grid
ROWS = 10
SIDE = 8  # of an image
EDGE = 10.0  # no sample of a working student lies farther out


def sample_figures(study: Study) -> Choices:
    """One choice a run; of images two, before training and after."""
    choices: dict[str, Figure] = {}
    for index, arm in enumerate(study.arms):
        for run in arm.runs:
            choices |= _of_run(run, index)
    return choices


def _of_run(run: Run, arm: int) -> Choices:
    shown = {each.step: each for each in (run.start, *run.evaluations[-1:]) if each is not None}.values()
    found = [(_when(each), *samples_of(each.path)) for each in shown]
    if run.about.get("samples") == "images":
        images = [each for each in found if each[1].shape[1:] == (SIDE * SIDE,)]
        return {f"{run.label}, {when}": _grid(points, levels) for when, points, levels in images}
    traces = [
        _scatter(when, points, "@muted/0.6" if place == 0 and len(found) > 1 else colour(arm))
        for place, (when, points, _) in enumerate(found)
        if points.shape[1:] == (2,)
    ]
    if not traces:
        return {}
    drawn = with_legend(figure(traces, "", ""))
    drawn["layout"]["yaxis"] |= {"scaleanchor": "x"}
    return {run.label: drawn}


def samples_of(path: Path) -> tuple[Floats, list[str]]:
    """Return the samples of an evaluation, [N, D], with the level of each; those without numbers are left out."""
    points: list[list[float]] = []
    levels: list[str] = []
    is_point = list_of(is_number)
    for _, row in read_rows(path):
        point: Any = row.get("point")
        if is_point(point) and is_text(row.get("level")) and len(point) == len(points[0] if points else point):
            points.append(np.clip(point, -EDGE, EDGE).tolist())
            levels.append(row["level"])
    return np.array(points, dtype=np.float64) if points else np.empty((0, 0)), levels


def _when(evaluation: Evaluation) -> str:
    return f"step {evaluation.step}" if evaluation.step else "before training"


def _scatter(name: str, points: Floats, shade: str) -> Figure:
    points = points[:POINTS]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": short(points[:, 0]),
        "y": short(points[:, 1]),
        "marker": {"color": shade, "size": 4},
        "hoverinfo": "skip",
    }


def _grid(points: Floats, levels: Sequence[str]) -> Figure:
    """One row of images a level, in alphabetical order; black on the page's ground."""
    names = sorted(set(levels))[:ROWS]
    rows = []
    for name in names:
        own = [points[place] for place, level in enumerate(levels) if level == name][:ACROSS]
        images = [np.pad(each.reshape(SIDE, SIDE), 1, constant_values=np.nan) for each in own]
        blank = np.full((SIDE + 2, SIDE + 2), np.nan)
        rows.append(np.concatenate([*images, *[blank] * (ACROSS - len(images))], axis=1))
    pixels = np.concatenate(rows)
    heat = {
        "type": "heatmap",
        "z": [[None if np.isnan(value) else round(float(value), 2) for value in row] for row in pixels],
        "zmin": -1,
        "zmax": 1,
        "colorscale": [[0, "@surface"], [1, "@text"]],
        "showscale": False,
        "hoverinfo": "skip",
    }
    drawn = figure([heat], "", "", autorange="reversed", visible=False, scaleanchor="x")
    drawn["layout"]["xaxis"] |= {"visible": False}
    return drawn
