"""Synthetic run directories, written through `RunDir` as `train` and `compare` write them.

The numbers are made up, but shaped like a real comparison: arms differ, evaluations are sampled per problem, the
learned arm logs a Beta policy, and rollouts hold chain-arithmetic completions with per-token streams. Two further arms
can be asked for: `composed` has every other control, `grpo` has no teacher. Run directories of version 1 can be asked
for too. Everything follows from the seed, so two calls write the same files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from atesd.files import dump_json, write_atomic
from atesd.runlog import FORMAT, RunDir

LEVELS = ("5 steps", "7 steps", "9 steps")
START = 0.36
ARMS = ("full", "half", "random", "learned")
END = {"full": 0.53, "half": 0.74, "random": 0.58, "learned": 0.69, "composed": 0.71, "grpo": 0.62}
OVERRIDES = {
    "full": ['exposure={kind="fixed", ratio=1.0}'],
    "half": ['exposure={kind="fixed", ratio=0.5}'],
    "random": ['exposure={kind="random"}'],
    "learned": ['exposure={kind="beta"}'],
}
EXPOSURE: dict[str, dict[str, Any]] = {
    "full": {"kind": "fixed", "ratio": 1.0},
    "half": {"kind": "fixed", "ratio": 0.5},
    "random": {"kind": "random", "low": 0.0, "high": 1.0},
    "learned": {"kind": "beta", "hold": 5, "lookahead": 10},
    "composed": {"kind": "influence", "grid": [0.0, 0.5, 1.0], "hold": 5},
    "grpo": {"kind": "fixed", "ratio": 1.0},
}
CONTROLS: dict[str, dict[str, Any]] = {
    "composed": {
        "target": {"kind": "extrapolate", "lambda_x": 1.35, "guard": False},
        "selection": {"kind": "tip", "score": "soft_or", "ratio": 0.5},
        "gate": {"kind": "sdar", "score": "gap", "beta": 5.0, "centered": False, "target": "divergence"},
        "routing": {"kind": "cliff", "uniform": "distil"},
        "curriculum": {"kind": "reverse_ppl", "rescore": "epoch"},
    },
    "grpo": {"routing": {"kind": "rl"}},
}
SEEN = {  # ends "The teacher sees ..."
    "full": "the whole solution (OPSD)",
    "half": "the first 50 % of the solution, always",
    "random": "a random share between 0 % and 100 %",
    "learned": "a learned share: a Beta policy",
    "composed": "a learned share: candidates mixed",
    "grpo": "nothing: the student is reinforced by its rewards",
}
SENTENCES = {
    "composed": ["The target goes beyond the teacher: λ 1.35", "Half of the tokens are distilled <TIP>"],
}
PROBLEMS = 32  # of a step
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


def write_compare(
    path: Path, *, arms: Sequence[str] = ARMS, seeds: Sequence[int] = (1, 2), steps: int = 60, **options: Any
) -> Path:
    """Write a comparison: `compare.json` and one run for each arm and seed."""
    path.mkdir(parents=True, exist_ok=True)
    comparison = {
        "recipe": "recipes/pico.toml",
        "arms": {arm: OVERRIDES.get(arm, []) for arm in arms},
        "seeds": list(seeds),
        "k": options.get("k", 4),
        "task": "pico",
        "seconds": 75.5 * len(arms) * len(seeds),
    }
    write_atomic(path / "compare.json", dump_json(comparison))
    for arm in arms:
        for seed in seeds:
            write_run(path / arm / f"seed_{seed}", arm=arm, seed=seed, steps=steps, **options)
    return path


def write_run(
    path: Path,
    *,
    arm: str = "learned",
    seed: int = 1,
    steps: int = 60,
    problems: int = 48,
    k: int = 4,
    hostile: bool = False,
    finished: bool = True,
    version: int = FORMAT,
) -> RunDir:
    """Write one run. `hostile` plants markup in a problem, a hint and a completion."""
    run = RunDir.create(path, run_config(arm, seed, steps), run_about(arm))
    if version == 1:
        (path / "about.json").unlink()
    rng = np.random.default_rng([seed, *arm.encode()])
    ratios = exposure_ratios(arm, steps, rng)
    for step in range(steps + 1):
        metrics = step_metrics(arm, step, steps, ratios, rng) if step else {}
        if version == 1:
            metrics.pop("route/both_groups", None)
        if step % max(1, steps // 6) == 0 or step == steps:
            rows = evaluation_rows(arm, seed, step=step, steps=steps, problems=problems, k=k)
            run.write_rows("eval", step, rows)
            metrics |= evaluation_metrics(rows, k)
        run.log(step, metrics)
        if step and (step % max(1, steps // 4) == 0 or step == 1):
            run.write_rows("rollouts", step, rollout_rows(step, ratios[step - 1], rng, hostile=hostile, arm=arm))
    if finished:
        final = evaluation_metrics(evaluation_rows(arm, seed, step=steps, steps=steps, problems=problems, k=k), k)
        run.finish({"step": steps, "seconds": 70.0 + 3.0 * seed, "final": final, "best": {"step": steps, **final}})
    return run


def run_about(arm: str) -> dict[str, Any]:
    """Return what a run says of itself, as its methods' configs put it."""
    return {
        "format": FORMAT,
        "exposure": SEEN.get(arm, "the first 25 % of the solution, always"),
        "controls": SENTENCES.get(arm, []),
        "distils": arm != "grpo",
        "reinforces": arm in {"composed", "grpo"},
    }


def run_config(arm: str, seed: int, steps: int) -> dict[str, Any]:
    """Return the sections of a resolved recipe that a report puts into words."""
    neutral = {
        "target": {"kind": "plain"},
        "selection": {"kind": "all"},
        "gate": {"kind": "none"},
        "routing": {"kind": "distil"},
        "curriculum": {"kind": "random"},
    }
    return {
        "seed": seed,
        "model": {"path": "pico", "dtype": "float32", "lora": None},
        "task": {"kind": "pico"},
        "exposure": EXPOSURE.get(arm, {"kind": "fixed", "ratio": 0.25}),
        "teacher": {"weights": "frozen", "ema_decay": None},
        "loss": {"divergence": {"kind": "forward_kl"}, "clip": "none", "prompt_weight": "none"},
        **neutral,
        **CONTROLS.get(arm, {}),
        "rl": {"scale": "std", "aggregate": "token", "ratio": "token", "eps_low": 0.2, "eps_high": 0.2, "kl_coef": 0.0},
        "rollout": {"temperature": 1.0, "max_new_tokens": 96, "group_size": 1},
        "optim": {"lr": 1e-3, "schedule": "linear"},
        "step": {"num_steps": steps, "problems": PROBLEMS},
        "eval": {"every": max(1, steps // 6), "k": 4, "temperature": 1.0},
    }


def exposure_ratios(arm: str, steps: int, rng: np.random.Generator) -> list[float]:
    """One ratio a step, held for five."""
    ratios: list[float] = []
    while len(ratios) < steps:
        centre = 0.5 - 0.12 * len(ratios) / steps
        drawn = {"full": 1.0, "half": 0.5, "random": rng.uniform(), "learned": rng.beta(8 * centre, 8 * (1 - centre))}
        drawn["composed"] = centre
        ratios += [float(drawn.get(arm, 0.25))] * 5
    return ratios[:steps]


def step_metrics(
    arm: str, step: int, steps: int, ratios: Sequence[float], rng: np.random.Generator
) -> dict[str, float]:
    """Metrics of one update: mismatch and divergence rise with the ratio and fall with time."""
    ratio, progress = ratios[step - 1], step / steps
    mismatch = (0.05 + 0.2 * ratio**1.5) * (1 - 0.5 * progress) + 0.01 * rng.normal()
    metrics = {
        "loss/total": 0.3 * mismatch,
        "loss/distil": 0.3 * mismatch,
        "divergence/mean": 0.3 * mismatch,
        "divergence/p99": 9.0 * abs(mismatch) * (1 + ratio),
        "mismatch/top1": abs(mismatch),
        "student/entropy": 0.45 - 0.2 * progress,
        "exposure/ratio": ratio,
        "exposure/ratio_min": ratio,
        "exposure/ratio_max": ratio,
        "rollout/length_mean": 30.0 - 6 * ratio * progress,
        "reward/mean": START + (END.get(arm, 0.5) - START) * progress,
        "optim/grad_norm": 1.0 + 0.1 * rng.normal(),
        "time/sample_s": 0.5 + 0.05 * rng.uniform(),
        "time/step_s": 0.3 + 0.05 * rng.uniform(),
        **route_metrics(distil=PROBLEMS),
    }
    if arm == "learned":
        metrics |= controller_metrics(step, progress, rng)
    if arm == "composed":
        metrics |= composed_metrics(step, progress, ratio, rng)
    if arm == "grpo":
        of_teacher = ("exposure/", "divergence/", "mismatch/", "teacher/", "loss/distil")
        metrics = {key: value for key, value in metrics.items() if not key.startswith(of_teacher)}
        metrics |= route_metrics(rl=PROBLEMS) | policy_metrics(rng)
    return metrics


def route_metrics(*, distil: int = 0, rl: int = 0, both: int = 0, nll: int = 0, skip: int = 0) -> dict[str, float]:
    """Groups of a step by what they were trained by; those with both losses count under `distil` and `rl` too."""
    counts = {"distil": distil, "rl": rl, "both": both, "nll": nll, "skip": skip}
    return {f"route/{name}_groups": float(count) for name, count in counts.items()}


def policy_metrics(rng: np.random.Generator) -> dict[str, float]:
    """What the reinforcement branch logs."""
    return {
        "loss/rl": 0.05 * rng.normal(),
        "reward/uniform_groups": float(rng.integers(8, 16)),
        "rl/ratio": 1.0,
        "rl/clip_frac": 0.01 * rng.uniform(),
        "rl/sampler_weight": 1.0 + 1e-8 * rng.uniform(),
        "rl/kl": 0.0,
    }


def composed_metrics(step: int, progress: float, ratio: float, rng: np.random.Generator) -> dict[str, float]:
    """What gate, cliff router and influence credit log.

    Reinforcing alternates every ten steps; lambda* is infinite, so absent, in every twentieth step. In steps 16 to 20
    every group is reinforced, so that nothing has an exposure.
    """
    reinforcing, alone = step % 20 in {0, *range(11, 20)}, 16 <= step <= 20
    least = (1.25 if reinforcing else 1.5) - 0.1 * progress
    skipped = int(rng.integers(0, 4))
    rl = PROBLEMS if alone else int(rng.integers(12, 20)) if reinforcing else 0
    metrics = route_metrics(distil=0 if alone else PROBLEMS - rl - skipped, rl=rl, skip=0 if alone else skipped)
    metrics |= {
        "cliff/lambda": 1 + 0.9 * (least - 1) if reinforcing else 1.35,
        "cliff/lambda_star": math.inf if step % 20 == 5 else least,
        "cliff/reinforcing": float(reinforcing),
        "cliff/p/product": 0.97 + 0.02 * progress,
        "cliff/b/product": 0.55 + 0.1 * progress,
    }
    if alone:
        metrics |= dict.fromkeys(("exposure/ratio", "exposure/ratio_min", "exposure/ratio_max"), math.nan)
    else:
        metrics |= {
            "gate/kept_frac": 0.5,
            "gate/mean": 0.24 + 0.02 * rng.normal(),
            "gate/open_frac": 0.6 + 0.1 * progress,
            "gate/gap": -1.2 + 0.6 * progress,
            "gate/gap_negative": 0.4 - 0.1 * progress,
        }
    if reinforcing:
        metrics |= policy_metrics(rng)
    if step % 5 == 0:
        metrics |= {f"exposure/credit/{g:g}": 0.3 - abs(g - ratio) * (0.2 + 0.1 * progress) for g in (0.0, 0.5, 1.0)}
    return metrics


def controller_metrics(step: int, progress: float, rng: np.random.Generator) -> dict[str, float]:
    """What the Beta policy logs; a reward appears only at steps at which a decision matures."""
    concentration, mean = 6 + 8 * progress, 0.5 - 0.12 * progress
    metrics = {
        "exposure/ka": mean * concentration,
        "exposure/kb": (1 - mean) * concentration,
        "exposure/mean": mean,
        "exposure/entropy": -0.27 - 0.3 * progress,
        "exposure/open": 2.0,
        "exposure/matured": float(max(0, step // 5 - 2)),
        "exposure/updates": float(max(0, step // 20)),
    }
    if step % 5 == 0 and step > 10:
        lp, gt = 0.03 * math.exp(-2 * progress) + 0.005 * rng.normal(), -0.4 - 0.1 * rng.uniform()
        metrics |= {"exposure/reward_lp": lp, "exposure/reward_gt": gt, "exposure/reward": lp + 0.25 * gt}
    return metrics


def evaluation_rows(arm: str, seed: int, *, step: int, steps: int, problems: int, k: int) -> list[dict[str, Any]]:
    """K graded samples a problem; the problems are always the same, and at step 0 all arms of a seed agree."""
    rng = np.random.default_rng([seed, step, *(arm.encode() if step else b"")])
    ease = np.random.default_rng(0).normal(size=problems)
    accuracy = START + (END.get(arm, 0.5) - START) * (1 - math.exp(-3 * step / steps)) / (1 - math.exp(-3))
    rows = []
    for number in range(problems):
        level = number % len(LEVELS)
        logit = math.log(accuracy / (1 - accuracy)) + 0.8 * ease[number] + 0.5 * (1 - level)
        for sample in range(k):
            right = bool(rng.uniform() < 1 / (1 + math.exp(-logit)))
            early = bool(rng.uniform() < {"full": 0.45, "half": 0.16}.get(arm, 0.2) * step / steps)
            rows.append(
                {
                    "problem_id": f"held-out-{number:03d}",
                    "level": LEVELS[level],
                    "sample": sample,
                    "completion": "3*4=7;\n7+5=2;\n#2." if right else "3*4=1;\n#1.",
                    "answer": "2" if right else str(rng.integers(3, 9)),
                    "reward": float(right),
                    "stop": "eos" if rng.uniform() > 0.02 else "length",
                    "length": int(rng.integers(14, 40)),
                    "traits": {"answers_early": early, "cites_hint": False},
                }
            )
    return rows


def evaluation_metrics(rows: Sequence[Mapping[str, Any]], k: int) -> dict[str, float]:
    """The aggregate that the loop logs beside the rows."""
    mean = float(np.mean([row["reward"] for row in rows]))
    return {
        f"eval/pico/avg@{k}": mean,
        f"eval/pico/avg@{k}_low": max(0.0, mean - 0.07),
        f"eval/pico/avg@{k}_high": min(1.0, mean + 0.07),
        "eval/pico/length_mean": float(np.mean([row["length"] for row in rows])),
    }


def rollout_rows(
    step: int, ratio: float, rng: np.random.Generator, *, hostile: bool, arm: str = ""
) -> list[dict[str, Any]]:
    """Eight completions of one update with their per-token streams; one on every route in the arm `composed`."""
    routes = {"composed": ("distil", "rl", "both", "nll", "skip"), "grpo": ("rl",)}.get(arm, ("distil",))
    rows = [_rollout(step, number, ratio, rng, hostile=hostile and number == 0) for number in range(8)]
    if arm == "composed":
        rows = [gated(row) for row in rows]
    return [routed(row, routes[number % len(routes)]) for number, row in enumerate(rows)]


def gated(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of which every second token is selected, at a weight of sigmoid(5 gap)."""
    gaps = np.array(row["teacher_logprob"]) - np.array(row["student_logprob"])
    weights = np.where(np.arange(len(gaps)) % 2 == 0, 1 / (1 + np.exp(-5 * gaps)), 0.0)
    return {**row, "gate": weights.round(6).tolist()}


def routed(row: Mapping[str, Any], route: str) -> dict[str, Any]:
    """Return a distilled row as it is written on a route; one that no loss is taken on has no streams."""
    components = {"both": ["distil", "rl"], "skip": []}.get(route, [route])
    changed: dict[str, Any] = {"route": route, "components": components}
    if "rl" in components:
        changed["advantage"] = 0.968246 if row["reward"] else -1.032796
    if "distil" not in components:
        nothing, full = ([value] * len(row["tokens"]) for value in (0.0, 1.0))
        changed |= {"hint": "", "teacher_prompt": "", "divergence": nothing, "gate": full}
        changed["teacher_logprob"] = row["student_logprob"]
    streams = {"divergence", "student_logprob", "teacher_logprob", "student_entropy", "gate"}
    return {key: value for key, value in {**row, **changed}.items() if components or key not in streams}


def _rollout(step: int, number: int, ratio: float, rng: np.random.Generator, *, hostile: bool) -> dict[str, Any]:
    lines, value = [], int(rng.integers(1, 10))
    problem = str(value)
    for index in range(int(rng.integers(5, 10))):
        sign, digit = ("*" if index < 2 else str(rng.choice(["+", "-"]))), int(rng.integers(1, 10))
        following = {"*": value * digit, "+": value + digit, "-": value - digit}[sign] % 10
        lines.append(f"{value}{sign}{digit}={following};\n")
        problem, value = f"{problem}{sign}{digit}", following
    completion = "".join(lines) + f"#{value}."
    shown = "".join(lines[: int(ratio * len(lines) + 1e-9)])
    hint = f"{shown}\nFinal answer: \\boxed{{{value}}}"
    if hostile:
        problem, hint, completion = HOSTILE + problem, hint + HOSTILE, completion[:6] + HOSTILE + completion[6:]
    tokens = [*_pieces(completion, HOSTILE), "<|im_end|>"]
    hard = np.array([token.isdigit() and index > 3 for index, token in enumerate(tokens)])
    divergence = rng.exponential(np.where(hard, 0.25 + 0.9 * ratio, 0.004))
    student = -rng.exponential(np.where(hard, 0.9, 0.03))
    teacher = np.minimum(-1e-4, student + rng.normal(0, np.where(hard, 0.9, 0.02)))
    return {
        "step": step,
        "problem_id": f"train-{step}-{number}" + "-long" * 20 * hostile,
        "problem": f"Compute {problem} from left to right.",
        "level": LEVELS[number % len(LEVELS)],
        "route": "distil",
        "components": ["distil"],
        "advantage": 0.0,
        "ratio": ratio,
        "hint": hint,
        "student_prompt": f"Compute {problem} from left to right.",
        "teacher_prompt": f"Compute {problem} from left to right.\n{hint}\nNow solve it yourself:",
        "completion": completion,
        "stop": "eos",
        "reward": float(rng.uniform() < 0.5),
        "tokens": tokens,
        "divergence": divergence.round(5).tolist(),
        "student_logprob": student.round(5).tolist(),
        "teacher_logprob": teacher.round(5).tolist(),
        "student_entropy": rng.exponential(np.where(hard, 0.8, 0.05)).round(5).tolist(),
        "gate": [1.0] * len(tokens),
    }


def _pieces(text: str, whole: str) -> list[str]:
    """Cut a text into characters, keeping `whole` as one token."""
    before, found, after = text.partition(whole)
    return [*before, *([whole] if found else []), *after]


def write_graded(path: Path, arms: Mapping[str, Mapping[int, Sequence[Sequence[float | None]]]]) -> Path:
    """Write a comparison of one final evaluation a run: ARM -> seed -> rewards [P][k]; every start is all wrong."""
    seeds = sorted({seed for runs in arms.values() for seed in runs})
    k = len(next(iter(next(iter(arms.values())).values()))[0])
    about = {
        "recipe": "tiny.toml",
        "arms": {arm: [] for arm in arms},
        "seeds": seeds,
        "k": k,
        "task": "t",
        "seconds": 9.0,
    }
    path.mkdir(parents=True)
    write_atomic(path / "compare.json", dump_json(about))
    for arm, runs in arms.items():
        for seed, rewards in runs.items():
            run = RunDir.create(path / arm / f"seed_{seed}", {"seed": seed})
            run.write_rows("eval", 0, graded_rows([[0.0] * k for _ in rewards]))
            run.write_rows("eval", 10, graded_rows(rewards))
            run.finish({"step": 10, "seconds": 2.0 * seed, "final": {}, "best": {}})
    return path


def graded_rows(rewards: Sequence[Sequence[float | None]], level: str = "") -> list[dict[str, Any]]:
    """One row a sample; the answer of a sample is its reward, its length 10."""
    return [
        {
            "problem_id": f"p{number}",
            "level": level,
            "sample": sample,
            "completion": "",
            "answer": str(reward),
            "reward": reward,
            "stop": "eos",
            "length": 10,
            "traits": {"cites_hint": reward == 0.0},
        }
        for number, samples in enumerate(rewards)
        for sample, reward in enumerate(samples)
    ]
