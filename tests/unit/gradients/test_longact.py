"""LongAct: saliency and masks by hand, refusals, and rows that a strict rule leaves bit for bit where they were."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from atesd.config import RunConfig
from atesd.facts import RunFacts
from atesd.gradients.longact import LongAct, LongActRule, salient, sequence_norms
from atesd.gradients.rule import announce
from atesd.train.model import add_lora
from atesd.types import UserError

from support.recording import Update, record
from support.wired import recipe

SMALL: dict[str, Any] = {
    "vocab_size": 11, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 32,
}  # fmt: skip


def qwen(**fields: Any) -> Qwen3ForCausalLM:
    """Return a model with four heads of queries, which share two of keys, of six dimensions each."""
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**SMALL | {"num_key_value_heads": 2, "head_dim": 6} | fields))


def built(model: nn.Module, seed: int = 0, **fields: Any) -> LongActRule:
    rule = LongAct(**fields).build(RunFacts(seed=seed))
    assert isinstance(rule, LongActRule)
    rule.prepare(model)
    return rule


def backward(rule: LongActRule, model: nn.Module, *batches: list[list[int]]) -> None:
    """Take the gradient of the sum of all logits of the first positions, row by row; rows are padded with 0."""
    for rows in batches:
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        with rule.attached(model):
            announce(model, [len(row) for row in rows])
            logits = model(input_ids=ids).logits
            sum(logits[place, : len(row)].square().sum() for place, row in enumerate(rows)).backward()


def projections(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: weight for name, weight in model.named_parameters() if "q_proj" in name or "k_proj" in name}


# ---- by hand ------------------------------------------------------------------------------------------------------


def test_saliency_is_the_sum_over_sequences_of_norms_over_their_own_positions() -> None:
    # Two heads of two. Sequence 0: (3, 1 | 0, 2), (4, 2 | 0, 0), padding; sequence 1: one position (0, 2 | 5, 1).
    output = torch.tensor([
        [[3.0, 1.0, 0.0, 2.0], [4.0, 2.0, 0.0, 0.0], [99.0, 99.0, 99.0, 99.0]],
        [[0.0, -2.0, 5.0, 1.0], [99.0, 99.0, 99.0, 99.0], [99.0, 99.0, 99.0, 99.0]],
    ])  # fmt: skip
    found = sequence_norms(output, [2, 1], 2)
    # 5 + 0, sqrt(5) + 2 | 0 + 5, 2 + 1
    torch.testing.assert_close(found, torch.tensor([[5.0, 5**0.5 + 2.0], [5.0, 3.0]]))
    with pytest.raises(AssertionError, match="one length a row"):
        sequence_norms(output, [2], 2)


@pytest.mark.parametrize(
    ("ratio", "kept"),
    [
        (0.3, [[0, 1, 0, 0], [0, 0, 1, 0]]),  # 1.2 of 4: one
        (0.5, [[1, 1, 0, 0], [0, 0, 1, 1]]),
        (0.1, [[0, 1, 0, 0], [0, 0, 1, 0]]),  # at least one
        (0.75, [[1, 1, 1, 0], [1, 0, 1, 1]]),  # of the equal ones the first
        (1.0, [[1, 1, 1, 1], [1, 1, 1, 1]]),
    ],
)
def test_every_head_keeps_its_own_largest(ratio: float, kept: list[list[int]]) -> None:
    scores = torch.tensor([[2.0, 3.0, 1.0, 1.0], [0.5, 0.5, 9.0, 8.0]])
    assert salient(scores, ratio).int().tolist() == kept


def test_a_share_that_is_a_whole_number_of_dimensions_keeps_that_many() -> None:
    # .29 * 100 is 28.999999999999996 in floating point
    assert int(salient(torch.arange(100.0)[None], 0.29).sum()) == 29


# ---- on a model ---------------------------------------------------------------------------------------------------


def expected_rows(model: nn.Module, ratio: float, *batches: list[list[int]]) -> dict[str, list[bool]]:
    """Compute the kept rows from what the projections give for each row alone, in Python numbers."""
    seen: dict[str, Any] = {}
    names = [name for name, _ in model.named_modules() if name.endswith(("q_proj", "k_proj"))]
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda module, given, output, name=name: seen.__setitem__(name, output[0].tolist())
        )
        for name in names
    ]
    totals: dict[str, list[float]] = {}
    with torch.no_grad():
        for row in (row for rows in batches for row in rows):
            model(input_ids=torch.tensor([row]))
            for name in names:
                norms = [sum(value**2 for value in column) ** 0.5 for column in zip(*seen[name], strict=True)]
                totals[name] = [a + b for a, b in zip(totals.get(name, [0.0] * len(norms)), norms, strict=True)]
    for handle in handles:
        handle.remove()
    kept = {}
    for name, total in totals.items():
        rows = [False] * len(total)
        for start in range(0, len(total), 6):
            best = sorted(range(start, start + 6), key=lambda at: -total[at])[: max(1, int(ratio * 6 + 1e-9))]
            for at in best:
                rows[at] = True
        kept[name] = rows
    return kept


BATCHES = ([[3, 4, 5, 6, 7], [8, 9]], [[1, 2, 10]])


def test_rows_of_small_activations_get_no_gradient_and_all_else_what_it_had() -> None:
    """Over two micro-batches, with padding, grouped queries and a teacher's pass in between."""
    model, plain = qwen(), qwen()
    rule = built(model, ratio=0.5)
    everything = built(plain, ratio=1.0)
    backward(rule, model, BATCHES[0])
    with rule.attached(model), torch.no_grad():  # a teacher reads something else
        announce(model, [3])
        model(input_ids=torch.tensor([[5, 5, 5]]))
    backward(rule, model, BATCHES[1])
    backward(everything, plain, *BATCHES)
    rule.apply(model)
    everything.apply(plain)
    kept = expected_rows(model, 0.5, *BATCHES)
    assert {name: sum(rows) for name, rows in kept.items() if "layers.0" in name} == {
        "model.layers.0.self_attn.q_proj": 4 * 3, "model.layers.0.self_attn.k_proj": 2 * 3,
    }  # fmt: skip
    whole = dict(plain.named_parameters())
    for name, weight in model.named_parameters():
        assert weight.grad is not None
        full = whole[name].grad
        assert full is not None
        rows = kept.get(name.removesuffix(".weight"))
        if rows is not None:
            assert (full.abs().sum(1) > 0).all(), "without the mask every row would learn"
            full = torch.where(torch.tensor(rows)[:, None], full, 0.0)
        assert torch.equal(weight.grad, full), name


def test_sums_of_several_processes_choose_what_those_of_one_would() -> None:
    """One saw the first batch, one the second, and one none."""
    batches = [[1, 2, 3, 4, 5], [6, 7]], [[8, 9, 10]]
    model = qwen()
    whole, *parts = (built(model, ratio=0.5) for _ in range(4))
    backward(whole, model, *batches)
    for rule, batch in zip(parts, batches, strict=False):
        backward(rule, model, batch)
    sums = [torch.stack(each).sum(0) for each in zip(*(rule.watched() for rule in parts), strict=True)]
    assert len(sums) == 4, "queries and keys of two layers"
    for rule in parts:
        for mine, total in zip(rule.watched(), sums, strict=True):
            mine.copy_(total)
    for rule in (whole, *parts):
        rule.apply(model)
    shares = [rule.metrics()["gradient/salient_share"] for rule in (whole, *parts)]
    assert shares == pytest.approx(shares[:1] * 4)
    for rule in parts:
        for each, expected in zip(rule._projections, whole._projections, strict=True):
            assert each.kept_R is not None
            assert each.kept_R.tolist() == expected.kept_R.tolist()  # type: ignore[union-attr]
    assert built(model, score="random").watched() == []


def test_only_the_named_layers_are_masked() -> None:
    model = qwen()
    rule = built(model, ratio=0.2, layers=(1,))
    backward(rule, model, *BATCHES)
    rule.apply(model)
    silent = {name: int((weight.grad.abs().sum(1) == 0).sum()) for name, weight in projections(model).items()}  # type: ignore[union-attr]
    assert {name: count for name, count in silent.items() if count} == {
        "model.layers.1.self_attn.q_proj.weight": 4 * 5, "model.layers.1.self_attn.k_proj.weight": 2 * 5,
    }  # fmt: skip


def test_with_adapters_the_rows_are_those_of_the_up_matrix() -> None:
    config = RunConfig.model_validate({"model": {"lora": {"r": 2, "targets": ["q_proj", "k_proj", "v_proj"]}}})
    assert config.model.lora is not None
    model = add_lora(qwen(), config.model.lora, 0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name))))
    rule = built(model, ratio=0.5)
    backward(rule, model, *BATCHES)
    rule.apply(model)
    kept = expected_rows(model, 0.5, *BATCHES)
    for name, rows in kept.items():
        up = model.get_parameter(f"{name}.lora_B.default.weight").grad
        down = model.get_parameter(f"{name}.lora_A.default.weight").grad
        assert up is not None
        assert down is not None
        assert (up.abs().sum(1) > 0).tolist() == rows
        assert (down.abs().sum(1) > 0).all()
        assert model.get_parameter(f"{name}.base_layer.weight").grad is None


def test_what_is_kept_is_chosen_anew_in_every_update() -> None:
    model = qwen()
    rule = built(model, ratio=0.2)
    for batch in BATCHES:
        model.zero_grad()
        backward(rule, model, batch)
        rule.apply(model)
        kept = expected_rows(model, 0.2, batch)
        for name, rows in kept.items():
            gradient = model.get_parameter(f"{name}.weight").grad
            assert gradient is not None
            assert (gradient.abs().sum(1) > 0).tolist() == rows
    assert expected_rows(model, 0.2, BATCHES[0]) != expected_rows(model, 0.2, BATCHES[1])


def test_how_much_the_kept_rows_hold_is_logged_once() -> None:
    model = qwen()
    rule = built(model, ratio=1.0)
    backward(rule, model, BATCHES[1])
    rule.apply(model)
    assert rule.metrics() == {"gradient/salient_share": 1.0}
    assert rule.metrics() == {}
    rule = built(model, ratio=0.5)
    backward(rule, model, BATCHES[1])
    rule.apply(model)
    assert 0.5 < rule.metrics()["gradient/salient_share"] < 1.0


def test_chance_keeps_as_many_rows_of_every_head_and_goes_on_after_a_resume() -> None:
    def kept(rule: LongActRule) -> list[list[bool]]:
        for weight in projections(model).values():
            weight.grad = torch.ones_like(weight)
        rule.apply(model)
        return [(weight.grad[:, 0] > 0).tolist() for weight in projections(model).values()]  # type: ignore[index]

    model = qwen()
    rule = built(model, ratio=0.5, score="random")
    first, second = kept(rule), kept(rule)
    assert first != second
    for rows in first + second:
        assert [sum(rows[start : start + 6]) for start in range(0, len(rows), 6)] == [3] * (len(rows) // 6)
    assert rule.metrics() == {}
    state = json.loads(json.dumps(rule.state_dict()))
    again = built(model, ratio=0.5, score="random")
    assert kept(again) == first
    again.load_state_dict(state)
    assert kept(again) == kept(rule)
    assert kept(built(model, seed=1, ratio=0.5, score="random")) != first


# ---- strict -------------------------------------------------------------------------------------------------------

HARD = {"lr": 1e-2, "weight_decay": 0.5, "max_grad_norm": 1.0}


def learning(update: Update, name: str) -> torch.Tensor:
    """Return which rows got a gradient."""
    return update.gradients[name].abs().sum(1) > 0


@pytest.mark.parametrize("lora", [None, {"r": 4, "alpha": 8}])
@pytest.mark.parametrize("strict", [True, False])
def test_a_strict_rule_leaves_other_rows_bit_for_bit_through_adamws_momentum_and_decay(
    strict: bool, lora: dict[str, Any] | None, tmp_path: Path
) -> None:
    model = {"path": "pico"} if lora is None else {"path": "pico", "lora": lora}
    rule = {"kind": "longact", "ratio": 0.3, "strict": strict}
    step = {"num_steps": 3, "problems": 3}
    run = record(recipe("sft", gradient=rule, optim=HARD, model=model, step=step), tmp_path / "run")
    end = "_proj.weight" if lora is None else "_proj.lora_B.default.weight"
    names = [name for name in run.updates[0].before if name.endswith(("q" + end, "k" + end))]
    assert len(names) == 4
    once_kept = 0
    weights = [*(update.before for update in run.updates), dict(run.model.named_parameters())]  # rows are back by then
    for place, update in enumerate(run.updates):
        for name in names:
            learns, old, new = learning(update, name), weights[place][name], weights[place + 1][name]
            moves = (old != new).any(1)
            assert int(learns.sum()) == 4 * 9, "floor(.3 * 32) dimensions of 4 heads"
            if strict:
                assert torch.equal(old[~learns], new[~learns])
            elif lora is None:
                assert moves.all(), "decay moves every row"
            assert moves[learns].float().mean() > 0.9
            if place:
                once_kept += int((learning(run.updates[place - 1], name) & ~learns).sum())
    assert once_kept > 0, "rows with momentum are among those that stay"
    other = next(name for name in run.updates[0].before if "v_proj" in name and (lora is None or "lora_B" in name))
    assert all(not torch.equal(old[other], new[other]) for old, new in pairwise(weights))


@pytest.mark.parametrize("changed", [{"step": {"token_budget": 100}}, {"model": {"gradient_checkpointing": True}}])
def test_neither_micro_batches_nor_checkpointing_change_what_is_kept(changed: dict[str, Any], tmp_path: Path) -> None:
    step = {"num_steps": 2, "problems": 4}
    tree = {"gradient": {"kind": "longact"}, "rl": {"kl_coef": 0.1}, "step": step}
    other = tree | {"step": step | changed.get("step", {}), "model": {"path": "pico"} | changed.get("model", {})}
    first, second = (
        record(recipe("rlsd", **sections), tmp_path / name) for name, sections in (("a", tree), ("b", other))
    )
    assert len(first.updates) == len(second.updates) == 2
    for one, two in zip(first.updates[:1], second.updates, strict=False):
        for name in (name for name in one.before if "q_proj" in name or "k_proj" in name):
            assert torch.equal(learning(one, name), learning(two, name))
    share = "gradient/salient_share"
    assert first.metrics[1][share] == pytest.approx(second.metrics[1][share], rel=1e-5)


# ---- what does not fit --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "has"),
    [
        (GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=11), "GPT2LMHeadModel has one of both, c_attn"),
        (GPTNeoXConfig(**SMALL), "GPTNeoXForCausalLM has one of both, query_key_value"),
        (Phi3Config(**SMALL, pad_token_id=0), "Phi3ForCausalLM has one of both, qkv_proj"),
    ],
    ids=["gpt2", "neox", "phi3"],
)
def test_a_fused_projection_is_refused_in_one_line(config: PretrainedConfig, has: str) -> None:
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UserError) as caught:
        built(model)
    assert str(caught.value) == (
        'gradient.kind = "longact" masks separate query and key projections, called q_proj and k_proj, and '
        f"{has}: take another model, or remove gradient"
    )


def test_a_layer_beyond_the_model_is_refused() -> None:
    with pytest.raises(UserError) as caught:
        built(qwen(), layers=(1, 2))
    assert str(caught.value) == (
        "gradient.layers names layer 2, and the model's 2 decoder layers are numbered from 0 to 1: name those, or "
        "leave gradient.layers out for all"
    )


def test_adapters_beside_both_projections_are_refused() -> None:
    config = RunConfig.model_validate({"model": {"lora": {"r": 2, "targets": ["v_proj"]}}})
    assert config.model.lora is not None
    with pytest.raises(UserError, match=r"none of which trains: add q_proj and k_proj to model\.lora\.targets"):
        built(add_lora(qwen(), config.model.lora, 0))


@pytest.mark.parametrize("fields", [{"ratio": 0.0}, {"ratio": 1.1}, {"layers": []}, {"layers": [-1]}])
def test_settings_that_make_no_sense_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        LongAct(**fields)


def test_the_rule_in_words() -> None:
    assert LongAct().describe() == (
        "Of the rows of query and key projections 30 % a head learn, those of largest activations (LongAct)"
    )
    assert LongAct(ratio=0.5, score="random", strict=True).describe() == (
        "Of the rows of query and key projections 50 % a head learn, those drawn at random, the others stay as they are"
    )
