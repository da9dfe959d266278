"""The last decoder layer where somebody reads it: at the N positions whose next token is scored.

What a layer does behind its attention it does position by position, and of the last one's output nobody reads prompts
and padding. So output projection, feed-forward network and norms run for the scored positions alone, of which they make
what they would make of them among others. That is so of the models whose layers are known (`FAMILY`); others, and
layers that somebody watches, run as they are.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from atesd.rollout.known import is_bare, is_family
from atesd.train.batch import Pass
from atesd.train.heads import decoder


def final_states(model: nn.Module, each: Pass) -> Tensor:
    """Run the decoder over a pass; return the hidden states behind its final norm at the scored positions, [N, H]."""
    body = cast("Any", decoder(model))
    layer = _last_layer(model, body)
    if layer is None:
        whole_BLH: Tensor = body(input_ids=each.ids_BL, use_cache=False).last_hidden_state
        return each.scored(whole_BLH)
    attention, project = layer.self_attn, layer.self_attn.o_proj.forward

    def forward(hidden_BLH: Tensor, **told: Any) -> Tensor:
        mixed_1NH, _ = attention(hidden_states=layer.input_layernorm(hidden_BLH), **told)
        hidden_1NH: Tensor = each.scored(hidden_BLH)[None] + mixed_1NH
        added_1NH: Tensor = layer.mlp(layer.post_attention_layernorm(hidden_1NH))
        return hidden_1NH + added_1NH

    attention.o_proj.forward = lambda mixed_BLH: project(each.scored(mixed_BLH)[None])
    layer.forward = forward
    try:
        states_1NH: Tensor = body(input_ids=each.ids_BL, use_cache=False).last_hidden_state
    finally:
        del layer.forward, attention.o_proj.forward
    return states_1NH[0]


def _last_layer(model: Any, body: Any) -> Any:
    """Return the last layer; None where it is to run as it is.

    That is where its make is not known, where it is compiled, where somebody watches or replaced what runs behind its
    attention, and where a backward pass with checkpointing would run it again.
    """
    if not is_family(getattr(model, "get_base_model", lambda: model)()):
        return None
    layer = body.layers[body.config.num_hidden_layers - 1]
    inside = (layer.self_attn, layer.self_attn.o_proj, layer.post_attention_layernorm, *layer.mlp.modules())
    behind = (layer, *inside, body.norm, body)
    if layer.training or layer._compiled_call_impl is not None or not all(map(is_bare, behind)):
        return None
    return layer
