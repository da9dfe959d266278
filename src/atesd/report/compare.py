"""What a comparison found: accuracy of every arm with its interval, and paired differences between arms.

Intervals and pairing are `evaluate/metrics.py`'s: seeds and problems are resampled, differences are taken within each
(seed, problem). S seeds, P problems.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from atesd.evaluate.metrics import (
    FEW_SEEDS,
    Difference,
    arm_interval,
    avg_at_k,
    bootstrap_interval,
    few_seeds_interval,
    paired_difference,
)
from atesd.report.load import load_comparison
from atesd.report.study import Arm, Evaluation, Floats, Study
from atesd.types import UserError

LEARNED, HALF, FULL = "learned", "half", "full"
RESAMPLES = 4_000
COUNTS = {2: "Two", 3: "Three", 4: "Four"}


@dataclass(frozen=True)
class Findings:
    """Average@k with its interval for the start and for each arm, None where nothing can be graded, and the pairs."""

    start: dict[str, float] | None
    arms: dict[str, dict[str, float] | None]
    paired: dict[str, Difference]
    leaders: tuple[str, ...] = ()
    """The arm of highest accuracy, and behind it those that are not told apart from it, highest first."""


def summarise(compare_dir: Path) -> dict[str, Any]:
    """Return what `summary.json` holds; accuracies are fractions, `seconds` of an arm is the mean of its runs.

    `leaders` are the arm of highest accuracy and those that no paired interval tells apart from it.

    The start is the evaluation before the first update, which the arms of a seed share. An arm without a
    complete run, and a pair without a common seed, is left out. UserError if nothing was evaluated yet.
    """
    study = load_comparison(compare_dir)
    found = find(study)
    if found.start is None:
        raise UserError(f"{compare_dir} holds no evaluation yet: let at least one run evaluate its start")
    arms = [(arm, entry) for arm in study.arms if (entry := found.arms[arm.name]) is not None]
    return {
        "start": found.start,
        "arms": {arm.name: entry | {"seconds": seconds(arm)} for arm, entry in arms},
        "leaders": list(found.leaders),
        "paired": {name: pair._asdict() for name, pair in found.paired.items()},
        "k": study.k,
        "seeds": list(study.seeds),
        "seconds": study.seconds,
    }


def find(study: Study) -> Findings:
    """Compute a study's findings; only a comparison has pairs."""
    arms = {arm.name: accuracy(finals(arm)) for arm in study.arms}
    return Findings(
        start=accuracy(starts(study)) if study.is_comparison else _together(starts(study)),
        arms=arms,
        paired=paired(study) if study.is_comparison else {},
        leaders=leaders(study, arms),
    )


def leaders(study: Study, found: Mapping[str, Mapping[str, float] | None]) -> tuple[str, ...]:
    """Return the arm of highest accuracy and, behind it, those that are not told apart from it, highest first.

    Two arms of a comparison are told apart by paired intervals without 0. Runs that were named together are no pairs:
    theirs are told apart where their own intervals have nothing in common.
    """
    known = {name: entry for name, entry in found.items() if entry is not None}
    arms = {arm.name: arm for arm in study.arms}
    best, *others = sorted(known, key=lambda name: -known[name]["average_at_k"]) or [""]

    def is_told_apart(name: str) -> bool:
        if not study.is_comparison:
            return known[name]["high"] < known[best]["low"]
        pair = difference(arms[best], arms[name]) if have_same_problems(arms[best], arms[name]) else None
        return pair is not None and pair.sign > 0

    return (best, *(name for name in others if not is_told_apart(name))) if best else ()


def starts(study: Study) -> list[Evaluation]:
    """Return one step-0 evaluation a seed of a comparison, that of the first arm which has one.

    Runs that were named together may have begun as different models: every one has its own.
    """
    found: dict[object, Evaluation] = {}
    for run in study.runs:
        if run.start is not None:
            found.setdefault(run.origin, run.start)
    return list(found.values())


def _together(evaluations: Sequence[Evaluation]) -> dict[str, float] | None:
    """Return the accuracy of starts that are no seeds of one thing: its interval resamples problems alone.

    None where they have different numbers of problems, and no start stands for all.
    """
    if len({len(evaluation.problem_ids) for evaluation in evaluations}) != 1:
        return None
    matrix_SP = accuracy_matrix(evaluations)
    if not matrix_SP.size:
        return None
    low, high = bootstrap_interval(matrix_SP.mean(axis=0), resamples=RESAMPLES)
    return {"average_at_k": avg_at_k(matrix_SP), "low": low, "high": high, "seeds": len(matrix_SP)}


def finals(arm: Arm) -> list[Evaluation]:
    """Return the final evaluation of every complete run."""
    return [run.final for run in arm.runs if run.final is not None]


def accuracy(evaluations: Sequence[Evaluation], *, resamples: int = RESAMPLES) -> dict[str, float] | None:
    """Return Average@k over seeds and its interval, or None where nothing can be graded.

    `t_low` and `t_high`, the t interval over seeds cut to [0, 1], are there for two to four of them.
    """
    if not evaluations:
        return None
    matrix_SP = accuracy_matrix(evaluations)
    if not matrix_SP.size:
        return None
    low, high = arm_interval(matrix_SP, shared=are_shared(evaluations), resamples=resamples)
    found = {"average_at_k": avg_at_k(matrix_SP), "low": low, "high": high, "seeds": len(matrix_SP)}
    over_seeds = few_seeds_interval(matrix_SP)
    if over_seeds is None:
        return found
    return found | {"t_low": max(0.0, over_seeds.low), "t_high": min(1.0, over_seeds.high)}


def caution(counts: Iterable[int]) -> str:
    """Say what intervals are worth, given over how many seeds each was taken; nothing where all have enough."""
    seeds = min(counts, default=FEW_SEEDS)
    if seeds >= FEW_SEEDS:
        return ""
    if seeds == 1:
        return "One seed: the intervals know of the held-out problems alone. Another seed may lie far outside them."
    return (
        f"{COUNTS[seeds]} seeds: a bootstrap interval is too narrow where seeds differ (over two, its 95 % may be 80 % "
        "or less) and too wide where they do not. The t interval over seeds stands beside it, and arms are told apart "
        "only where both tell them apart. Run five seeds or more."
    )


def paired(study: Study) -> dict[str, Difference]:
    """Return the differences of `pairs_of`, over the seeds that both arms have.

    UserError where the learned arm and another were evaluated on different problems; else such pairs are left out.
    """
    arms = {arm.name: arm for arm in study.arms}
    found = {
        key: difference(arms[a], arms[b])
        for key, (a, b) in pairs_by_key(list(arms)).items()
        if LEARNED in arms or have_same_problems(arms[a], arms[b])
    }
    return {name: pair for name, pair in found.items() if pair is not None}


def pairs_of(arms: Sequence[str]) -> list[tuple[str, str]]:
    """Name the pairs that are compared: learned - X for every other arm X, and half - full, where there are both.

    Where `learned` is none of them, each arm is compared with the first.
    """
    if LEARNED in arms:
        pairs = [(LEARNED, name) for name in arms if name != LEARNED]
    else:
        pairs = [(name, arms[0]) for name in arms[1:]]
    pairs = [pair for pair in pairs if set(pair) != {HALF, FULL}]
    return pairs + [(HALF, FULL)] * (HALF in arms and FULL in arms)


def pairs_by_key(arms: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Return the same pairs by the keys of their differences, FIRST-SECOND: a name may hold a hyphen itself."""
    return {f"{first}-{second}": (first, second) for first, second in pairs_of(arms)}


def accuracy_matrix(evaluations: Sequence[Evaluation]) -> Floats:
    """Return [S, P] accuracies over the problems, in order of id, that are gradable in every evaluation.

    UserError if the evaluations differ in their number of problems.
    """
    sizes = {len(evaluation.problem_ids): evaluation.path for evaluation in evaluations}
    if len(sizes) > 1:
        found = ", ".join(f"{path} has {size}" for size, path in sorted(sizes.items()))
        raise UserError(f"runs were evaluated on different numbers of problems ({found}): use one evaluation set")
    matrix_SP = np.stack([evaluation.accuracies for evaluation in evaluations])
    kept: Floats = matrix_SP[:, ~np.isnan(matrix_SP).any(axis=0)]
    return kept


def are_shared(evaluations: Sequence[Evaluation]) -> bool:
    """Tell whether all evaluations hold the same problems."""
    return len({evaluation.problem_ids for evaluation in evaluations}) == 1


def seconds(arm: Arm) -> float:
    """Return the mean duration of the arm's complete runs that say theirs; 0 while there is none."""
    durations = [run.seconds for run in arm.runs if run.seconds]
    return float(np.mean(durations)) if durations else 0.0


def by_seed(arm: Arm) -> dict[int | None, Evaluation]:
    """Return the final evaluation of every complete run by its seed."""
    return {run.seed: run.final for run in arm.runs if run.final is not None}


def have_same_problems(first: Arm, second: Arm) -> bool:
    """Tell whether two arms were evaluated on the same problems at every seed that both have, as many a seed."""
    ours, theirs = by_seed(first), by_seed(second)
    both = [seed for seed in ours if seed in theirs]
    sizes = {len(ours[seed].problem_ids) for seed in both}
    return len(sizes) < 2 and all(ours[seed].problem_ids == theirs[seed].problem_ids for seed in both)


def difference(first: Arm, second: Arm) -> Difference | None:
    """Return first - second over the seeds that both have; None without a common seed or a gradable problem."""
    ours, theirs = by_seed(first), by_seed(second)
    seeds = [seed for seed in ours if seed in theirs]
    if not have_same_problems(first, second):
        raise UserError(
            f"{first.name} and {second.name} were evaluated on different problems: run both with one evaluation set"
        )
    if not seeds:
        return None
    evaluations = [arm[seed] for arm in (ours, theirs) for seed in seeds]
    both = accuracy_matrix(evaluations)
    if not both.size:
        return None
    first_SP, second_SP = both[: len(seeds)], both[len(seeds) :]
    return paired_difference(first_SP, second_SP, shared=are_shared(evaluations), resamples=RESAMPLES)
