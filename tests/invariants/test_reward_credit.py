"""Credit from graded rollouts against dense autograd in float64 and finite differences, on the packaged model.

Grades are given here, so that every fold and level has something to say. F folds.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from atesd.files import read_jsonl
from atesd.recipe import build_config
from atesd.routing.route import Route
from atesd.runlog import RunDir
from atesd.train.loop import Trainer
from atesd.train.setup import Parts, assemble
from atesd.types import Group, Measurement

from support.composition import BASE

OPTIM: dict[str, Any] = {"lr": 1e-3, "max_grad_norm": 0.0, "eps": 1e-4}
TREE: dict[str, Any] = BASE | {
    "task": {"kind": "pico", "train_size": 24, "probe_size": 2, "eval_size": 1},
    "probe": {"credit_parameters": "last_layer", "credit_steps": 2, "credit_problems": 4},
    "optim": OPTIM,
    "rollout": {"temperature": 1.3, "top_p": 1.0, "top_k": 0, "max_new_tokens": 24, "group_size": 2},
}
REWARDS: list[tuple[float | None, float | None]] = [
    (1.0, 0.0), (0.0, 0.5), (1.0, 1.0), (0.25, 1.0), (None, 1.0), (0.0, 1.0), (0.75, 0.0), (None, None), (0.0, 1.0),
]  # fmt: skip


def graded(parts: Parts, first: int, seed: int, rewards: Sequence[tuple[float | None, ...]] = REWARDS) -> list[Group]:
    """Sample for nine problems, and give the attempts their rewards."""
    problems = parts.problems[first : first + len(rewards)]
    groups = parts.driver.rollout(problems, build_config(TREE).rollout, seed=seed)
    return [
        Group(
            group.problem,
            tuple(replace(attempt, reward=reward) for attempt, reward in zip(group.trajectories, given, strict=True)),
        )
        for group, given in zip(groups, rewards, strict=True)
    ]


def began(tree: dict[str, Any], updates: int = 1) -> tuple[Parts, list[list[Group]]]:
    """Return a run that has seen four steps of graded completions, the last of which is asked about."""
    config = build_config(tree)
    parts = assemble(config)
    steps = [graded(parts, 5 * number, seed=number) for number in range(4)]
    for groups in steps:
        routes = [Route.SKIP if index == 1 else Route.DISTIL for index in range(len(groups))]
        parts.credit.remember(groups, routes, [0.25] * len(groups), config.target)
    for _ in range(updates):
        routes = [Route.DISTIL] * 3
        rows = parts.rows.build(steps[0][:3], routes, [1.0] * 3, ("teacher",))
        parts.stepper.optimize(rows, build_config(TREE).target)
    parts.model.eval()
    return parts, steps


def tables(parts: Parts, kind: str, *asked: float) -> list[dict[str, float]]:
    wanted = [Measurement(kind, each) for each in asked]
    found = parts.measurer.measure(wanted)
    return [dict(found[each]) for each in wanted]  # type: ignore[arg-type]


class Dense:
    """The model in float64, one sequence at a time."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.model = copy.deepcopy(parts.model).double().eval()
        depth = self.model.config.num_hidden_layers
        named = list(self.model.named_parameters())
        self.names = [name for name, _ in named if f"layers.{depth - 1}." in name]
        self.weights: list[nn.Parameter] = [weight for name, weight in named if name in self.names]
        self.initial = copy.deepcopy(assemble(build_config(TREE)).model).double().eval()

    def logs(self, model: nn.Module, prompt: Sequence[int], completion: Sequence[int]) -> Tensor:
        """Return log-probabilities [T, V] at the sampling temperature."""
        logits: Tensor = model(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
        return (logits / 1.3).log_softmax(-1)

    def loglik(self, turn: Any) -> Tensor:
        logs = self.logs(self.model, turn.prompt_ids, turn.completion_ids)
        return logs.gather(1, torch.tensor(turn.completion_ids)[:, None])[:, 0]

    def advantages(self, steps: Sequence[Sequence[Group]]) -> list[tuple[int, float, Any]]:
        """Return number, advantage and turn of every graded attempt: against the other one, or the level's mean.

        The number is that of its problem among all that are known, step by step.
        """
        running: dict[str, float] = {}
        found = []
        for groups in steps:
            seen: dict[str, list[float]] = {}
            for group in groups:
                seen.setdefault(group.problem.level, []).extend(group.rewards)
            now = {level: sum(values) / len(values) for level, values in seen.items() if values}
            before = {**now, **running}
            step = []
            for place, group in enumerate(groups):
                first, second = group.trajectories
                for own, other in ((first, second), (second, first)):
                    if own.reward is not None:
                        usual = before[group.problem.level] if other.reward is None else other.reward
                        step.append((place, own.reward - usual, own.turns[0]))
            found.append(step)
            running |= {level: 0.9 * before[level] + 0.1 * mean for level, mean in now.items()}
        kept = [
            ((age, place), *rest) for age, step in enumerate(found[-3:-1]) for place, *rest in step
        ]  # not the newest
        numbers = sorted({place for place, *_ in kept})
        return [(numbers.index(place), advantage, turn) for place, advantage, turn in kept]

    def surrogate(self, steps: Sequence[Sequence[Group]]) -> Tensor:
        """Return (1/tokens) sum A log p of what is known."""
        known = self.advantages(steps)
        tokens = sum(len(turn.completion_ids) for _, _, turn in known)
        return torch.stack([advantage * self.loglik(turn).sum() for _, advantage, turn in known]).sum() / tokens

    def folds(self, steps: Sequence[Sequence[Group]]) -> list[list[Tensor]]:
        """Return g_R by fold."""
        known = self.advantages(steps)
        tokens = sum(len(turn.completion_ids) for _, _, turn in known)
        assert max(number for number, *_ in known) >= 8, "more problems than folds"
        found = []
        for fold in range(8):
            part = [-advantage * self.loglik(turn).sum() for number, advantage, turn in known if number % 8 == fold]
            loss = 8 * torch.stack(part).sum() / tokens if part else 0 * sum(w.sum() for w in self.weights)
            found.append(list(torch.autograd.grad(loss, self.weights, allow_unused=True, materialize_grads=True)))
        return found

    def probe_folds(self, references: Sequence[Any]) -> list[list[Tensor]]:
        """Return the gradient of the references' token-mean NLL by fold: every eighth of them, scaled to a mean.

        Of fewer than eight each is a fold.
        """
        tokens, count = sum(len(each.completion) for each in references), min(8, len(references))
        found = []
        for fold in range(count):
            part = []
            for prompt, completion, _ in references[fold::count]:
                logits = self.model(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
                logs = logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])  # at temperature 1
                part.append(-logs.sum())
            loss = count * torch.stack(part).sum() / tokens
            found.append(list(torch.autograd.grad(loss, self.weights, allow_unused=True, materialize_grads=True)))
        return found

    def distillation(
        self, groups: Sequence[Group], ratios: Sequence[float], strength: float = 1.0
    ) -> dict[str, Tensor]:
        """Return each level's part of the token mean of KL(target || student)."""
        count = sum(len(a.turns[0].completion_ids) for group in groups for a in group.trajectories)
        levels: dict[str, Tensor] = {}
        for group, ratio in zip(groups, ratios, strict=True):
            for attempt in group.trajectories:
                turn = attempt.turns[0]
                log_q = self.logs(self.model, turn.prompt_ids, turn.completion_ids)
                with torch.no_grad():
                    hinted = self.parts.hints.teacher_ids(group.problem, ratio)
                    log_p = self.logs(self.initial, hinted, turn.completion_ids)
                    base = self.logs(self.initial, turn.prompt_ids, turn.completion_ids)
                    log_p = (strength * log_p - (strength - 1) * base).log_softmax(-1)
                value = (log_p.exp() * (log_p - log_q)).sum() / count
                levels[group.problem.level] = levels.get(group.problem.level, 0.0) + value
        return levels

    def scale(self) -> list[Tensor]:
        """Return P of the credited weights, from the optimizer's state."""
        optimizer = getattr(self.parts.optimizer, "optimizer", self.parts.optimizer)
        own = dict(self.parts.model.named_parameters())
        found = []
        for name in self.names:
            state = optimizer.state.get(own[name])
            if not state:
                found.append(torch.ones_like(own[name]).double())
                continue
            v = state["exp_avg_sq"].double() / (1 - optimizer.param_groups[0]["betas"][1] ** float(state["step"]))
            found.append(1 / (v.sqrt() + OPTIM["eps"]))
        return found

    def credits(self, levels: dict[str, Tensor], folds: Sequence[Sequence[Tensor]], limit: float) -> dict[str, float]:
        """Return s <g_R, P g> by level and fold."""
        scale = self.scale()
        gradients = {
            level: torch.autograd.grad(loss, self.weights, retain_graph=True) for level, loss in levels.items()
        }
        whole = [torch.stack(parts).sum(0) for parts in zip(*gradients.values(), strict=True)]
        norm = float(sum(part.square().sum() for part in whole) ** 0.5)
        kept = min(1.0, limit / norm) if limit else 1.0
        return {
            f"{level}/{number}": kept
            * sum(float((a * p * b).sum()) for a, p, b in zip(fold, scale, gradient, strict=True))
            for level, gradient in gradients.items()
            for number, fold in enumerate(folds)
        }


def close(found: dict[str, float], expected: dict[str, float]) -> None:
    assert set(found) == set(expected)
    largest = max(map(abs, expected.values()))
    assert largest > 0
    assert found == pytest.approx(expected, rel=2e-3, abs=2e-5 * largest)


@pytest.mark.parametrize("updates", [0, 1])
def test_credits_by_level_and_fold_are_those_of_dense_gradients(updates: int) -> None:
    """The first four problems of the newest step whatever their route; the two steps before it say what is right."""
    limit = 0.01
    parts, steps = began(TREE | {"optim": OPTIM | {"max_grad_norm": limit}}, updates)
    dense = Dense(parts)
    folds = dense.folds(steps)
    speaking = [number for number, fold in enumerate(folds) if any(bool(part.any()) for part in fold)]
    known = dense.advantages(steps)
    assert set(speaking) <= {number % 8 for number, advantage, _ in known if advantage}, "equal grades say nothing"
    assert len(speaking) > 4
    assert any(not advantage for _, advantage, _ in known)
    asked, binds = (0.0, 0.5, 1.0), []
    by_level, together = (tables(parts, f"reward_influence{kind}", *asked) for kind in ("_by_level", ""))
    for ratio, table, whole in zip(asked, by_level, together, strict=True):
        levels = dense.distillation(steps[-1][:4], [ratio] * 4)
        assert len(levels) == 3
        expected = dense.credits(levels, folds, limit)
        close(table, expected)
        summed = {
            f"/{fold}": sum(value for key, value in expected.items() if key.endswith(f"/{fold}")) for fold in range(8)
        }
        close(whole, summed)
        binds.append(dense.credits(levels, folds, 0.0) != pytest.approx(expected))
    assert set(binds) == {True, False}, "one gradient is clipped, and one is not"


@pytest.mark.parametrize("size", [9, 3])
def test_the_probes_credits_by_level_and_fold_are_those_of_dense_gradients(size: int) -> None:
    """Of nine references the first fold has two, each other one. No grades are needed."""
    tree = TREE | {"task": {"kind": "pico", "train_size": 24, "probe_size": size, "eval_size": 1}}
    parts, steps = began(tree | {"optim": OPTIM | {"max_grad_norm": 0.01}})
    assert len(parts.probe.references) == size
    dense = Dense(parts)
    folds = dense.probe_folds(parts.probe.references)
    for ratio, table in zip((0.0, 1.0), tables(parts, "probe_influence_by_level", 0.0, 1.0), strict=True):
        close(table, dense.credits(dense.distillation(steps[-1][:4], [ratio] * 4), folds, 0.01))
    (whole,) = tables(parts, "probe_influence", 1.0)
    together = {"": torch.stack([*dense.distillation(steps[-1][:4], [1.0] * 4).values()]).sum()}
    close(whole, dense.credits(together, folds, 0.01))


def test_lambdas_are_compared_at_the_ratios_in_force() -> None:
    tree = TREE | {"target": {"kind": "extrapolate", "lambda_x": 1.5, "aligned": True}}
    parts, steps = began(tree)
    dense = Dense(parts)
    folds = dense.folds(steps)
    found = tables(parts, "reward_influence_lambda", 1.0, 1.5)
    for strength, table in zip((1.0, 1.5), found, strict=True):
        whole = {"": torch.stack([*dense.distillation(steps[-1][:4], [0.25] * 4, strength).values()]).sum()}
        close(table, dense.credits(whole, folds, 0.0))


@pytest.mark.parametrize("updates", [0, 1])
def test_a_small_step_changes_the_advantage_weighted_likelihood_by_the_credit(updates: int) -> None:
    """The claim itself: behind theta - eta P g the surrogate (1/tokens) sum A log p has risen by eta <g_R, P g>."""
    parts, steps = began(TREE, updates)
    dense = Dense(parts)
    scale = dense.scale()
    for ratio, table in zip((0.0, 1.0), tables(parts, "reward_influence", 0.0, 1.0), strict=True):
        credit = sum(table.values()) / 8
        loss = torch.stack([*dense.distillation(steps[-1][:4], [ratio] * 4).values()]).sum()
        gradient = torch.autograd.grad(loss, dense.weights)
        length = float(sum((p * g).square().sum() for p, g in zip(scale, gradient, strict=True)) ** 0.5)
        eta = 1e-4 / length
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                for weight, p, g in zip(dense.weights, scale, gradient, strict=True):
                    weight.sub_(sign * eta * p * g)
                ends.append(float(dense.surrogate(steps)))
                for weight, p, g in zip(dense.weights, scale, gradient, strict=True):
                    weight.add_(sign * eta * p * g)
        assert (ends[0] - ends[1]) / 2 == pytest.approx(eta * credit, rel=5e-3)


def test_the_virtual_reward_is_that_of_earlier_completions_behind_the_step() -> None:
    parts, steps = began(TREE)
    dense = Dense(parts)
    before = {name: weight.detach().clone() for name, weight in parts.model.named_parameters()}
    wanted = [Measurement("virtual_reward", ratio) for ratio in (0.0, 1.0)]
    found = parts.measurer.measure(wanted)
    assert all(torch.equal(weight, before[name]) for name, weight in parts.model.named_parameters())
    now = -float(dense.surrogate(steps).detach())
    optimizer = getattr(parts.optimizer, "optimizer", parts.optimizer)
    kept = copy.deepcopy(optimizer.state_dict())
    chosen = [group for index, group in enumerate(steps[-1]) if index != 1][:4]  # those that were distilled
    for measurement in wanted:
        loss = torch.stack([*dense.distillation(chosen, [measurement.ratio] * 4).values()]).sum()  # type: ignore[list-item]
        named = dict(dense.model.named_parameters())
        gradient = torch.autograd.grad(loss, [*named.values()])
        for (_, weight), part in zip(parts.model.named_parameters(), gradient, strict=True):
            weight.grad = part.float()
        torch.optim.AdamW.step(optimizer)
        stepped = Dense(parts)
        expected = -float(stepped.surrogate(steps).detach())
        value = found[measurement]
        assert isinstance(value, float)
        assert abs(expected - now) > 1e-4
        assert value - now == pytest.approx(expected - now, rel=2e-2)
        optimizer.load_state_dict(copy.deepcopy(kept))
        with torch.no_grad():
            for name, weight in parts.model.named_parameters():
                weight.copy_(before[name])


def test_equal_or_missing_grades_say_nothing() -> None:
    parts = assemble(build_config(TREE))
    target = build_config(TREE).target
    kinds = ("reward_influence", "reward_influence_by_level", "virtual_reward")
    asked = [Measurement(kind, 0.5) for kind in kinds] + [Measurement("reward_influence_lambda", 1.0)]
    same: list[tuple[float | None, ...]] = [(1.0, 1.0), (None, None), (0.0, 0.0)]
    for number in range(2):
        parts.credit.remember(graded(parts, 3 * number, number, same), [Route.DISTIL] * 3, [0.5] * 3, target)
        assert parts.measurer.measure(asked) == {}
    parts.credit.remember(graded(parts, 6, 2, [(1.0, 0.0)] * 3), [Route.DISTIL] * 3, [0.5] * 3, target)
    assert parts.measurer.measure(asked) == {}, "the newest grades are not asked"
    parts.credit.remember(graded(parts, 9, 3, same), [Route.SKIP] * 3, [0.5] * 3, target)
    found = parts.measurer.measure(asked)
    assert {measurement.kind for measurement in found} == {
        "reward_influence",
        "reward_influence_by_level",
        "reward_influence_lambda",
    }, "what is skipped can still be asked about, but no virtual step was taken on it"


def test_no_gradient_of_the_run_is_touched() -> None:
    parts, _ = began(TREE)
    for weight in parts.model.parameters():
        weight.grad = None
    flags = [weight.requires_grad for weight in parts.model.parameters()]
    tables(parts, "reward_influence", 0.5)
    assert all(weight.grad is None for weight in parts.model.parameters())
    assert [weight.requires_grad for weight in parts.model.parameters()] == flags


@pytest.mark.parametrize(("reward", "probe"), [("wrong", 3), ("wrong", 0), ("partly", 3)])
def test_a_run_asks_the_probe_while_rewards_say_nothing(reward: str, probe: int, tmp_path: Path) -> None:
    """All wrong, with a probe: its credits choose. Without one, ratios stay, and the run goes on."""
    (tmp_path / "grades.py").write_text(
        "def wrong(completions, **_): return [0.0] * len(completions)\n"
        "def partly(completions, **_): return [sum(map(ord, each)) % 5 / 4 for each in completions]\n"
    )
    tree = TREE | {
        "task": {"kind": "pico", "train_size": 24, "probe_size": probe, "eval_size": 1},
        "reward": {"kind": "python", "function": f"{tmp_path / 'grades.py'}:{reward}"},
        "exposure": {"kind": "influence", "reference": "reward", "by": "level", "hold": 1, "grid": [0.0, 1.0]},
        "step": {"num_steps": 3, "problems": 6},
    }
    Trainer.start(build_config(tree), tmp_path / "run").train()
    rows = RunDir.open(tmp_path / "run").metrics()
    sources = {key.split("_")[0] for row in rows if row["step"] > 1 for key in row if "_influence_by_level" in key}
    shown = {group["ratio"] for group in read_jsonl(tmp_path / "run" / "groups.jsonl") if group["step"] > 1}
    if reward == "partly":
        assert sources == {"measure/reward"}
    elif probe:
        assert sources == {"measure/probe"}
        assert shown <= {0.0, 1.0}, "chosen by the probe"
        assert any("exposure/short/credit/0" in row for row in rows)
    else:
        assert not sources
        assert shown == {0.5}
        assert all(row.get("exposure/discarded") == 1.0 for row in rows if row["step"])
