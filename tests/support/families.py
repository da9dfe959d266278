"""Tiny random models of every family that the loop of our own samples from; every weight of theirs matters."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from support.models import EOS, PAD, VOCABULARY

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "bos_token_id": None,
    "rms_norm_eps": 0.05,  # large, so that leaving it out shows
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}
FAMILIES = {
    "qwen3": lambda **more: Qwen3ForCausalLM(
        Qwen3Config(**SIZES | {"head_dim": 16, "tie_word_embeddings": True} | more)
    ),
    "qwen2 with biases": lambda **more: Qwen2ForCausalLM(Qwen2Config(**SIZES | {"tie_word_embeddings": False} | more)),
    "llama with scaled positions": lambda **more: LlamaForCausalLM(
        LlamaConfig(**SIZES | {"rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True} | more)
    ),
    "llama with yarn": lambda **more: LlamaForCausalLM(
        LlamaConfig(**SIZES | {"rope_parameters": YARN, "tie_word_embeddings": True} | more)
    ),
    "mistral": lambda **more: MistralForCausalLM(
        MistralConfig(**SIZES | {"sliding_window": None, "num_key_value_heads": 4, "hidden_act": "gelu"} | more)
    ),
}


def family_model(family: str, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    """Return a model with normal weights: of spread .3, the norms' around 1."""
    torch.manual_seed(0)
    model = FAMILIES[family](**more).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(1.0 if "norm" in name else 0.0, 0.3)
    return model.to(dtype)
