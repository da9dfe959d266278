"""Figures of the controls beside exposure: routes, gates, the cliff, credits. None where the runs hold no data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from atesd.report.load import Arm, Floats, Run, Study, setting
from atesd.report.plots import SAME, Panel, mean_by_step, mean_series
from atesd.report.traces import Figure, axis, layout, legend, line, short, symbol, thin

RUNS = 24  # choices of a figure that shows one run

ROUTES = {  # in the order of the stack; the style sheet has a colour of each name
    "distil": "distilled",
    "both": "distilled and reinforced",
    "rl": "reinforced",
    "nll": "trained on the reference",
    "skip": "skipped",
}
PATTERNS = {"distil": "", "both": "x", "rl": "/", "nll": ".", "skip": "-"}
GATES = {  # key -> label, whether it is a share
    "gate/mean": ("Mean weight of distilled tokens", False),
    "gate/kept_frac": ("Share of distilled tokens that are selected", True),
    "gate/open_frac": ("Share of distilled tokens whose gate is above 1/2", True),
    "gate/gap": ("Mean gap, teacher minus student log-probability, nats", False),
    "gate/gap_negative": ("Share of distilled tokens with a negative gap", True),
}
CAPTIONS = {
    "routes": "How the groups of each step were trained.",
    "gates": "How strongly distilled tokens listen to the teacher, mean over seeds. The weight is selection times "
    "gate: 1 everywhere in plain distillation.",
    "cliff": "λ* is how far the target may reach beyond the teacher before the student would leave the clip's safe "
    "region; gaps are steps in which any λ is safe. "
    "While the cliff router reinforces, groups of equal rewards are distilled at a capped λ, or skipped.",
    "credits": "To first order, how well a step of distillation at each candidate ratio would serve the probe; "
    "moving averages of cosines.",
}


def route_panel(study: Study) -> Panel | None:
    """Shares of the groups by route over steps; one choice a run and the mean over an arm's seeds."""
    arms = [(arm, found) for arm in study.arms if (found := _routes_by_run(arm))]
    shown = [(arm, found) for arm, found in arms if not all(_only_distils(points) for points in found.values())]
    choices: dict[str, Figure] = {}
    for arm, found in shown:
        if len(found) > 1:
            choices[f"{arm.name}, mean over seeds"] = _stack(mean_by_step(found.values()))
        choices |= {label: _stack(points) for label, points in found.items()}
    if not choices:
        return None
    plain = [arm.name for arm, _ in arms if arm.name not in {other.name for other, _ in shown}]
    rest = f" Left out, as every group was distilled: {', '.join(plain)}." if plain else ""
    return _of_runs("routes", "Share of groups by route over training steps", choices, rest)


def gate_panel(study: Study) -> Panel | None:
    """Weights of distilled tokens over steps, mean over seeds; one choice a quantity that is not 1 throughout."""
    choices = {}
    for key, (label, share) in GATES.items():
        lines = [(index, arm.name, mean_series(arm, key)) for index, arm in enumerate(study.arms)]
        lines = [(index, name, points) for index, name, points in lines if len(points)]
        if any(np.abs(points[:, 1] - 1).max() > SAME for _, _, points in lines):
            frame = layout("step", label, y_percent=share)
            frame["yaxis"] |= {"rangemode": "tozero"}
            choices[label] = {"data": [line(index, name, points) for index, name, points in lines], "layout": frame}
    return (
        Panel("gates", "Weights of distilled tokens over training steps", CAPTIONS["gates"], choices)
        if choices
        else None
    )


def cliff_panel(study: Study) -> Panel | None:
    """lambda* against the lambda in force, reinforcing steps shaded; one choice a run."""
    choices = {
        run.label: _cliff(run, index)
        for index, arm in enumerate(study.arms)
        for run in arm.runs
        if len(run.series("cliff/lambda_star"))
    }
    if not choices:
        return None
    return _of_runs("cliff", "λ* and the λ in force over training steps", choices)


def credit_panel(study: Study) -> Panel | None:
    """Influence credits of the candidate ratios over steps; one choice a run."""
    choices = {run.label: _credits(run, ratios) for run in study.runs if (ratios := credit_ratios(run))}
    return _of_runs("credits", "Influence credit of candidate ratios over training steps", choices) if choices else None


def route_shares(run: Run) -> Floats:
    """Return [n, 1 + len(ROUTES)]: the step and the share of its groups on each route.

    The log counts a group with both losses under `distil` and under `rl`: what the counts hold beyond the groups of a
    step are such groups.
    """
    rows = run.series(*(f"route/{name}_groups" for name in ("distil", "rl", "nll", "skip")))
    rows = rows[rows[:, 1:].any(axis=1)]
    distil, rl, nll, skip = rows[:, 1:].T
    counted = rows[:, 1:].sum(axis=1)
    groups = setting(run.config, "step.problems") or counted
    both = np.clip(counted - groups, 0, np.minimum(distil, rl))
    shares = np.stack([distil - both, both, rl - both, nll, skip], axis=1) / (counted - both)[:, None]
    return np.concatenate([rows[:, :1], shares], axis=1)


def credit_ratios(run: Run) -> list[str]:
    """Return the candidate ratios that have a credit, rising, as the keys spell them."""
    prefix = "exposure/credit/"
    return sorted({key[len(prefix) :] for row in run.rows for key in row if key.startswith(prefix)}, key=float)


def _of_runs(name: str, description: str, choices: Mapping[str, Figure], rest: str = "") -> Panel:
    """A panel of one figure a run, as many as are allowed."""
    if len(choices) > RUNS:
        rest += f" Shown for {RUNS} of {len(choices)}."
    return Panel(name, description, CAPTIONS[name] + rest, dict(list(choices.items())[:RUNS]))


def _routes_by_run(arm: Arm) -> dict[str, Floats]:
    found = {run.label: route_shares(run) for run in arm.runs}
    return {label: points for label, points in found.items() if len(points)}


def _only_distils(points: Floats) -> bool:
    return not points[:, 2:].any()


def _stack(points: Floats) -> Figure:
    kept = thin(points)
    data = [
        {
            "type": "scatter",
            "mode": "lines",
            "name": words,
            "x": short(kept[:, 0]),
            "y": short(kept[:, column]),
            "stackgroup": "routes",
            "line": {"color": f"@{name}", "width": 1, "shape": "hvh"},
            "fillcolor": f"@{name}/0.55",
            "fillpattern": _pattern(name),
            "hovertemplate": f"{words}: %{{y:.0%}}<extra></extra>",
        }
        for column, (name, words) in enumerate(ROUTES.items(), start=1)
        if points[:, column].any()
    ]
    frame = layout("step", "share of groups", y_percent=True) | legend()
    frame["yaxis"] |= {"range": [0, 1]}
    return {"data": data, "layout": frame | {"hovermode": "x unified"}}


def _pattern(name: str) -> Figure:
    """Hatching, so that routes are told apart without colour."""
    return {"shape": PATTERNS[name], "fgcolor": "@surface", "fillmode": "overlay", "size": 7, "solidity": 0.25}


def _cliff(run: Run, arm: int) -> Figure:
    """lambda* has gaps where it is infinite; where no lambda in force was logged the target's own is drawn."""
    wanted = setting(run.config, "target.lambda_x") or np.nan
    rows = [row for row in run.rows if row["step"] > 0 and ("cliff/lambda_star" in row or "cliff/lambda" in row)]
    numbers = [
        (
            row["step"],
            row.get("cliff/lambda_star", np.nan),
            row.get("cliff/lambda", wanted),
            row.get("cliff/reinforcing", 0.0),
        )
        for row in rows
    ]
    points = thin(np.array(numbers, dtype=np.float64).reshape(-1, 4))
    data = [_shade(points)] if points[:, 3].any() else []
    bound = line(arm, "λ*, the largest safe λ", points[:, [0, 1]], markers=True, shape="hvh")
    bound["line"] |= {"color": "@text", "dash": "dot"}
    bound["marker"] |= {"color": "@text", "symbol": "circle", "size": [4 * one for one in _isolated(points[:, 1])]}
    data.append(bound)
    if not np.isnan(points[:, 2]).all():
        data.append(line(arm, "λ in force", points[:, [0, 2]], shape="hvh"))
    for trace in data:
        trace.pop("meta", None)
    frame = layout("step", "λ") | legend()
    frame["yaxis"] |= {"range": _cliff_range(points), "overlaying": "y2", "tickmode": "auto"}  # lines above the shade
    frame["yaxis2"] = axis("") | {"range": [0, 1], "visible": False}
    return {"data": data, "layout": frame}


def _cliff_range(points: Floats) -> Sequence[float]:
    """Room for both lines; a lambda* far above what is asked for runs out at the top."""
    low, high = float(np.nanmin(points[:, 1:3])), float(np.nanmax(points[:, 1:3]))
    asked = points[:, 2][~np.isnan(points[:, 2])]
    if len(asked) and asked.max() > 1:
        high = min(high, 1 + 4 * (float(asked.max()) - 1))
    pad = 0.06 * (high - low) or 0.05
    return [low - pad, high + pad]


def _isolated(values: Floats) -> list[bool]:
    """Tell which values stand between gaps, where no line would show them."""
    gaps = np.isnan(np.concatenate([[np.nan], values, [np.nan]]))
    alone: list[bool] = (~gaps[1:-1] & gaps[:-2] & gaps[2:]).tolist()
    return alone


def _shade(points: Floats) -> Figure:
    """The reinforcing steps as areas over the whole height."""
    return {
        "type": "scatter",
        "mode": "lines",
        "name": "reinforcing steps",
        "x": short(points[:, 0]),
        "y": short(points[:, 3]),
        "yaxis": "y2",
        "line": {"width": 0, "shape": "hvh"},
        "fill": "tozeroy",
        "fillcolor": "@rl/0.14",
        "fillpattern": _pattern("rl"),
        "hoverinfo": "skip",
    }


def _credits(run: Run, ratios: Sequence[str]) -> Figure:
    data = []
    for number, ratio in enumerate(ratios):
        trace = line(number, f"ratio {ratio}", run.series(f"exposure/credit/{ratio}"), markers=True, width=1.8)
        shade = f"@heat-high/{0.45 + 0.55 * number / max(1, len(ratios) - 1):.2f}"
        trace["line"] |= {"color": shade, "dash": "solid"}
        trace["marker"] |= {"color": shade, "symbol": symbol(number)}
        del trace["meta"]
        data.append(trace)
    frame = layout("step", "credit") | legend()
    frame["yaxis"] |= {"zeroline": True, "zerolinecolor": "@axis"}
    return {"data": data, "layout": frame}
