"""Rollouts of the next step, sampled while this one updates: one-step off-policy.

Step n trains on completions of theta_(n-1), and asks for those of step n + 1, from theta_n, before its update; its step
time is max(sample, update) instead of their sum. The first step has nobody who asked for it, and lag 0. What corrects a
loss is w = min(p_old / p_sampler, importance_clip) of every sampled token (`losses/policy.py`, `losses/divergence.py`):
truncated importance sampling, where p_old are the weights that the step begins with.

Which problems come is thus decided a step earlier, before the curriculum observes what the step between them brings.
Exposure, routes and lambda are decided where they always are, since no sample depends on them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from atesd.config import RunConfig
from atesd.rollout.driver import Underway
from atesd.train.batch import Row
from atesd.train.stats import RowStats
from atesd.types import Ending, Group, Problem, StopReason, Trajectory, Turn


class Ahead:
    """What the next step will train on, where that is under way or was sampled already."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._taken_s: float | None = None
        self._problems: list[int] = []
        self._underway: Underway | None = None
        self._attempts: list[tuple[Trajectory, ...]] | None = None

    def begin(self, problems: Sequence[int], underway: Underway) -> None:
        """Take note of what was asked for, by places of the problems."""
        assert not self, "one step is sampled ahead"
        self._problems, self._underway = list(problems), underway

    def __bool__(self) -> bool:
        return self._underway is not None or self._attempts is not None

    def take(self, problems: Sequence[Problem]) -> list[Group]:
        """Wait for the groups and hand them out; `problems` are all of the run's. UserError as in sampling."""
        attempts = self._fetched()
        chosen = [problems[place] for place in self._problems]
        self._attempts, self._taken_s, self._seconds = None, self._seconds, 0.0
        return [Group(problem, each) for problem, each in zip(chosen, attempts, strict=True)]

    def seconds(self) -> dict[str, float]:
        """Return how long what was taken last had been under way, once: 0 where a checkpoint held it."""
        taken, self._taken_s = self._taken_s, None
        return {} if taken is None else {"time/ahead_s": taken}

    def drop(self) -> None:
        """Give up what nobody will train on."""
        if self._underway is not None:
            self._underway.drop()
            self._underway = None

    def state_dict(self) -> dict[str, Any] | None:
        """Wait for the groups and return them, which later weights could not sample again; None where there are none.

        The next step would wait for them as well, so that this costs no time but the writing.
        """
        if not self:
            return None
        return {"problems": self._problems, "attempts": [[asdict(each) for each in group] for group in self._fetched()]}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Restore what `state_dict` returned."""
        self._underway = self._attempts = None
        self._seconds = 0.0
        if state is not None:
            self._problems = list(state["problems"])
            self._attempts = [tuple(_trajectory(each) for each in group) for group in state["attempts"]]

    def _fetched(self) -> list[tuple[Trajectory, ...]]:
        if self._underway is not None:
            groups = self._underway.groups()
            self._seconds = self._underway.seconds()
            self._attempts = [group.trajectories for group in groups]
            self._underway = None
        assert self._attempts is not None
        return self._attempts


def _trajectory(kept: Mapping[str, Any]) -> Trajectory:
    """Return what `asdict` and JSON made of an attempt."""
    turns = tuple(
        Turn(
            **each
            | {name: tuple(each[name]) for name in ("prompt_ids", "completion_ids", "logprobs")}
            | {"stop": StopReason(each["stop"])}
        )
        for each in kept["turns"]
    )
    return Trajectory(**{**kept, "turns": turns, "said": tuple(kept["said"]), "ended": Ending(kept["ended"])})


def lag_of(groups: Sequence[Group], step: int) -> float:
    """Return by how many steps the weights that sampled are behind those of now, mean over turns."""
    turns = [turn for group in groups for attempt in group.trajectories for turn in attempt.turns]
    return sum(step - turn.weights_version for turn in turns) / len(turns)


def ratio_metrics(rows: Sequence[Row], scored: Mapping[int, RowStats], config: RunConfig) -> dict[str, float]:
    """Describe r = p_student / p_sampler over the scored tokens, p_student as the row's update read it.

    The clipped share is that of tokens with r above the least importance clip among the losses of their row, over rows
    that have one.
    """
    ratios: list[Tensor] = []
    clipped: list[Tensor] = []
    for index, row in scored.items():
        if not rows[index].sampler_logprobs:
            continue
        ratio_T = (row.as_sampled.double() - torch.tensor(rows[index].sampler_logprobs, dtype=torch.double)).exp()
        ratios.append(ratio_T)
        clip = _clip(rows[index], config)
        if clip is not None:
            clipped.append((ratio_T > clip).double())
    found = {"rollout/ratio": ratios, "rollout/ratio_clipped": clipped}
    return {name: float(torch.cat(each).mean()) for name, each in found.items() if each}


def _clip(row: Row, config: RunConfig) -> float | None:
    of_loss = {"rl": config.rl.importance_clip, "distil": config.loss.importance_clip}
    clips = [of_loss[name] for name in row.components if of_loss.get(name) is not None]
    return min((clip for clip in clips if clip is not None), default=None)
