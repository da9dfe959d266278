"""A Hugging Face folder with a tiny random model that can read any text: one token a byte."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from support.models import tiny_config
from support.templates import QWEN3

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def write_byte_model(folder: Path) -> Path:
    """Write a random Qwen3 and a byte-level tokenizer with a chat template and no pad token."""
    alphabet = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>", "<|user|>", "<|assistant|>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", chat_template=TEMPLATE)
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        tiny_config(vocab_size=len(fast), max_position_embeddings=4096, eos_token_id=fast.eos_token_id)
    )
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def write_qwen3(folder: Path) -> Path:
    """Write a tiny Qwen3 with the vocabulary of the real ones and a template that knows thinking; one token a byte."""
    write_byte_model(folder)
    fast = PreTrainedTokenizerFast.from_pretrained(folder)
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    fast.chat_template = QWEN3
    torch.manual_seed(0)
    ends = fast.convert_tokens_to_ids("<|im_end|>")
    model = Qwen3ForCausalLM(
        tiny_config(vocab_size=151_936, max_position_embeddings=40_960, eos_token_id=ends, tie_word_embeddings=True)
    )
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder
