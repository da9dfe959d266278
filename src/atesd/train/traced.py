"""A model without its weights, and what autograd would keep of a pass through it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from atesd.sections import ModelConfig
from atesd.train.heads import beside_text, decoder, kind_of
from atesd.train.hub import base_of_adapter, fetched, locate
from atesd.train.model import add_lora, resolve
from atesd.types import UserError, first_line

_ATTENTION = "atesd_plan"


def skeleton(config: ModelConfig) -> nn.Module:
    """Return the model in training form without storage. UserError where its config cannot be had."""
    path, revision = fetched(resolve(config.path), config.revision)
    base = base_of_adapter(path)
    if base is not None:
        path, revision = resolve(base.path), base.revision
    asked = locate(path, revision)
    dtype = torch.float32 if config.dtype == "float32" else torch.bfloat16
    try:
        settings = AutoConfig.from_pretrained(path, trust_remote_code=False, **asked)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                settings,
                dtype=dtype,
                attn_implementation="eager" if config.attn_implementation == "eager" else _ATTENTION,
                trust_remote_code=False,
            )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"no causal language model can be planned from {path!r} ({first_line(error)}): give a folder with a "
            "config.json, or a hub id"
        ) from error
    for weight in beside_text(model):
        weight.requires_grad_(False)
    if config.lora is not None:
        model = add_lora(model, config.lora, 0)
    return cast("nn.Module", model)


def activations(model: nn.Module, rows: int, length: int) -> tuple[float, float]:
    """Return the bytes that autograd keeps of a pass over `rows` rows, in all and of one layer.

    UserError where the model cannot be followed without its weights.
    """
    model.eval()
    body = decoder(model)
    layers = next((each for each in body.modules() if isinstance(each, nn.ModuleList) and len(each)), None)
    own = {weight.untyped_storage()._cdata for weight in model.parameters()}
    kept: dict[int, Any] = {}
    marks: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    def so_far(*_: Any) -> None:
        marks.append(sum(storage.nbytes() for storage in kept.values()))

    hooks = [layers[0].register_forward_pre_hook(so_far), layers[0].register_forward_hook(so_far)] if layers else []
    mask = None  # whose values nobody reads, but whose making would
    if cast("Any", model).config._attn_implementation == "eager":
        mask = torch.zeros(rows, 1, length, length, dtype=next(model.parameters()).dtype, device="meta")
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), _embeddings_with_gradient(model):
            body(
                input_ids=torch.zeros(rows, length, dtype=torch.long, device="meta"),
                attention_mask=mask,
                use_cache=False,
            )
    except (NotImplementedError, RuntimeError, ValueError, TypeError) as error:
        raise UserError(
            f"{kind_of(model)} cannot be followed without its weights ({first_line(error)}): what it keeps depends on "
            "its data, as with experts; measure one step with step.num_steps=1"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    so_far()
    return float(marks[-1]), float(marks[1] - marks[0]) if len(marks) == 3 else float(marks[-1])


@contextmanager
def _embeddings_with_gradient(model: nn.Module) -> Iterator[None]:
    """Let gradients begin at the embeddings, as checkpointing asks for with adapters: the first layer then counts."""
    hook = cast("Any", model).get_input_embeddings().register_forward_hook(lambda *each: each[-1].requires_grad_())
    try:
        yield
    finally:
        hook.remove()


class _Attended(torch.autograd.Function):
    """Attention as a fused kernel keeps it: queries, keys, values, results and one number a row."""

    @staticmethod
    def forward(ctx: Any, query_BQLD: Tensor, key_BKLD: Tensor, value_BKLD: Tensor) -> Tensor:
        result = torch.empty(*query_BQLD.shape[:3], value_BKLD.shape[3], dtype=query_BQLD.dtype, device="meta")
        ctx.save_for_backward(query_BQLD, key_BKLD, value_BKLD, result, result.new_empty(query_BQLD.shape[:3]))
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:  # noqa: ARG004
        raise AssertionError("a plan makes no backward pass")


def _planned_attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **_: Any) -> Any:  # noqa: ARG001
    return cast("Any", _Attended).apply(query, key, value).transpose(1, 2).contiguous(), None


AttentionInterface.register(_ATTENTION, _planned_attention)
