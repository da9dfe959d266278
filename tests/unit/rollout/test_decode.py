"""The loop of our own against transformers' forward, `generate` and warpers."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from scipy.stats import chi2_contingency
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from atesd.rollout import decode, llama
from atesd.rollout.decode import draw
from atesd.rollout.hf import HFEngine, HFSampler
from atesd.rollout.known import why_unknown
from atesd.rollout.llama import Cache, Decoder
from atesd.rollout.sampler import SamplingConfig
from atesd.types import Turn

from support.families import FAMILIES, family_model
from support.models import EOS, PAD, tiny_model

# Unequal lengths, twice the same, pad and EOS ids inside.
PROMPTS = [[5, 6, 7], [9], [PAD, 4, EOS, 8, 3, 11, 2], [EOS, PAD], [12, 13, 14, 15, 16], [9], [5, 6, 7]]
ENDS = (EOS, 6, 17)
GREEDY = SamplingConfig(temperature=0, max_new_tokens=24)
CUT = SamplingConfig(temperature=1.1, top_p=0.9, top_k=8, max_new_tokens=24)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def sampler_of(model: Any, *, always_generate: bool = False, eos_ids: tuple[int, ...] = ENDS) -> HFSampler:
    return HFSampler(model, eos_ids=eos_ids, pad_id=PAD, decode=str, always_generate=always_generate)


def own(model: Any, sampling: SamplingConfig, prompts: list[list[int]] = PROMPTS, seed: int = 0) -> list[Turn]:
    """Sample with the loop of our own, and be sure that it was."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    assert why_unknown(base, 32) is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "generate", None)
        return sampler_of(model).sample(prompts, sampling, seed=seed)


def forced(model: Any, turn: Turn, temperature: float = 1.0) -> torch.Tensor:
    """Score a completion in one forward pass over its ids, without padding."""
    with torch.no_grad():
        logits = model(torch.tensor([[*turn.prompt_ids, *turn.completion_ids]])).logits[0].double()
    rows = (logits / temperature).log_softmax(-1)[len(turn.prompt_ids) - 1 : -1]
    return rows.gather(-1, torch.tensor(turn.completion_ids)[:, None])[:, 0]


def assert_scored(model: Any, turns: list[Turn], temperature: float = 1.0, atol: float = 1e-5) -> None:
    for turn in turns:
        found = torch.tensor(turn.logprobs, dtype=torch.float64)
        torch.testing.assert_close(found, forced(model, turn, temperature), atol=atol, rtol=0)


def adapted(model: Any, **more: Any) -> Any:
    torch.manual_seed(3)
    config = {"r": 2, "lora_alpha": 5, "target_modules": TARGETS, "init_lora_weights": False} | more
    return get_peft_model(model, LoraConfig(**config)).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_completions_are_those_of_generate(family: str, dtype: torch.dtype) -> None:
    model = family_model(family, dtype)
    expected = sampler_of(model, always_generate=True).sample(PROMPTS, GREEDY, seed=0)
    found = own(model, GREEDY)
    assert [turn.completion_ids for turn in found] == [turn.completion_ids for turn in expected]
    assert [turn.stop for turn in found] == [turn.stop for turn in expected]
    assert_scored(model, found)
    assert len({len(turn.completion_ids) for turn in found}) > 1, "some end before others"


@pytest.mark.parametrize("family", FAMILIES)
def test_sampled_log_probabilities_are_those_of_the_models_forward(family: str) -> None:
    model = family_model(family)
    assert_scored(model, own(model, CUT, PROMPTS * 3), temperature=1.1)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_as_near_to_the_forward_in_float32_as_the_models_own(family: str) -> None:
    """The same weights in float32 are the truth; the mean squared error may be twice the forward's own."""
    model = family_model(family, torch.bfloat16)
    turns = own(model, CUT, PROMPTS * 3)
    exact = family_model(family).to(torch.bfloat16).float()
    theirs = torch.cat([forced(model, turn, 1.1) - forced(exact, turn, 1.1) for turn in turns])
    ours = torch.cat([torch.tensor(turn.logprobs).double() - forced(exact, turn, 1.1) for turn in turns])
    assert float(ours.square().mean()) < 2 * float(theirs.square().mean())


def test_prompts_of_one_length_need_no_mask() -> None:
    model = family_model("qwen3")
    assert_scored(model, own(model, CUT, [[5, 6, 7], [8, 9, 10], [5, 6, 7]]), temperature=1.1)


def test_a_single_token_is_sampled_behind_the_prompt() -> None:
    model = family_model("mistral")
    turns = own(model, CUT.model_copy(update={"max_new_tokens": 1}))
    assert [len(turn.completion_ids) for turn in turns] == [1] * len(PROMPTS)
    assert_scored(model, turns, temperature=1.1)


def test_dropping_rows_that_have_ended_changes_no_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """Never, as shipped, and at every end: the same draws, the same ids, log-probabilities up to rounding."""
    model, kept = family_model("llama with scaled positions"), []
    keep = Cache.keep
    monkeypatch.setattr(Cache, "keep", lambda self, rows: kept.append(len(rows)) or keep(self, rows))
    found, drops = [], []
    for share in (0.0, decode._STILL_GOING, 1.0):
        kept.clear()
        monkeypatch.setattr(decode, "_STILL_GOING", share)
        found.append(own(model, CUT, PROMPTS * 6))
        drops.append(list(kept))
    never, shipped, always = drops
    assert never == []
    assert len(set(shipped)) >= 3
    assert all(later < earlier for earlier, later in pairwise(shipped))
    assert len(always) > len(shipped)
    for turns in found[1:]:
        for turn, plain in zip(turns, found[0], strict=True):
            assert turn.completion_ids == plain.completion_ids
            np.testing.assert_allclose(turn.logprobs, plain.logprobs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("every", [2, 5, 7, 100])
def test_looking_less_often_at_what_has_ended_changes_no_sample(every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    often = own(model, CUT)
    assert len({len(turn.completion_ids) for turn in often}) > 2
    steps = 0
    step = Decoder.step

    def counted(self: Decoder, tokens_B: torch.Tensor, cache: Cache) -> torch.Tensor:
        nonlocal steps
        steps += 1
        return step(self, tokens_B, cache)

    monkeypatch.setattr(Decoder, "step", counted)
    monkeypatch.setitem(decode._LOOK_EVERY, "cpu", every)
    seldom = own(model, CUT)
    for one, other in zip(often, seldom, strict=True):
        assert one.completion_ids == other.completion_ids
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)
    longest = max(len(turn.completion_ids) for turn in often)
    # It ends with the first look behind the longest completion, or at the limit. The first token takes no step, the
    # comparison with the model's own logits takes one.
    assert steps == min(-(-longest // every) * every, CUT.max_new_tokens)


@pytest.mark.parametrize(("ties", "reads"), [(False, 2), (True, 3)])
def test_a_walk_that_trusts_too_few_candidates_is_taken_again(
    ties: bool, reads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 23 equal tokens top-k 3 keeps all, and looks at 15 of them first. The first pass compares the two loops."""
    model = tiny_model(tied=False)
    if ties:
        with torch.no_grad():
            model.lm_head.weight.zero_()
    sampling = SamplingConfig(temperature=1.0, top_k=3, top_p=0.9, max_new_tokens=12)
    often = own(model, sampling)
    calls = []
    read = Decoder.read
    monkeypatch.setattr(Decoder, "read", lambda self, *given, **more: calls.append(1) or read(self, *given, **more))
    monkeypatch.setitem(decode._LOOK_EVERY, "cpu", 5)
    seldom = own(model, sampling)
    assert [turn.completion_ids for turn in seldom] == [turn.completion_ids for turn in often]
    assert len(calls) == reads
    if ties:
        assert max(token for turn in seldom for token in turn.completion_ids) > 15


@pytest.mark.parametrize("has_bias", [False, True])
def test_a_head_in_parts_gives_the_logits_of_the_whole(has_bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of 5 outputs, the last one shorter."""
    model = tiny_model()
    head = model.lm_head
    if has_bias:
        head.bias = torch.nn.Parameter(torch.linspace(-3, 3, head.out_features))
    with torch.no_grad():
        monkeypatch.setattr(llama, "_PART", 5 * head.in_features)
        assert llama._is_tall(head)
        assert head.out_features % 5
        parts, _ = Decoder(model).read(PROMPTS, 1)
        monkeypatch.setattr(llama, "_PART", 2**30)
        assert not llama._is_tall(head)
        whole, _ = Decoder(model).read(PROMPTS, 1)
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=0)


def test_a_head_in_half_precision_stays_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama, "_PART", 10)
    assert llama._is_tall(tiny_model().lm_head)
    assert not llama._is_tall(tiny_model().to(torch.bfloat16).lm_head)


def test_equal_prompts_are_read_once() -> None:
    decoder, seen = Decoder(family_model("qwen3")), []
    run = decoder._pass
    decoder._pass = lambda ids, *rest, **more: seen.append(tuple(ids.shape)) or run(ids, *rest, **more)
    with torch.no_grad():
        logits, cache = decoder.read([[5, 6, 7], [9], [5, 6, 7]], 4)
    assert seen == [(2, 3)]
    assert torch.equal(logits[0], logits[2])
    assert not torch.equal(logits[0], logits[1])
    assert cache.positions_B.tolist() == [3, 1, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("family", ["qwen3", "qwen2 with biases"])
def test_adapters_count_as_they_stand(family: str, dtype: torch.dtype) -> None:
    """In bfloat16 the base is rounded and peft keeps its adapters in float32."""
    model = adapted(family_model(family, dtype))
    atol = 0.3 if dtype is torch.bfloat16 else 1e-5
    on = own(model, CUT, PROMPTS * 3)
    assert_scored(model, on, 1.1, atol)
    with model.disable_adapter():
        off = own(model, CUT, PROMPTS * 3)
        assert_scored(model, off, 1.1, atol)
    assert off == own(family_model(family, dtype), CUT, PROMPTS * 3)
    assert [turn.completion_ids for turn in on] != [turn.completion_ids for turn in off]
    strong = adapted(family_model(family, dtype), lora_alpha=10)
    assert [turn.logprobs for turn in own(strong, CUT)] != [turn.logprobs for turn in own(model, CUT)]


def test_several_active_adapters_add_up() -> None:
    model = adapted(family_model("qwen3"))
    model.add_adapter(
        "other", LoraConfig(r=3, lora_alpha=7, target_modules=["v_proj", "up_proj"], init_lora_weights=False)
    )
    model.base_model.set_adapter(["default", "other"])
    assert_scored(model, own(model, CUT), 1.1)
    model.base_model.set_adapter("other")
    assert_scored(model, own(model, CUT), 1.1)


def test_a_small_adapter_is_not_rounded_away_in_bfloat16() -> None:
    """2 * .02 * .015 * 5 / 2 = .0015 is less than half a step of bfloat16 at .75 (.00195), and yet moves the logits."""
    model = adapted(family_model("qwen3", torch.bfloat16))
    layer = model.get_base_model().model.layers[0].mlp.down_proj
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.mul_(0.0)
        layer.lora_A["default"].weight.fill_(0.02)
        layer.lora_B["default"].weight.fill_(0.015)
        weight = layer.base_layer.weight
        weight.copy_(weight.sign() * 0.75)
        assert torch.equal(weight + layer.get_delta_weight("default").to(weight.dtype), weight)
    on = own(model, GREEDY)
    with model.disable_adapter():
        off = own(model, GREEDY)
    assert [turn.logprobs for turn in on] != [turn.logprobs for turn in off]


def test_the_engine_builds_either_path(monkeypatch: pytest.MonkeyPatch) -> None:
    class Spoken:
        eos_ids, pad_id, decode = ENDS, PAD, staticmethod(str)

    model = tiny_model()
    fast = HFEngine().build(model, Spoken()).sample(PROMPTS, CUT, seed=0)  # type: ignore[arg-type]
    assert fast == sampler_of(model).sample(PROMPTS, CUT, seed=0)
    monkeypatch.setattr("atesd.rollout.hf.decoding", None)
    slow = HFEngine(decode="generate").build(model, Spoken()).sample(PROMPTS, CUT, seed=0)  # type: ignore[arg-type]
    assert slow == sampler_of(model, always_generate=True).sample(PROMPTS, CUT, seed=0)
    assert [turn.completion_ids for turn in slow] != [turn.completion_ids for turn in fast]


WARPED = [
    SamplingConfig(temperature=temperature, top_p=top_p, top_k=top_k)
    for temperature, top_p, top_k in [
        (1.0, 1.0, 0),
        (0.7, 1.0, 5),
        (1.1, 0.95, 20),
        (1.1, 0.5, 4),
        (1.0, 0.3, 0),
        (1.3, 0.9999, 0),
        (1.0, 0.9, 400),
        (1.0, 1.0, 1),
        (1.0, 1e-6, 0),
        (2.0, 0.6, 290),
    ]
]


def warped(logits_1V: torch.Tensor, sampling: SamplingConfig) -> torch.Tensor:
    """Return what transformers' warpers leave, as probabilities [V]."""
    warpers: list[Any] = [TemperatureLogitsWarper(sampling.temperature)]
    warpers += [TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
    warpers += [TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
    return LogitsProcessorList(warpers)(None, logits_1V).softmax(-1)[0]


@pytest.mark.parametrize("sampling", WARPED, ids=lambda each: f"{each.temperature}-{each.top_p}-{each.top_k}")
@pytest.mark.parametrize("spread", [0.1, 1.0, 4.0])
@pytest.mark.parametrize("ties", [False, True])
def test_tokens_are_drawn_with_the_probabilities_of_transformers_warpers(
    sampling: SamplingConfig, spread: float, ties: bool
) -> None:
    """A grid of N uniform numbers meets a token of probability p between Np - 1 and Np + 1 times."""
    count, size = 4000, 300
    logits_V = torch.randn(size, generator=torch.Generator().manual_seed(1)) * spread
    logits_V[7] = -torch.inf
    if ties and sampling.top_p == 1:  # which of equals falls out of a nucleus is nobody's business
        logits_V = (logits_V * 2 / spread).round() / 2
    uniform_N1 = ((torch.arange(count) + 0.5) / count)[:, None]
    weights_NV = (logits_V / sampling.temperature).softmax(-1).expand(count, size)
    seen_V = draw(weights_NV, sampling, uniform_N1)[:, 0].bincount(minlength=size)
    expected_V = warped(logits_V[None], sampling) * count
    assert float((seen_V - expected_V).abs().max()) < 1.1
    assert set(seen_V.nonzero()[:, 0].tolist()) <= set(expected_V.nonzero()[:, 0].tolist())


def test_the_ends_of_the_uniform_range_draw_tokens_that_have_weight() -> None:
    weights_BV = torch.tensor([[0.0, 1.0, 0.0, 3.0, 0.0]] * 2)
    uniform_B1 = torch.tensor([[0.0], [1.0 - 2**-24]])
    for sampling in (SamplingConfig(top_p=1.0, top_k=0), SamplingConfig(top_p=0.99, top_k=0), SamplingConfig(top_k=4)):
        assert {1, 3} >= set(draw(weights_BV, sampling, uniform_B1)[:, 0].tolist())
    assert draw(weights_BV, SamplingConfig(top_p=1.0, top_k=0), uniform_B1)[:, 0].tolist() == [1, 3]


def test_whatever_the_sum_of_weights_the_largest_uniform_number_stays_inside() -> None:
    weights_BV = torch.rand(20_000, 4, generator=torch.Generator().manual_seed(0))
    weights_BV[:, 3] = 0.0
    largest_B1 = torch.full((20_000, 1), 1.0 - 2**-24)
    assert draw(weights_BV, SamplingConfig(top_p=1.0, top_k=0), largest_B1).unique().tolist() == [2]


def test_all_tokens_as_probable_as_the_last_of_top_k_stay_however_many() -> None:
    uniform_N1 = ((torch.arange(3000) + 0.5) / 3000)[:, None]
    found = draw(torch.ones(3000, 300), SamplingConfig(top_k=5, top_p=1.0), uniform_N1)[:, 0].bincount(minlength=300)
    assert found.tolist() == [10] * 300


def test_nothing_is_sampled_behind_an_end_token() -> None:
    model, seen = family_model("qwen2 with biases"), set()
    with torch.no_grad(), decode.decoding(model, CUT, eos_ids=ENDS, seed=0) as complete:
        for ids, logprobs in complete(PROMPTS * 6):
            assert len(ids) == len(logprobs)
            assert not set(ids[:-1]) & set(ENDS)
            assert ids[-1] in ENDS or len(ids) == CUT.max_new_tokens
            seen.add(ids[-1])
    assert len(seen & set(ENDS)) > 1


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"), [(1.0, 1.0, 0), (1.1, 0.95, 20), (0.8, 0.7, 0), (1.5, 1.0, 4)]
)
def test_completions_are_distributed_as_those_of_generate(temperature: float, top_p: float, top_k: int) -> None:
    """Three tokens from one prompt, 3000 times on each path: a chi-square test finds no difference."""
    model, count = family_model("qwen3"), 3000
    sampling = SamplingConfig(temperature=temperature, top_p=top_p, top_k=top_k, max_new_tokens=3)
    asked = [[5, 6, 7]] * count
    theirs = sampler_of(model, always_generate=True).sample(asked, sampling, seed=1)
    tallies = [Counter(turn.completion_ids for turn in turns) for turns in (own(model, sampling, asked, 2), theirs)]
    whole = sum(tallies, Counter())
    common = [ids for ids, seen in whole.items() if seen >= 20]
    table = np.array([[*(tally[ids] for ids in common), 0] for tally in tallies])
    table[:, -1] = count - table.sum(1)
    assert len(common) > 10
    assert chi2_contingency(table[:, table.sum(0) > 0]).pvalue > 1e-3


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (2, 2), (4, 1), (5, 1), (2, 3), (8, 1), (3, 3)])
def test_few_rows_take_the_other_product_with_the_same_result(
    shape: tuple[int, int], bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to 4 rows and positions of the body, and 8 of a tall head."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(24, 40, bias=bias, dtype=torch.float64)
    x = torch.randn(*shape, 24, dtype=torch.float64)
    expected = layer(x)
    plain, heads = llama._projection(layer), llama._in_parts(layer)
    asked: list[Any] = []
    linear = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *given: asked.append(given) or linear(*given))
    for product, few in ((plain, 4), (heads, 8)):
        asked.clear()
        found = product(x)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        assert found.is_contiguous()
        assert bool(asked) == (shape[0] * shape[1] > few)


def test_a_single_row_is_no_product_with_a_vector(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = torch.nn.Linear(24, 40, bias=False)
    columns: list[int] = []
    product = torch.Tensor.__matmul__

    def watched(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        columns.append(other.shape[1])
        return product(one, other)

    monkeypatch.setattr(torch.Tensor, "__matmul__", watched)
    assert llama._projection(layer)(torch.randn(1, 1, 24)).shape == (1, 1, 40)
    llama._projection(layer)(torch.randn(1, 3, 24))
    assert columns == [2, 3]


def test_few_rows_elsewhere_than_on_a_cpu_take_the_plain_product(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = torch.nn.Linear(24, 40, device="meta")
    asked: list[Any] = []
    linear = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *given: asked.append(given) or linear(*given))
    assert llama._projection(layer)(torch.randn(2, 1, 24, device="meta")).shape == (2, 1, 40)
    assert len(asked) == 1
