"""Read run directories and comparisons into plain arrays; nothing here knows about figures or HTML."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

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
from atesd.report.study import Arm, Evaluation, Run, Study, setting
from atesd.runlog import RunDir
from atesd.types import StopReason, UserError

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
