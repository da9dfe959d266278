"""What a step leaves in the run directory besides the loss: batch metrics, rollout rows, timings."""

from __future__ import annotations

import resource
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import torch

from atesd.rollout.render import Renderer
from atesd.routing.route import Route
from atesd.train.batch import Row
from atesd.train.rows import turns_of
from atesd.train.stats import StepOutcome
from atesd.types import Ending, Group, Problem, Trajectory

Traits = Callable[[Problem, str], dict[str, bool]]


def pass_rates(groups: Sequence[Group]) -> list[float | None]:
    """Return the mean reward of each group's gradable attempts; None where none is."""
    return [sum(group.rewards) / len(group.rewards) if group.rewards else None for group in groups]


def batch_metrics(
    groups: Sequence[Group], routes: Sequence[Route], rows: Sequence[Row], traits: Traits
) -> dict[str, float]:
    """Describe the completions, rewards, routes and exposure of a generation batch."""
    ratios = [row.ratio for row in rows if "distil" in row.components]
    attempts = [(group.problem, trajectory) for group in groups for trajectory in group.trajectories]
    lengths = [trajectory.num_tokens for _, trajectory in attempts]
    rewards = [trajectory.reward for _, trajectory in attempts]
    graded = [reward for reward in rewards if reward is not None]
    truncated = sum(trajectory.truncated for _, trajectory in attempts)
    uniform = [len(set(group.rewards)) == 1 for group in groups]
    metrics = {
        "rollout/length_mean": float(np.mean(lengths)),
        "rollout/turns_mean": float(np.mean([len(trajectory.turns) for _, trajectory in attempts])),
        "rollout/eos_frac": 1.0 - truncated / len(attempts),
        "rollout/truncated": float(truncated),
        "reward/ungradable": float(len(rewards) - len(graded)),
        "optim/tokens": float(sum(lengths)),
        "reward/ungradable_groups": float(sum(not group.rewards for group in groups)),
        "reward/uniform_groups": float(sum(uniform)),
    }
    for component in ("distil", "rl", "nll"):
        metrics[f"route/{component}_groups"] = float(sum(component in route.components for route in routes))
    metrics["route/both_groups"] = float(sum(route is Route.BOTH for route in routes))
    metrics["route/skip_groups"] = float(sum(route is Route.SKIP for route in routes))
    if ratios:
        metrics |= {
            "exposure/ratio": float(np.mean(ratios)),
            "exposure/ratio_min": min(ratios),
            "exposure/ratio_max": max(ratios),
        }
    if graded:
        metrics |= {"reward/mean": float(np.mean(graded)), "reward/std": float(np.std(graded))}
    metrics |= ending_metrics([trajectory for _, trajectory in attempts])
    for name in attempts[0][1].rewards:
        given = [trajectory.rewards[name] for _, trajectory in attempts]
        known = [reward for reward in given if reward is not None]
        metrics[f"reward/{name}/ungradable"] = float(len(given) - len(known))
        if known:
            metrics[f"reward/{name}/mean"] = float(np.mean(known))
    found = [traits(problem, trajectory.final.text) for problem, trajectory in attempts]
    return metrics | {f"rollout/trait/{name}": float(np.mean([traits[name] for traits in found])) for name in found[0]}


def ending_metrics(attempts: Sequence[Trajectory]) -> dict[str, float]:
    """Count how attempts ended and what was no action; nothing where all are of one turn that nobody answered."""
    if all(len(each.turns) == 1 and not each.ended.failed for each in attempts):
        return {}
    counts = Counter(each.ended for each in attempts)
    return {
        **{f"env/ended/{ending}": float(counts[ending]) for ending in Ending if counts[ending]},
        "env/invalid": float(sum(each.invalid for each in attempts)),
    }


def group_rows(
    groups: Sequence[Group], routes: Sequence[Route], rows: Sequence[Row], strength: float
) -> list[dict[str, Any]]:
    """Return one record a group: what trained it, what its teacher saw and how far the target reached.

    `ratio` is the mean over its distilled completions; `ratio` and `lambda` are null where nothing was distilled.
    """
    shown: dict[int, list[float]] = {}
    for row in rows:
        if "distil" in row.components:
            shown.setdefault(row.group, []).append(row.ratio)
    return [
        {
            "problem_id": group.problem.id,
            "route": str(route),
            "ratio": float(np.mean(shown[index])) if index in shown else None,
            "lambda": strength if index in shown else None,
            "rewards": [attempt.reward for attempt in group.trajectories],
        }
        for index, (group, route) in enumerate(zip(groups, routes, strict=True))
    ]


def grader_metrics(reward: object) -> dict[str, float]:
    """Return how many answers the grader gave up on so far, where it keeps count."""
    timeouts = getattr(reward, "timeouts", 0)
    return {"reward/timeouts": float(timeouts)} if timeouts else {}


def rollout_rows(
    groups: Sequence[Group],
    routes: Sequence[Route],
    rows: Sequence[Row],
    outcome: StepOutcome,
    *,
    step: int,
    renderer: Renderer,
    count: int,
    reached: Callable[[Row], Sequence[float]],
) -> list[dict[str, Any]]:
    """Return the first `count` turns with the hint that the teacher saw and the streams of their tokens.

    Of a hint with hidden tokens `attended` says how many attention reaches of how many, `shades` its parts and of each
    the share of layers and heads that reach it.
    """
    written = []
    shown = zip(rows, turns_of(groups), strict=True)
    for index, (row, (group, attempt, turn)) in enumerate(list(shown)[:count]):
        record: dict[str, Any] = {
            "step": step,
            "problem_id": group.problem.id,
            "problem": group.problem.problem,
            "level": group.problem.level,
            "route": str(routes[row.group]),
            "components": list(row.components),
            "advantage": round(row.advantage, 6),
            "ratio": row.ratio,
            "hint": row.hint,
            **_veiled(row, renderer, reached),
            "student_prompt": renderer.prompt_text(row.prompt),
            "teacher_prompt": renderer.prompt_text(row.view_prompts.get("teacher", ())),
            "turn": attempt.turns.index(turn) + 1,
            "turns": len(attempt.turns),
            "observation": attempt.observation(attempt.turns.index(turn)),
            "ended": str(attempt.ended),
            "invalid": attempt.invalid,
            "completion": turn.text,
            "stop": str(turn.stop),
            "reward": attempt.reward,
            **({"rewards": dict(attempt.rewards)} if attempt.rewards else {}),
            "tokens": renderer.token_texts(row.completion),
        }
        written.append(record | _streams(outcome, index))
    return written


def _veiled(row: Row, renderer: Renderer, reached: Callable[[Row], Sequence[float]]) -> dict[str, Any]:
    veil = row.veils.get("teacher")
    if veil is None:
        return {}
    texts = renderer.token_texts(row.view_prompts["teacher"][veil.start : veil.stop])
    return {"attended": [veil.keep, veil.stop - veil.start], "shades": shades(row.hint, texts, reached(row))}


def shades(hint: str, texts: Sequence[str], shares: Sequence[float]) -> list[tuple[str, float]]:
    """Cut a hint into its tokens, each with its share; what stands outside of all tokens has the share 1.

    Tokens may begin before the hint or end behind it. [] where they do not spell it.
    """
    spelt = "".join(texts)
    ends = product(range(len(texts[0]) + 1), range(len(texts[-1]) + 1))
    inside = ((before, spelt[before : len(spelt) - behind]) for before, behind in ends)
    before, core = next(((before, core) for before, core in inside if core.strip() and core in hint), (0, ""))
    if not core:
        return []
    place = hint.index(core) - before
    parts = [(hint[: max(0, place)], 1.0)]
    for text, share in zip(texts, shares, strict=True):
        parts.append((hint[max(0, place) : max(0, place + len(text))], round(share, 3)))
        place += len(text)
    return [part for part in [*parts, (hint[place:], 1.0)] if part[0]]


def timings(phases: Mapping[str, float], seconds: float, tokens: float) -> dict[str, float]:
    """Return the step's seconds by phase, the peak memory, and where it sampled, or waited for that, the speed."""
    taken = {**phases, "time/step_s": seconds, "memory/peak_mib": peak_memory_mib()}
    sampling = phases.get("time/ahead_s", phases.get("time/sample_s"))
    if sampling:
        taken["time/tokens_per_s"] = tokens / sampling
    return taken


def peak_memory_mib() -> float:
    """Return the most memory that the device, or on a CPU the process, has held so far."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def _streams(outcome: StepOutcome, index: int) -> dict[str, list[float]]:
    """Return per-token lists of a row, rounded to what a reader can use; none for a row outside every loss."""
    if index not in outcome.rows:
        return {}
    scored = outcome.rows[index]
    columns = {
        "divergence": scored.stats.divergence,
        "student_logprob": scored.stats.student_logprob,
        "teacher_logprob": scored.stats.teacher_logprob,
        "student_entropy": scored.stats.student_entropy,
        "gate": scored.weight_T,
    }
    return {name: [round(value, 6) for value in column.tolist()] for name, column in columns.items()}
