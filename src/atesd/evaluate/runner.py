"""Sample k completions of every held-out problem, grade them, and summarise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from atesd.evaluate.metrics import avg_at_k, bootstrap_interval, maj_at_k, pass_at_k
from atesd.rewards.answer import extract_answer
from atesd.rollout.driver import Driver
from atesd.rollout.sampler import SamplingConfig
from atesd.types import Config, Group, Problem, StopReason

Traits = Callable[[Problem, str], dict[str, bool]]


class EvalConfig(Config):
    """Evaluation on held-out problems. Defaults: OPSD's script (METHOD 1.1), with a shorter completion limit."""

    every: Annotated[int, Field(ge=1)] = 25
    """Steps between evaluations; the start and the end are always evaluated."""
    k: Annotated[int, Field(ge=1)] = 12
    """Completions a problem: Average@k."""
    problems: Annotated[int, Field(ge=1)] | None = None
    """Evaluate on the first so many problems of the evaluation set; unset, on all."""
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """Sampling temperature of evaluation."""
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
    task: str, problems: Sequence[Problem], driver: Driver, sampling: SamplingConfig, *, seed: int, traits: Traits
) -> Evaluation:
    """Evaluate on problems; `sampling.group_size` is k. Ungradable completions are counted and left out."""
    groups = driver.rollout(problems, sampling, seed=seed)
    rows = [row for group in groups for row in _rows(group, traits)]
    return Evaluation({f"eval/{task}/{key}": value for key, value in _summarise(groups, rows).items()}, rows)


def _rows(group: Group, traits: Traits) -> list[dict[str, Any]]:
    return [
        {
            "problem_id": group.problem.id,
            "level": group.problem.level,
            "sample": sample,
            "completion": trajectory.turns[-1].text,
            "answer": extract_answer(trajectory.turns[-1].text),
            "reward": trajectory.reward,
            "stop": str(trajectory.turns[-1].stop),
            "length": len(trajectory.turns[-1].completion_ids),
            "traits": traits(group.problem, trajectory.turns[-1].text),
        }
        for sample, trajectory in enumerate(group.trajectories)
    ]


def _summarise(groups: Sequence[Group], rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    metrics = {
        "length_mean": float(np.mean([row["length"] for row in rows])),
        "truncated_frac": float(np.mean([row["stop"] == StopReason.LENGTH for row in rows])),
        "ungradable": float(sum(row["reward"] is None for row in rows)),
    }
    for name in rows[0]["traits"]:
        metrics[f"trait/{name}"] = float(np.mean([row["traits"][name] for row in rows]))
    gradable = [group for group in groups if all(t.reward is not None for t in group.trajectories)]
    if gradable:
        metrics |= _accuracy(gradable)
    return metrics


def _accuracy(groups: Sequence[Group]) -> dict[str, float]:
    """Return Average@k, pass@j for powers of two, and maj@k over groups of k graded completions."""
    correct_PG = np.array([[trajectory.reward == 1.0 for trajectory in group.trajectories] for group in groups])
    k = correct_PG.shape[1]
    average = avg_at_k(correct_PG)
    low, high = bootstrap_interval(correct_PG.mean(axis=1))
    metrics = {f"avg@{k}": average, f"avg@{k}_low": low, f"avg@{k}_high": high}
    for j in sorted({min(2**power, k) for power in range(k.bit_length() + 1)}):
        metrics[f"pass@{j}"] = float(np.mean(pass_at_k(correct_PG, j)))
    answers = [[extract_answer(t.turns[-1].text) for t in group.trajectories] for group in groups]
    metrics[f"maj@{k}"] = float(np.mean(maj_at_k(answers, correct_PG)))
    levels = [group.problem.level for group in groups]
    for level in sorted({name for name in levels if name}):
        metrics[f"level/{level}"] = float(correct_PG[[name == level for name in levels]].mean())
    return metrics
