"""Numbers about a whole set of samples, such as a distance to the data: what runs of a flow log as `quality/NAME`.

One number a run: means over seeds with Student's 95 % interval over them; differences are taken within a seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from atesd.evaluate.metrics import t_interval
from atesd.report.compare import pairs_by_key, pairs_of
from atesd.report.plots import SAME, names_in
from atesd.report.study import Run, Study
from atesd.report.tables import NOT_TOLD_APART, swatch, table

PREFIX = "quality/"
MINUS = " \u2212 "


def qualities(study: Study, pairs: Sequence[tuple[str, str]] | None = None) -> dict[str, dict[str, Any]]:
    """Return by name: `start`, `arms` and, of a comparison, `paired`; {} where no run logs any.

    Without `pairs` those of the accuracies are compared.
    """
    if pairs is None:
        pairs = pairs_of([arm.name for arm in study.arms]) if study.is_comparison else []
    return {name: _quality(study, PREFIX + name, pairs) for name in names_in(study.runs, f"{PREFIX}{{}}")}


def quality_tables(study: Study) -> str:
    """Means of every arm and paired differences, a table a number; empty where there is none."""
    return "".join(_table(study, name, found) for name, found in qualities(study).items())


def said(entry: Mapping[str, Any] | None, sign: str = "") -> str:
    """Write a mean with its interval."""
    if entry is None:
        return ""
    interval = "" if entry["low"] is None else f" ({entry['low']:{sign}.4f} to {entry['high']:{sign}.4f})"
    return f"{entry['mean']:{sign}.4f}{interval}"


def reading(entry: Mapping[str, Any]) -> str:
    """Say what an interval allows to say; differences that are equal on all seeds tell nothing of their error."""
    if entry["low"] is None:
        return "one seed"
    if entry["high"] - entry["low"] < SAME * abs(entry["mean"]):
        return NOT_TOLD_APART
    return "higher" if entry["low"] > 0 else "lower" if entry["high"] < 0 else NOT_TOLD_APART


def _quality(study: Study, key: str, pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    starts: dict[object, float] = {}
    for run in study.runs:
        if run.rows and run.rows[0]["step"] == 0 and key in run.rows[0]:
            starts.setdefault(run.origin, run.rows[0][key])
    finals = {
        arm.name: {run.seed: run.rows[-1][key] for run in arm.runs if _is_complete(run) and key in run.rows[-1]}
        for arm in study.arms
    }
    paired = {}
    for first, second in pairs:
        seeds = [seed for seed in finals[first] if seed in finals[second]]
        if seeds:
            paired[f"{first}-{second}"] = _entry([finals[first][seed] - finals[second][seed] for seed in seeds])
    return {
        "start": _entry(list(starts.values()), over_seeds=study.is_comparison) if starts else None,
        "arms": {name: _entry(list(found.values())) for name, found in finals.items() if found},
        "paired": paired,
    }


def _is_complete(run: Run) -> bool:
    return run.result is not None and bool(run.rows)


def _entry(values: Sequence[float], *, over_seeds: bool = True) -> dict[str, Any]:
    """Return the mean with its interval; starts of runs that were named together are no seeds, and have none."""
    low, high = t_interval(np.array(values)) if over_seeds and len(values) > 1 else (None, None)
    return {"mean": float(np.mean(values)), "low": low, "high": high, "seeds": len(values)}


def _table(study: Study, name: str, found: Mapping[str, Any]) -> str:
    index = {arm.name: swatch(number) for number, arm in enumerate(study.arms)}
    rows = [f"<tr><th scope=row>start</th><td class=number>{said(found['start'])}</td><td></td></tr>"]
    rows += [
        f"<tr><th scope=row>{index[arm]}{escape(arm)}</th><td class=number>{said(entry)}</td><td></td></tr>"
        for arm, entry in found["arms"].items()
    ]
    rows += [
        f"<tr><th scope=row>{escape(MINUS.join(pair))}</th>"
        f"<td class=number>{said(found['paired'][key], '+')}</td>"
        f"<td class=verdict>{reading(found['paired'][key])}</td></tr>"
        for key, pair in pairs_by_key(list(index)).items()
        if key in found["paired"]
    ]
    words = escape(name.replace("_", " "))
    head = ["Arm or pair", "Mean over seeds, with its t interval of 95\u00a0%", "Reading"]
    return f"<h3>{words[:1].upper()}{words[1:]}</h3>" + table(head, rows, numeric=(1,))
