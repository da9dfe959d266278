"""Figures of a shape of their own: what draws the panels that are not plain lines over steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from atesd.report.checked import is_number
from atesd.report.compare import accuracy, finals
from atesd.report.plots import FROM_ZERO, Choices, Draw, Quantity, by_arm, mean_by_step, names_in, natural
from atesd.report.study import Arm, Evaluation, Floats, Run, Study, setting
from atesd.report.traces import (
    Figure,
    axis,
    band_opacity,
    banded,
    binned,
    cloud,
    colour,
    figure,
    intervals,
    line,
    of_no_arm,
    short,
    thin,
    with_legend,
)

CURVE_RESAMPLES = 1000  # for bands and levels; the final table takes more
DENSITY_STEPS = 100  # heat maps are the largest figures
CONCENTRATION_MOST = 1e9  # of a Beta policy: more, or 0, is no policy's
LOG_MOST = 100.0  # of a density that can be drawn
WHOLE = "exposure/"  # prefix of the policy that all problems share
REWARD_TERMS = {"reward": "reward", "reward_lp": "learning progress", "reward_gt": "teacher-grounded"}
ROUTES = {  # words and hatching in the order of the stack; the style sheet has a colour of each name
    "distil": ("distilled", ""),
    "both": ("distilled and reinforced", "x"),
    "rl": ("reinforced", "/"),
    "nll": ("trained on the reference", "."),
    "skip": ("skipped", "-"),
}


def accuracy_bands(study: Study) -> Choices:
    """Average@k on held-out problems over steps: mean over seeds, with its 95 % band."""
    traces: list[Figure] = []
    for index, arm in enumerate(study.arms):
        if points := accuracy_curve(arm):
            traces += banded(index, arm.name, points, opacity=band_opacity(len(study.arms)))
    return {"": figure(traces, "step", f"Average@{study.k}", percent=True)} if traces else {}


def accuracy_curve(arm: Arm) -> list[tuple[int, dict[str, float]]]:
    """Return steps with Average@k and its interval, where all runs of the arm were evaluated."""
    return [(step, found) for step, evaluations in _by_step(arm) if (found := _accuracy(evaluations))]


def level_intervals(study: Study) -> Choices:
    """Final accuracy of every arm at every level, with 95 % intervals."""
    found = [_by_level(arm) for arm in study.arms]
    names = sorted({level for levels in found for level in levels}, key=natural)
    drawn = [(index, levels) for index, levels in enumerate(found) if levels]
    if len(names) < 2:
        return {}
    places = {level: place for place, level in enumerate(names)}
    traces = []
    for index, levels in drawn:
        shift = (index - (len(found) - 1) / 2) * 0.5 / len(drawn)
        traces.append(intervals(index, study.arms[index].name, levels, [places[level] + shift for level in levels]))
    shown = figure(traces, "", f"Average@{study.k}", percent=True)
    shown["layout"]["xaxis"] |= {"tickvals": [*places.values()], "ticktext": names, "range": [-0.5, len(names) - 0.5]}
    return {"": shown}


def trait_lines(study: Study) -> Choices:
    """How often evaluated completions have a trait, over steps; one choice a trait that ever occurs."""
    choices = {}
    for trait in study.traits:
        arms = by_arm(study, [_trait_series(arm, trait) for arm in study.arms])
        if any(points[:, 1].any() for _, _, points in arms):
            traces = [line(*arm, markers=True) for arm in arms]
            choices[trait.replace("_", " ")] = figure(traces, "step", "share of completions", percent=True, **FROM_ZERO)
    return choices


def clouds(quantity: Quantity) -> Draw:
    """A quantity against the exposure ratio, one point a step, with the medians of all arms."""

    def draw(study: Study) -> Choices:
        series = [[run.series("exposure/ratio", quantity.key) for run in arm.runs] for arm in study.arms]
        arms = by_arm(study, [np.concatenate(runs) for runs in series])
        if not arms:
            return {}
        traces = [cloud(*arm, percent=quantity.percent) for arm in arms]
        traces.append(binned(np.concatenate([points for _, _, points in arms])))
        drawn = figure(traces, "exposure ratio", quantity.label, percent=quantity.percent, **FROM_ZERO)
        drawn["layout"]["xaxis"] |= {"range": [-0.03, 1.03]}
        return {"": drawn}

    return draw


def densities(run: Run, arm: int) -> Choices:
    """A Beta policy's density over steps, with the ratios that were drawn; one choice a policy."""
    return {label: _density(run, arm, prefix) for label, prefix in policies(run).items()}


def reward_rows(run: Run, arm: int) -> Choices:
    """The reward of a Beta policy and its terms one above the other, each on its own scale; one choice a policy."""
    choices = {}
    for label, prefix in policies(run).items():
        terms = {words: run.series(prefix + key) for key, words in REWARD_TERMS.items()}
        if any(map(len, terms.values())):
            choices[label] = _rows({words: points for words, points in terms.items() if len(points)}, arm)
    return choices


def policies(run: Run) -> dict[str, str]:
    """Return label and key prefix of a run's Beta policies: of the only one, or of one for each difficulty bin."""
    whole = {run.label: WHOLE} if any(f"{WHOLE}ka" in row for row in run.rows) else {}
    bins = names_in([run], f"{WHOLE}{{}}/ka")
    ends = {0: "easiest problems", len(bins) - 1: "hardest problems"}
    names = [ends.get(index, f"problems of difficulty {index + 1} of {len(bins)}") for index in range(len(bins))]
    return whole | {f"{run.label}, {name}": f"{WHOLE}{key}/" for name, key in zip(names, bins, strict=True)}


def binned_policies(study: Study) -> str:
    """Say what the line in a density of a difficulty bin is, where there are bins."""
    if all(prefix == WHOLE for run in study.runs for prefix in policies(run).values()):
        return ""
    return " For a difficulty bin, whose draws are not logged, the line is the policy's mean."


def beta_density(ratios: Floats, ka: Floats, kb: Floats) -> Floats:
    """Return [R, S]: x^(ka-1) (1-x)^(kb-1) / B(ka, kb) at R ratios for S parameter pairs."""
    constants = [math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) for a, b in zip(ka, kb, strict=True)]
    logs = np.outer(np.log(ratios), ka - 1) + np.outer(np.log1p(-ratios), kb - 1) + np.array(constants)
    density: Floats = np.exp(np.minimum(logs, LOG_MOST))
    return density


def route_stacks(study: Study) -> Choices:
    """Shares of the groups by route of arms that did not only distil; one choice a run and the mean over seeds."""
    choices: dict[str, Figure] = {}
    for arm in study.arms:
        found = _routes_by_run(arm)
        if _only_distils(found):
            continue
        if len(found) > 1:
            choices[f"{arm.name}, mean over seeds"] = _stack(mean_by_step(found.values()))
        choices |= {label: _stack(points) for label, points in found.items()}
    return choices


def plain_arms(study: Study) -> str:
    """Name the arms that the figure of routes leaves out."""
    routes = {arm.name: _routes_by_run(arm) for arm in study.arms}
    plain = [name for name, found in routes.items() if found and _only_distils(found)]
    return f" Left out, as every group was distilled: {', '.join(plain)}." if plain else ""


def route_shares(run: Run) -> Floats:
    """Return [n, 1 + len(ROUTES)]: the step and the share of its groups on each route.

    A group with both losses is counted under `distil` and `rl` too. Runs of version 1 did not log `both`.
    """
    rows = run.series(*(f"route/{name}_groups" for name in ("distil", "both", "rl", "nll", "skip")), default=0.0)
    counts = rows[:, 1:] - rows[:, [2]] * [1, 0, 1, 0, 0]
    kept = (counts >= 0).all(axis=1) & counts.any(axis=1)
    return np.concatenate([rows[kept, :1], counts[kept] / counts[kept].sum(axis=1, keepdims=True)], axis=1)


def cliff_lines(run: Run, arm: int) -> Choices:
    """lambda* against the lambda in force, reinforcing steps shaded.

    lambda* has gaps where it is infinite; where no lambda in force was logged the target's own is drawn.
    """
    points = run.series("cliff/lambda_star", "cliff/lambda", "cliff/reinforcing", default=np.nan)
    points = thin(points[points[:, 0] > 0])
    steps, bound, asked, reinforcing = points.T
    if np.isnan(bound).all():
        return {}
    own = setting(run.config, "target.lambda_x")
    asked = np.where(np.isnan(asked), own if is_number(own) and own else np.nan, asked)
    traces = [_shade(np.stack([steps, np.nan_to_num(reinforcing)], axis=1))] if np.nansum(reinforcing) else []
    limit = line(arm, "λ*, the largest safe λ", points[:, :2], markers=True, shape="hvh")
    limit["marker"] |= {"symbol": "circle", "size": [4 * alone for alone in _isolated(bound)]}
    traces.append(of_no_arm(limit, "@text", dash="dot"))
    if not np.isnan(asked).all():
        in_force = line(arm, "λ in force", np.stack([steps, asked], axis=1), shape="hvh")
        traces.append(of_no_arm(in_force, colour(arm)))
    # the lines lie above the shade, which has an axis of its own
    drawn = figure(traces, "step", "λ", range=_lambda_range(bound, asked), overlaying="y2", tickmode="auto")
    return {run.label: with_legend(drawn, yaxis2=axis("") | {"range": [0, 1], "visible": False})}


def _by_step(arm: Arm) -> list[tuple[int, list[Evaluation]]]:
    """Group an arm's evaluations by step, leaving out steps that only some of its runs have reached."""
    found: dict[int, list[Evaluation]] = {}
    for run in arm.runs:
        for evaluation in run.evaluations:
            found.setdefault(evaluation.step, []).append(evaluation)
    return [(step, found[step]) for step in sorted(found) if len(found[step]) == len(arm.runs)]


def _accuracy(evaluations: Sequence[Evaluation]) -> dict[str, float] | None:
    return accuracy(evaluations, resamples=CURVE_RESAMPLES)


def _by_level(arm: Arm) -> dict[str, dict[str, float]]:
    """Return an arm's final accuracy at every level; none where its runs had other numbers of problems at one."""
    levels = sorted({level for evaluation in finals(arm) for level in evaluation.levels if level}, key=natural)
    parts = {level: [evaluation.at(level) for evaluation in finals(arm)] for level in levels}
    if any(len({len(each.problem_ids) for each in found}) > 1 for found in parts.values()):
        return {}
    return {level: entry for level, found in parts.items() if (entry := _accuracy(found))}


def _trait_series(arm: Arm, trait: str) -> Floats:
    rows = [
        [step, np.mean([evaluation.traits.get(trait, 0.0) for evaluation in evaluations])]
        for step, evaluations in _by_step(arm)
    ]
    return np.array(rows, dtype=np.float64).reshape(-1, 2)


def _density(run: Run, arm: int, prefix: str) -> Figure:
    points = run.series(f"{prefix}ka", f"{prefix}kb")
    points = thin(points[((points[:, 1:] > 0) & (points[:, 1:] < CONCENTRATION_MOST)).all(axis=1)], DENSITY_STEPS)
    grid = np.linspace(0.0125, 0.9875, 40)
    heat = {
        "type": "heatmap",
        "x": short(points[:, 0]),
        "y": short(grid),
        "z": [[float(f"{value:.3g}") for value in row] for row in beta_density(grid, points[:, 1], points[:, 2])],
        "zmin": 0,
        "colorscale": [[0, "@surface"], [0.5, "@heat-middle"], [1, "@heat-high"]],
        "colorbar": {"title": {"text": "density", "side": "right"}, "thickness": 10, "outlinewidth": 0, "len": 0.9},
        "hovertemplate": "step %{x}, ratio %{y:.2f}<br>density %{z:.3~g}<extra></extra>",
    }
    name, key = ("drawn ratio", "exposure/ratio") if prefix == WHOLE else ("mean of the policy", f"{prefix}mean")
    drawn = of_no_arm(line(arm, name, run.distilled.series(key), shape="hv", width=1.2), "@text")
    return figure([heat, drawn], "step", "exposure ratio", range=[0, 1], showgrid=False)


def _rows(terms: Mapping[str, Floats], arm: int) -> Figure:
    """Lines one above the other, each under its name."""
    drawn = figure([], "step", "")
    frame = drawn["layout"]
    frame["annotations"] = []
    for row, (name, points) in enumerate(terms.items()):
        number, top = str(row + 1) if row else "", 1 - row / len(terms)
        term = of_no_arm(line(arm, name, points, markers=True, width=1.4), colour(arm))
        drawn["data"].append(term | {"xaxis": "x", "yaxis": f"y{number}"})
        frame[f"yaxis{number}"] = axis("") | {"domain": [top - 1 / len(terms) + 0.02, top - 0.09], "nticks": 5}
        frame["annotations"].append(_heading(name, top))
    frame["xaxis"] |= {"anchor": drawn["data"][-1]["yaxis"]}
    return drawn


def _heading(text: str, top: float) -> Figure:
    place = {"xref": "paper", "x": 0, "xanchor": "left", "yref": "paper", "y": top, "yanchor": "top"}
    return {"text": text, "showarrow": False, "font": {"color": "@text"}, **place}


def _routes_by_run(arm: Arm) -> dict[str, Floats]:
    found = {run.label: route_shares(run) for run in arm.runs}
    return {label: points for label, points in found.items() if len(points)}


def _only_distils(found: Mapping[str, Floats]) -> bool:
    return not any(points[:, 2:].any() for points in found.values())


def _stack(points: Floats) -> Figure:
    traces = [
        of_no_arm(line(0, words, points[:, [0, column]], shape="hvh", width=1), f"@{name}")
        | {"stackgroup": "routes", "fillcolor": f"@{name}/0.55", "fillpattern": _hatching(name)}
        | {"hovertemplate": f"{words}: %{{y:.0%}}<extra></extra>"}
        for column, (name, (words, _)) in enumerate(ROUTES.items(), start=1)
        if points[:, column].any()
    ]
    return with_legend(figure(traces, "step", "share of groups", percent=True, range=[0, 1]), hovermode="x unified")


def _hatching(route: str) -> Figure:
    """A pattern, so that routes are told apart without colour."""
    return {"shape": ROUTES[route][1], "fgcolor": "@surface", "fillmode": "overlay", "size": 7, "solidity": 0.25}


def _lambda_range(bound: Floats, asked: Floats) -> Sequence[float]:
    """Room for both lines; a lambda* far above what is asked for runs out at the top."""
    both = np.concatenate([bound, asked])
    low, high = float(np.nanmin(both)), float(np.nanmax(both))
    most = np.max(asked, initial=1.0, where=~np.isnan(asked))
    if most > 1:
        high = min(high, 1 + 4 * (float(most) - 1))
    pad = 0.06 * (high - low) or 0.05
    return [low - pad, high + pad]


def _isolated(values: Floats) -> list[bool]:
    """Tell which values stand between gaps, where no line would show them."""
    gaps = np.isnan(np.concatenate([[np.nan], values, [np.nan]]))
    alone: list[bool] = (~gaps[1:-1] & gaps[:-2] & gaps[2:]).tolist()
    return alone


def _shade(points: Floats) -> Figure:
    """The reinforcing steps as areas over the whole height."""
    shade = of_no_arm(line(0, "reinforcing steps", points, shape="hvh", width=0), "@rl")
    area = {"fill": "tozeroy", "fillcolor": "@rl/0.14", "fillpattern": _hatching("rl")}
    return shade | area | {"yaxis": "y2", "hoverinfo": "skip"}
