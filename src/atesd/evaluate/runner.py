"""Sample k completions of every held-out problem, grade them, and summarise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from atesd.evaluate.metrics import avg_at_k, bootstrap_interval, have_answers, maj_at_k, pass_at_k
from atesd.rewards.answer import extract_answer
from atesd.rollout.driver import Driver
from atesd.rollout.sampler import SamplingConfig, Temperature
from atesd.types import Config, Group, Problem, StopReason, UserError

Traits = Callable[[Problem, str], dict[str, bool]]
Row = dict[str, Any]
"""One sample of a problem, as it is written to a file."""
Write = Callable[[Sequence[Row]], object]
"""Puts rows where they are safe."""


class EvalConfig(Config):
    """Evaluation on held-out problems. Defaults: OPSD's script, with a shorter completion limit."""

    every: Annotated[int, Field(ge=1)] = 25
    """Steps between evaluations; the start and the end are always evaluated."""
    k: Annotated[int, Field(ge=1)] = 12
    """Completions a problem: Average@k."""
    problems: Annotated[int, Field(ge=1)] | None = None
    """Evaluate on the first so many problems of the evaluation set; unset, on all."""
    temperature: Temperature = 1.0
    """Sampling temperature of evaluation, from .001 to 1000; 0 takes the most probable token."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Nucleus of evaluation; 1 switches the cut off."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Top-k cut of evaluation; 0 switches it off."""
    max_new_tokens: Annotated[int, Field(ge=1)] | None = None
    """Longest completion; unset, that of the rollouts."""

    def sampling(self, rollout: SamplingConfig) -> SamplingConfig:
        """Return the settings of evaluation completions."""
        return SamplingConfig(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            max_new_tokens=self.max_new_tokens or rollout.max_new_tokens,
            group_size=self.k,
            batch_tokens=rollout.batch_tokens,
        )


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Metrics by key, and one row a sample."""

    metrics: dict[str, float]
    rows: list[dict[str, Any]]


def evaluate(
    task: str,
    problems: Sequence[Problem],
    driver: Driver,
    sampling: SamplingConfig,
    *,
    seed: int,
    traits: Traits,
    write: Write | None = None,
) -> Evaluation:
    """Evaluate on problems, all samples in one request; `sampling.group_size` is k. UserError without problems.

    `write` gets the rows before anything is computed from them.
    """
    refuse_none(task, problems)
    tables = sample(problems, driver, sampling, seed=seed, traits=traits)
    if write is not None:
        write([row for table in tables for row in table])
    return summarise(task, tables)


def refuse_none(task: str, problems: Sequence[Problem]) -> None:
    """UserError where a task has nothing to evaluate on."""
    if not problems:
        raise UserError(
            f"task {task!r} has no evaluation problem: raise task.eval_size, or name a file with task.eval_path"
        )


def sample(
    problems: Sequence[Problem], driver: Driver, sampling: SamplingConfig, *, seed: int, traits: Traits
) -> list[list[Row]]:
    """Return the samples of each problem, graded, as rows."""
    return [_rows(group, traits) for group in driver.rollout(problems, sampling, seed=seed)]


def summarise(task: str, tables: Sequence[Sequence[Row]]) -> Evaluation:
    """Return the metrics of all problems' samples.

    A completion without a reward is counted, and its problem is left out of every accuracy.
    """
    rows = [row for table in tables for row in table]
    metrics = _describe(rows)
    graded = [table for table in tables if all(row["reward"] is not None for row in table)]
    if graded:
        metrics |= _accuracy(graded)
    return Evaluation({f"eval/{task}/{key}": value for key, value in metrics.items()}, rows)


def _rows(group: Group, traits: Traits) -> list[dict[str, Any]]:
    return [
        {
            "problem_id": group.problem.id,
            "level": group.problem.level,
            "sample": sample,
            "completion": trajectory.final.text,
            "answer": extract_answer(trajectory.final.text),
            "reward": trajectory.verdict,
            **({"rewards": dict(trajectory.rewards)} if trajectory.rewards else {}),
            "stop": str(trajectory.final.stop),
            "turns": len(trajectory.turns),
            "ended": str(trajectory.ended),
            "invalid": trajectory.invalid,
            **({"replies": [turn.text for turn in trajectory.turns]} if len(trajectory.turns) > 1 else {}),
            "length": trajectory.num_tokens,
            "traits": traits(group.problem, trajectory.final.text),
        }
        for sample, trajectory in enumerate(group.trajectories)
    ]


def _describe(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    metrics = {
        "length_mean": float(np.mean([row["length"] for row in rows])),
        "truncated_frac": float(np.mean([row["stop"] == StopReason.LENGTH for row in rows])),
        "ungradable": float(sum(row["reward"] is None for row in rows)),
    }
    if any(row["turns"] > 1 for row in rows):
        metrics["turns_mean"] = float(np.mean([row["turns"] for row in rows]))
        metrics["invalid_mean"] = float(np.mean([row["invalid"] for row in rows]))
        for ending in sorted({row["ended"] for row in rows}):
            metrics[f"ended/{ending}"] = float(np.mean([row["ended"] == ending for row in rows]))
    for name in rows[0]["traits"]:
        metrics[f"trait/{name}"] = float(np.mean([row["traits"][name] for row in rows]))
    return metrics


def _accuracy(tables: Sequence[Sequence[dict[str, Any]]]) -> dict[str, float]:
    """Return Average@k, pass@j for powers of two and k, and maj@k with intervals, and Average@k by level.

    A reward of 1 is correct; of several rewards the first one's, without its weight, since their sum is no verdict.
    maj@k votes by an answer's wording, and is left out where no sample has an answer.
    """
    correct_PK = np.array([[row["reward"] == 1.0 for row in table] for table in tables])
    k = correct_PK.shape[1]
    answers = [[row["answer"] for row in table] for table in tables]
    values = {f"avg@{k}": correct_PK.mean(axis=1)}
    if have_answers(answers):
        values[f"maj@{k}"] = maj_at_k(answers, correct_PK)
    for j in sorted({min(2**power, k) for power in range(k.bit_length() + 1)}):
        values[f"pass@{j}"] = pass_at_k(correct_PK, j)
    metrics: dict[str, float] = {}
    for name, values_P in values.items():
        low, high = bootstrap_interval(values_P)
        metrics |= {name: float(np.mean(values_P)), f"{name}_low": low, f"{name}_high": high}
    levels = [table[0]["level"] for table in tables]
    for level in sorted(set(levels) - {""}):
        metrics[f"level/{level}"] = avg_at_k(correct_PK[[name == level for name in levels]])
    return metrics
