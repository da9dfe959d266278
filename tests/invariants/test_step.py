"""The update: components, gates and their score pass, several updates a batch, the non-finite stop."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, OPTConfig

from atesd.losses import gradient
from atesd.losses.divergence import TokenStreams
from atesd.losses.stats import TokenStats
from atesd.recipe import build_config
from atesd.sections import LoraConfig
from atesd.train.model import add_lora, enable_checkpointing
from atesd.types import NonFiniteError

from support.models import VOCABULARY, ragged_rows, tiny_model
from support.steppers import make_stepper


class HalfGate:
    """Weighs every token by one half, micro-batch by micro-batch."""

    reads_divergence = True

    def values(self, streams: TokenStreams) -> Tensor:
        return streams.divergence_N

    def weights(self, stats: TokenStats) -> Tensor:
        return torch.full_like(stats.divergence, 0.5)

    def metrics(self, stats: TokenStats) -> dict[str, float]:
        return {"gate/tokens": float(stats.divergence.numel())}


class TopHalf:
    """Selects the half of all tokens with the largest divergence: needs the whole batch."""

    needs_batch = True

    def __init__(self) -> None:
        self.seen: list[int] = []

    def select(self, stats: TokenStats, seed: int) -> Tensor:
        self.seen.append(stats.divergence.numel())
        chosen = torch.zeros_like(stats.divergence)
        chosen[stats.divergence.topk(stats.divergence.numel() // 2).indices] = 1.0
        return chosen


class Outcomes(TopHalf):
    """Selects all, and notes what became of each token's attempt."""

    def select(self, stats: TokenStats, seed: int) -> Tensor:
        self.outcomes = stats.advantage.tolist()
        return torch.ones_like(stats.divergence)


class Nothing(TopHalf):
    """Selects no token."""

    def select(self, stats: TokenStats, seed: int) -> Tensor:
        return torch.zeros_like(stats.divergence)


def all_divergences(outcome_rows: dict[int, object]) -> Tensor:
    return torch.cat([outcome_rows[index].stats.divergence for index in sorted(outcome_rows)])  # type: ignore[attr-defined]


def test_a_gate_scales_the_loss_but_not_its_denominator() -> None:
    rows = ragged_rows(6)
    plain, _ = make_stepper(tiny_model())
    gated, _ = make_stepper(tiny_model(), HalfGate(), step={"token_budget": 1})
    metrics = gated.optimize(rows).metrics
    assert metrics["loss/distil"] == pytest.approx(0.5 * plain.optimize(rows).metrics["loss/distil"], rel=1e-5)
    assert (metrics["gate/mean"], metrics["gate/kept_frac"]) == (0.5, 1.0)
    assert metrics["gate/tokens"] == sum(len(row.completion) for row in rows), "metrics cover all micro-batches"


@pytest.mark.parametrize("budget", [1, 10_000])
def test_a_selection_sees_the_whole_batch_and_divides_by_the_selected_count(budget: int) -> None:
    rows, selection = ragged_rows(6), TopHalf()
    stepper, _ = make_stepper(tiny_model(), None, selection, step={"token_budget": budget})
    outcome = stepper.optimize(rows)
    values = all_divergences(outcome.rows)
    assert selection.seen == [values.numel()]
    expected = values.topk(values.numel() // 2).values.mean()
    assert outcome.metrics["loss/distil"] == pytest.approx(expected.item(), rel=1e-5)


def test_an_empty_selection_makes_no_update_and_says_so() -> None:
    model = tiny_model()
    before = [weight.detach().clone() for weight in model.parameters()]
    stepper, _ = make_stepper(model, None, Nothing())
    outcome = stepper.optimize(ragged_rows(4))
    assert outcome.metrics["optim/empty_updates"] == 1
    assert "loss/total" not in outcome.metrics
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_the_supervised_component_is_cross_entropy_of_the_completions() -> None:
    model, rows = tiny_model(), ragged_rows(5, components=("nll",))
    losses = []
    for row in rows:
        ids = torch.tensor([[*row.prompt, *row.completion]])
        logits = model(ids).logits[0, len(row.prompt) - 1 : -1]
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(row.completion), reduction="none"))
    expected = torch.cat(losses).mean()
    expected.backward()
    norm = torch.stack([weight.grad.norm() for weight in model.parameters() if weight.grad is not None]).norm()
    model.zero_grad()
    stepper, _ = make_stepper(model)
    outcome = stepper.optimize(rows)
    assert outcome.metrics["loss/nll"] == pytest.approx(expected.item(), rel=1e-5)
    assert outcome.metrics["optim/grad_norm"] == pytest.approx(float(norm), rel=1e-4)


def test_a_selection_knows_what_became_of_each_tokens_attempt() -> None:
    rows = [replace(row, outcome=float(index)) for index, row in enumerate(ragged_rows(4))]
    selection = Outcomes()
    stepper, _ = make_stepper(tiny_model(), None, selection)
    stepper.optimize(rows)
    tokens = {float(index): len(row.completion) for index, row in enumerate(rows)}
    assert {outcome: selection.outcomes.count(outcome) for outcome in tokens} == tokens


def test_updates_per_batch_splits_the_batch_into_that_many_optimizer_steps() -> None:
    rows = ragged_rows(6)
    stepper, _ = make_stepper(tiny_model(), step={"problems": 6, "updates_per_batch": 3})
    moves = []
    original = stepper._move
    stepper._move = lambda *given: (moves.append(given), original(*given))  # type: ignore[method-assign]
    outcome = stepper.optimize(rows)
    assert len(moves) == 3
    assert sorted(outcome.rows) == list(range(6))


def test_the_numbers_of_several_updates_are_their_means() -> None:
    """Nine rows of four groups in two updates: losses and norms of both, not of the last."""
    rows = [replace(row, group=group) for row, group in zip(ragged_rows(9), (0, 0, 0, 0, 0, 0, 1, 2, 3), strict=True)]
    numbers = []
    for part in (rows[:7], rows[7:], rows):
        one = part is not rows
        step = {"problems": 4, "updates_per_batch": 1 if one else 2}
        stepper, _ = make_stepper(tiny_model(), step=step, optim={"lr": 1e-12})
        numbers.append(stepper.optimize(part).metrics)
    first, second, both = numbers
    assert first["loss/total"] != pytest.approx(second["loss/total"], rel=1e-3)
    for key in ("loss/total", "optim/grad_norm"):
        assert both[key] == pytest.approx((first[key] + second[key]) / 2, rel=1e-5)


def test_a_non_finite_loss_stops_before_the_weights_move() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight[0] = float("inf")
    before = [weight.detach().clone() for weight in model.parameters()]
    stepper, _ = make_stepper(model)
    with pytest.raises(NonFiniteError):
        stepper.optimize(ragged_rows(3))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_gradient_clipping_bounds_the_step_and_logs_the_norm_before_it() -> None:
    rows = ragged_rows(4)
    free, _ = make_stepper(tiny_model())
    clipped, _ = make_stepper(tiny_model(), optim={"lr": 1e-2, "max_grad_norm": 1e-3})
    assert clipped.optimize(rows).metrics["optim/grad_norm"] == pytest.approx(
        free.optimize(rows).metrics["optim/grad_norm"], rel=1e-5
    )


@pytest.mark.parametrize("lora", [False, True])
def test_gradient_checkpointing_recomputes_activations_and_changes_no_number(lora: bool) -> None:
    rows = ragged_rows(4)
    outcomes, calls = [], []
    for checkpointing in (False, True):
        model = tiny_model()
        if checkpointing:
            enable_checkpointing(model)
        count: list[int] = []
        model.model.layers[0].self_attn.register_forward_hook(lambda *_, count=count: count.append(1))
        if lora:
            model = add_lora(model, LoraConfig(r=2, alpha=4), 0)
        section = {"gradient_checkpointing": checkpointing}
        stepper, _ = make_stepper(model, model=section)
        outcomes.append(stepper.optimize(rows).metrics["optim/grad_norm"])
        calls.append(len(count))
    assert outcomes[0] == pytest.approx(outcomes[1], rel=1e-4)
    assert calls == [2, 3], "teacher and student forward; the student's once more in the backward pass"


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_checkpointing_does_not_bring_dropout_back(kind: str) -> None:
    """In modules (GPT-2) and in functions that ask whether a layer trains (OPT); the model's config keeps its own."""
    config: Any = (
        GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=64)
        if kind == "gpt2"
        else OPTConfig(vocab_size=VOCABULARY, hidden_size=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2,
                       word_embed_proj_dim=16, max_position_embeddings=64, attention_dropout=0.4, dropout=0.4)
    )  # fmt: skip
    model: Any = AutoModelForCausalLM.from_config(config)
    enable_checkpointing(model)
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        expected = model.eval()(ids).logits
        found = [model.train()(ids).logits for _ in range(2)]
    assert all(torch.equal(each, expected) for each in found)
    assert (config.attn_pdrop if kind == "gpt2" else config.dropout) > 0


def made_again(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Collect what arrives at passes that could not use what they had."""
    made: list[Any] = []
    again = gradient._Pass.again

    def counting(self: Any, upstream: Any) -> Any:
        made.append(upstream)
        return again(self, upstream)

    monkeypatch.setattr(gradient._Pass, "again", counting)
    return made


@pytest.mark.parametrize("components", [("distil",), ("nll",), ("distil", "nll")])
@pytest.mark.parametrize("gate", [{"kind": "none"}, {"kind": "sdar"}, {"kind": "sdar", "target": "divergence"}])
def test_a_frozen_head_is_gone_over_once(
    components: tuple[str, ...], gate: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = made_again(monkeypatch)
    model = tiny_model(tied=False)
    model.lm_head.requires_grad_(False)
    config = build_config({"gate": gate, "loss": {"tile_logits": VOCABULARY}})
    stepper, _ = make_stepper(model, config.gate, loss={"tile_logits": VOCABULARY})
    assert stepper.optimize(ragged_rows(4, components=components)).metrics["optim/grad_norm"] > 0
    assert not made


@pytest.mark.parametrize("sections", [
    {},
    {"loss": {"aggregate": "sequence"}},
    {"loss": {"clip": "token", "clip_tau": 0.5}, "step": {"token_budget": 1}},
    {"gate": {"kind": "sdar", "target": "divergence"}, "loss": {"aggregate": "sequence"}},
    {"gate": {"kind": "sdar", "score": "entropy", "target": "divergence"}},
    {"selection": {"kind": "tip", "ratio": 0.5}, "loss": {"aggregate": "sequence"}},
])  # fmt: skip
@pytest.mark.parametrize("weights", [(1.0,), (0.0, 0.25, 1.0)])
def test_the_update_knows_its_weights_beforehand(
    sections: dict[str, Any], weights: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trained head whose weights were not expected would be gone over a second time: right, but slow."""
    made = made_again(monkeypatch)
    rows = [replace(row, weight=weights[index % len(weights)]) for index, row in enumerate(ragged_rows(6))]
    loss = sections.get("loss", {})
    found = []
    for tile in (None, VOCABULARY):
        model = tiny_model()
        stepper, _ = make_stepper(model, **(sections | {"loss": loss | {"tile_logits": tile}}))
        found.append(stepper.optimize(rows).metrics)
    assert not made
    for key in ("loss/total", "optim/grad_norm"):
        assert found[1][key] == pytest.approx(found[0][key], rel=1e-5)
