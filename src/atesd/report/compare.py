"""What a comparison found: accuracy of every arm with its interval, and paired differences between arms.

Intervals and pairing are `evaluate/metrics.py`'s: seeds and problems are resampled, differences are taken within each
(seed, problem). S seeds, P problems.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from atesd.evaluate.metrics import Difference, arm_interval, avg_at_k, paired_difference
from atesd.report.load import Arm, Evaluation, Floats, Study, load_comparison
from atesd.types import UserError

LEARNED, HALF, FULL = "learned", "half", "full"


def summarise(compare_dir: Path) -> dict[str, Any]:
    """Return what `summary.json` holds; accuracies are fractions, `seconds` of an arm is the mean of its runs.

    The start is the evaluation before the first update, which the arms of a seed share. An arm without a final
    evaluation, and a pair without a common seed, is left out. UserError if nothing was evaluated yet.
    """
    study = load_comparison(compare_dir)
    start = accuracy(starts(study))
    if start is None:
        raise UserError(f"{compare_dir} holds no evaluation yet: let at least one run evaluate its start")
    arms = {arm.name: summary for arm in study.arms if (summary := accuracy(finals(arm))) is not None}
    return {
        "start": start,
        "arms": {arm.name: arms[arm.name] | {"seconds": seconds(arm)} for arm in study.arms if arm.name in arms},
        "paired": {name: found._asdict() for name, found in paired(study).items()},
        "k": study.k,
        "seeds": list(study.seeds),
        "seconds": study.seconds,
    }


def starts(study: Study) -> list[Evaluation]:
    """Return one step-0 evaluation a seed: that of the first arm which has one."""
    found: dict[int | None, Evaluation] = {}
    for run in study.runs:
        if run.start is not None:
            found.setdefault(run.seed, run.start)
    return list(found.values())


def finals(arm: Arm) -> list[Evaluation]:
    """Return the final evaluation of every run that has one."""
    return [run.final for run in arm.runs if run.final is not None]


def accuracy(evaluations: Sequence[Evaluation], *, resamples: int = 10_000) -> dict[str, float] | None:
    """Return Average@k over seeds and its interval, or None where nothing can be graded."""
    if not evaluations:
        return None
    matrix_SP = accuracy_matrix(evaluations)
    if not matrix_SP.size:
        return None
    low, high = arm_interval(matrix_SP, resamples=resamples)
    return {"average_at_k": avg_at_k(matrix_SP), "low": low, "high": high}


def paired(study: Study) -> dict[str, Difference]:
    """Return the difference learned - X for every other arm X, and half - full, over the seeds that both have."""
    arms = {arm.name: arm for arm in study.arms}
    pairs = [(LEARNED, name) for name in arms if name != LEARNED] + [(HALF, FULL)]
    found = {f"{a}-{b}": _difference(arms[a], arms[b]) for a, b in pairs if a in arms and b in arms}
    return {name: difference for name, difference in found.items() if difference is not None}


def accuracy_matrix(evaluations: Sequence[Evaluation]) -> Floats:
    """Return [S, P] accuracies over the problems, in order of id, that are gradable in every evaluation.

    UserError if the evaluations differ in their number of problems.
    """
    sizes = {len(evaluation.problem_ids) for evaluation in evaluations}
    if len(sizes) > 1:
        raise UserError(f"runs were evaluated on {sorted(sizes)} problems: compare runs with one evaluation set")
    matrix_SP = np.stack([evaluation.accuracies for evaluation in evaluations])
    kept: Floats = matrix_SP[:, ~np.isnan(matrix_SP).any(axis=0)]
    return kept


def seconds(arm: Arm) -> float:
    """Return the mean duration of the arm's complete runs; 0 while there is none."""
    durations = [float(run.result["seconds"]) for run in arm.runs if run.result is not None]
    return float(np.mean(durations)) if durations else 0.0


def _difference(first: Arm, second: Arm) -> Difference | None:
    ours, theirs = ({run.seed: run.final for run in arm.runs if run.final is not None} for arm in (first, second))
    seeds = [seed for seed in ours if seed in theirs]
    for seed in seeds:
        if ours[seed].problem_ids != theirs[seed].problem_ids:
            raise UserError(
                f"{first.name} and {second.name}, seed {seed}, were evaluated on different problems: "
                "run both with one evaluation set"
            )
    if not seeds:
        return None
    both = accuracy_matrix([arm[seed] for arm in (ours, theirs) for seed in seeds])
    return paired_difference(both[: len(seeds)], both[len(seeds) :]) if both.size else None
