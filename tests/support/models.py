"""A tiny random Qwen3 and rows for it: real architecture, no weights to load."""

from __future__ import annotations

import random
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from atesd.train.batch import Row

VOCABULARY = 23
PAD, EOS = 0, 1


def tiny_model(seed: int = 0, *, tied: bool = True) -> Qwen3ForCausalLM:
    """Return a 2-layer Qwen3 in float32 whose random weights are large enough for peaked distributions."""
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(
        tiny_config(
            vocab_size=VOCABULARY,
            max_position_embeddings=64,
            tie_word_embeddings=tied,
            pad_token_id=PAD,
            eos_token_id=EOS,
            initializer_range=0.3,
        )
    )


def tiny_config(**settings: Any) -> Qwen3Config:
    """Return the config of a 2-layer Qwen3."""
    return Qwen3Config(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        bos_token_id=None,
        **settings,
    )


def ragged_rows(count: int, seed: int = 0, *, components: tuple[str, ...] = ("distil",)) -> list[Row]:
    """Return rows of very different lengths; completions may contain pad and EOS ids anywhere."""
    rng = random.Random(seed)

    def ids(low: int, high: int) -> tuple[int, ...]:
        return tuple(rng.randrange(VOCABULARY) for _ in range(rng.randint(low, high)))

    return [
        Row(
            prompt=ids(1, 9),
            view_prompts={"teacher": ids(1, 20)},
            completion=ids(1, 12),
            components=components,
            ratio=rng.random(),
            group=index,
        )
        for index in range(count)
    ]
