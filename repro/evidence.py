"""Turn finished comparisons into the numbers, figures and tables of docs/evidence.md.

    python repro/evidence.py comparison RUNS NAME BASE [ONE:OTHER ...]
                                                          accuracy of every arm, paired differences to the arm BASE,
                                                          and of ONE to OTHER
    python repro/evidence.py codes RUNS                   how often every latent code steers, over training
    python repro/evidence.py cliff RUNS                   parse rate and clip against lambda, lambda* marked
    python repro/evidence.py curriculum RUNS              exposure against the perplexity of the references
    python repro/evidence.py aligned RUNS [COST]          `aligned` against the best fixed ratio, on every tier in RUNS;
                                                          COST: runs of both on a quiet machine, one at a time
    python repro/evidence.py agents RUNS                  success of every arm, and what exposure and gate add together
    python repro/evidence.py smollm2 RUNS MISMATCH        every arm on a real model, and what repro/mismatch.py measured

Each writes docs/evidence/NAME.json and NAME.svg and prints a Markdown table.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from atesd.evaluate.metrics import Difference, paired_difference
from atesd.files import dump_json, read_jsonl, write_atomic
from atesd.report.compare import accuracy, accuracy_matrix, are_shared, difference, finals, seconds, starts
from atesd.report.load import load_comparison
from atesd.report.quality import qualities, reading, said
from atesd.report.study import Arm, Study
from atesd.runlog import RunDir

from figure import write_figure

OUT = Path(__file__).parents[1] / "docs" / "evidence"
COLOURS = ("#0072b2", "#d55e00", "#009e73")
PARSED = re.compile(r"^#\d$", re.MULTILINE)
BLOCK, RESAMPLES = 3, 4_000
PERPLEXITY = "perplexity of the step's references"
Windows = tuple[np.ndarray, np.ndarray]
Panel = tuple[str, Mapping[str, Sequence[float]], float | None]


def main(arguments: Sequence[str]) -> None:
    """Run one of them."""
    kind, folder, *rest = arguments
    OUT.mkdir(parents=True, exist_ok=True)
    kinds = {
        "comparison": comparison,
        "cliff": cliff,
        "curriculum": curriculum,
        "codes": codes,
        "aligned": aligned,
        "agents": agents,
        "smollm2": smollm2,
    }
    kinds[kind](Path(folder), *rest)


def comparison(folder: Path, name: str, base: str, *pairs: str) -> None:
    """Accuracy of every arm with its interval, its difference to the base over common seeds, its cost and routes.

    `pairs` are further differences, each as `one:other`.
    """
    study = load_comparison(folder)
    arms = {arm.name: arm for arm in study.arms}
    reference = np.mean([seconds(arm) for arm in study.arms if arm.name == base])
    found: dict[str, Any] = {"start": accuracy(starts(study)), "k": study.k, "seeds": list(study.seeds), "arms": {}}
    print(f"| arm | Average@{study.k} | 95 % | minus `{base}` | 95 % | time | distil / rl / skip |")
    print("|---|---|---|---|---|---|---|")
    for arm in sorted(arms.values(), key=lambda arm: -(accuracy(finals(arm)) or {"average_at_k": 0})["average_at_k"]):
        own, pair = accuracy(finals(arm)), difference(arm, arms[base])
        if own is None or pair is None:
            continue
        routes = route_shares(folder / arm.name)
        cost = seconds(arm) / reference
        found["arms"][arm.name] = own | {"minus_base": pair._asdict(), "relative_time": cost, "routes": routes}
        print(
            f"| `{arm.name}` | {own['average_at_k']:.3f} | {own['low']:.3f} to {own['high']:.3f} | "
            f"{pair.difference:+.3f} | {pair.low:+.3f} to {pair.high:+.3f} | {cost:.2f} | "
            f"{' / '.join(f'{share:.0%}' for share in routes.values())} |"
        )
    if pairs:
        print("\n| pair | difference | 95 % |\n|---|---|---|")
        found["pairs"] = {}
    for one, other in (pair.split(":") for pair in pairs):
        apart = difference(arms[one], arms[other])
        if apart is not None:
            found["pairs"][f"{one}:{other}"] = apart._asdict()
            print(f"| `{one}` - `{other}` | {apart.difference:+.3f} | {apart.low:+.3f} to {apart.high:+.3f} |")
    if numbers := qualities(study, [(arm, base) for arm in arms if arm != base]):
        found |= {"quality": numbers, "first_step": {arm.name: first_step(arm) for arm in study.arms}}
        print_quality(study, found)
    write_atomic(OUT / f"{name}.json", dump_json(found))
    write_figure(folder, OUT / f"{name}.svg")


def print_quality(study: Study, found: Mapping[str, Any]) -> None:
    """Print numbers about a flow's samples with their differences to the base, and the first step's mismatch."""
    for name, entry in found["quality"].items():
        print(f"\n| arm | {name} (t, 95 %) | minus the base (t, 95 %) | reading |\n|---|---|---|---|")
        print(f"| start | {said(entry['start'])} | | |")
        for arm in study.arms:
            pair = next((pair for key, pair in entry["paired"].items() if key.startswith(f"{arm.name}-")), None)
            words = f"{said(pair, '+')} | {reading(pair)}" if pair else " | "
            print(f"| `{arm.name}` | {said(entry['arms'].get(arm.name))} | {words} |")
    print("\n| arm | exposure of step 1 | divergence | top-1 disagreement |\n|---|---|---|---|")
    for arm, numbers in found["first_step"].items():
        print(f"| `{arm}` | {' | '.join(format(value, '.4g') for value in numbers.values())} |")


def first_step(arm: Arm) -> dict[str, float]:
    """Return means over seeds of what the first step logged, when all arms' students are still the same."""
    keys = ("exposure/ratio", "divergence/mean", "mismatch/top1")
    rows = [row for run in arm.runs for row in run.rows if row["step"] == 1]
    return {key: float(np.mean([row[key] for row in rows])) for key in keys} if rows else dict.fromkeys(keys, 0.0)


def aligned(folder: Path, cost: str = "") -> None:
    """Say on every tier how far `aligned` is from the best fixed ratio, and from `learned`, and what it costs.

    A tier is a comparison that holds the three arms; its one arm of another name is the best fixed ratio, chosen on
    other seeds. A deficit is the best fixed ratio's accuracy minus `aligned`'s: below 0 where that is ahead. Without
    runs of their own costs are those of the study, which a shared machine distorts.
    """
    tiers: dict[str, Any] = {}
    quiet = Path(cost) if cost else None
    print("| tier | seeds | best fixed ratio | aligned | deficit | 95 % | minus learned | 95 % | time |")
    print("|---|---|---|---|---|---|---|---|---|")
    for place in sorted(path for path in folder.iterdir() if path.is_dir()):
        study = load_comparison(place)
        arms = {arm.name: arm for arm in study.arms}
        (best,) = set(arms) - {"aligned", "learned"}
        own, fixed = accuracy(finals(arms["aligned"])), accuracy(finals(arms[best]))
        lost, gained = difference(arms[best], arms["aligned"]), difference(arms["aligned"], arms["learned"])
        if own is None or fixed is None or lost is None or gained is None:
            raise SystemExit(f"{place} has no seed with complete runs of all three arms: let the comparison go on")
        times, steps = relative_cost(quiet or place, run_seconds), relative_cost(quiet or place, step_seconds)
        tiers[place.name] = {
            "seeds": len(study.seeds),
            "best_fixed": fixed["average_at_k"],
            "best_fixed_arm": best,
            "aligned": own["average_at_k"],
            "deficit": lost.difference,
            "deficit_low": lost.low,
            "deficit_high": lost.high,
            "cost": float(np.median(times)),
            "cost_range": [min(times), max(times)],
            "cost_of_steps": float(np.median(steps)),
            "cost_of_steps_range": [min(steps), max(steps)],
            "seeds_listed": list(study.seeds),
            "minus_learned": gained.difference,
            "minus_learned_low": gained.low,
            "minus_learned_high": gained.high,
        }
        print(
            f"| {place.name} | {len(study.seeds)} | `{best}` {fixed['average_at_k']:.3f} | {own['average_at_k']:.3f} | "
            f"{lost.difference:+.3f} | {lost.low:+.3f} to {lost.high:+.3f} | {gained.difference:+.3f} | "
            f"{gained.low:+.3f} to {gained.high:+.3f} | {np.median(times):.2f} |"
        )
    write_atomic(OUT / "aligned.json", dump_json({"tiers": tiers}))


def agents(folder: Path) -> None:
    """Success of every arm beside GRPO's, exposure over the run, and the claim: is both better than the better single?

    Confirmed where the joint arm is ahead of the better of `sdar` and `atesd` by more than two standard errors over
    seeds, refuted within one of it or below, else undecided.
    """
    study = load_comparison(folder)
    arms = {arm.name: arm for arm in study.arms}
    found: dict[str, Any] = {"start": accuracy(starts(study)), "k": study.k, "seeds": list(study.seeds), "arms": {}}
    print(f"| arm | success (Average@{study.k}) | 95 % | minus `grpo` | 95 % | ratio, first and last steps | turns |")
    print("|---|---|---|---|---|---|---|")
    for name, arm in arms.items():
        own, pair = accuracy(finals(arm)), difference(arm, arms["grpo"])
        if own is None or pair is None:
            raise SystemExit(f"arm {name} in {folder} has no complete run: let the comparison go on")
        logs = [RunDir.open(run).metrics()[1:] for run in runs_of(folder / name)]
        ratios = [[row.get("exposure/ratio") for row in log] for log in logs]
        turns = float(np.mean([row["rollout/turns_mean"] for log in logs for row in log]))
        path = None if name == "grpo" else np.nanmean(np.array(ratios, dtype=float), axis=0).tolist()
        found["arms"][name] = own | {"minus_grpo": pair._asdict(), "mean_ratio": path, "turns": turns}
        seen = "" if path is None else f"{np.mean(path[:10]):.2f}, {np.mean(path[-10:]):.2f}"
        print(
            f"| `{name}` | {own['average_at_k']:.3f} | {own['low']:.3f} to {own['high']:.3f} | "
            f"{pair.difference:+.3f} | {pair.low:+.3f} to {pair.high:+.3f} | {seen} | {turns:.1f} |"
        )
    found["pairs"] = {}
    for one, other in (("atesd", "grpo_opsd"), ("sdar", "grpo_opsd"), ("sdar_atesd", "sdar"), ("atesd", "sdar")):
        pair = difference(arms[one], arms[other])
        assert pair is not None
        found["pairs"][f"{one} - {other}"] = pair._asdict()
        print(f"`{one}` - `{other}`: {pair.difference:+.3f}, 95 % {pair.low:+.3f} to {pair.high:+.3f}")
    single = max(("sdar", "atesd"), key=lambda name: found["arms"][name]["average_at_k"])
    pair = difference(arms["sdar_atesd"], arms[single])
    assert pair is not None
    by_seed = np.array(
        [
            float(np.nanmean(joint.final.rewards) - np.nanmean(alone.final.rewards))
            for joint, alone in zip(arms["sdar_atesd"].runs, arms[single].runs, strict=True)
            if joint.final is not None and alone.final is not None
        ]
    )
    error = float(by_seed.std(ddof=1) / np.sqrt(len(by_seed)))
    gained = float(by_seed.mean())
    verdict = "confirmed" if gained > 2 * error else "refuted" if gained <= error else "undecided"
    found["claim"] = {"better_single": single, **pair._asdict(), "standard_error": error, "verdict": verdict}
    print(
        f"\n`sdar_atesd` - `{single}`: {gained:+.3f}, standard error {error:.3f} over {len(by_seed)} seeds, "
        f"95 % {pair.low:+.3f} to {pair.high:+.3f}: {verdict}"
    )
    write_atomic(OUT / "agents.json", dump_json(found))
    write_figure(folder, OUT / "agents.svg")


def relative_cost(place: Path, seconds_of: Callable[[Path], float]) -> list[float]:
    """Return `aligned`'s seconds over those of the fixed ratio, seed by seed."""
    (best,) = {path.parent.name for path in place.glob("*/seed_*")} - {"aligned", "learned"}
    found = []
    for run in runs_of(place / "aligned"):
        other = place / best / run.name
        if (other / "result.json").is_file():
            found.append(seconds_of(run) / seconds_of(other))
    return found


def run_seconds(run: Path) -> float:
    """Return the seconds of a run with the recipe's evaluations, without loading."""
    return sum(row.get("time/step_s", row.get("time/eval_s", 0.0)) for row in RunDir.open(run).metrics())


def step_seconds(run: Path) -> float:
    """Return the seconds of a run's steps, evaluations left out."""
    return sum(row["time/step_s"] - row.get("time/eval_s", 0.0) for row in RunDir.open(run).metrics() if row["step"])


def smollm2(folder: Path, mismatch: str) -> None:
    """Accuracy of every arm, its gain over the warmed-up model and its difference to full exposure; mismatch beside."""
    study = load_comparison(folder)
    arms = {arm.name: arm for arm in study.arms}
    start = accuracy(starts(study))
    found: dict[str, Any] = {"start": start, "k": study.k, "seeds": list(study.seeds), "arms": {}}
    print(f"| arm | Average@{study.k} | 95 % | minus the start | 95 % | minus `full` | 95 % | minutes |")
    print("|---|---|---|---|---|---|---|---|")
    for arm in sorted(arms.values(), key=lambda arm: -(accuracy(finals(arm)) or {"average_at_k": 0})["average_at_k"]):
        own, gained, pair = accuracy(finals(arm)), gain(arm), difference(arm, arms["full"])
        if own is None or gained is None or pair is None:
            raise SystemExit(f"arm {arm.name} in {folder} has no complete run: let the comparison go on")
        minutes = seconds(arm) / 60
        found["arms"][arm.name] = own | {"gain": gained._asdict(), "minus_full": pair._asdict(), "minutes": minutes}
        print(
            f"| `{arm.name}` | {own['average_at_k']:.3f} | {own['low']:.3f} to {own['high']:.3f} | "
            f"{gained.difference:+.3f} | {gained.low:+.3f} to {gained.high:+.3f} | {pair.difference:+.3f} | "
            f"{pair.low:+.3f} to {pair.high:+.3f} | {minutes:.1f} |"
        )
    found["mismatch"] = json.loads(Path(mismatch).read_text(encoding="utf-8"))
    write_atomic(OUT / "smollm2.json", dump_json(found))
    write_figure(folder, OUT / "smollm2.svg")


def gain(arm: Arm) -> Difference | None:
    """Return an arm's final accuracy minus that of its own starts, over seeds and, within them, problems."""
    runs = [run for run in arm.runs if run.start is not None and run.final is not None]
    if not runs:
        return None
    evaluations = [run.final for run in runs if run.final] + [run.start for run in runs if run.start]
    both = accuracy_matrix(evaluations)
    shared = are_shared(evaluations)
    return paired_difference(both[: len(runs)], both[len(runs) :], shared=shared, resamples=RESAMPLES)


def route_shares(arm: Path) -> dict[str, float]:
    """Share of groups on each route, over all runs of an arm; a group on two counts in both."""
    totals = dict.fromkeys(("distil", "rl", "skip"), 0.0)
    groups = 0.0
    for run in runs_of(arm):
        for row in RunDir.open(run).metrics()[1:]:
            for route in totals:
                totals[route] += row.get(f"route/{route}_groups", 0.0)
            groups += max(1.0, sum(row.get(f"route/{route}_groups", 0.0) for route in totals))
    return {route: total / groups for route, total in totals.items()}


def runs_of(arm: Path) -> list[Path]:
    """Return the complete runs of an arm's folder."""
    return sorted(path.parent for path in arm.glob("seed_*/result.json"))


def cliff(folder: Path) -> None:
    """Parse rate, accuracy and clip of every lambda, and the threshold that the base's measurement predicts."""
    points: dict[str, list[dict[str, float]]] = {}
    predicted = []
    for run in (run for arm in sorted(folder.iterdir()) for run in runs_of(arm)):
        rows = RunDir.open(run).metrics()
        evaluation = list(read_jsonl(sorted((run / "eval").glob("step_*.jsonl"))[-1]))
        clips = [row["loss/clip_frac"] for row in rows if "loss/clip_frac" in row]
        predicted += [row["cliff/lambda_star"] for row in rows[:1] if "cliff/lambda_star" in row]
        points.setdefault(run.parent.name, []).append(
            {
                "parse": float(np.mean([bool(PARSED.search(row["completion"])) for row in evaluation])),
                "accuracy": float(np.mean([row["reward"] for row in evaluation])),
                "clip_frac": float(np.mean(clips)),
                "clip_frac_max": max(clips),
            }
        )
    star = float(np.mean(predicted))
    write_atomic(OUT / "cliff.json", dump_json({"lambda_star": star, "points": points}))
    print("| lambda | parse rate, each seed | accuracy | importance clip acts on |\n|---|---|---|---|")
    for name, seeds in points.items():
        parsed = ", ".join(format(seed["parse"], ".3f") for seed in seeds)
        right = np.mean([seed["accuracy"] for seed in seeds])
        clip, most = np.mean([seed["clip_frac"] for seed in seeds]), max(seed["clip_frac_max"] for seed in seeds)
        print(f"| {name} | {parsed} | {right:.3f} | {clip:.3%} of tokens, at most {most:.2%} |")
    print(f"predicted lambda* {star:.4f} from {len(predicted)} measurements at step 0")
    swept = {float(name): seeds for name, seeds in points.items() if name[0].isdigit()}
    panels = [
        ("parse rate", {f"{x:g}": [seed["parse"] for seed in seeds] for x, seeds in swept.items()}, 1.0),
        (
            "share of tokens at the clip",
            {f"{x:g}": [s["clip_frac"] for s in seeds] for x, seeds in swept.items()},
            None,
        ),
    ]
    write_atomic(OUT / "cliff.svg", draw_sweep(panels, [float(x) for x in swept], star))


def codes(folder: Path) -> None:
    """Share of chunks that each latent code steers over training, per arm that has codes; the mean over seeds."""
    curves: dict[str, dict[str, list[list[float]]]] = {}
    found: dict[str, Any] = {}
    print("| arm | most used code | least used code | entropy of the router | size | gain |\n|---|---|---|---|---|---|")
    for arm in load_comparison(folder).arms:
        logs = [[row for row in run.rows if "codes/entropy" in row] for run in arm.runs]
        if not all(logs):
            continue
        names = sorted((key for key in logs[0][0] if key.startswith("codes/share/")), key=lambda key: (len(key), key))
        curves[arm.name] = {name.rsplit("/")[-1]: [[row[name] for row in log] for log in logs] for name in names}
        last = [row for log in logs for row in log[-20:]]
        used = [float(np.mean([row[name] for row in last])) for name in names]
        rest = {key: float(np.mean([row[f"codes/{key}"] for row in last])) for key in ("entropy", "size", "gain")}
        found[arm.name] = {"shares": used, **rest}
        numbers = " | ".join(f"{value:.3g}" for value in rest.values())
        print(f"| `{arm.name}` | {max(used):.0%} | {min(used):.0%} | {numbers} |")
    write_atomic(OUT / "codes_use.json", dump_json(found))
    write_atomic(OUT / "codes_use.svg", draw_codes(curves))


def draw_codes(curves: Mapping[str, Mapping[str, list[list[float]]]]) -> str:
    """One panel an arm, one line a code: the mean over seeds, averaged over five steps."""
    parts: list[str] = []
    for number, (arm, lines) in enumerate(curves.items()):
        means = {code: smooth(np.mean(values, axis=0)) for code, values in lines.items()}
        high = max(mean.max() for mean in means.values())
        zero = 60 + number * 230 + 160
        title = f"{arm}: share of chunks that each of {len(means)} codes steers"
        parts += [label(70, zero - 175, title, bold=True), rule(70, 690, zero, zero)]
        parts += [label(64, zero + 4, "0 %", anchor="end"), label(64, zero - 156, f"{high:.0%}", anchor="end")]
        for index, (code, mean) in enumerate(means.items()):
            steps, heights = np.linspace(70, 690, len(mean)), zero - mean / high * 160
            colour = f"hsl({index * 360 // len(means)} 65% 42%)"
            parts.append(polyline(list(zip(steps, heights, strict=True)), colour))
            parts.append(label(694, heights[-1] + 4, code, colour=colour))
        parts.append(label(690, zero + 18, f"step {len(next(iter(lines.values()))[0])}", anchor="end"))
    return svg(720, 60 + 230 * len(curves), parts)


def curriculum(folder: Path) -> None:
    """Rank correlation of each window's exposure with its references' perplexity, per order of problems."""
    found: dict[str, Any] = {}
    curves: dict[str, dict[str, list[list[float]]]] = {}
    print("| order | windows | rank correlation | 95 %, block bootstrap | 95 % of permuted windows |")
    print("|---|---|---|---|---|")
    for arm in sorted(path for path in folder.iterdir() if runs_of(path)):
        windows = [windows_of(RunDir.open(run).metrics()) for run in runs_of(arm)]
        rng = np.random.default_rng(0)
        value = mean_rank_correlation(windows)
        boot = [mean_rank_correlation(resampled(windows, rng)) for _ in range(RESAMPLES)]
        null = [mean_rank_correlation([(rng.permutation(a), p) for a, p in windows]) for _ in range(RESAMPLES)]
        interval, chance = (np.nanpercentile(values, [2.5, 97.5]).tolist() for values in (boot, null))
        found[arm.name] = {"rank_correlation": value, "interval": interval, "permuted": chance, "seeds": len(windows)}
        count, spread = sum(len(ratio) for ratio, _ in windows), "{:+.2f} to {:+.2f}".format
        print(f"| `{arm.name}` | {count} | {value:+.2f} | {spread(*interval)} | {spread(*chance)} |")
        logs = [RunDir.open(run).metrics()[1:] for run in runs_of(arm)]
        curves[arm.name] = {
            PERPLEXITY: [[float(np.exp(row["curriculum/reference_nll"])) for row in log] for log in logs],
            "mean of the exposure policy": [[row["exposure/mean"] for row in log] for log in logs],
        }
    write_atomic(OUT / "curriculum.json", dump_json(found))
    write_atomic(OUT / "curriculum.svg", draw_curves(curves))


def windows_of(rows: Sequence[Mapping[str, float]]) -> Windows:
    """Return exposure and mean perplexity of every hold window: steps in a row that share one ratio."""
    ratios: list[float] = []
    nlls: list[list[float]] = []
    for row in rows:
        if "exposure/ratio" not in row or "curriculum/reference_nll" not in row:
            continue
        if not ratios or row["exposure/ratio"] != ratios[-1]:
            ratios.append(row["exposure/ratio"])
            nlls.append([])
        nlls[-1].append(row["curriculum/reference_nll"])
    return np.array(ratios), np.exp([np.mean(window) for window in nlls])


def mean_rank_correlation(windows: Iterable[Windows]) -> float:
    """Average Spearman's rho over seeds, so that differences between seeds do not count."""
    return float(np.mean([spearmanr(ratio, perplexity).statistic for ratio, perplexity in windows]))


def resampled(windows: Sequence[Windows], rng: np.random.Generator) -> list[Windows]:
    """Draw seeds, and within each blocks of consecutive windows."""
    drawn = []
    for index in rng.integers(0, len(windows), len(windows)):
        ratio, perplexity = windows[index]
        count = len(ratio)
        first = rng.integers(0, count - BLOCK + 1, -(-count // BLOCK))
        chosen = (first[:, None] + np.arange(BLOCK)).ravel()[:count]
        drawn.append((ratio[chosen], perplexity[chosen]))
    return drawn


def draw_sweep(panels: Sequence[Panel], xs: Sequence[float], star: float) -> str:
    """One panel below the other over lambda on a log scale: every seed a dot, their mean a line, lambda* dashed."""
    low, high = np.log(min(xs)) - 0.05, np.log(max(xs)) + 0.05
    parts = []
    for number, (title, values, top) in enumerate(panels):
        most = top or max(1e-9, *(max(seeds) for seeds in values.values())) * 1.15
        zero = 60 + number * 230 + 160

        def x(value: float) -> float:
            return float(70 + (np.log(value) - low) / (high - low) * 620)

        def y(value: float, zero: int = zero, most: float = most) -> float:
            return zero - value / (1.05 * most) * 160

        parts += [label(70, zero - 175, title, bold=True), rule(70, 690, zero, zero)]
        parts += [rule(70, 690, y(most), y(most), "#dddddd"), label(64, y(most) + 4, f"{most:.3g}", anchor="end")]
        parts += [label(64, zero + 4, "0", anchor="end")]
        parts.append(rule(x(star), x(star), zero - 165, zero, COLOURS[1], dashed=True))
        parts.append(label(x(star) + 5, zero - 60, f"predicted λ* {star:.3f}", colour=COLOURS[1]))
        points = [(x(float(name)), y(float(np.mean(seeds)))) for name, seeds in values.items()]
        parts.append(polyline(points, COLOURS[0]))
        for name, seeds in values.items():
            parts += [
                f'<circle cx="{x(float(name)):.1f}" cy="{y(seed):.1f}" r="3.5" fill="{COLOURS[0]}"/>' for seed in seeds
            ]
        shown = [value for value in xs if value in (1.0, 1.1, 1.25, 1.5, 2.0, 3.0, 5.0)]
        parts += [label(x(value), zero + 18, f"{value:g}", anchor="middle") for value in shown]
        parts.append(label(380, zero + 36, "λ, log scale", anchor="middle"))
    return svg(720, 60 + 230 * len(panels), parts)


def draw_curves(curves: Mapping[str, Mapping[str, list[list[float]]]]) -> str:
    """One panel a quantity over steps, one line an order: the mean over seeds, averaged over five steps."""
    titles = list(next(iter(curves.values())))
    parts: list[str] = []
    for number, title in enumerate(titles):
        means = {arm: smooth(np.mean(values[title], axis=0)) for arm, values in curves.items()}
        low, high = min(m.min() for m in means.values()), max(m.max() for m in means.values())
        zero = 60 + number * 230 + 160
        parts += [label(70, zero - 175, title, bold=True), rule(70, 690, zero, zero)]
        parts += [label(64, zero + 4, f"{low:.2f}", anchor="end"), label(64, zero - 156, f"{high:.2f}", anchor="end")]
        for index, (arm, mean) in enumerate(means.items()):
            steps = np.linspace(70, 690, len(mean))
            heights = zero - (mean - low) / ((high - low) or 1.0) * 160
            parts.append(polyline(list(zip(steps, heights, strict=True)), COLOURS[index]))
            parts.append(label(330 + 125 * index, zero - 175, arm, colour=COLOURS[index]))
        parts.append(label(690, zero + 18, f"step {len(next(iter(curves.values()))[title][0])}", anchor="end"))
    return svg(720, 60 + 230 * len(titles), parts)


def smooth(values: np.ndarray, width: int = 5) -> np.ndarray:
    """Average over windows of five steps."""
    return np.convolve(values, np.ones(width) / width, mode="valid")


def label(x: float, y: float, text: str, *, anchor: str = "start", colour: str = "#222222", bold: bool = False) -> str:
    """Return one line of text."""
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}"{weight}>{text}</text>'


def rule(x1: float, x2: float, y1: float, y2: float, colour: str = "#222222", *, dashed: bool = False) -> str:
    """Return a straight line."""
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"{dash}/>'


def polyline(points: Iterable[tuple[float, float]], colour: str) -> str:
    """Return a line through points."""
    joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{joined}" fill="none" stroke="{colour}" stroke-width="2.2"/>'


def svg(width: int, height: int, parts: Iterable[str]) -> str:
    """Return the figure on white."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="13">\n<rect width="{width}" height="{height}" fill="#ffffff"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
