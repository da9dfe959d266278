"""RMS norms in fewer passes over memory than transformers makes on a CPU.

    y = w x / sqrt(mean(x^2) + eps)

over the last dimension, computed in float32 and rounded to x's precision before w: bit for bit what transformers
computes, so that a model is the same without this. With r = 1 / sqrt(mean(x^2) + eps), n = r x and g = w dL/dy, the
gradient is, within rounding,

    dL/dx = r (g - n mean(g n)),    dL/dw = sum over rows of n dL/dy

Kept for the backward pass are x and r. Shapes: N rows of any number of dimensions, W width.
"""

from __future__ import annotations

from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn


def use_lean_norms(model: nn.Module) -> None:
    """Have the RMS norms of a model compute in this way: those that are found to give the same."""
    same: dict[tuple[type[nn.Module], torch.dtype], bool] = {}
    for module in model.modules():
        eps = _eps(module)
        if eps is None or "forward" in vars(module):
            continue
        key = type(module), cast("Tensor", module.weight).dtype
        if key not in same:
            same[key] = _is_same(module, eps)
        if same[key]:
            module.__class__ = _lean(cast("Any", type(module)), eps)


def rms_norm(x_NW: Tensor, weight_W: Tensor, eps: float) -> Tensor:
    """Return the norm of rows, in their precision."""
    return cast("Tensor", cast("Any", _RmsNorm).apply(x_NW, weight_W, eps)[0])


class _RmsNorm(torch.autograd.Function):
    """Gives y, and r for its own use."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x_NW: Tensor, weight_W: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        wide_NW = x_NW.float()
        rate_N1 = wide_NW.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        return _times(wide_NW, rate_N1, x_NW).to(x_NW.dtype).mul_(weight_W), rate_N1

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: tuple[Tensor, Tensor]) -> None:
        x_NW, weight_W, ctx.eps = inputs
        _, rate_N1 = output
        ctx.mark_non_differentiable(rate_N1)
        ctx.save_for_backward(x_NW, weight_W, rate_N1)

    @staticmethod
    def backward(ctx: Any, gradient_NW: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_NW, weight_W, rate_N1 = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is asked for, in which r is no constant
            rate_N1 = (x_NW.float().square().mean(-1, keepdim=True) + ctx.eps).rsqrt()
        normed_NW = x_NW.float() * rate_N1
        of_weight_W = None
        if ctx.needs_input_grad[1]:
            of_weight_W = (gradient_NW * normed_NW).reshape(-1, len(weight_W)).sum(0).to(weight_W.dtype)
        of_x_NW = (gradient_NW * weight_W).float()
        mean_N1 = torch.linalg.vecdot(of_x_NW, normed_NW).unsqueeze(-1) / x_NW.shape[-1]
        if torch.is_grad_enabled():
            return ((of_x_NW - normed_NW * mean_N1) * rate_N1).to(x_NW.dtype), of_weight_W, None
        return of_x_NW.addcmul_(normed_NW, mean_N1, value=-1).mul_(rate_N1).to(x_NW.dtype), of_weight_W, None


def _times(wide_NW: Tensor, rate_N1: Tensor, x_NW: Tensor) -> Tensor:
    """Return the product, in the memory of a copy of x where there is one."""
    return wide_NW * rate_N1 if wide_NW is x_NW else wide_NW.mul_(rate_N1)


def _eps(module: nn.Module) -> float | None:
    """Return the eps of an RMS norm; None where a module is none, by its name, its weights and what it holds."""
    weights = dict(module.named_parameters())
    if not type(module).__name__.endswith("RMSNorm") or weights.keys() != {"weight"} or weights["weight"].dim() != 1:
        return None
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return eps if isinstance(eps, float) else None


@torch.no_grad()
def _is_same(module: nn.Module, eps: float) -> bool:
    """Tell whether a norm gives what the formula does, whatever its weights: Gemma's, for one, adds 1 to them."""
    weight_W = torch.full_like(cast("Tensor", module.weight), 0.3)
    generator = torch.Generator().manual_seed(0)
    x_NW = (8 * torch.randn(4, len(weight_W), generator=generator)).to(weight_W)
    try:
        found = torch.func.functional_call(module, {"weight": weight_W}, (x_NW,))
    except (RuntimeError, TypeError, ValueError):
        return False
    return isinstance(found, Tensor) and torch.equal(found, rms_norm(x_NW, weight_W, eps))


@cache
def _lean(kind: type[nn.Module], eps: float) -> type[nn.Module]:
    """Return a norm's class with another forward, under the same name."""

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        if hidden_states.dtype is not self.weight.dtype:
            return cast("Tensor", kind.forward(self, hidden_states))
        return rms_norm(hidden_states, self.weight, eps)

    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        state = cast("tuple[Any, ...]", nn.Module.__reduce_ex__(self, protocol))[2:]
        return (_empty, (kind, eps), *state)

    methods = {"forward": forward, "__reduce_ex__": reduce, "__module__": kind.__module__}
    return type(kind.__name__, (kind,), methods)


def _empty(kind: type[nn.Module], eps: float) -> nn.Module:
    """Return a norm without its state, for pickle and copies: no module holds a class that is made as it is needed."""
    return object.__new__(_lean(cast("Any", kind), eps))
