"""Tables of the report as HTML: results, paired differences, behaviour, settings. Every text is escaped here."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from atesd.evaluate.metrics import avg_at_k, have_answers, maj_at_k, pass_at_k
from atesd.report.compare import Findings, finals, pairs_by_key, seconds, starts
from atesd.report.study import Evaluation, Study
from atesd.report.traces import COLOURS, SYMBOLS
from atesd.report.words import duration, seen_in_words

NOT_TOLD_APART = "not told apart"
OVER_SEEDS = "t over seeds, 95\u00a0%"
WIDTH, HEIGHT = 190, 20  # of an interval's drawing, CSS pixels


def result_table(study: Study, findings: Findings) -> str:
    """Average@k of the start and of every arm, with interval, time and what the teacher sees."""
    start = findings.start
    found = [(index, arm, findings.arms[arm.name]) for index, arm in enumerate(study.arms)]
    known = [entry for entry in [start, *(entry for _, _, entry in found)] if entry is not None]
    low = math.floor(10 * min(entry["low"] for entry in known)) / 10
    high = max(math.ceil(10 * max(entry["high"] for entry in known)) / 10, low + 0.1)
    reference = None if start is None else start["average_at_k"]
    few = any("t_low" in entry for entry in known)

    def interval(entry: Mapping[str, float], index: int | None) -> str:
        drawn = interval_drawing((entry["low"], entry["average_at_k"], entry["high"]), (low, high), index, reference)
        return f"<td class=number><strong>{percent(entry['average_at_k'])}</strong></td><td>{drawn}</td>" + (
            f"<td class=number>{percent(entry['low'])} to {percent(entry['high'])}</td>"
            f"{over_seeds(entry, percent) if few else ''}"
        )

    rows = []
    if start is not None:
        rows.append(
            f"<tr><th scope=row>start</th><td class=words>no training yet</td>{interval(start, None)}<td></td></tr>"
        )
    for index, arm, entry in found:
        state = "no final accuracy" if any(run.result is not None for run in arm.runs) else "no complete run yet"
        shown = interval(entry, index) if entry else f"<td class=muted colspan={4 if few else 3}>{state}</td>"
        took = duration(seconds(arm)) if seconds(arm) else ""
        words = escape(seen_in_words(arm.runs[0]))
        name = f"{swatch(index)}{escape(arm.name)}"
        rows.append(
            f"<tr><th scope=row>{name}</th><td class=words>{words}</td>{shown}<td class=number>{took}</td></tr>"
        )
    scale = f"<span class=scale><span>{low:.0%}</span><span>{high:.0%}</span></span>"
    head = [
        "Arm",
        "<span class=words>The teacher sees</span>",
        f"Average@{study.k}",
        scale,
        "95 % interval",
        *([OVER_SEEDS] if few else []),
        "Time a run",
    ]
    return table(head, rows, numeric=(2, 4, 5, 6))


def paired_table(study: Study, findings: Findings) -> str:
    """Differences between arms within each seed and problem; empty where there is none."""
    found = findings.paired
    if not found:
        return ""
    few = any(entry.t_low is not None for entry in found.values())
    reach = max(0.05, math.ceil(20 * max(abs(bound) for entry in found.values() for bound in entry[1:3])) / 20)
    names = [arm.name for arm in study.arms]
    rows = []
    for key, (first, second) in pairs_by_key(names).items():
        entry = found.get(key)
        if entry is None:
            continue
        drawn = interval_drawing((entry.low, entry.difference, entry.high), (-reach, reach), names.index(first), 0.0)
        rows.append(
            f"<tr><th scope=row>{escape(first)} \u2212 {escape(second)}</th>"
            f"<td class=number><strong>{points(entry.difference)}</strong></td><td>{drawn}</td>"
            f"<td class=number>{points(entry.low)} to {points(entry.high)}</td>"
            f"{over_seeds(entry._asdict(), points) if few else ''}"
            f"<td class=verdict>{verdict(entry.sign)}</td></tr>"
        )
    scale = f"<span class=scale><span>{points(-reach)}</span><span>{points(reach)}</span></span>"
    head = ["Pair", "Points", scale, "95 % interval", *([OVER_SEEDS] if few else []), "Reading"]
    return table(head, rows, numeric=(1, 3, 4) if few else (1, 3))


def over_seeds(entry: Mapping[str, Any], write: Callable[[float], str]) -> str:
    """The cell of the t interval; empty where there is none."""
    low, high = entry.get("t_low"), entry.get("t_high")
    return f"<td class=number>{'' if low is None or high is None else f'{write(low)} to {write(high)}'}</td>"


def behaviour_table(study: Study) -> str:
    """Average@k beside pass@k and majority, length, truncation and traits of the final evaluations."""
    groups: list[tuple[str, list[Evaluation]]] = [("start", starts(study))]
    groups += [(f"{swatch(index)}{escape(arm.name)}", finals(arm)) for index, arm in enumerate(study.arms)]
    groups = [(name, evaluations) for name, evaluations in groups if evaluations]
    columns = behaviour_columns(study)
    rows = [
        f"<tr><th scope=row>{name}</th>"
        + "".join(f"<td class=number>{show(evaluations)}</td>" for _, show in columns)
        + "</tr>"
        for name, evaluations in groups
    ]
    heads = ["Arm", *(escape(name) for name, _ in columns)]
    return table(heads, rows, numeric=range(1, len(heads)))


def behaviour_columns(study: Study) -> list[tuple[str, Callable[[Sequence[Evaluation]], str]]]:
    """Return header and content of each column, given the evaluations of an arm."""

    def trait_column(trait: str) -> Callable[[Sequence[Evaluation]], str]:
        return lambda evaluations: percent(mean(evaluation.traits.get(trait, math.nan) for evaluation in evaluations))

    return [
        (
            f"Average@{study.k}",
            lambda evaluations: percent(mean(avg_at_k(e.correct) for e in evaluations if e.correct.size)),
        ),
        (f"pass@{study.k}", lambda evaluations: percent(mean(_passed(e) for e in evaluations))),
        (f"majority of {study.k}", lambda evaluations: percent(mean(_majority(e) for e in evaluations))),
        ("mean length, tokens", lambda evaluations: f"{mean(e.lengths_mean for e in evaluations):.1f}"),
        ("hit the limit", lambda evaluations: percent(mean(e.truncated for e in evaluations))),
        *((trait.replace("_", " "), trait_column(trait)) for trait in study.traits),
    ]


def _passed(evaluation: Evaluation) -> float:
    correct = evaluation.correct
    return float(pass_at_k(correct, correct.shape[1]).mean()) if correct.size else math.nan


def _majority(evaluation: Evaluation) -> float:
    answers = evaluation.graded_answers
    return float(maj_at_k(answers, evaluation.correct).mean()) if have_answers(answers) else math.nan


def settings_table(rows: Sequence[tuple[str, str]]) -> str:
    """Names and values, as a description list."""
    return "<dl>" + "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in rows) + "</dl>"


def table(heads: Sequence[str], rows: Sequence[str], *, numeric: Sequence[int]) -> str:
    """Wrap rows into a table that scrolls by itself where the screen is narrow."""
    cells = "".join(
        f"<th scope=col{' class=number' if index in numeric else ''}>{head}</th>" for index, head in enumerate(heads)
    )
    body = "".join(rows)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="table"><table><thead><tr>{cells}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def interval_drawing(
    interval: tuple[float, float, float], scale: tuple[float, float], arm: int | None, reference: float | None
) -> str:
    """Draw an interval (low, mean, high) on a scale, with a line at the reference value."""
    low, mean, high = interval

    def x(value: float) -> str:
        return f"{6 + (WIDTH - 12) * (value - scale[0]) / (scale[1] - scale[0]):.1f}"

    middle = HEIGHT / 2
    line = (
        ""
        if reference is None
        else f'<line class=reference x1="{x(reference)}" x2="{x(reference)}" y1="0" y2="{HEIGHT}"/>'
    )
    return (
        f'<svg class="interval {"arm" if arm is None else f"arm{arm % COLOURS}"}" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'aria-hidden="true">{line}<line class=axis x1="6" x2="{WIDTH - 6}" y1="{middle}" y2="{middle}"/>'
        f'<line class=bar x1="{x(low)}" x2="{x(high)}" y1="{middle}" y2="{middle}"/>'
        f'<circle cx="{x(mean)}" cy="{middle}" r="5"/></svg>'
    )


def swatch(index: int) -> str:
    """The arm's marker in its colour."""
    outline = list(SYMBOLS.values())[index % COLOURS]
    return (
        f'<svg class="swatch arm{index % COLOURS}" viewBox="-6 -6 12 12" aria-hidden="true"><path d="{outline}"/></svg>'
    )


def verdict(sign: int) -> str:
    """Say what the intervals of a difference allow to say."""
    return {1: "higher", -1: "lower"}.get(sign, NOT_TOLD_APART)


def percent(value: float) -> str:
    """Write a fraction as a percentage, or n/a where there is none."""
    return "n/a" if math.isnan(value) else f"{100 * value:.1f}\u00a0%"


def points(value: float) -> str:
    """Write a difference of fractions in percentage points."""
    return f"{100 * value:+.1f}".replace("-", "\u2212")


def mean(values: Iterable[float]) -> float:
    """Return the mean of what is known, NaN where nothing is."""
    known = [value for value in values if not math.isnan(value)]
    return float(np.mean(known)) if known else math.nan
