"""Which models take the loop of our own, why others do not, and what happens where the two disagree."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from atesd.rollout import llama
from atesd.rollout.hf import HFSampler
from atesd.rollout.known import distance, why_unknown
from atesd.rollout.sampler import SamplingConfig
from atesd.train.model import enable_checkpointing

from support.families import FAMILIES, LLAMA3, SIZES, family_model
from support.models import EOS, PAD, VOCABULARY, tiny_model

SAMPLING = SamplingConfig(temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=6)
PROMPTS = [[5, 6, 7], [9], [3, 4, 8, 11, 2]]


def sampler_of(model: Any, *, always_generate: bool = False) -> HFSampler:
    return HFSampler(model, eos_ids=[EOS], pad_id=PAD, decode=str, always_generate=always_generate)


def lora(**more: Any) -> Callable[[Any], Any]:
    config = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False} | more
    return lambda model: get_peft_model(model, LoraConfig(**config)).get_base_model()


def merged(model: Any) -> Any:
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.merge_adapter()
    return adapted.get_base_model()


def quantised(model: Any) -> Any:
    class Packed(torch.nn.Linear):
        pass

    model.model.layers[1].mlp.up_proj = Packed(32, 48, bias=False)
    return model


def hooked(model: Any) -> Any:
    model.model.layers[0].register_forward_hook(lambda module, args, output: output * 2)
    return model


def patched(model: Any) -> Any:
    model.model.norm.forward = lambda hidden: hidden * 2
    return model


def mixed(model: Any) -> Any:
    model.model.norm.double()
    return model


def attended(model: Any) -> Any:
    model.config._attn_implementation = "flex_attention"
    return model


def renormed(model: Any) -> Any:
    model.model.embed_tokens.max_norm = 1.0
    return model


class Derived(LlamaForCausalLM):
    """Might do anything."""


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (quantised, "layers.1.mlp.up_proj is a Packed"),
        (hooked, "model.layers.0 has a hook or a forward of its own"),
        (patched, "model.norm has a hook or a forward of its own"),
        (mixed, "its weights are of several or unusual types, or on several devices"),
        (attended, "its attention is 'flex_attention'"),
        (renormed, "its embedding is a Embedding of another kind"),
        (merged, "layers.0.self_attn.q_proj has merged adapters"),
        (lora(use_dora=True), "layers.0.self_attn.q_proj has a variant of LoRA"),
        (lora(lora_bias=True), "layers.0.self_attn.q_proj has a variant of LoRA"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*lora_bias=True.*")
def test_what_the_loop_does_not_know_goes_to_generate_for_a_reason(
    change: Callable[[Any], Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = change(family_model("qwen3"))
    assert why_unknown(model, 16) == reason
    monkeypatch.setattr("atesd.rollout.hf.decoding", None)
    if reason.startswith(("its attention", "its weights")):
        return  # nor does it run
    assert len(sampler_of(model).sample(PROMPTS, SAMPLING, seed=0)) == 3


def test_other_architectures_and_adapters_go_to_generate() -> None:
    sizes = {
        "vocab_size": VOCABULARY,
        "n_embd": 16,
        "n_layer": 1,
        "n_head": 2,
        "bos_token_id": None,
        "eos_token_id": EOS,
    }
    model = GPT2LMHeadModel(GPT2Config(**sizes))
    assert why_unknown(model, 16) == "its architecture is GPT2LMHeadModel"
    assert len(sampler_of(model).sample(PROMPTS, SAMPLING, seed=0)) == 3
    assert why_unknown(Derived(family_model("llama with yarn").config), 16) == "its architecture is Derived"
    Derived.__name__ = "LlamaForCausalLM"
    assert why_unknown(Derived(family_model("llama with yarn").config), 16) == "its architecture is LlamaForCausalLM"
    config = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    tuned = get_peft_model(family_model("qwen3"), config).get_base_model()
    assert why_unknown(tuned, 16) == "layers.0.self_attn.k_proj is a Linear"


def test_frequencies_that_grow_with_the_text_go_to_generate() -> None:
    moving = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0}
    model = family_model("llama with scaled positions", rope_parameters=moving)
    assert why_unknown(model, 16) == "its rotary embedding is of type 'dynamic'"
    assert why_unknown(family_model("llama with scaled positions", rope_parameters=LLAMA3), 16) is None


def test_a_sliding_window_is_no_matter_until_it_slides() -> None:
    """Prompts of up to 5 and 6 new tokens: 11 positions."""
    model = family_model("mistral", sliding_window=11)
    assert why_unknown(model, 11) is None
    assert why_unknown(model, 12) == "12 positions exceed its sliding window of 11"
    greedy = SAMPLING.model_copy(update={"temperature": 0.0})
    assert sampler_of(model).sample(PROMPTS, greedy, seed=0)[2].completion_ids == (
        sampler_of(model, always_generate=True).sample(PROMPTS, greedy, seed=0)[2].completion_ids
    )


def test_gradient_checkpointing_and_plain_lora_are_known() -> None:
    model = tiny_model()
    enable_checkpointing(model)
    assert any(module._forward_hooks for module in model.modules())
    assert why_unknown(lora()(model), 16) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_both_give_the_same_logits(family: str, dtype: torch.dtype) -> None:
    with torch.no_grad():
        found = [distance(family_model(family, dtype), prompt) for prompt in PROMPTS]
    assert all(each is not None and each < 0.5 for each in found)


def test_wrong_logits_are_far_from_the_tolerance(monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions that stand still, a rotation the wrong way round, a norm without its eps, and no mask."""
    model = family_model("llama with scaled positions")

    class Open(llama.Cache):
        def __init__(self, *args: Any, **more: Any) -> None:
            super().__init__(*args, **more)
            self.mask_B11S = None

    class Late(llama.Cache):
        def __init__(self, *args: Any, **more: Any) -> None:
            super().__init__(*args, **more)
            self.positions_B = self.positions_B - 1

    norm = llama._norm
    faults: list[tuple[str, Any]] = [
        ("Cache", Open),
        ("Cache", Late),
        ("_rotated", lambda heads, turn: heads * turn[0] - heads.roll(heads.shape[-1] // 2, -1) * turn[1]),
        ("_norm", lambda module: lambda x: norm(module)(x * 10)),
    ]
    for name, fault in faults:
        with monkeypatch.context() as patch, torch.no_grad():
            patch.setattr(llama, name, fault)
            found = distance(model, PROMPTS[0])
            assert found is not None
            assert found > 10, name


def test_a_disagreement_is_told_once_and_ends_in_generate(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    monkeypatch.setattr("atesd.rollout.hf.distance", lambda *_: 7.5)
    sampler = sampler_of(model)
    with pytest.warns(
        UserWarning, match=r"own decoding gives Qwen3ForCausalLM other logits .*7\.5 times the tolerance"
    ):
        first = sampler.sample(PROMPTS, SAMPLING, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = sampler.sample(PROMPTS, SAMPLING, seed=0)
    assert first == again == sampler_of(model, always_generate=True).sample(PROMPTS, SAMPLING, seed=0)


def test_the_comparison_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("atesd.rollout.hf.distance", lambda model, prompt: asked.append(prompt) or 0.0)
    sampler = sampler_of(tiny_model())
    for seed in range(3):
        sampler.sample(PROMPTS, SAMPLING, seed=seed)
    assert asked == [PROMPTS[0]]


def test_a_model_without_a_finite_logit_decides_nothing() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
        assert distance(model, [5, 6]) is None


def test_sizes_reach_every_family() -> None:
    assert {family_model(family).config.rms_norm_eps for family in FAMILIES} == {SIZES["rms_norm_eps"]}
