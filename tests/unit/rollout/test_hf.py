from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig, Qwen3ForCausalLM

from atesd.rollout.decode import Decoder
from atesd.rollout.hf import HFSampler
from atesd.rollout.sampler import SamplingConfig, Weights
from atesd.types import NonFiniteError, StopReason, Turn, UserError

from support.models import EOS, PAD, VOCABULARY, tiny_model

# Unequal lengths; pad and EOS ids occur inside.
PROMPTS = [[5, 6, 7], [9], [PAD, 4, EOS, 8, 3, 11, 2], [EOS, PAD], [12, 13, 14, 15, 16]]
OPEN = SamplingConfig(temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=16)
CUT = SamplingConfig(temperature=1.1, top_p=0.95, top_k=20, max_new_tokens=16)
NARROW = SamplingConfig(temperature=1.1, top_p=0.6, top_k=4, max_new_tokens=16)
GREEDY = SamplingConfig(temperature=0, max_new_tokens=16)
PATH = {"always_generate": False}


@pytest.fixture(params=["our loop", "generate"], autouse=True)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test runs on both paths."""
    monkeypatch.setitem(PATH, "always_generate", request.param == "generate")
    return str(request.param)


def sampler_of(model: torch.nn.Module, eos_ids: Sequence[int] = (EOS,), pad_id: int = PAD) -> HFSampler:
    return HFSampler(model, eos_ids=eos_ids, pad_id=pad_id, decode=lambda ids: " ".join(map(str, ids)), **PATH)


def log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = logits - logits.max(-1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def forced_logprobs(model: torch.nn.Module, turn: Turn, temperature: float) -> NDArray[np.float64]:
    """Score a completion in one plain forward pass over its own ids, without padding; softmax in float64."""
    with torch.no_grad():
        logits = model(torch.tensor([[*turn.prompt_ids, *turn.completion_ids]])).logits[0].double().numpy()
    rows = log_softmax(logits / temperature)[len(turn.prompt_ids) - 1 : -1]
    return rows[np.arange(len(turn.completion_ids)), list(turn.completion_ids)]


@pytest.mark.parametrize("sampling", [OPEN, CUT, NARROW, GREEDY])
def test_logprobs_are_those_of_the_tempered_untruncated_distribution(sampling: SamplingConfig) -> None:
    model = tiny_model()
    turns = sampler_of(model).sample(PROMPTS * 4, sampling, seed=0)
    assert len(turns) == 20
    for turn in turns:
        expected = forced_logprobs(model, turn, sampling.temperature or 1.0)
        np.testing.assert_allclose(turn.logprobs, expected, atol=1e-5, rtol=0)


def test_the_prompt_ids_given_are_the_ids_kept_in_order() -> None:
    turns = sampler_of(tiny_model()).sample(PROMPTS, OPEN, seed=0)
    assert [list(turn.prompt_ids) for turn in turns] == PROMPTS


def test_samples_follow_temperature_and_top_k() -> None:
    """One step from one prompt, 4000 times: only the three best tokens, at the odds of softmax(logits / 1.7)."""
    model, count = tiny_model(), 4000
    sampling = SamplingConfig(temperature=1.7, top_p=1.0, top_k=3, max_new_tokens=1)
    turns = sampler_of(model).sample([[5, 6, 7]] * count, sampling, seed=3)
    with torch.no_grad():
        logits = model(torch.tensor([[5, 6, 7]])).logits[0, -1].double().numpy()
    best = np.argsort(-logits)[:3]
    share = np.exp(log_softmax(logits[best] / 1.7))
    seen = np.array([[turn.completion_ids[0] for turn in turns].count(token) for token in best]) / count
    assert seen.sum() == pytest.approx(1.0)
    assert np.all(np.abs(seen - share) < 4 * np.sqrt(share * (1 - share) / count))


def test_top_p_keeps_the_smallest_set_with_the_mass() -> None:
    model = tiny_model()
    with torch.no_grad():
        probs = np.exp(log_softmax(model(torch.tensor([[9]])).logits[0, -1].double().numpy()))
    order = np.argsort(-probs)
    # Halfway between the mass of the two best and of the three best: the nucleus is the three best.
    top_p = float(np.cumsum(probs[order])[1] + probs[order[2]] / 2)
    sampling = SamplingConfig(temperature=1.0, top_p=top_p, top_k=0, max_new_tokens=1)
    turns = sampler_of(model).sample([[9]] * 2000, sampling, seed=0)
    assert {turn.completion_ids[0] for turn in turns} == {int(token) for token in order[:3]}


def test_equal_seeds_give_equal_samples_whatever_the_global_state() -> None:
    sampler = sampler_of(tiny_model())
    torch.manual_seed(1)
    first = sampler.sample(PROMPTS, OPEN, seed=7)
    torch.manual_seed(2)
    again, other = sampler.sample(PROMPTS, OPEN, seed=7), sampler.sample(PROMPTS, OPEN, seed=8)
    assert first == again
    assert [turn.completion_ids for turn in first] != [turn.completion_ids for turn in other]


def test_the_global_random_state_is_untouched() -> None:
    sampler = sampler_of(tiny_model())
    before = torch.get_rng_state()
    sampler.sample(PROMPTS, OPEN, seed=7)
    assert torch.equal(torch.get_rng_state(), before)


def test_completions_end_at_the_first_of_several_end_tokens() -> None:
    ends = (EOS, 6, 17, 20)
    turns = sampler_of(tiny_model(), eos_ids=ends).sample(PROMPTS * 8, OPEN, seed=0)
    assert {turn.stop for turn in turns} == {StopReason.EOS, StopReason.LENGTH}
    for turn in turns:
        inside, last = turn.completion_ids[:-1], turn.completion_ids[-1]
        assert not set(inside) & set(ends)
        assert (last in ends) == (turn.stop is StopReason.EOS)
        assert turn.stop is StopReason.EOS or len(turn.completion_ids) == OPEN.max_new_tokens
        assert len(turn.logprobs) == len(turn.completion_ids)


def test_an_end_token_as_the_last_permitted_token_is_an_end() -> None:
    """Every token ends: one token each, and none of them counts as cut off."""
    sampling = OPEN.model_copy(update={"max_new_tokens": 1})
    turns = sampler_of(tiny_model(), eos_ids=range(VOCABULARY)).sample(PROMPTS, sampling, seed=0)
    assert [(len(turn.completion_ids), turn.stop) for turn in turns] == [(1, StopReason.EOS)] * len(PROMPTS)


@pytest.mark.parametrize("pad_id", [EOS, 6, 11])
def test_the_choice_of_pad_id_changes_nothing(pad_id: int) -> None:
    model, ends = tiny_model(), (EOS, 6, 17)
    expected = sampler_of(model, ends, PAD).sample(PROMPTS * 4, OPEN, seed=0)
    found = sampler_of(model, ends, pad_id).sample(PROMPTS * 4, OPEN, seed=0)
    assert [turn.completion_ids for turn in found] == [turn.completion_ids for turn in expected]
    assert [turn.stop for turn in found] == [turn.stop for turn in expected]
    assert any(turn.stop is StopReason.EOS for turn in expected)


def test_the_generation_settings_of_a_model_folder_are_not_honoured(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)  # weights that stand in memory as in a file round alike
    plain = Qwen3ForCausalLM.from_pretrained(tmp_path)
    expected = sampler_of(plain).sample(PROMPTS, GREEDY, seed=0)
    sampled = sampler_of(plain).sample(PROMPTS, OPEN, seed=0)
    plain.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.6,
        top_k=1,
        min_p=0.5,
        repetition_penalty=9.0,
        no_repeat_ngram_size=1,
        suppress_tokens=list(range(2, 20)),
        min_new_tokens=9,
        max_length=4,
        num_return_sequences=2,
        eos_token_id=3,
    )
    plain.save_pretrained(tmp_path / "settings")
    model = Qwen3ForCausalLM.from_pretrained(tmp_path / "settings")
    settings = model.generation_config
    assert settings.repetition_penalty == 9.0
    assert sampler_of(model).sample(PROMPTS, GREEDY, seed=0) == expected
    assert sampler_of(model).sample(PROMPTS, OPEN, seed=0) == sampled
    assert model.generation_config is settings


def test_the_model_comes_back_as_it_was_even_after_an_error() -> None:
    model = tiny_model().train()
    settings, state = model.generation_config, torch.get_rng_state()
    with pytest.raises(IndexError):
        sampler_of(model).sample([[VOCABULARY + 5]], OPEN, seed=0)
    assert model.training
    assert model.generation_config is settings
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()


def test_dropout_is_off_while_sampling_and_the_mode_is_restored() -> None:
    model = tiny_model()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.train()
    turns = sampler_of(model).sample(PROMPTS, OPEN, seed=0)
    assert model.training
    model.eval()
    for turn in turns:
        np.testing.assert_allclose(turn.logprobs, forced_logprobs(model, turn, 1.0), atol=1e-5, rtol=0)
    sampler_of(model).sample(PROMPTS, OPEN, seed=0)
    assert not model.training


def test_prompt_and_completion_may_fill_the_context_but_not_exceed_it() -> None:
    """The tiny model has 64 positions: 48 + 16 fit, 49 + 16 do not."""
    sampler = sampler_of(tiny_model())
    (turn,) = sampler.sample([[5] * 48], OPEN, seed=0)
    assert 1 <= len(turn.completion_ids) <= 16
    with pytest.raises(UserError, match=r"prompt of 49 tokens .* up to 16 .* context of 64"):
        sampler.sample([[3], [5] * 49], OPEN, seed=0)


def test_a_prompt_without_tokens_is_refused() -> None:
    with pytest.raises(AssertionError):
        sampler_of(tiny_model()).sample([[3], []], OPEN, seed=0)
    assert sampler_of(tiny_model()).sample([], OPEN, seed=0) == []


def test_a_small_token_budget_cuts_the_request_but_not_the_order(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy, so that the draws do not depend on the cut. 7 + 16 positions: a budget of 23 is one prompt a call."""
    model = tiny_model()
    whole = sampler_of(model).sample(PROMPTS, GREEDY, seed=0)
    calls = []
    if path == "generate":
        generate = model.generate
        model.generate = lambda **inputs: calls.append(inputs["input_ids"].shape) or generate(**inputs)
    else:
        read = Decoder.read
        monkeypatch.setattr("atesd.rollout.hf.distance", lambda *_: 0.0)
        monkeypatch.setattr(
            Decoder,
            "read",
            lambda self, asked, *more, **rest: (
                calls.append((len(asked), max(map(len, asked)))) or read(self, asked, *more, **rest)
            ),
        )
    cut = sampler_of(model).sample(PROMPTS, GREEDY.model_copy(update={"batch_tokens": 23}), seed=0)
    # Longest first: 7 + 16 = 23, then 5 + 16 = 21, 3 + 16 = 19, 2 + 16 = 18 and 1 + 16 = 17, alone each.
    assert [tuple(shape) for shape in calls] == [(1, 7), (1, 5), (1, 3), (1, 2), (1, 1)]
    assert [turn.completion_ids for turn in cut] == [turn.completion_ids for turn in whole]
    calls.clear()
    sampler_of(model).sample(PROMPTS, GREEDY.model_copy(update={"batch_tokens": 46}), seed=0)
    # 46 // 23 = 2 with the longest, 46 // 19 = 2 with the next, then the last.
    assert [tuple(shape) for shape in calls] == [(2, 7), (2, 3), (1, 1)]


def test_chunks_of_a_request_draw_different_samples() -> None:
    """The random state runs on from call to call: equal prompts in different chunks are not sampled alike."""
    sampling = OPEN.model_copy(update={"batch_tokens": 19})
    turns = sampler_of(tiny_model()).sample([[5, 6, 7]] * 6, sampling, seed=0)
    assert len({turn.completion_ids for turn in turns}) > 1


def test_an_adapter_samples_as_it_stands() -> None:
    model = get_peft_model(
        tiny_model(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, lora_dropout=0.0)
    )
    model.get_base_model().generation_config = settings = GenerationConfig(repetition_penalty=9.0)
    on = sampler_of(model).sample(PROMPTS, OPEN, seed=0)
    for turn in on:
        np.testing.assert_allclose(turn.logprobs, forced_logprobs(model, turn, 1.0), atol=1e-5, rtol=0)
    assert model.get_base_model().generation_config is settings
    with model.disable_adapter():
        off = sampler_of(model).sample(PROMPTS, OPEN, seed=0)
    base = sampler_of(tiny_model()).sample(PROMPTS, OPEN, seed=0)
    assert [turn.completion_ids for turn in off] == [turn.completion_ids for turn in base]
    assert [turn.completion_ids for turn in on] != [turn.completion_ids for turn in off]


def test_turns_carry_text_and_the_version_of_the_weights() -> None:
    sampler = sampler_of(tiny_model())
    sampler.sync(Weights(4, False, dict))
    (turn,) = sampler.sample([[5, 6]], OPEN, seed=0)
    assert turn.weights_version == 4
    assert turn.text == " ".join(map(str, turn.completion_ids))


@pytest.mark.parametrize("sampling", [OPEN, GREEDY])
def test_broken_weights_are_named_instead_of_sampled_from(sampling: SamplingConfig) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
        model.model.norm.weight[0] = float("inf")
    with pytest.raises(
        NonFiniteError, match=r"weights are not finite \(first model\.layers\.1\.mlp\.up_proj\.weight\): star"
    ):
        sampler_of(model).sample(PROMPTS, sampling, seed=0)


def test_weights_that_have_outgrown_float32_are_named_with_their_size() -> None:
    """Finite weights of 1e30 in two factors give activations of 1e60."""
    model = tiny_model(tied=False)
    with torch.no_grad():
        model.model.norm.weight.fill_(1e30)
        model.lm_head.weight.mul_(1e25)
    largest = r"logits are not finite, though the weights are \(largest 1e\+30 in model\.norm\.weight\): start again"
    with pytest.raises(NonFiniteError, match=largest):
        sampler_of(model).sample(PROMPTS, OPEN, seed=0)


def test_a_temperature_that_overflows_the_logits_is_named() -> None:
    cold = OPEN.model_copy(update={"temperature": 1e-45})
    with pytest.raises(NonFiniteError, match="logits divided by a temperature of 1e-45 overflow: raise it"):
        sampler_of(tiny_model()).sample(PROMPTS, cold, seed=0)


def test_entries_of_probability_zero_are_no_breakage() -> None:
    model = tiny_model(tied=False)
    bias = torch.zeros(VOCABULARY)
    bias[5:] = -torch.inf
    model.lm_head.bias = torch.nn.Parameter(bias)
    turns = sampler_of(model).sample(PROMPTS, OPEN, seed=0)
    assert {token for turn in turns for token in turn.completion_ids} <= set(range(5))


def test_one_prompt_without_a_distribution_among_others_is_enough() -> None:
    """The last prompt alone holds token 13, whose embedding is broken."""
    model = tiny_model(tied=False)
    with torch.no_grad():
        model.model.embed_tokens.weight[13, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"first model\.embed_tokens\.weight"):
        sampler_of(model).sample([[5, 6], [12, 13]], GREEDY.model_copy(update={"max_new_tokens": 1}), seed=0)
