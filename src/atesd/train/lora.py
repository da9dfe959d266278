"""LoRA's layers in fewer passes over their inputs and outputs than peft's, forward and backward.

    out = x W^T + bias + scale (x A^T) B^T

peft casts x to the adapter's float32, multiplies, scales, adds and casts back, each in a pass and a tensor of its own,
which in half precision takes longer than the base layer. Here the addition is part of the second product, and x is
kept once.

A and B stay float32 where they are kept, moved and saved, and take part in the precision of x, as under torch's
autocast and as the sampling loop has them (`rollout/llama.py`).
Shapes: N positions, I inputs, O outputs, R rank.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn


def in_fewer_passes(model: nn.Module) -> None:
    """Have every plain LoRA layer of a model compute in this way; those of other kinds stay peft's."""
    for layer in model.modules():
        if type(layer) is PeftLinear and type(layer.base_layer) is nn.Linear:
            layer.__class__ = AdaptedLinear


class AdaptedLinear(PeftLinear):  # type: ignore[misc]  # peft has no types
    """peft's layer. Whatever is not one plain adapter over a frozen layer is left to peft."""

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        """Return the outputs of the layer with its adapter."""
        name = None if args or options else self._plain_adapter()
        if name is None or not self._takes(x):
            return cast("Tensor", super().forward(x, *args, **options))
        base, down_RI, up_OR = self.base_layer, self.lora_A[name].weight, self.lora_B[name].weight
        return adapted(x, base.weight, base.bias, down_RI, up_OR, float(self.scaling[name]))

    def _plain_adapter(self) -> str | None:
        """Return the only adapter in force; None where there are none or several, or it is more than two matrices."""
        names = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or self.fan_in_fan_out or len(names) != 1 or self.lora_variant:
            return None
        down, up, dropout = (part[names[0]] for part in (self.lora_A, self.lora_B, self.lora_dropout))
        is_plain = up.bias is None and isinstance(dropout, nn.Identity)
        return names[0] if is_plain and not any(map(_is_watched, (self.base_layer, down, up, dropout))) else None

    def _takes(self, x: Tensor) -> bool:
        weight, bias = self.base_layer.weight, self.base_layer.bias
        is_frozen = not weight.requires_grad and (bias is None or not bias.requires_grad)
        return is_frozen and x.dtype is weight.dtype and not torch.is_autocast_enabled(x.device.type)


def adapted(
    x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, down_RI: Tensor, up_OR: Tensor, scale: float
) -> Tensor:
    """Return x W^T + bias + scale (x A^T) B^T, whose gradients are those of x, A and B."""
    return cast("Tensor", cast("Any", _Adapted).apply(x, weight_OI, bias_O, down_RI, up_OR, scale))


def _is_watched(module: nn.Module) -> bool:
    """Whether somebody wants to see what a module reads, makes or derives."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


class _Adapted(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        down_RI: Tensor,
        up_OR: Tensor,
        scale: float,
    ) -> Tensor:
        x_NI = x.reshape(-1, x.shape[-1])
        low_NR = F.linear(x_NI, down_RI.to(x.dtype))
        out_NO = F.linear(x_NI, weight_OI, bias_O).addmm_(low_NR, (scale * up_OR).to(x.dtype).T)
        ctx.save_for_backward(x, low_NR, weight_OI, down_RI, up_OR)
        ctx.scale = scale
        return out_NO.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, of_out: Tensor) -> tuple[Tensor | None, ...]:
        x, low_NR, weight_OI, down_RI, up_OR = ctx.saved_tensors
        x_NI, of_out_NO = x.reshape(-1, x.shape[-1]), of_out.reshape(-1, of_out.shape[-1])
        if torch.is_grad_enabled():  # to be derived once more: by x and A, too
            low_NR = F.linear(x_NI, down_RI.to(x.dtype))
        of_low_NR = of_out_NO @ (ctx.scale * up_OR).to(x.dtype)
        of_x = of_down_RI = of_up_OR = None
        if ctx.needs_input_grad[0]:
            of_x = (of_out_NO @ weight_OI).addmm_(of_low_NR, down_RI.to(x.dtype)).view_as(x)
        if ctx.needs_input_grad[3]:
            of_down_RI = (of_low_NR.T @ x_NI).to(down_RI.dtype)
        if ctx.needs_input_grad[4]:
            # [R, N] by [N, O] is up to three times as fast as [O, N] by [N, R].
            of_up_OR = ctx.scale * (low_NR.T @ of_out_NO).T.to(up_OR.dtype)
        return of_x, None, None, of_down_RI, of_up_OR, None
