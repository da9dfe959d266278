"""Hiding tokens of a hint: against models in float64, bit for bit where nothing is hidden, refused where it cannot."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from atesd.exposure.retention_gates import Gates
from atesd.losses.divergence import LossConfig
from atesd.train.batch import Passage, Veil, view_input
from atesd.train.scorer import Scorer
from atesd.train.veils import Veils
from atesd.types import UserError

from support.architectures import family
from support.models import PAD, tiny_model
from support.plain_models import final_states

CPU = torch.device("cpu")
MODELS: dict[str, Callable[[], Any]] = {"qwen3": lambda: tiny_model().eval(), "llama": lambda: family("llama")}
LOWEST = -1e30


def make_gates(*, bias: float = 1.0, seed: int = 0, **settings: Any) -> Gates:
    sizes: dict[str, Any] = {
        "layers": 2, "heads": 2, "width": 32, "hidden": 16, "bias": bias, "learning_rate": 0.01, "weight_decay": 0.0,
        "ntp": 1.0, "cap": 1.0, "seed": seed, "device": CPU,
    }  # fmt: skip
    made = Gates(**sizes | settings)
    with torch.no_grad():
        for network in made.networks:
            network[-1].weight.mul_(8.0)  # type: ignore[index]
    return made


def make_scorer(model: Any, gates: Gates | None = None, pad_id: int = PAD) -> Scorer:
    veils = Veils(model, gates)
    return Scorer(model, pad_id=pad_id, loss=LossConfig(), temperature=1.0, token_budget=10_000, veils=veils)


def passages(*, by_gates: bool, seed: int = 0) -> list[Passage]:
    """Return ragged passages whose hints stand anywhere, at the beginning too; some share a prompt, one has no veil."""
    rng = random.Random(seed)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(23) for _ in range(count))

    made = []
    for length, start, stop, keep in ((12, 0, 7, 2), (20, 5, 14, 4), (9, 3, 8, 1), (20, 2, 20, 6)):
        kept = None if by_gates else tuple(sorted(rng.sample(range(stop - start), keep)))
        prompt = ids(length)
        made += [Passage(prompt, ids(rng.randint(1, 8)), Veil(start, stop, keep, kept)) for _ in range(2)]
    return [*made, Passage(ids(15), ids(4))]


def split(whole: Tensor, every: list[Passage]) -> list[Tensor]:
    return list(whole.split([len(each.completion) for each in every]))


def scored_part(states_TW: Tensor, passage: Passage) -> Tensor:
    return states_TW[len(passage.prompt) - 1 :]


def read(passage: Passage) -> tuple[int, ...]:
    return passage.prompt + passage.completion[:-1]


def hiding(passage: Passage, kept_EGI: list[list[set[int]]]) -> Any:
    """Return the bias that hides what is not kept of a layer and head from every query but its own."""
    assert passage.veil is not None
    start, stop, length = passage.veil.start, passage.veil.stop, len(read(passage))

    def bias(layer: int, _: Tensor) -> Tensor:
        found = torch.zeros(len(kept_EGI[layer]), length, length, dtype=torch.float64)
        for head, kept in enumerate(kept_EGI[layer]):
            for key in range(start, stop):
                for query in range(length):
                    if key - start not in kept and query != key:
                        found[head, query, key] = LOWEST
        return found

    return bias


def betas(gates: Gates, layer: int, states_TW: Tensor) -> Tensor:
    """Return log beta, [G, T], in float64."""
    first, _, last = gates.networks[layer].double()  # type: ignore[misc]
    x = states_TW @ first.weight.T + first.bias
    x = (x * x.sigmoid()) @ last.weight.T + last.bias
    gates.networks[layer].float()
    return -torch.log1p((-x).exp()).T


def by_gates(model: Any, gates: Gates, passage: Passage) -> list[list[set[int]]]:
    """Return what gates keep: betas of a pass with nothing hidden, in the order of (t - i) log beta."""
    veil = passage.veil
    assert veil is not None
    found: dict[tuple[int, int, int], float] = {}

    def look(layer: int, states_TW: Tensor) -> None:
        log_beta_GT = betas(gates, layer, states_TW)
        for head in range(2):
            for place in range(veil.start, veil.stop):
                age = len(passage.prompt) - 1 - place
                found[layer, head, place - veil.start] = age * float(log_beta_GT[head, place].detach())

    final_states(model, read(passage), look)
    best = sorted(found, key=lambda entry: -found[entry])[: 4 * veil.keep]
    return [[{token for a, b, token in best if (a, b) == (layer, head)} for head in (0, 1)] for layer in (0, 1)]


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    return MODELS[request.param]()


def test_the_models_in_float64_are_the_models(model: Any) -> None:
    ids = tuple(random.Random(1).randrange(23) for _ in range(17))
    found = model.model(torch.tensor([ids])).last_hidden_state[0].detach().double()
    torch.testing.assert_close(found, final_states(model, ids), atol=2e-5, rtol=1e-4)


def test_tokens_chosen_by_rule_are_all_that_the_teacher_attends_to(model: Any) -> None:
    every = passages(by_gates=False)
    found = split(make_scorer(model).hidden(every).hidden_NH.detach().double(), every)
    for passage, states in zip(every, found, strict=True):
        bias = (lambda *_: None) if passage.veil is None else hiding(passage, [[set(passage.veil.kept or ())] * 2] * 2)
        torch.testing.assert_close(
            states, scored_part(final_states(model, read(passage), bias), passage), atol=5e-5, rtol=1e-4
        )
        if passage.veil is not None:
            plain = scored_part(final_states(model, read(passage)), passage)
            assert (states - plain).abs().max() > 1e-2, "hiding must be seen"


def test_a_hidden_token_tells_nothing_at_all(model: Any) -> None:
    """Its id may be any: not one bit of what is scored depends on it, by way of the prompt behind it neither."""
    (passage,) = passages(by_gates=False)[2:3]
    assert passage.veil is not None
    assert passage.veil.kept is not None
    scorer = make_scorer(model)
    before = scorer.hidden([passage]).hidden_NH
    for place in range(passage.veil.start, passage.veil.stop):
        prompt = list(passage.prompt)
        prompt[place] = (prompt[place] + 1) % 23
        same = torch.equal(scorer.hidden([passage._replace(prompt=tuple(prompt))]).hidden_NH, before)
        assert same == (place - passage.veil.start not in passage.veil.kept)


def test_gates_keep_what_lasts_longest_over_all_layers_and_heads(model: Any) -> None:
    gates = make_gates()
    every = passages(by_gates=True)
    scorer = make_scorer(model, gates)
    found = split(scorer.hidden(every).hidden_NH.detach().double(), every)
    uneven = 0
    for passage, states in zip(every[:-1], found, strict=False):
        kept = by_gates(model, gates, passage)
        uneven += len({len(tokens) for heads in kept for tokens in heads}) > 1
        expected = scored_part(final_states(model, read(passage), hiding(passage, kept)), passage)
        torch.testing.assert_close(states, expected, atol=5e-5, rtol=1e-4)
    assert uneven, "layers and heads must share the budget"
    assert scorer.veils is not None
    for each in view_input(every, PAD, CPU).passes:
        for row, kept_EHI in scorer.veils.kept(each).items() if each.veiled else ():
            passage = each.veiled[row]
            assert passage.veil is not None
            assert int(kept_EHI.sum()) == 2 * 2 * passage.veil.keep


def test_a_fading_hint_has_the_distance_times_log_beta_on_its_logits(model: Any) -> None:
    gates = make_gates()
    every = passages(by_gates=True)
    scorer = make_scorer(model, gates)
    assert scorer.veils is not None
    with torch.no_grad(), scorer.veils.remembering() as remembered:
        found = split(scorer.hidden(every).hidden_NH.double(), every)
    said = {passage: (each, row) for each in remembered for row, passage in each.veiled.items()}
    for passage, states in zip(every[:-1], found, strict=False):
        veil = passage.veil
        assert veil is not None

        def fading(layer: int, states_TW: Tensor, passage: Passage = passage, veil: Veil = veil) -> Tensor:
            log_beta_GT = betas(gates, layer, states_TW).detach()
            each, row = said[passage]
            ours = each.log_beta[layer][row, :, : len(states_TW)].double()
            bias = torch.zeros(2, len(states_TW), len(states_TW), dtype=torch.float64)
            for key in range(len(states_TW)):
                is_hint = veil.start <= key < veil.stop
                expected = log_beta_GT[:, key] if is_hint else torch.zeros(2, dtype=torch.float64)
                torch.testing.assert_close(ours[:, key], expected, atol=1e-5, rtol=1e-3)
                for query in range(key, len(states_TW)):
                    bias[:, query, key] = (query - key) * log_beta_GT[:, key] if is_hint else 0.0
            return bias

        expected = scored_part(final_states(model, read(passage), fading), passage)
        torch.testing.assert_close(states, expected, atol=5e-5, rtol=1e-4)


def test_where_beta_is_one_nothing_fades_bit_for_bit(model: Any) -> None:
    gates = make_gates(bias=1e4)
    every = passages(by_gates=True)
    scorer = make_scorer(model, gates)
    assert scorer.veils is not None
    plain = scorer.hidden([passage._replace(veil=None) for passage in every]).hidden_NH
    with scorer.veils.remembering():
        faded = scorer.hidden(every).hidden_NH
    for one, other in zip(split(plain, every), split(faded, every), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)  # cut into other passes
    alone = [every[0], every[2]]
    with torch.no_grad():  # under a gradient of the bias torch takes another kernel
        with scorer.veils.remembering():
            faded = scorer.hidden(alone).hidden_NH
        assert torch.equal(scorer.hidden([passage._replace(veil=None) for passage in alone]).hidden_NH, faded)


def test_passes_without_a_veil_are_what_they_are_without_veils_bit_for_bit(model: Any) -> None:
    every = [passage._replace(veil=None) for passage in passages(by_gates=False)]
    bare = Scorer(model, pad_id=PAD, loss=LossConfig(), temperature=1.0, token_budget=10_000)
    before = bare.hidden(every).hidden_NH
    scorer = make_scorer(model)
    assert torch.equal(scorer.hidden(every).hidden_NH, before)
    mixed = scorer.hidden([*every, *passages(by_gates=False)[:-1]]).hidden_NH
    assert torch.equal(mixed[: len(before)], before), "passages with and without a veil go apart"
    with pytest.raises(IndexError):
        scorer.hidden([Passage((1, 2, 999), (3,), Veil(0, 1, 0, ()))])
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(scorer.hidden(every).hidden_NH, before), "a pass that failed leaves nothing behind"
    with pytest.raises(AssertionError, match="nothing would hide"):
        bare.hidden(passages(by_gates=False))


@pytest.mark.parametrize("gated", [False, True])
def test_padding_behind_a_passage_never_matters(gated: bool, model: Any) -> None:
    every = passages(by_gates=gated)
    gates = make_gates() if gated else None
    scorer, other = make_scorer(model, gates), make_scorer(model, gates, pad_id=7)
    together = scorer.hidden(every).hidden_NH
    assert torch.equal(together, other.hidden(every).hidden_NH)
    for passage, inside in zip(every, split(together, every), strict=True):
        torch.testing.assert_close(scorer.hidden([passage]).hidden_NH, inside, atol=2e-5, rtol=1e-5)


def test_gates_and_a_rule_may_choose_side_by_side(model: Any) -> None:
    """As when gates are warm for some rows and not for others: each row is what it is alone, and is told of alone."""
    gates = make_gates()
    every = [*passages(by_gates=True)[:4], *passages(by_gates=False)[4:8]]
    scorer = make_scorer(model, gates)
    assert scorer.veils is not None
    together = split(scorer.hidden(every).hidden_NH, every)
    for passage, inside in zip(every, together, strict=True):
        torch.testing.assert_close(scorer.hidden([passage]).hidden_NH, inside, atol=2e-5, rtol=1e-5)
        veil = passage.veil
        assert veil is not None
        kept = [[set(veil.kept)] * 2] * 2 if veil.kept is not None else by_gates(model, gates, passage)
        shares = [sum(token in head for layer in kept for head in layer) / 4 for token in range(veil.stop - veil.start)]
        assert scorer.veils.reached(passage) == shares


REFUSED = [
    ("falcon", {}, r"cannot replace the attention of FalconForCausalLM"),
    ("falcon-h1", {}, r"FalconH1ForCausalLM passes on by other ways what they say"),
    ("recurrent-gemma", {}, r"RecurrentGemmaForCausalLM"),
]


@pytest.mark.parametrize(("name", "more", "message"), REFUSED)
def test_models_whose_attention_cannot_be_replaced_are_refused(name: str, more: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        Veils(family(name, **more))
    assert "\n" not in str(caught.value)
    assert 'reveal.kind = "segments"' in str(caught.value)


@pytest.mark.parametrize("attention", ["eager", "flash_attention_2", "flex_attention"])
def test_another_attention_than_sdpa_is_refused(attention: str) -> None:
    model = tiny_model()
    model.config._attn_implementation = attention
    message = f'runs with attn_implementation = "{attention}": set model.attn_implementation = "sdpa"'
    with pytest.raises(UserError, match=message):
        Veils(model)


def test_a_model_with_a_window_keeps_it_while_tokens_are_hidden() -> None:
    """A veil that hides nothing, on a sequence longer than the window of half of the layers."""
    model = family("gemma3", sliding_window=4, layer_types=["sliding_attention", "full_attention"])
    every = [Passage(tuple(range(2, 18)), (3, 4, 5), Veil(2, 6, 4, (0, 1, 2, 3)))]
    plain = [passage._replace(veil=None) for passage in every]
    scorer = make_scorer(model)
    torch.testing.assert_close(scorer.hidden(every).hidden_NH, scorer.hidden(plain).hidden_NH, atol=1e-5, rtol=1e-5)
    without = family("gemma3", layer_types=["full_attention"] * 2)
    assert (make_scorer(without).hidden(plain).hidden_NH - scorer.hidden(plain).hidden_NH).abs().max() > 1e-2
