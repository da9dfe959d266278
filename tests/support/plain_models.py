"""Qwen3 and Llama in float64, one sequence at a time, written from their equations: attention with any bias added.

Shapes: T positions, W width, H query heads, G key heads, D dimensions of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

BiasOf = Callable[[int, Tensor], Tensor | None]
"""From a layer and the states that enter it, [T, W], what is added to its logits: [G, T, T], or None."""


def final_states(model: Any, ids: tuple[int, ...], bias_of: BiasOf = lambda *_: None) -> Tensor:
    """Return the states that the head reads, [T, W]."""
    config = model.config
    weights = {name: value.detach().double() for name, value in model.model.state_dict().items()}
    heads, key_heads = config.num_attention_heads, config.num_key_value_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    states_TW = weights["embed_tokens.weight"][list(ids)]
    length = len(ids)
    angles_TD = torch.arange(length).double()[:, None] * config.rope_parameters["rope_theta"] ** (
        -torch.arange(0, size, 2).double() / size
    )
    cos, sin = torch.cat([angles_TD.cos()] * 2, -1), torch.cat([angles_TD.sin()] * 2, -1)

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * weights[f"{name}.weight"]

    def turned(x: Tensor) -> Tensor:
        left, right = x[..., : size // 2], x[..., size // 2 :]
        return x * cos + torch.cat([-right, left], -1) * sin

    for layer in range(config.num_hidden_layers):
        base = f"layers.{layer}"
        bias_GTT = bias_of(layer, states_TW)
        x = norm(states_TW, f"{base}.input_layernorm")
        query, key, value = (
            (x @ weights[f"{base}.self_attn.{name}_proj.weight"].T).view(length, -1, size).transpose(0, 1)
            for name in "qkv"
        )
        if f"{base}.self_attn.q_norm.weight" in weights:
            query, key = norm(query, f"{base}.self_attn.q_norm"), norm(key, f"{base}.self_attn.k_norm")
        query, key = turned(query), turned(key)
        mixed = []
        for head in range(heads):
            own = head * key_heads // heads
            logits_TT = query[head] @ key[own].T / size**0.5
            if bias_GTT is not None:
                logits_TT = logits_TT + bias_GTT[own]
            logits_TT = logits_TT.masked_fill(torch.ones(length, length).triu(1) > 0, -torch.inf)
            mixed.append(logits_TT.softmax(-1) @ value[own])
        states_TW = states_TW + torch.cat(mixed, -1) @ weights[f"{base}.self_attn.o_proj.weight"].T
        x = norm(states_TW, f"{base}.post_attention_layernorm")
        gate = x @ weights[f"{base}.mlp.gate_proj.weight"].T
        up = x @ weights[f"{base}.mlp.up_proj.weight"].T
        states_TW = states_TW + (gate * gate.sigmoid() * up) @ weights[f"{base}.mlp.down_proj.weight"].T
    return norm(states_TW, "norm")
