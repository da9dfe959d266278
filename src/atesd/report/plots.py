"""The report's figures. Each function returns None where the runs hold no data for it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from atesd.report.compare import accuracy, are_shared, finals
from atesd.report.load import Arm, Evaluation, Floats, Run, Study
from atesd.report.traces import Figure, axis, band_opacity, banded, binned, cloud, intervals, layout, line, short, thin

CURVE_RESAMPLES = 1000  # for bands and levels; the final table takes more
DENSITY_RUNS, DENSITY_STEPS = 12, 100  # heat maps are the largest figures
EXPOSURE_SEEDS = 12

CURVES = {
    "loss/total": "Loss",
    "divergence/mean": "Mean divergence, nats",
    "divergence/p99": "Divergence, 99th percentile, nats",
    "mismatch/top1": "Top-1 disagreement",
    "student/entropy": "Student entropy, nats",
    "teacher/entropy": "Teacher entropy, nats",
    "reward/mean": "Reward of training completions",
    "rollout/length_mean": "Length of training completions, tokens",
    "optim/grad_norm": "Gradient norm",
    "optim/lr": "Learning rate",
    "time/step_s": "Seconds a step",
    "time/sample_s": "Seconds a step spent in sampling",
}
CHANGING_CURVES = {  # shown where they change
    "loss/rl": "Policy loss",
    "reward/uniform_groups": "Groups of equal rewards, which reinforce nothing",
    "rl/ratio": "Importance ratio of reinforced tokens",
    "rl/clip_frac": "Share of reinforced tokens held by a clip",
    "rl/sampler_weight": "Weight that corrects for the sampler",
    "rl/kl": "KL from the step-0 weights, nats",
    "route/mismatch_ema": "Mismatch that the teacher's retirement follows",
    "route/retired": "Whether the teacher has retired, 0 or 1",
    "exposure/paired_credit": "Paired credit: what more exposure would gain, nats",
}
SAME = 1e-6  # numbers that differ by less do not change
CAPTIONS = {
    "accuracy": "Mean over seeds; the band holds 95 % of what resampling seeds and problems gives. "
    "Step 0 is the model before training.",
    "exposure": "The share of the solution that the teacher saw in every step with a teacher.",
    "density": "Where the learned policy puts its next draw: strong colour is likely. "
    "The line is the ratio that was drawn.",
    "levels": "Final accuracy with 95 % intervals.",
    "traits": "Share of held-out completions with the trait, mean over seeds.",
    "curves": "What every step logged, mean over seeds.",
    "rewards": "A decision is scored after its look-ahead. The two terms are shown before their coefficient and "
    "normalisation, each on its own scale.",
    "mismatch": "How often the most probable tokens of teacher and student differ; one point a step.",
    "tail": "The largest divergences: one token in a hundred lies above. The dark line joins medians, with quartiles. "
    "Both also change as training goes on, and arms differ in that: read them together with the training curves.",
}
REWARD_TERMS = {
    "reward": "reward",
    "reward_lp": "learning progress",
    "reward_gt": "teacher-grounded",
}
WHOLE = "exposure/"  # prefix of the policy that all problems share


@dataclass(frozen=True)
class Panel:
    """One figure, or several among which the reader chooses by label."""

    name: str
    description: str
    caption: str
    choices: Mapping[str, Figure]


def accuracy_panel(study: Study) -> Panel | None:
    """Average@k on held-out problems over steps: mean over seeds, with its 95 % band."""
    traces: list[Figure] = []
    for index, arm in enumerate(study.arms):
        points = accuracy_curve(arm)
        if points:
            traces += banded(index, arm.name, points, opacity=band_opacity(len(study.arms)))
    if not traces:
        return None
    frame = layout("step", f"Average@{study.k}", y_percent=True)
    return Panel(
        "accuracy",
        f"Average@{study.k} over training steps",
        CAPTIONS["accuracy"],
        {"": {"data": traces, "layout": frame}},
    )


def accuracy_curve(arm: Arm) -> list[tuple[int, dict[str, float]]]:
    """Return steps with Average@k and its interval, where all runs of the arm were evaluated."""
    return [(step, found) for step, evaluations in _by_step(arm) if (found := _curve_point(evaluations))]


def exposure_panel(study: Study) -> Panel | None:
    """The exposure ratio of every step: the mean over seeds, or the runs of one seed."""
    seeds = list(dict.fromkeys(run.seed for run in study.runs))
    if len(seeds) == 1:
        choices = {"": _exposure(study, seeds)}
    else:
        choices = {"mean over seeds": _exposure(study, seeds)}
        choices |= {f"seed {seed}": _exposure(study, [seed]) for seed in seeds[:EXPOSURE_SEEDS]}
    choices = {label: figure for label, figure in choices.items() if figure["data"]}
    if not choices:
        return None
    return Panel("exposure", "Exposure ratio over training steps", CAPTIONS["exposure"], choices)


def density_panel(study: Study) -> Panel | None:
    """The Beta policy's density over steps, with the ratios that were drawn; one choice a run, or a difficulty bin."""
    learned = {
        label: (run, index, prefix)
        for index, arm in enumerate(study.arms)
        for run in arm.runs
        for label, prefix in policies(run).items()
    }
    if not learned:
        return None
    choices = {label: _density(*found) for label, found in list(learned.items())[:DENSITY_RUNS]}
    rest = f" Shown for {DENSITY_RUNS} of {len(learned)} policies." if len(learned) > DENSITY_RUNS else ""
    if any(prefix != WHOLE for _, _, prefix in learned.values()):
        rest += " For a difficulty bin, whose draws are not logged, the line is the policy's mean."
    return Panel("density", "Density of the learned exposure policy over steps", CAPTIONS["density"] + rest, choices)


def mismatch_panels(study: Study) -> list[Panel]:
    """Top-1 disagreement and the upper tail of the divergence against the exposure ratio, one point a step."""
    wanted = {
        "mismatch/top1": ("mismatch", "top-1 disagreement", True),
        "divergence/p99": ("tail", "divergence, 99th percentile, nats", False),
    }
    panels = []
    for key, (name, label, percent) in wanted.items():
        clouds = [
            (index, arm, _stacked(run.series("exposure/ratio", key) for run in arm.runs)) for index, arm in _arms(study)
        ]
        clouds = [(index, arm, points) for index, arm, points in clouds if len(points)]
        if clouds:
            traces = [cloud(index, arm.name, points, percent=percent) for index, arm, points in clouds]
            traces.append(binned(np.concatenate([points for _, _, points in clouds])))
            frame = layout("exposure ratio", label, y_percent=percent)
            frame["xaxis"] |= {"range": [-0.03, 1.03]}
            frame["yaxis"] |= {"rangemode": "tozero"}
            panels.append(
                Panel(name, f"{label} against exposure ratio", CAPTIONS[name], {"": {"data": traces, "layout": frame}})
            )
    return panels


def reward_panel(study: Study) -> Panel | None:
    """The controller's reward and its two terms, each on its own scale; one choice a run, or a difficulty bin."""
    choices = {
        label: _rewards(run, index, prefix)
        for index, arm in enumerate(study.arms)
        for run in arm.runs
        for label, prefix in policies(run).items()
        if len(run.series(f"{prefix}reward"))
    }
    return (
        Panel("rewards", "Reward of the exposure controller and its terms", CAPTIONS["rewards"], choices)
        if choices
        else None
    )


def level_panel(study: Study) -> Panel | None:
    """Final accuracy of every arm at every level, with 95 % intervals."""
    traces = []
    for index, arm in enumerate(study.arms):
        points = [(level, found) for level, evaluations in _by_level(arm) if (found := _curve_point(evaluations))]
        if points:
            traces.append(intervals(index, arm.name, points, shift=index - (len(study.arms) - 1) / 2))
    names = sorted({level for arm in study.arms for level, _ in _by_level(arm)}, key=_natural)
    if not traces or len(names) < 2:
        return None
    for trace in traces:
        shift = trace.pop("shift") * 0.5 / max(1, len(traces))
        trace["x"] = [names.index(level) + shift for level in trace["customdata"]]
    frame = layout("", f"Average@{study.k}", y_percent=True)
    frame["xaxis"] |= {"tickvals": list(range(len(names))), "ticktext": names, "range": [-0.5, len(names) - 0.5]}
    return Panel(
        "levels", f"Final Average@{study.k} by level", CAPTIONS["levels"], {"": {"data": traces, "layout": frame}}
    )


def trait_panel(study: Study) -> Panel | None:
    """How often evaluated completions have a trait, over steps; one choice a trait that ever occurs."""
    traits = sorted({trait for run in study.runs for evaluation in run.evaluations for trait in evaluation.traits})
    choices = {}
    for trait in traits:
        lines = [(index, arm.name, _trait_series(arm, trait)) for index, arm in _arms(study)]
        if any(points[:, 1].any() for _, _, points in lines):
            frame = layout("step", "share of completions", y_percent=True)
            frame["yaxis"] |= {"rangemode": "tozero"}
            data = [line(index, name, points, markers=True) for index, name, points in lines if len(points)]
            choices[trait.replace("_", " ")] = {"data": data, "layout": frame}
    return (
        Panel("traits", "Share of completions with a trait over steps", CAPTIONS["traits"], choices)
        if choices
        else None
    )


def curve_panel(study: Study) -> Panel | None:
    """Logged quantities of training over steps, mean over seeds; one choice a quantity."""
    choices = {}
    for key, label in (CURVES | CHANGING_CURVES | _contract_curves(study)).items():
        lines = [(index, arm.name, mean_series(arm, key)) for index, arm in _arms(study)]
        lines = [(index, name, points) for index, name, points in lines if len(points)]
        if lines and (key not in CHANGING_CURVES or changes(points for _, _, points in lines)):
            data = [line(index, name, points) for index, name, points in lines]
            choices[label] = {"data": data, "layout": layout("step", label)}
    return Panel("curves", "Logged quantities over training steps", CAPTIONS["curves"], choices) if choices else None


def beta_density(ratios: Floats, ka: Floats, kb: Floats) -> Floats:
    """Return [R, S]: x^(ka-1) (1-x)^(kb-1) / B(ka, kb) at R ratios for S parameter pairs."""
    constants = [math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) for a, b in zip(ka, kb, strict=True)]
    logs = np.outer(np.log(ratios), ka - 1) + np.outer(np.log1p(-ratios), kb - 1) + np.array(constants)
    density: Floats = np.exp(logs)
    return density


def policies(run: Run) -> dict[str, str]:
    """Return label and key prefix of a run's Beta policies: of the only one, or of one for each difficulty bin."""
    keys = {key for row in run.rows for key in row if key.startswith("exposure/") and key.endswith("/ka")}
    bins = sorted(key.removesuffix("ka") for key in keys - {f"{WHOLE}ka"})
    whole = {run.label: WHOLE} if f"{WHOLE}ka" in keys else {}
    return whole | {f"{run.label}, {difficulty(number, len(bins))}": prefix for number, prefix in enumerate(bins)}


def difficulty(number: int, bins: int) -> str:
    """Name a difficulty bin."""
    ends = {0: "easiest problems", bins - 1: "hardest problems"}
    return ends.get(number, f"problems of difficulty {number + 1} of {bins}")


def mean_series(arm: Arm, key: str) -> Floats:
    """Return [n, 2]: steps and means over the runs that logged the key there."""
    return mean_by_step(run.series(key) for run in arm.runs)


def mean_by_step(series: Iterable[Floats]) -> Floats:
    """Return one row a step: the mean of the rows that the series have for it."""
    stacked = _stacked(series)
    steps = np.unique(stacked[:, 0])
    means = np.array([stacked[stacked[:, 0] == step].mean(axis=0) for step in steps])
    return means.reshape(-1, stacked.shape[1])


def changes(series: Iterable[Floats]) -> bool:
    """Tell whether the second column of any series changes."""
    return any(bool(np.ptp(points[:, 1]) > SAME) for points in series)


def _contract_curves(study: Study) -> dict[str, str]:
    """Return the keys of the cliff's contract classes with their words."""
    words = {
        "cliff/p/": "Teacher's probability of the forced token",
        "cliff/b/": "Base's probability of the forced token",
    }
    keys = sorted({key for run in study.runs for row in run.rows for key in row if key.startswith(tuple(words))})
    return {key: f"{words[key[:8]]}, {key[8:]}" for key in keys}


def _arms(study: Study) -> list[tuple[int, Arm]]:
    return list(enumerate(study.arms))


def _by_step(arm: Arm) -> list[tuple[int, list[Evaluation]]]:
    """Group an arm's evaluations by step, leaving out steps that only some of its runs have reached."""
    found: dict[int, list[Evaluation]] = {}
    for run in arm.runs:
        for evaluation in run.evaluations:
            found.setdefault(evaluation.step, []).append(evaluation)
    return [(step, found[step]) for step in sorted(found) if len(found[step]) == len(arm.runs)]


def _by_level(arm: Arm) -> list[tuple[str, list[Evaluation]]]:
    """Cut an arm's final evaluations by level; nothing where its runs were evaluated on different problems."""
    if not are_shared(finals(arm)):
        return []
    levels = sorted({level for evaluation in finals(arm) for level in evaluation.levels if level}, key=_natural)
    return [(level, [_only(evaluation, level) for evaluation in finals(arm)]) for level in levels]


def _only(evaluation: Evaluation, level: str) -> Evaluation:
    kept = [index for index, name in enumerate(evaluation.levels) if name == level]
    return replace(
        evaluation,
        problem_ids=tuple(evaluation.problem_ids[index] for index in kept),
        levels=(level,) * len(kept),
        rewards=evaluation.rewards[kept],
        answers=tuple(evaluation.answers[index] for index in kept),
    )


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort `5 steps` before `10 steps`."""
    return [(int(word), "") if word.isdigit() else (0, word) for word in name.split()]


def _curve_point(evaluations: Sequence[Evaluation]) -> dict[str, float] | None:
    return accuracy(evaluations, resamples=CURVE_RESAMPLES)


def _trait_series(arm: Arm, trait: str) -> Floats:
    rows = [
        [step, np.mean([evaluation.traits.get(trait, 0.0) for evaluation in evaluations])]
        for step, evaluations in _by_step(arm)
    ]
    return np.array(rows, dtype=np.float64).reshape(-1, 2)


def _stacked(series: Iterable[Floats]) -> Floats:
    return np.concatenate(list(series))


def _exposure(study: Study, seeds: Sequence[int | None]) -> Figure:
    """One line an arm over the runs with one of the seeds."""
    arms = [
        (index, replace(arm, runs=tuple(_distilled(run) for run in arm.runs if run.seed in seeds)))
        for index, arm in _arms(study)
    ]
    lines = [(index, arm.name, mean_series(arm, "exposure/ratio")) for index, arm in arms if arm.runs]
    frame = layout("step", "exposure ratio")
    frame["yaxis"] |= {"range": [-0.03, 1.03]}
    data = [line(index, name, points, shape="hv", width=1.8) for index, name, points in lines if len(points)]
    return {"data": data, "layout": frame}


def _distilled(run: Run) -> Run:
    """Keep the steps in which a group was distilled: early logs have exposure ratios that nobody saw."""
    return replace(run, rows=[row for row in run.rows if row.get("route/distil_groups", 1) > 0])


def _density(run: Run, arm: int, prefix: str) -> Figure:
    points = thin(run.series(f"{prefix}ka", f"{prefix}kb"), DENSITY_STEPS)
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
    drawn = line(arm, name, _distilled(run).series(key), shape="hv", width=1.2)
    drawn["line"]["color"] = "@text"
    del drawn["meta"]
    frame = layout("step", "exposure ratio")
    frame["yaxis"] |= {"range": [0, 1], "showgrid": False}
    return {"data": [heat, drawn], "layout": frame}


def _rewards(run: Run, arm: int, prefix: str) -> Figure:
    terms = {prefix + key: label for key, label in REWARD_TERMS.items() if len(run.series(prefix + key))}
    frame = layout("step", "") | {"annotations": []}
    data = []
    for row, (key, label) in enumerate(terms.items()):
        term = line(arm, label, run.series(key), markers=True, width=1.4)
        del term["meta"]
        name = "yaxis" if row == 0 else f"yaxis{row + 1}"
        top = 1 - row / len(terms)
        frame[name] = axis("") | {"domain": [top - 1 / len(terms) + 0.02, top - 0.09], "nticks": 5}
        frame["annotations"].append(_heading(label, top))
        data.append(term | {"yaxis": name.replace("axis", ""), "xaxis": "x"})
    frame["xaxis"] |= {"anchor": f"y{len(terms)}" if len(terms) > 1 else "y"}
    return {"data": data, "layout": frame}


def _heading(text: str, top: float) -> Figure:
    place = {"xref": "paper", "x": 0, "xanchor": "left", "yref": "paper", "y": top, "yanchor": "top"}
    return {"text": text, "showarrow": False, "font": {"color": "@text"}, **place}
