"""Every update of every recipe: gradient, optimizer, and what is logged of it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from support.oracle import Expected, Oracle, Row, Scored, distance
from support.recording import record
from support.wired import RECIPES, SAMPLING, SKEWS, recipe

Oracles = Callable[[str], Oracle]
every_recipe = pytest.mark.parametrize("name", RECIPES)


@every_recipe
def test_every_update_has_the_gradient_of_the_loss_that_the_recipe_says(name: str, oracle: Oracles) -> None:
    truth = oracle(name)
    expected, made = truth.updates(), truth.run.updates
    assert len(made) == len(expected) > 1
    limit = truth.settings["optim"]["max_grad_norm"]
    for update, part in zip(made, expected, strict=True):
        # In float32 tokens that are nearly certain carry an error of 1e-7: it shows where a gradient is small.
        allowed = 5e-5 + 5e-7 / part.norm
        assert distance(update.gradients, part.clipped(limit)) < allowed


@every_recipe
def test_every_update_is_a_step_of_adamw_at_the_scheduled_rate(name: str, oracle: Oracles) -> None:
    truth = oracle(name)
    optim = truth.settings["optim"]
    weights = truth.run.initial
    for index, (update, (m, v)) in enumerate(zip(truth.run.updates, truth.moments(), strict=True)):
        rate, (first, second) = truth.rate(index), optim["betas"]
        assert update.rate == pytest.approx(rate, rel=1e-9)
        moved, wanted = {}, {}
        for key, weight in update.before.items():
            assert torch.equal(weight, weights[key]), "nothing else moves the weights"
            mean, square = m[key] / (1 - first ** (index + 1)), v[key] / (1 - second ** (index + 1))
            wanted[key] = -rate * (mean / (square.sqrt() + optim["eps"]) + optim["weight_decay"] * weight.double())
            moved[key] = update.after[key].double() - weight.double()
        if rate > 1e-9:  # else smaller than float32 can hold
            assert distance(moved, wanted) < 2e-3
        weights = update.after


@every_recipe
def test_completions_are_sampled_from_the_student_as_it_stands_before_the_step(name: str, oracle: Oracles) -> None:
    truth = oracle(name)
    calls = truth.run.of(truth.run.trainer.parts.problems)
    if name == "sft":
        assert not calls
        return
    assert len(calls) == truth.run.steps
    temperature = truth.settings["rollout"]["temperature"]
    for step, call in enumerate(calls, start=1):
        done = sum(part.step < step for part in truth.updates())
        assert call.updates == done
        assert all(torch.equal(call.weights[key], weight) for key, weight in truth.weights(done).items())
        assert {key: call.sampling[key] for key in ("temperature", "top_p", "top_k", "max_new_tokens")} == {
            key: truth.settings["rollout"][key] for key in ("temperature", "top_p", "top_k", "max_new_tokens")
        }
        for prompt, turn in zip(call.prompts, call.turns, strict=True):
            logs = (truth.seen(truth.weights(done), prompt, turn.completion_ids) / temperature).log_softmax(-1)
            found = logs.gather(1, torch.tensor(turn.completion_ids)[:, None])[:, 0]
            skew = SKEWS.get(name, 0.0) * torch.cos(torch.arange(len(found)))
            assert torch.allclose(torch.tensor(turn.logprobs).double(), (found + skew).clamp(max=0.0), atol=2e-5)


@every_recipe
def test_completions_are_graded_and_the_cut_off_ones_are_wrong(name: str, oracle: Oracles) -> None:
    truth = oracle(name)
    for step in range(1, truth.run.steps + 1):
        for row in truth.rows(step):
            text = truth.run.tokenizer.decode(row.completion, skip_special_tokens=True)
            assert row.reward == truth.reward(row.problem, text, row.cut_off)


def cat(parts: list[Tensor | None]) -> Tensor:
    return torch.cat([part for part in parts if part is not None])


def scored(parts: list[Expected], component: str | None = None) -> list[tuple[Row, Scored]]:
    """Return the rows that a live component reads, or those that one component reads."""
    return [
        (row, stats)
        for part in parts
        for row, stats in zip(part.rows, part.scored, strict=True)
        if (component in row.components if component else set(row.components) & set(part.losses))
    ]


def of_update(truth: Oracle, part: Expected) -> dict[str, float]:
    """Recompute one update's numbers."""
    numbers = {f"loss/{name}": loss for name, loss in part.losses.items()}
    numbers |= {"loss/total": sum(part.losses.values()), "optim/grad_norm": part.norm}
    if "distil" in part.losses:
        heard = scored([part], "distil")
        chosen = cat([torch.ones(len(row.completion)) if row.selected is None else row.selected for row, _ in heard])
        gate = cat([stats.gate for _, stats in heard])
        if truth.settings["target"]["kind"] == "paint":
            numbers["target/painted_frac"] = float(cat([stats.painted for _, stats in heard]).mean())
        numbers |= {"gate/kept_frac": float(chosen.mean()), "gate/mean": float((chosen * gate).mean())}
        if truth.settings["gate"]["kind"] == "sdar":
            gap = cat([stats.teacher_logprob for _, stats in heard]) - cat([stats.logprob for _, stats in heard])
            numbers |= {
                "gate/gap": float(gap.mean()),
            }
    if "rl" in part.losses:
        forced = [stats for _, stats in scored([part], "rl")]
        numbers |= {
            "rl/ratio": float(cat([stats.ratio for stats in forced]).mean()),
            "rl/clip_frac": float(cat([stats.held for stats in forced]).mean()),
            "rl/sampler_weight": float(cat([stats.correction for stats in forced]).mean()),
            "rl/kl": float(cat([stats.kl for stats in forced]).mean()),
            "rl/credit": float(cat([stats.credit for stats in forced]).mean()),
        }
    return numbers


def logged(truth: Oracle, parts: list[Expected]) -> dict[str, float]:
    """Recompute a step's numbers: those of updates are means over the ones that have them, others are of all tokens."""
    several = [of_update(truth, part) for part in parts]
    numbers = {key: statistics.fmean(each[key] for each in several if key in each) for each in several for key in each}
    rows = scored(parts)
    logprob = cat([stats.logprob for _, stats in rows])
    numbers["student/entropy"] = float(cat([stats.entropy for _, stats in rows]).mean())
    numbers["student/confidence"] = float(cat([stats.top for _, stats in rows]).mean())
    sampling = truth.settings["rollout"]["temperature"]
    if truth.settings["loss"]["temperature_student"] in (None, sampling) and rows[0][0].sampled:
        sampled = torch.tensor([value for row, _ in rows for value in row.sampled]).double()
        numbers["rollout/logprob_gap"] = float((logprob - sampled).abs().mean())
    taught = [(row, stats) for row, stats in rows if "distil" in row.components]
    if taught:
        divergence = cat([stats.divergence for _, stats in taught])
        numbers |= {
            "divergence/mean": float(divergence.mean()),
            "divergence/p99": float(divergence.sort().values[math.ceil(0.99 * len(divergence)) - 1]),
            "mismatch/top1": float(cat([stats.mismatch for _, stats in taught]).mean()),
            "teacher/entropy": float(cat([stats.teacher_entropy for _, stats in taught]).mean()),
            "loss/first_token": sum(float(stats.divergence[0]) for _, stats in taught) / len(taught),  # type: ignore[index]
        }
        if truth.settings["loss"]["divergence"]["kind"] == "sampled":
            numbers["loss/clip_frac"] = float(cat([stats.clipped for _, stats in taught]).mean())
    return numbers


@pytest.mark.parametrize(
    "name", [name for name, tree in RECIPES.items() if tree.get("gate", {}).get("kind") == "aligned"]
)
def test_the_log_says_where_teacher_and_outcome_agree(name: str, oracle: Oracles) -> None:
    truth = oracle(name)
    looked = 0
    for step in range(1, truth.run.steps + 1):
        parts = [part for part in truth.updates() if part.step == step and "distil" in part.losses]
        pulls = [
            [
                truth.agreement(stats, row.outcome)
                for row, stats in scored([part], "distil")
                if abs(row.outcome or 0) > 1e-6
            ]
            for part in parts
        ]
        pulls = [of_update for of_update in pulls if of_update]
        if not pulls:
            continue
        # A pull whose sign float32 cannot tell may count or not.
        low, high = (
            statistics.fmean(float((cat([*of_update]) > edge).double().mean()) for of_update in pulls)
            for edge in (4e-7, -4e-7)
        )
        assert low - 1e-9 <= truth.run.metrics[step]["gate/agree_frac"] <= high + 1e-9
        looked += high - low < 0.5
    assert looked or name == "aligned_lambda", "where teacher and student hardly differ the bounds say little"


@pytest.mark.parametrize("name", [name for name, tree in RECIPES.items() if tree.get("gate", {}).get("kind") == "sdar"])
def test_the_log_says_how_gates_open(name: str, oracle: Oracles) -> None:
    truth = oracle(name)
    for step in range(1, truth.run.steps + 1):
        parts = [part for part in truth.updates() if part.step == step and "distil" in part.losses]
        if not parts:
            continue
        several = [[stats for _, stats in scored([part], "distil")] for part in parts]
        gaps = [
            cat([stats.teacher_logprob for stats in heard]) - cat([stats.logprob for stats in heard])
            for heard in several
        ]
        openings = [cat([truth.opening(stats) for stats in heard]) for heard in several]
        for key, values in (("gate/gap_negative", [-gap for gap in gaps]), ("gate/open_frac", openings)):
            # A number whose sign float32 cannot tell may count or not.
            low, high = (
                statistics.fmean(float((each > edge).double().mean()) for each in values) for edge in (2e-6, -2e-6)
            )
            assert low - 1e-9 <= truth.run.metrics[step][key] <= high + 1e-9
            assert high - low < 0.2


@every_recipe
def test_the_log_says_what_was_done(name: str, oracle: Oracles) -> None:
    truth = oracle(name)
    for step in range(1, truth.run.steps + 1):
        parts = [part for part in truth.updates() if part.step == step]
        found = truth.run.metrics[step]
        assert found.get("optim/empty_updates", 0) == len(truth.parts(step)) - len(parts)
        if not parts:
            continue
        assert found["optim/lr"] == pytest.approx(truth.rate(truth.updates().index(parts[-1])), rel=1e-6)
        expected = logged(truth, parts)
        assert {key: found[key] for key in expected} == pytest.approx(expected, rel=2e-4, abs=2e-6)
        assert {key for key in ("loss/distil", "loss/rl", "loss/nll") if key in found} == {
            f"loss/{key}" for part in parts for key in part.losses
        }


@pytest.mark.parametrize("name", [name for name, tree in RECIPES.items() if tree.get("selection")])
def test_selected_are_the_best_tokens_of_the_whole_update(name: str, oracle: Oracles) -> None:
    truth = oracle(name)
    selection = truth.settings["selection"]
    for part in truth.updates():
        taught = scored([part], "distil")
        if not taught:
            continue
        chosen = cat([row.selected for row, _ in taught]) > 0
        assert int(chosen.sum()) == max(1, math.floor(selection["ratio"] * len(chosen) + 1e-9))
        if selection["score"] == "multinomial":
            continue
        entropy = cat([stats.entropy for _, stats in taught])
        bound = entropy.sort().values[math.ceil(selection["percentile"] * len(entropy)) - 1]
        h, d = stretched(entropy.clamp(max=bound)), stretched(cat([stats.reverse_kl for _, stats in taught]))
        score = {"entropy": h, "q3": (1 - h) * d, "soft_or": h + d - h * d}[selection["score"]]
        assert float(score[chosen].min()) > float(score[~chosen].max()) - 1e-4


def stretched(values: Tensor) -> Tensor:
    return (values - values.min()) / (values.max() - values.min())


def test_a_multinomial_selection_draws_by_the_powers_it_is_given(oracle: Oracles) -> None:
    """How much entropy h and divergence d was drawn is usual for weights h^2, and far off for d^2 and for none."""
    truth = oracle("multinomial")
    selection, random = truth.settings["selection"], np.random.default_rng(0)
    assert (selection["entropy_power"], selection["divergence_power"]) == (2.0, 0.0)
    for part in truth.updates():
        taught = scored([part], "distil")
        chosen = (cat([row.selected for row, _ in taught]) > 0).numpy()
        entropy, divergence = (cat([getattr(s, n) for _, s in taught]).numpy() for n in ("entropy", "divergence"))
        h, d = entropy / entropy.max(), (divergence / math.log(2)).clip(0, 1)
        usual = draws(random, h**2, h, d, int(chosen.sum()))
        for other in (d**2, np.ones_like(h)):
            gap = draws(random, other, h, d, int(chosen.sum())).mean(0) - usual.mean(0)
            assert (np.abs(gap) > 5 * usual.std(0)).any(), "the laws can be told apart"
        found = np.array([h[chosen].sum(), d[chosen].sum()])
        assert (np.abs(found - usual.mean(0)) < 4 * usual.std(0)).all()


def draws(random: np.random.Generator, weight: Any, h: Any, d: Any, count: int) -> Any:
    """Draw 300 times without replacement; return the sums of h and d over what was drawn, [300, 2]."""
    share = (weight + 1e-12) / (weight + 1e-12).sum()
    drawn = [random.choice(len(h), count, replace=False, p=share) for _ in range(300)]
    return np.array([[h[ids].sum(), d[ids].sum()] for ids in drawn])


def test_a_multinomial_selection_draws_anew_in_every_update(oracle: Oracles) -> None:
    """The first two steps of `still` differ in nothing else."""
    truth = oracle("still")
    one, two, *_ = truth.updates()
    assert [row.completion for row in one.rows] == [row.completion for row in two.rows]
    assert [row.ratio for row in one.rows] == [row.ratio for row in two.rows]
    assert not torch.equal(cat([row.selected for row in one.rows]), cat([row.selected for row in two.rows]))


def test_recipes_reach_what_they_are_there_for(oracle: Oracles) -> None:
    """A clip that never acts, a correction of 1 or a constant reward would let a wrong wiring pass."""
    for name in ("tip_both", "sdar", "hdpo", "rl"):
        forced = [pair for part in oracle(name).updates() if "rl" in part.losses for pair in scored([part], "rl")]
        assert any(row.advantage > 0 for row, _ in forced)
        assert any(row.advantage < 0 for row, _ in forced)
        correction = cat([stats.correction for _, stats in forced])
        assert float((correction - 1).abs().max()) > 0.1 or name == "sdar"
    for name in ("rlsd", "retire_share"):
        forced = [pair for part in oracle(name).updates() if "rl" in part.losses for pair in scored([part], "rl")]
        for sign in (1, -1):
            credit = cat([stats.credit for row, stats in forced if sign * row.advantage > 0])
            assert 0.0 < float((credit > 1.01).double().mean()) < 1.0, name
            assert 0.0 < float((credit < 0.99).double().mean()) < 1.0, name
    painted = cat([stats.painted for _, stats in scored(oracle("paint").updates(), "distil")])
    assert 0.05 < float(painted.mean()) < 0.95
    for name in ("hdpo", "rl", "rlsd"):
        forced = [pair for part in oracle(name).updates() if "rl" in part.losses for pair in scored([part], "rl")]
        assert 0.0 < float(cat([stats.held for _, stats in forced]).mean()) < 1.0, name
    sampled = scored(oracle("sampled").updates(), "distil")
    assert 0.0 < float(cat([stats.clipped for _, stats in sampled]).mean()) < 1.0
    assert {row.weight for part in oracle("anchor").updates() for row in part.rows} >= {0.0}
    assert any(0 < row.weight < 0.25 for part in oracle("anchor").updates() for row in part.rows)
    routes = {row.route for part in oracle("hdpo").updates() for row in part.rows}
    assert routes == {"distil", "rl"}
    for name, cut_off in (("tip_both", True), ("rl", False)):  # masked; dropped as a group of equal rewards
        silent = [row for step in (1, 2) for row in oracle(name).rows(step) if not row.components]
        assert any(row.cut_off is cut_off for row in silent)
    ungraded = [row for name in ("tip_both", "hdpo") for part in oracle(name).updates() for row in part.rows]
    assert any(row.reward is None and row.route in ("rl", "both") for row in ungraded), "beside graded ones"
    for name in ("cliff", "guard", "influence"):
        assert len({row.strength for part in oracle(name).updates() for row in part.rows if row.components}) > 1
    assert all(
        part.norm > oracle("paired").settings["optim"]["max_grad_norm"] for part in oracle("paired").updates()[:1]
    )


def test_an_update_of_masked_completions_counts_as_empty(tmp_path: Path) -> None:
    """optim/empty_updates: updates of the step that were left out because no loss could move the weights."""
    step = {"num_steps": 1, "problems": 2, "updates_per_batch": 2, "truncated": "mask"}
    run = record(recipe("sampled", rollout=SAMPLING | {"max_new_tokens": 2}, step=step), tmp_path / "run")
    assert not run.updates
    assert run.metrics[1]["rollout/truncated"] == 4.0
    assert run.metrics[1].get("optim/empty_updates") == 2.0
