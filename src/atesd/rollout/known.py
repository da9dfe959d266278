"""Which models the loop of our own may sample from: those whose every part it knows, and whose logits it gives."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from atesd.rollout.llama import Decoder

FAMILY = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")  # of transformers itself
SHORT_ROWS = "sdpa_with_short_rows"
"""The attention of `train/attention.py`, as transformers knows it."""
_ADAPTED = "peft.tuners.lora.layer.Linear", "atesd.train.lora.AdaptedLinear"
"""Layers under plain LoRA, by name: peft may not be imported here."""
_SAME_MATHS = ("eager", "sdpa", SHORT_ROWS, "flash_attention_2", "flash_attention_3")
# Weights that are read in a type of their own: adapters, latent codes.
_BESIDE = re.compile(r"\.lora_|^latent_codes\.")
# Those whose frequencies depend on nothing but the config.
_FIXED_ROPE = ("default", "linear", "llama3", "yarn")
PATH_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}
"""Largest distance of two paths' logits, as a share of their spread. A wrong scale, mask or norm moves them by more."""


def is_family(model: Any) -> bool:
    """Tell whether a model is one of `FAMILY`."""
    kind = type(model)  # by name: importing four models costs seconds
    return kind.__name__ in FAMILY and kind.__module__.startswith("transformers.models.")


def is_bare(module: nn.Module) -> bool:
    """Tell whether a module has neither a hook that may change outputs nor a forward of its own."""
    return "forward" not in vars(module) and not any(map(_matters, _hooks(module)))


def why_unknown(model: Any, length: int) -> str | None:
    """Say why the loop cannot sample `length` positions from a model as it stands; None where it can."""
    if not is_family(model):
        return f"its architecture is {type(model).__name__}"
    return next(_objections(model, length), None)


def _objections(model: Any, length: int) -> Iterator[str]:
    config, body = model.config, model.model
    if config._attn_implementation not in _SAME_MATHS:
        yield f"its attention is {config._attn_implementation!r}"
    if vars(config).get("_heterogeneity_spec") is not None:
        yield "its layers are of several shapes"
    if body.rotary_emb.rope_type not in _FIXED_ROPE:
        yield f"its rotary embedding is of type {body.rotary_emb.rope_type!r}"
    window = getattr(config, "sliding_window", None)
    if window is not None and length > window:
        yield f"{length} positions exceed its sliding window of {window}"
    if type(body.embed_tokens) is not nn.Embedding or body.embed_tokens.max_norm is not None:
        yield f"its embedding is a {type(body.embed_tokens).__name__} of another kind"
    for name, layer in _linear_layers(model):
        wrong = _why_not_linear(layer)
        if wrong:
            yield f"{name} {wrong}"
    plain = [weight for name, weight in model.named_parameters() if not _BESIDE.search(name)]
    if len({(weight.dtype, weight.device) for weight in plain}) > 1 or plain[0].dtype not in PATH_TOLERANCE:
        yield "its weights are of several or unusual types, or on several devices"
    for name, module in model.named_modules():
        if not is_bare(module):
            yield f"{name or 'the model'} has a hook or a forward of its own"


def _linear_layers(model: Any) -> Iterator[tuple[str, Any]]:
    """Yield what the decoder reads as a linear layer, with its name."""
    yield "lm_head", model.lm_head
    for index, layer in enumerate(model.model.layers):
        for part, names in (("self_attn", "qkvo"), ("mlp", ("gate", "up", "down"))):
            for name in names:
                yield f"layers.{index}.{part}.{name}_proj", getattr(getattr(layer, part), f"{name}_proj")


def _why_not_linear(layer: Any) -> str:
    """Say what a layer is, if neither a linear one nor one under plain LoRA."""
    kind = type(layer)
    if kind is nn.Linear:
        return ""
    if f"{kind.__module__}.{kind.__name__}" not in _ADAPTED or type(layer.base_layer) is not nn.Linear:
        return f"is a {kind.__name__}"
    if layer.merged:
        return "has merged adapters"
    has_bias = any(up.bias is not None for up in layer.lora_B.values())
    if layer.lora_variant or layer.fan_in_fan_out or has_bias:
        return "has a variant of LoRA"
    return ""


def _hooks(module: nn.Module) -> Iterator[Any]:
    yield from module._forward_pre_hooks.values()
    yield from module._forward_hooks.values()


def _matters(hook: Any) -> bool:
    """Whether a hook may change outputs: those of transformers record them or let gradients through, FSDP's gather."""
    return not str(getattr(hook, "__module__", "")).startswith(("transformers.", "torch.distributed.fsdp."))


def distance(model: Any, prompt: Sequence[int]) -> float | None:
    """Return how far the decoder's logits are from the model's own over the tolerance; None where nothing is finite.

    A few tokens of the prompt and half as many are read together and continued by a token, so that padding, positions
    and the cache take part.
    """
    start = (list(prompt) * 2)[:8]
    starts, token = (start, start[: len(start) // 2]), start[0]
    decoder = Decoder(model)
    read_BV, cache = decoder.read(starts, 1)
    stepped_BV = decoder.step(torch.tensor([token] * 2, device=read_BV.device), cache)
    found_N2V = torch.stack((read_BV, stepped_BV), dim=1)
    expected_N2V = torch.stack(
        [model(torch.tensor([[*ids, token]], device=read_BV.device)).logits[0, -2:] for ids in starts]
    )
    return relative_distance(found_N2V.double(), expected_N2V.double(), PATH_TOLERANCE[read_BV.dtype])


def relative_distance(found: Tensor, expected: Tensor, tolerance: float) -> float | None:
    """Return the root mean square of the difference over that of the centred expectation and the tolerance."""
    finite = expected.isfinite()
    if not bool(finite.any()):
        return None
    expected, found = expected[finite], found[finite]
    spread = (expected - expected.mean()).square().mean().sqrt()
    return float((found - expected).square().mean().sqrt() / (spread * tolerance).clamp(min=1e-12))
