"""Loss components together: reinforcement, shared and own denominators, neutral settings, what is remembered."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from atesd.losses.policy import PolicyConfig
from atesd.losses.target import AnchorMix, Extrapolate, Residual
from atesd.metrics import is_timing
from atesd.recipe import build_config
from atesd.runlog import RunDir
from atesd.train.batch import Row
from atesd.train.loop import Trainer

from support.composition import BASE
from support.models import ragged_rows, tiny_model
from support.steppers import make_stepper

RL: dict[str, Any] = {"routing": {"kind": "rl"}, "rollout": {"temperature": 1.0, "group_size": 2, "max_new_tokens": 16}}
BOTH = RL | {"routing": {"kind": "both", "coef": 0.3}}
HDPO = RL | {"routing": {"kind": "hdpo"}}


def own_logprobs(model: torch.nn.Module, row: Row) -> Tensor:
    """Score a completion by a plain forward pass."""
    logits = model(torch.tensor([[*row.prompt, *row.completion]])).logits[0, len(row.prompt) - 1 : -1]
    picked: Tensor = logits.log_softmax(-1).gather(1, torch.tensor(row.completion)[:, None])[:, 0]
    return picked


def sampled(rows: list[Row], components: tuple[str, ...] = ("rl",), seed: int = 0) -> list[Row]:
    """Give rows alternating advantages and the sampler's log-probabilities under the model of that seed."""
    model = tiny_model(seed)
    with torch.no_grad():
        return [
            replace(
                row,
                components=components,
                advantage=(1.0, -0.5, 0.25)[index % 3],
                sampler_logprobs=tuple(own_logprobs(model, row).tolist()),
            )
            for index, row in enumerate(rows)
        ]


def weights(model: torch.nn.Module) -> list[Tensor]:
    return [weight.detach().clone() for weight in model.parameters()]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("aggregate", ["token", "sequence", "constant"])
def test_on_policy_reinforcement_is_reinforce_with_advantages(aggregate: str) -> None:
    model, rows = tiny_model(), sampled(ragged_rows(5))
    terms = [-row.advantage * own_logprobs(model, row) for row in rows]
    expected = {
        "token": torch.cat(terms).mean(),
        "sequence": torch.stack([term.mean() for term in terms]).mean(),
        "constant": torch.cat(terms).sum() / (5 * 16),
    }[aggregate]
    expected.backward()
    norm = torch.stack([weight.grad.norm() for weight in model.parameters() if weight.grad is not None]).norm()
    model.zero_grad()
    stepper, _ = make_stepper(model, **RL, rl={"aggregate": aggregate})
    metrics = stepper.optimize(rows).metrics
    assert metrics["optim/grad_norm"] == pytest.approx(float(norm), rel=1e-4)
    tokens = [len(row.completion) for row in rows]
    value = {
        "token": -sum(row.advantage * n for row, n in zip(rows, tokens, strict=True)) / sum(tokens),
        "sequence": -sum(row.advantage for row in rows) / 5,
        "constant": -sum(row.advantage * n for row, n in zip(rows, tokens, strict=True)) / 80,
    }[aggregate]
    assert metrics["loss/rl"] == pytest.approx(value, rel=1e-4)
    assert metrics["rl/ratio"] == 1.0
    assert metrics["rl/sampler_weight"] == pytest.approx(1.0, abs=1e-5)


def test_both_adds_the_losses_each_over_its_own_count() -> None:
    rows = sampled(ragged_rows(5), ("distil", "rl"))
    alone, _ = make_stepper(tiny_model())
    distil = alone.optimize([replace(row, components=("distil",)) for row in rows]).metrics["loss/distil"]
    reinforcing, _ = make_stepper(tiny_model(), **RL)
    rl = reinforcing.optimize([replace(row, components=("rl",)) for row in rows]).metrics["loss/rl"]
    stepper, _ = make_stepper(tiny_model(), **BOTH)
    metrics = stepper.optimize(rows).metrics
    assert metrics["loss/distil"] == pytest.approx(0.3 * distil, rel=1e-5)
    assert metrics["loss/rl"] == pytest.approx(rl, rel=1e-4)
    assert metrics["loss/total"] == pytest.approx(0.3 * distil + rl, rel=1e-4)


def test_a_coefficient_of_0_is_reinforcement_alone() -> None:
    rows = sampled(ragged_rows(5))
    plain, both = tiny_model(), tiny_model()
    make_stepper(plain, **RL)[0].optimize(rows)
    section = RL | {"routing": {"kind": "both", "coef": 0.0}}
    outcome = make_stepper(both, **section)[0].optimize([replace(row, components=("distil", "rl")) for row in rows])
    assert "loss/distil" not in outcome.metrics
    for a, b in zip(weights(plain), weights(both), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-6)


def test_a_router_that_splits_groups_divides_by_the_tokens_of_all() -> None:
    rows = sampled(ragged_rows(6))
    mixed = [replace(row, components=("distil",)) if index < 4 else row for index, row in enumerate(rows)]
    own, _ = make_stepper(tiny_model())
    distil = own.optimize(mixed[:4]).metrics["loss/distil"]
    alone, _ = make_stepper(tiny_model(), **RL)
    rl = alone.optimize(mixed[4:]).metrics["loss/rl"]
    stepper, _ = make_stepper(tiny_model(), **HDPO)
    metrics = stepper.optimize(mixed).metrics
    part = sum(len(row.completion) for row in rows[:4]) / sum(len(row.completion) for row in rows)
    assert metrics["loss/distil"] == pytest.approx(part * distil, rel=1e-5)
    assert metrics["loss/rl"] == pytest.approx((1 - part) * rl, rel=1e-4)


@pytest.mark.parametrize("section", [RL, BOTH, HDPO])
@pytest.mark.parametrize("aggregate", ["token", "sequence"])
def test_micro_batches_change_nothing(section: dict[str, Any], aggregate: str) -> None:
    names = {"rl": ("rl",), "both": ("distil", "rl"), "hdpo": ("distil",)}[section["routing"]["kind"]]
    rows = sampled(ragged_rows(8))
    rows = [replace(row, components=names) if index % 2 else row for index, row in enumerate(rows)]
    found = []
    for budget in (1, 10_000):
        model = tiny_model()
        stepper, _ = make_stepper(
            model, **section, step={"token_budget": budget}, rl={"aggregate": aggregate}, loss={"aggregate": aggregate}
        )
        metrics = stepper.optimize(rows).metrics
        found.append((metrics["loss/total"], metrics["optim/grad_norm"]))
    assert found[0] == pytest.approx(found[1], rel=2e-4)


def test_groups_without_any_advantage_make_no_update_and_say_so() -> None:
    model = tiny_model()
    before = weights(model)
    stepper, _ = make_stepper(model, **RL)
    outcome = stepper.optimize([replace(row, advantage=0.0) for row in sampled(ragged_rows(4))])
    assert outcome.metrics["optim/empty_updates"] == 1
    assert "loss/rl" not in outcome.metrics
    assert same(before, weights(model))


def test_later_updates_of_a_batch_know_the_weights_it_began_with() -> None:
    rows = sampled(ragged_rows(6))
    seen = []
    stepper, _ = make_stepper(tiny_model(), **RL, step={"problems": 6, "updates_per_batch": 2})
    original = stepper._policy_tokens

    def watch(batch: Any, streams: Any, reference: Any) -> Any:
        tokens = original(batch, streams, reference)
        seen.append(float((streams.logprob_N.detach() - tokens.old_logprob_N).abs().max()))
        sampler = torch.tensor([value for row in batch.rows for value in row.sampler_logprobs])
        torch.testing.assert_close(tokens.old_logprob_N, sampler, atol=1e-5, rtol=0)
        return tokens

    stepper._policy_tokens = watch  # type: ignore[method-assign]
    stepper.optimize(rows)
    assert len(seen) == 2
    assert seen[0] < 1e-6
    assert seen[1] > 1e-3


def test_the_sampled_token_loss_clips_stale_tokens() -> None:
    rows = [replace(row, components=("distil",)) for row in sampled(ragged_rows(6))]
    section = {"loss": {"divergence": {"kind": "sampled", "importance_clip": 1.001}}, "optim": {"lr": 5e-2}}
    fresh, _ = make_stepper(tiny_model(), **section)
    assert fresh.optimize(rows).metrics["loss/clip_frac"] == 0.0
    stale, _ = make_stepper(tiny_model(), **section, step={"problems": 6, "updates_per_batch": 6})
    assert stale.optimize(rows).metrics["loss/clip_frac"] > 0.1


def test_the_kl_term_measures_the_way_from_the_step_0_weights() -> None:
    rows = sampled(ragged_rows(5))
    stepper, _ = make_stepper(tiny_model(), **RL, rl={"kl_coef": 0.5}, teacher={"weights": "live"})
    assert stepper.optimize(rows).metrics["rl/kl"] == pytest.approx(0.0, abs=1e-6)
    moved = stepper.optimize(rows).metrics
    assert moved["rl/kl"] > 1e-3


def test_problem_weights_scale_the_loss_but_not_its_denominator() -> None:
    rows = ragged_rows(6)
    plain, _ = make_stepper(tiny_model())
    half, _ = make_stepper(tiny_model())
    expected = 0.5 * plain.optimize(rows).metrics["loss/distil"]
    assert half.optimize([replace(row, weight=0.5) for row in rows]).metrics["loss/distil"] == pytest.approx(expected)
    none, _ = make_stepper(tiny_model())
    assert none.optimize([replace(row, weight=0.0) for row in rows]).metrics["optim/empty_updates"] == 1


NEUTRAL: dict[str, Any] = {
    "exposure": {"kind": "fixed", "ratio": 1.0},
    "target": {"kind": "extrapolate", "lambda_x": 1.0},
    "selection": {"kind": "tip", "ratio": 1.0},
    "gate": {"kind": "none"},
    "routing": {"kind": "distil"},
}


def test_neutral_settings_are_opsd_bit_for_bit(tmp_path: Path) -> None:
    logs = []
    for name, section in (("opsd", {"exposure": {"kind": "fixed"}}), ("neutral", NEUTRAL)):
        Trainer.start(build_config(BASE | section), tmp_path / name).train()
        rows = RunDir.open(tmp_path / name).metrics()
        logs.append([{key: value for key, value in row.items() if not is_timing(key)} for row in rows])
    assert logs[0] == logs[1]


@pytest.mark.parametrize("target", [Extrapolate(lambda_x=1.5), AnchorMix(), Residual()])
def test_statistics_are_those_of_the_unextrapolated_pair_whatever_target_and_clip(target: Any) -> None:
    rows = [replace(row, view_prompts={**row.view_prompts, "full": (1, 2, 3)}) for row in ragged_rows(4)]
    plain, _ = make_stepper(tiny_model())
    expected = plain.optimize(rows)
    mixed, _ = make_stepper(tiny_model(), loss={"clip": "token"}, target=target.model_dump())
    outcome = mixed.optimize(rows)
    assert outcome.metrics["loss/distil"] != pytest.approx(expected.metrics["loss/distil"])
    for index, row in expected.rows.items():
        for name in ("divergence", "teacher_logprob", "student_logprob", "reverse_kl", "top1_agree"):
            torch.testing.assert_close(getattr(outcome.rows[index].stats, name), getattr(row.stats, name))


def test_the_base_view_keeps_the_step_0_weights_beside_a_moving_teacher() -> None:
    rows = ragged_rows(3)
    stepper, _ = make_stepper(tiny_model(), teacher={"weights": "live"}, target={"kind": "extrapolate"})
    seen: list[Tensor] = []
    original = stepper._scorer.view

    def watch(*arguments: Any) -> Any:
        scored = original(*arguments)
        seen.append(scored.hidden_NH)
        return scored

    stepper._scorer.view = watch  # type: ignore[method-assign]
    stepper.optimize(rows)
    stepper.optimize(rows)
    teacher, base, moved_teacher, same_base = seen
    assert torch.equal(base, same_base)
    assert not torch.equal(teacher, moved_teacher)


def test_the_defaults_of_the_branch_are_the_documented_ones() -> None:
    config = PolicyConfig()
    assert (config.eps_low, config.eps_high, config.dual_clip, config.kl_coef) == (0.2, 0.2, 3.0, 0.0)
    assert (config.scale, config.aggregate, config.ratio, config.zero_variance) == ("std", "token", "token", "keep")


def shifted(rows: list[Row], nats: float) -> list[Row]:
    """Return rows whose sampler found its tokens less likely by so many nats."""
    return [replace(row, sampler_logprobs=tuple(value - nats for value in row.sampler_logprobs)) for row in rows]


SERVER = {"rollout": {"temperature": 1.0, "engine": {"kind": "vllm"}}}


@pytest.mark.parametrize(
    ("divergence", "rollout", "factors"),
    [
        # p_old / p_sampler = e^nats: e^.7 = 2.013753, and e^3 = 20.1 is held at 4; e^-1 = .367879.
        ({"kind": "sampled", "importance_clip": 4.0}, SERVER, {0.7: 2.013753, 3.0: 4.0, -1.0: 0.367879}),
        ({"kind": "sampled", "importance_clip": 4.0}, {}, {0.7: 1.0, 3.0: 1.0}),  # on the very weights that train
        ({"kind": "reverse_kl"}, SERVER, {0.7: 1.0}),  # no sampled token in it
    ],
)
def test_the_sampled_token_loss_corrects_for_a_sampler_with_weights_of_its_own(
    divergence: dict[str, Any], rollout: dict[str, Any], factors: dict[float, float]
) -> None:
    """Loss and gradient are w = min(p_old / p_sampler, c) times those of a sampler that agrees."""
    rows = [replace(row, components=("distil",)) for row in sampled(ragged_rows(5))]

    def step(given: list[Row]) -> Any:
        stepper, _ = make_stepper(tiny_model(), **rollout, loss={"divergence": divergence})
        return stepper.optimize(given)

    plain = step(rows)
    for nats, factor in factors.items():
        outcome = step(shifted(rows, nats))
        for key in ("loss/distil", "optim/grad_norm"):
            assert outcome.metrics[key] == pytest.approx(factor * plain.metrics[key], rel=1e-4), (key, nats)
        weights_N = torch.cat([row.weight_T for row in outcome.rows.values()])
        torch.testing.assert_close(weights_N, torch.full_like(weights_N, factor), atol=1e-4, rtol=1e-4)


def test_the_correction_is_each_tokens_own_and_of_the_weights_that_the_step_began_with() -> None:
    rows = [replace(row, components=("distil",)) for row in sampled(ragged_rows(6))]
    first = rows[0].sampler_logprobs
    rows[0] = replace(rows[0], sampler_logprobs=(first[0] - 0.7, *first[1:]))
    stepper, _ = make_stepper(
        tiny_model(),
        **SERVER,
        loss={"divergence": {"kind": "sampled"}},
        optim={"lr": 5e-2},
        step={"problems": 6, "updates_per_batch": 2, "token_budget": 40},
    )
    found = stepper.optimize(rows).rows
    assert len(found) == 6
    for index, row in found.items():
        expected = torch.ones_like(row.weight_T)
        if index == 0:
            expected[0] = 2.013753
        torch.testing.assert_close(row.weight_T, expected, atol=1e-4, rtol=1e-4)
