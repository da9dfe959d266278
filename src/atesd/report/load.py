"""Read run directories and comparisons into plain arrays; nothing here knows about figures or HTML."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atesd.report.checked import (
    is_amount,
    is_bool,
    is_number,
    is_step,
    is_text,
    kept,
    list_of,
    optional,
    read_metrics,
    read_object,
    read_rows,
    refuse_damaged,
    seal_notes,
    table_of,
)
from atesd.runlog import RunDir
from atesd.types import StopReason, UserError

Floats = NDArray[np.float64]

EVALUATED = {  # fields of an evaluated sample
    "problem_id": is_text,
    "level": is_text,
    "reward": optional(is_number),
    "answer": optional(is_text),
    "length": is_amount,
    "stop": is_text,
    "traits": table_of(is_bool),
}
ABOUT = {
    "format": is_step,
    "exposure": is_text,
    "controls": list_of(is_text),
    "distils": is_bool,
    "reinforces": is_bool,
    "samples": is_text,
    "right": is_text,
}
RESULT = {"step": is_step, "seconds": is_amount}
COMPARISON = {
    "recipe": is_text,
    "arms": table_of(list_of(is_text)),
    "seeds": list_of(is_step),
    "task": is_text,
    "k": lambda value: is_step(value) and value > 0,
}
_STEP_FILE = re.compile(r"step_\d{1,12}\.jsonl", re.ASCII)


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


def load_study(paths: Sequence[Path]) -> Study:
    """Read what the paths name: one comparison, or any number of run directories and comparisons.

    One comparison keeps its arm names. Otherwise every run directory is an arm of its own, and the arms of
    comparisons are called FOLDER/ARM. UserError: no path, a path that is neither, a broken file, or evaluations with
    different numbers of samples a problem.
    """
    if not paths:
        raise UserError("nothing to report: give at least one run directory or comparison directory")
    if len(paths) == 1 and is_comparison(paths[0]):
        return load_comparison(paths[0])
    studies = [load_comparison(path) if is_comparison(path) else _single(path) for path in paths]
    arms = [
        (f"{path.resolve().name}/{arm.name}" if study.is_comparison else arm.name, arm)
        for path, study in zip(paths, studies, strict=True)
        for arm in study.arms
    ]
    names = _distinct([name for name, _ in arms])
    return Study(
        title=", ".join(study.title for study in studies),
        task=studies[0].task,
        is_comparison=False,
        arms=tuple(_renamed(arm, name) for name, (_, arm) in zip(names, arms, strict=True)),
        k=_same_k(studies),
        seeds=tuple(sorted({seed for study in studies for seed in study.seeds})),
        seconds=sum(study.seconds for study in studies),
        missing=tuple(name for study in studies for name in study.missing),
    )


def is_comparison(path: Path) -> bool:
    """Tell a comparison's folder from a run's."""
    return (path / "compare.json").is_file()


def load_comparison(path: Path) -> Study:
    """Read `compare.json` and the runs ARM/seed_N that exist; the others are listed in `missing`."""
    if not is_comparison(path):
        raise UserError(f"{path} is not a comparison: it has no compare.json; give the folder that `compare` wrote")
    about = read_object(path / "compare.json")
    refuse_damaged(path / "compare.json", about, COMPARISON)
    if not is_amount(about.get("seconds") or 0.0) or not all(map(_names_folder, about["arms"])):
        raise UserError(f"{path}/compare.json is damaged (seconds or names of arms): restore it from a copy")
    arms, missing = [], []
    for name, overrides in about["arms"].items():
        runs = []
        for seed in dict.fromkeys(about["seeds"]):
            folder = path / name / f"seed_{seed}"
            if not (folder / "config.json").is_file():
                missing.append(f"{name}, seed {seed}: not started")
                continue
            runs.append(load_run(folder, name, seed))
            if runs[-1].result is None:
                missing.append(f"{name}, seed {seed}: not finished")
        arms.append(Arm(name, tuple(overrides), tuple(runs)))
    return Study(
        title=Path(about["recipe"]).stem,
        task=about["task"],
        is_comparison=True,
        arms=tuple(arm for arm in arms if arm.runs),
        k=int(about["k"]),
        seeds=tuple(int(seed) for seed in about["seeds"]),
        seconds=float(about.get("seconds") or 0.0),
        missing=tuple(missing),
    )


def load_run(path: Path, arm: str, seed: int | None) -> Run:
    """Read one run directory under the name `arm`. UserError where a file is damaged, see `checked.py`."""
    folder = RunDir.open(path)
    notes: list[str] = []
    about = kept("about.json", read_object(path / "about.json"), ABOUT, notes)
    result = kept("result.json", read_object(path / "result.json"), RESULT, notes)
    is_complete = (path / "result.json").is_file()
    evaluations = [load_evaluation(file) for file in _step_files(path / "eval")]
    notes += [f"eval, step {each.step}: empty, left out" for each in evaluations if not each.problem_ids]
    notes += seal_notes(folder, is_complete=is_complete, version=about.get("format", 1))
    run = Run(
        arm=arm,
        seed=seed,
        path=path,
        config=read_object(path / "config.json"),
        about=about,
        env=read_object(path / "env.json"),
        rows=read_metrics(folder.metrics_path, notes),
        result=result if is_complete else None,
        evaluations=tuple(evaluation for evaluation in evaluations if evaluation.problem_ids),
        rollouts={_step(file): file for file in _step_files(path / "rollouts")},
    )
    if run.result and run.final is None and run.result.get("step"):
        notes.append(f"no evaluation of the last step, {run.result['step']}: the run has no final accuracy")
    return replace(run, notes=tuple(notes))


def load_evaluation(path: Path) -> Evaluation:
    """Read one evaluation file into arrays."""
    rows = []
    for line, row in read_rows(path):
        refuse_damaged(path, row, EVALUATED, line)
        rows.append(row)
    problems: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        problems.setdefault(row["problem_id"], []).append(row)
    ids = sorted(problems)
    k = max((len(samples) for samples in problems.values()), default=0)
    rewards = np.full((len(ids), k), np.nan)
    for index, name in enumerate(ids):
        for sample, row in enumerate(problems[name]):
            rewards[index, sample] = np.nan if row["reward"] is None else row["reward"]
    return Evaluation(
        step=_step(path),
        problem_ids=tuple(ids),
        levels=tuple(str(problems[name][0]["level"]) for name in ids),
        rewards=rewards,
        answers=tuple(tuple(row["answer"] for row in problems[name]) for name in ids),
        lengths_mean=_mean(row["length"] for row in rows),
        truncated=_mean(row["stop"] == StopReason.LENGTH for row in rows),
        traits={trait: _mean(row["traits"].get(trait, False) for row in rows) for trait in _traits(rows)},
        path=path,
    )


def setting(config: Mapping[str, Any], path: str) -> Any:
    """Return a setting of a resolved recipe by its dotted path; None where the recipe does not have it."""
    value: Any = config
    for name in path.split("."):
        if not isinstance(value, Mapping):
            return None
        value = value.get(name)
    return value


def _single(path: Path) -> Study:
    run = load_run(path, path.resolve().name, None)
    return Study(
        title=run.arm,
        task=str(setting(run.config, "task.kind") or ""),
        is_comparison=False,
        arms=(Arm(run.arm, (), (run,)),),
        k=run.evaluations[-1].rewards.shape[1] if run.evaluations else 0,
        seeds=(run.config["seed"],) if is_step(run.config.get("seed")) else (),
        seconds=run.seconds,
        missing=() if run.result is not None else (f"{run.arm}: not finished",),
    )


def _same_k(studies: Sequence[Study]) -> int:
    """Return the samples a problem of those that were evaluated. UserError where they differ: Average@k is of one k."""
    found = {study.k: study.title for study in reversed(studies) if study.k}
    if len(found) > 1:
        named = ", ".join(f"{title} has {k}" for k, title in sorted(found.items()))
        raise UserError(
            f"evaluations have different numbers of samples a problem ({named}), and a report has one Average@k: "
            "report them apart, or train them with one eval.k"
        )
    return next(iter(found), 0)


def _distinct(names: Sequence[str]) -> list[str]:
    """Number the second and later uses of a name, so that no two arms share one."""
    return [
        f"{name} ({names[: index + 1].count(name)})" if name in names[:index] else name
        for index, name in enumerate(names)
    ]


def _renamed(arm: Arm, name: str) -> Arm:
    return Arm(name, arm.overrides, tuple(replace(run, arm=name) for run in arm.runs))


def _names_folder(name: str) -> bool:
    """Tell whether a name can be that of a folder below another."""
    return name not in {"", ".", ".."} and name.isprintable() and "/" not in name and len(name.encode()) < 200


def _step_files(folder: Path) -> list[Path]:
    """Return the files of a folder that hold one step each, in order; strays are left alone."""
    found = [file for file in folder.glob("step_*.jsonl") if _STEP_FILE.fullmatch(file.name) and file.is_file()]
    return sorted(found, key=_step)


def _step(path: Path) -> int:
    return int(path.stem.removeprefix("step_"))


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return float(np.mean(listed)) if listed else float("nan")


def _traits(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return sorted({trait for row in rows for trait in row["traits"]})
