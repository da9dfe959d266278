"""Tiny random models of many families: two layers, width 32, some 130 tokens; what their logits go through shows."""

from __future__ import annotations

from typing import Any, cast

import torch
import transformers
from torch import nn

SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}
_MOE = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
_MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
# Class of the config and of the model, and settings.
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {}),
    "qwen2, tied": ("Qwen2Config", "Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {"head_dim": 8}),
    "qwen3-moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", {"head_dim": 8, **_MOE}),
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "smollm3": ("SmolLM3Config", "SmolLM3ForCausalLM", {}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {"head_dim": 8, "final_logit_softcapping": 1.5}),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", {"head_dim": 8, "final_logit_softcapping": 2.0}),
    "gemma3 without a cap": ("Gemma3TextConfig", "Gemma3ForCausalLM", {"head_dim": 8}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {}),
    "cohere": ("CohereConfig", "CohereForCausalLM", {"logit_scale": 0.25}),
    "granite": ("GraniteConfig", "GraniteForCausalLM", {"logits_scaling": 3.0}),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", {}),
    "gpt-neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {}),
    "glm": ("GlmConfig", "GlmForCausalLM", {"head_dim": 8}),
    "falcon": ("FalconConfig", "FalconForCausalLM", {}),
    "falcon-h1": ("FalconH1Config", "FalconH1ForCausalLM", {"lm_head_multiplier": 0.3, **_MAMBA}),
    "recurrent-gemma": ("RecurrentGemmaConfig", "RecurrentGemmaForCausalLM", {"logits_soft_cap": 1.5}),
    "gpt-j, a head with a bias": (
        "GPTJConfig",
        "GPTJForCausalLM",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4, "tie_word_embeddings": False},
    ),
    "inkling": (
        "InklingTextConfig",
        "InklingForCausalLM",
        {
            "head_dim": 8,
            "logits_mup_width_multiplier": 2.0,
            "unpadded_vocab_size": 120,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "moe_intermediate_size": 16,
        },
    ),
}


def family(name: str, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    """Return a model whose weights are of spread .3, those of norms around their own start."""
    config, model, settings = FAMILIES[name]
    torch.manual_seed(0)
    built = cast("nn.Module", getattr(transformers, model)(getattr(transformers, config)(**SIZES | settings | more)))
    with torch.no_grad():
        for weight in built.parameters():
            if weight.dim() == 2:
                weight.normal_(0, 0.3)
            elif weight.is_floating_point():
                weight.add_(0.05 * torch.randn_like(weight))
    return built.eval().to(dtype)
