"""Attention of short rows in bfloat16 on a CPU, where torch's backward pass takes ten times as long as its forward one.

    out = softmax(scaling q k^T, where the mask lets it) v

The forward pass is transformers' own, so that all values stay what they were; the backward pass is the formula's.
Shapes: B rows, H heads, G heads of keys and values, Q queries, K keys, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from atesd.rollout.known import SHORT_ROWS, is_family
from atesd.types import UserError

SHORT = 160
"""Keys up to which the formula is the faster one, of heads 64 to 128 wide."""


def use_short_rows(model: nn.Module) -> None:
    """Have a model in bfloat16 whose attention is transformers' `sdpa` attend in this way where rows are short.

    Only models of `FAMILY`: the code of some others asks for the attention's name, and computes something else under a
    new one.
    """
    settings = cast("Any", model).config
    is_half = next(model.parameters()).dtype is torch.bfloat16
    if is_family(model) and settings._attn_implementation == "sdpa" and is_half:
        _register()
        settings._attn_implementation = SHORT_ROWS


def _register() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(SHORT_ROWS, _attention)
    AttentionMaskInterface.register(SHORT_ROWS, sdpa_mask)


def _attention(
    module: nn.Module,
    query_BHQD: Tensor,
    key_BGKD: Tensor,
    value_BGKD: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers does; with the formula's backward pass where there is one, which it makes faster."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def theirs(query_BHQD: Tensor, key_BGKD: Tensor, value_BGKD: Tensor) -> Tensor:
        out_BQHD, _ = sdpa_attention_forward(module, query_BHQD, key_BGKD, value_BGKD, attention_mask, **options)
        return cast("Tensor", out_BQHD)

    inputs = query_BHQD, key_BGKD, value_BGKD
    learns = torch.is_grad_enabled() and any(each.requires_grad for each in inputs)
    is_half_on_cpu = query_BHQD.dtype is torch.bfloat16 and query_BHQD.device.type == "cpu"
    is_short = key_BGKD.shape[2] <= SHORT
    if not (
        learns and is_half_on_cpu and is_short and _is_plain(module, query_BHQD, key_BGKD, attention_mask, options)
    ):
        return theirs(*inputs), None
    scaling = options.get("scaling")
    if scaling is None:
        scaling = query_BHQD.shape[-1] ** -0.5
    return cast("Tensor", cast("Any", _ShortRows).apply(*inputs, attention_mask, scaling, theirs)), None


def _is_plain(
    module: nn.Module, query_BHQD: Tensor, key_BGKD: Tensor, mask: Tensor | None, options: dict[str, Any]
) -> bool:
    """Tell whether the formula is what transformers computes: no dropout, no bias, a mask [B, 1, Q, K] of what is read
    or none and causal.
    """
    if options.get("dropout") or any(options.get(name) is not None for name in ("softcap", "position_bias", "cache")):
        return False
    if mask is not None:
        return mask.dtype is torch.bool and mask.dim() == 4 and mask.shape[1] == 1
    is_causal = options.get("is_causal")
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    return bool(is_causal) and query_BHQD.shape[2] == key_BGKD.shape[2]


class _ShortRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query_BHQD: Tensor,
        key_BGKD: Tensor,
        value_BGKD: Tensor,
        mask: Tensor | None,
        scaling: float,
        theirs: Callable[[Tensor, Tensor, Tensor], Tensor],
    ) -> Tensor:
        ctx.save_for_backward(query_BHQD, key_BGKD, value_BGKD, mask)
        ctx.scaling = scaling
        return theirs(query_BHQD, key_BGKD, value_BGKD)

    @staticmethod
    def backward(ctx: Any, gradient_BQHD: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise UserError(
                "attention in bfloat16 on a CPU has no second derivative here: set model.attn_implementation = "
                '"eager", or model.dtype = "float32"'
            )
        query_BHQD, key_BGKD, value_BGKD, mask = ctx.saved_tensors
        found = gradients(query_BHQD, key_BGKD, value_BGKD, mask, ctx.scaling, gradient_BQHD)
        return (*found, None, None, None)


def gradients(
    query_BHQD: Tensor,
    key_BGKD: Tensor,
    value_BGKD: Tensor,
    mask: Tensor | None,
    scaling: float,
    gradient_BQHD: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dL/dq, dL/dk and dL/dv. Without a mask [B, 1, Q, K] queries read all keys up to their own place.

    With P the weights and o = dL/dout: dL/dv = P^T o, dL/dq = scaling S k and dL/dk = scaling S^T q for
    S = P (o v^T - sum over keys of P o v^T). Products are in the inputs' precision but for q k^T, whose rounding the
    exponential would multiply. The H / G heads that share keys are rows of one matrix: N of them with their queries.
    """
    (_, _, queries, width), (_, groups, keys, _) = query_BHQD.shape, key_BGKD.shape
    shared = query_BHQD.shape[1] // groups
    if mask is None:
        mask = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=query_BHQD.device).tril()
    query_BGND = query_BHQD.reshape(-1, groups, shared * queries, width)
    of_out_BGND = gradient_BQHD.transpose(1, 2).reshape(-1, groups, shared * queries, value_BGKD.shape[-1])
    exact = torch.promote_types(query_BHQD.dtype, torch.float32)
    scores_BGNK = (query_BGND.to(exact) @ key_BGKD.to(exact).mT).mul_(scaling)
    is_hidden_BGRQK = ~mask[:, :, None]
    scores_BGNK.view(-1, groups, shared, queries, keys).masked_fill_(is_hidden_BGRQK, torch.finfo(exact).min)
    weights_BGNK = scores_BGNK.softmax(-1)
    # Of queries that read nothing, as padding in front of a row.
    weights_BGNK.view(-1, groups, shared, queries, keys).masked_fill_(is_hidden_BGRQK, 0.0)
    of_value_BGKD = weights_BGNK.to(of_out_BGND.dtype).mT @ of_out_BGND
    of_scores_BGNK = (of_out_BGND @ value_BGKD.mT).to(exact).mul_(weights_BGNK)
    of_scores_BGNK.addcmul_(weights_BGNK, of_scores_BGNK.sum(-1, keepdim=True), value=-1).mul_(scaling)
    of_scores_BGNK = of_scores_BGNK.to(query_BHQD.dtype)
    return (of_scores_BGNK @ key_BGKD).view_as(query_BHQD), of_scores_BGNK.mT @ query_BGND, of_value_BGKD
