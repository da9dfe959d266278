"""What makes a model's logits: its decoder, its output head and what the head's products go through.

V vocabulary, H hidden size. What stands here of configs is a proposal; `agree.py` compares it with the model's own
logits before a run, and refuses what differs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from atesd.types import UserError

# Config attributes by what the logits y = hidden @ head.T + bias go through.
_MULTIPLIED = ("logit_scale", "lm_head_multiplier")  # Cohere, Falcon-H1
_DIVIDED = ("logits_scaling", "logits_mup_width_multiplier")  # Granite, Inkling
_CAPPED = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma, RecurrentGemma, xLSTM
_ROWS = "unpadded_vocab_size"  # Inkling: later rows of the head are padding


class Head(NamedTuple):
    """Output embedding [V, H], its bias [V], and how logits are made: cap tanh(scale y / cap), or scale y."""

    weight_VH: Tensor
    bias_V: Tensor | None
    scale: float = 1.0
    cap: float | None = None


def head(model: nn.Module) -> Head:
    """Return the output head. UserError where a model has none that is a plain matrix, or its config is nonsense."""
    layer = output_layer(model)
    weight_VH, bias_V = getattr(layer, "weight", None), getattr(layer, "bias", None)
    if not isinstance(weight_VH, Tensor) or weight_VH.dim() != 2 or not weight_VH.is_floating_point():
        raise UserError(
            f"{kind_of(model)} has no output head with a matrix of weights that the divergence could be computed from: "
            "take a causal language model whose head is a linear layer, not quantised"
        )
    config = cast("Any", model).config.get_text_config()
    rows = getattr(config, _ROWS, None)
    if rows is not None and rows < len(weight_VH):
        weight_VH, bias_V = weight_VH[:rows], None if bias_V is None else bias_V[:rows]
    scale, cap = 1.0, None
    for name, value in _set(model, config, (*_MULTIPLIED, *_DIVIDED, *_CAPPED)):
        if name in _CAPPED:
            cap = value
        else:
            scale *= value if name in _MULTIPLIED else 1 / value
    return Head(weight_VH, bias_V, scale, cap)


def output_layer(model: nn.Module) -> nn.Module | None:
    """Return the layer behind the decoder; None where the model names none."""
    return cast("nn.Module | None", cast("Any", model).get_output_embeddings())


def decoder(model: nn.Module) -> nn.Module:
    """Return the part of the model that maps ids to final hidden states, adapters included."""
    base = getattr(model, "base_model", model) if hasattr(model, "peft_config") else model
    inner = cast("Any", base.model if hasattr(model, "peft_config") else base)
    return cast("nn.Module", inner.get_decoder() if hasattr(inner, "get_decoder") else inner.model)


def beside_text(model: nn.Module) -> list[nn.Parameter]:
    """Return the weights that text never reaches: what is neither in the decoder nor in the head, as a vision tower."""
    reached = {id(weight) for part in (decoder(model), output_layer(model)) if part for weight in part.parameters()}
    return [weight for weight in model.parameters() if id(weight) not in reached]


def refuse_router_loss(model: nn.Module) -> None:
    """UserError where a mixture of experts would add a loss of its routers to its training, which updates lack."""
    config = cast("Any", model).config.get_text_config()
    coefs = {name: value for name, value in vars(config).items() if name.startswith("router") and name.endswith("coef")}
    added = [f"{name} = {value:g}" for name, value in coefs.items() if value]
    if getattr(config, "output_router_logits", False) and added:
        raise UserError(
            f"{kind_of(model)} adds a loss of its routers to its training ({', '.join(added)}), which the losses here "
            "leave out: set output_router_logits to false in the model's config.json to train without it"
        )


def _set(model: nn.Module, config: Any, names: tuple[str, ...]) -> Iterator[tuple[str, float]]:
    """Yield the named settings that have a value. UserError for one that is not positive."""
    for name in names:
        value = getattr(config, name, None)
        if value is None:
            continue
        if not value > 0:
            raise UserError(
                f"{kind_of(model)} has {name} = {value} in its config.json, which must be positive: mend it"
            )
        yield name, float(value)


def kind_of(model: Any) -> str:
    """Return the name of the architecture beneath adapters."""
    return type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__
