"""A real run of a few steps on the packaged model, with all that passes the sampler and the optimizer written down.

Only what is stable from outside is touched: the recipe, `Trainer`, `HFSampler.sample`, `torch.optim.AdamW.step` and the
run directory. So a recording says what the trainer did, whatever its insides look like.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from atesd.recipe import build_config
from atesd.rollout.hf import HFSampler
from atesd.tasks.synthetic import pico
from atesd.train.loop import Trainer
from atesd.types import Problem, Turn

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Call:
    """One request to the sampler, what came back (as the trainer saw it), and the weights that it was made with."""

    prompts: list[tuple[int, ...]]
    sampling: dict[str, Any]
    seed: int
    turns: list[Turn]
    weights: Weights
    updates: int
    """Optimizer updates before it."""


@dataclass(frozen=True)
class Update:
    """One optimizer update: gradients as Adam got them, weights on both sides, the rate in force."""

    before: Weights
    gradients: Weights
    after: Weights
    rate: float


@dataclass
class Recording:
    """A finished run. `metrics`, `groups`, `rollouts` and `evaluations` are those of the run directory, by step."""

    trainer: Trainer
    settings: dict[str, Any]
    folder: Path
    probe: list[Problem]
    evaluation: list[Problem]
    initial: Weights
    calls: list[Call] = field(default_factory=list)
    updates: list[Update] = field(default_factory=list)
    metrics: dict[int, dict[str, Any]] = field(default_factory=dict)
    groups: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    rollouts: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    evaluations: dict[int, list[dict[str, Any]]] = field(default_factory=dict)

    @property
    def model(self) -> nn.Module:
        return self.trainer.parts.model

    @property
    def tokenizer(self) -> Any:
        return self.trainer.parts.tokenizer

    @property
    def steps(self) -> int:
        return int(self.settings["step"]["num_steps"])

    def problem(self, identity: str) -> Problem:
        return next(problem for problem in self.trainer.parts.problems if problem.id == identity)

    def of(self, problems: Sequence[Problem]) -> list[Call]:
        """Return the requests about some problems, told by their prompts."""
        known = {student_prompt(self.tokenizer, self.settings, problem) for problem in problems}
        return [call for call in self.calls if known.issuperset(call.prompts)]


def student_prompt(tokenizer: Any, settings: dict[str, Any], problem: Problem) -> tuple[int, ...]:
    """Return the ids of a problem without a hint."""
    return rendered(tokenizer, settings["prompt"]["student"].replace("{problem}", problem.problem))


def rendered(tokenizer: Any, text: str) -> tuple[int, ...]:
    """Return the ids of one user turn up to the assistant's header."""
    message = [{"role": "user", "content": text}]
    return tuple(tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=True, return_dict=False))


def record(tree: dict[str, Any], folder: Path, *, skew: float = 0.0) -> Recording:
    """Train a recipe to its end.

    `skew` shifts the sampler's log-probabilities by skew * cos(place), so that its correction has something to correct.
    """
    if skew:  # a gap that is meant does not warn
        tree = tree | {"rollout": tree.get("rollout", {}) | {"gap_warning": 1.0, "gap_limit": 1.0}}
    with pytest.MonkeyPatch.context() as patch:
        found: list[Recording] = []
        _watch_sampler(patch, found, skew)
        _watch_optimizer(patch, found)
        trainer = Trainer.start(build_config(tree), folder)
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        task = settings["task"]
        found.append(
            Recording(
                trainer,
                settings,
                folder,
                probe=pico.problems("probe", task["probe_size"], 0),
                evaluation=pico.problems("eval", task["eval_size"], settings["seed"]),
                initial=_weights(trainer.parts.model),
            )
        )
        trainer.train()
    run = found[0]
    run.metrics = {row["step"]: row for row in _rows(folder / "metrics.jsonl")}
    for row in _rows(folder / "groups.jsonl"):
        run.groups.setdefault(row["step"], []).append(row)
    run.rollouts = _by_step(folder / "rollouts")
    run.evaluations = _by_step(folder / "eval")
    return run


def _watch_sampler(patch: pytest.MonkeyPatch, found: list[Recording], skew: float) -> None:
    sample = HFSampler.sample

    def watched(
        self: HFSampler, prompts: Sequence[Sequence[int]], sampling: Any, *, seed: int, **more: Any
    ) -> list[Turn]:
        run = found[0]
        weights = _weights(run.model)
        turns = sample(self, prompts, sampling, seed=seed, **more)
        turns = [replace(turn, logprobs=_skewed(turn.logprobs, skew)) for turn in turns]
        asked = [tuple(prompt) for prompt in prompts]
        run.calls.append(Call(asked, sampling.model_dump(), seed, turns, weights, len(run.updates)))
        return turns

    patch.setattr(HFSampler, "sample", watched)


def _watch_optimizer(patch: pytest.MonkeyPatch, found: list[Recording]) -> None:
    move = torch.optim.AdamW.step

    @wraps(move)
    def watched(self: torch.optim.AdamW, *args: Any, **kwargs: Any) -> Any:
        run = found[0]
        before = _weights(run.model)
        gradients = {
            name: torch.zeros_like(weight) if weight.grad is None else weight.grad.detach().clone()
            for name, weight in _trained(run.model)
        }
        rate = float(self.param_groups[0]["lr"])
        result = move(self, *args, **kwargs)
        run.updates.append(Update(before, gradients, _weights(run.model), rate))
        return result

    patch.setattr(torch.optim.AdamW, "step", watched)


def _skewed(logprobs: Sequence[float], skew: float) -> tuple[float, ...]:
    return tuple(min(0.0, value + skew * math.cos(place)) for place, value in enumerate(logprobs))


def _trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]


def _weights(model: nn.Module) -> Weights:
    return {name: weight.detach().clone() for name, weight in _trained(model)}


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def _by_step(folder: Path) -> dict[int, list[dict[str, Any]]]:
    return {int(path.stem.removeprefix("step_")): _rows(path) for path in sorted(folder.glob("step_*.jsonl"))}
