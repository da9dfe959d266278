"""What a report is about, as plain arrays: evaluations, runs, arms. `load.py` reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Evaluation:
    """Every graded sample of one evaluation, P problems with up to k samples each, sorted by problem id.

    `rewards` is [P, k] with NaN where a sample is not gradable or absent; `answers` holds the extracted answers.
    """

    step: int
    problem_ids: tuple[str, ...]
    levels: tuple[str, ...]
    rewards: Floats
    answers: tuple[tuple[str | None, ...], ...]
    lengths_mean: float
    truncated: float
    traits: Mapping[str, float]
    path: Path

    @property
    def accuracies(self) -> Floats:
        """Share of correct samples, [P]; NaN for a problem with a sample that could not be graded."""
        correct = np.where(np.isnan(self.rewards), np.nan, self.rewards == 1.0)
        means: Floats = correct.mean(axis=1)
        return means

    @property
    def correct(self) -> NDArray[np.bool_]:
        """Correctness [P', k] over the problems whose samples could all be graded."""
        kept: NDArray[np.bool_] = self.rewards[~np.isnan(self.accuracies)] == 1.0
        return kept

    def at(self, level: str) -> Evaluation:
        """The problems of one level; length, truncation and traits stay those of all."""
        kept = [index for index, name in enumerate(self.levels) if name == level]
        return replace(
            self,
            problem_ids=tuple(self.problem_ids[index] for index in kept),
            levels=(level,) * len(kept),
            rewards=self.rewards[kept],
            answers=tuple(self.answers[index] for index in kept),
        )

    @property
    def graded_answers(self) -> list[tuple[str | None, ...]]:
        """The answers of the same problems."""
        known = ~np.isnan(self.accuracies)
        return [answers for answers, kept in zip(self.answers, known, strict=True) if kept]


@dataclass(frozen=True)
class Run:
    """One run directory. `result` is None while the run is not complete; `notes` say what of it is not as written."""

    arm: str
    seed: int | None
    path: Path
    config: Mapping[str, Any]
    about: Mapping[str, Any]
    env: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    result: Mapping[str, Any] | None
    evaluations: tuple[Evaluation, ...]
    rollouts: Mapping[int, Path]
    notes: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """What a reader calls this run."""
        return self.arm if self.seed is None else f"{self.arm}, seed {self.seed}"

    @property
    def origin(self) -> tuple[Path, int | None]:
        """What runs with one start in common share: comparison and seed; a run that was named by itself has its own."""
        return (self.path, None) if self.seed is None else (self.path.parent.parent, self.seed)

    @property
    def right(self) -> str:
        """When a sample of a flow counts as right, which completes "the share of samples that ..."; else empty."""
        return str(self.about.get("right", ""))

    @property
    def start(self) -> Evaluation | None:
        """The evaluation before the first update, if there was one."""
        return next((evaluation for evaluation in self.evaluations if evaluation.step == 0), None)

    @property
    def final(self) -> Evaluation | None:
        """The evaluation at the last step of a complete run: one in the middle of a run is no result."""
        if self.result is None or not self.evaluations or self.evaluations[-1].step == 0:
            return None
        last = self.evaluations[-1]
        return last if self.result.get("step", last.step) == last.step else None

    @property
    def seconds(self) -> float:
        """How long the run took; 0 where it does not say so, or is not complete."""
        return float((self.result or {}).get("seconds", 0.0))

    @property
    def distils(self) -> bool:
        """Tell whether the run has a teacher; one that does not say so has one unless its log counts no group of it."""
        counts = [row["route/distil_groups"] for row in self.rows if "route/distil_groups" in row]
        return bool(self.about.get("distils", not counts or any(counts)))

    @property
    def reinforces(self) -> bool:
        """Tell whether the run may reinforce; of one that does not say so, whether it did."""
        return bool(self.about.get("reinforces", any(row.get("route/rl_groups") for row in self.rows)))

    @property
    def distilled(self) -> Run:
        """The run with the steps in which a group was distilled: early logs have ratios that nobody saw."""
        return replace(self, rows=[row for row in self.rows if row.get("route/distil_groups", 1) > 0])

    def series(self, *keys: str, default: float | None = None) -> Floats:
        """Return [n, 1 + len(keys)]: the step and the values of the rows that hold every key.

        With a default it stands for absent values, and the rows are those that hold any key.
        """
        held = all if default is None else any
        rows = [row for row in self.rows if held(key in row for key in keys)]
        found = [[row["step"], *(row.get(key, default) for key in keys)] for row in rows]
        return np.array(found, dtype=np.float64).reshape(-1, 1 + len(keys))


@dataclass(frozen=True)
class Arm:
    """The runs of one setting, one a seed."""

    name: str
    overrides: tuple[str, ...]
    runs: tuple[Run, ...]


@dataclass(frozen=True)
class Study:
    """What a report is about: arms of a comparison, or runs that were simply named together."""

    title: str
    task: str
    is_comparison: bool
    arms: tuple[Arm, ...]
    k: int
    seeds: tuple[int, ...]
    seconds: float
    missing: tuple[str, ...]

    @property
    def runs(self) -> list[Run]:
        """All runs, arm by arm."""
        return [run for arm in self.arms for run in arm.runs]

    @property
    def right(self) -> str:
        """When a sample counts as right, where all runs are flows of one kind; else empty."""
        found = {run.right for run in self.runs}
        return found.pop() if len(found) == 1 else ""

    @property
    def notes(self) -> list[str]:
        """What is not as the runs wrote it."""
        return [f"{run.label}: {note}" for run in self.runs for note in run.notes]

    @property
    def traits(self) -> list[str]:
        """All traits that were looked for in evaluated completions."""
        return sorted({trait for run in self.runs for evaluation in run.evaluations for trait in evaluation.traits})


def setting(config: Mapping[str, Any], path: str) -> Any:
    """Return a setting of a resolved recipe by its dotted path; None where the recipe does not have it."""
    value: Any = config
    for name in path.split("."):
        if not isinstance(value, Mapping):
            return None
        value = value.get(name)
    return value
