"""The decoder's layers through torch.compile: of many passes over what a layer makes between its products, one."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from atesd.train.heads import kind_of
from atesd.types import UserError, first_line


def compile_layers(model: nn.Module) -> None:
    """Have a model's decoder layers compiled when they first compute, once for all of them and for batches of any size.

    UserError where the machine cannot compile, or the model's class does not say which its layers are.
    """
    names = set(getattr(model, "_no_split_modules", None) or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if not layers:
        raise UserError(f"model.compile compiles decoder layers, and {kind_of(model)} does not name its own: remove it")
    _try()
    _let_passes_be_derived_again()
    if hasattr(model, "peft_config"):  # else the first layer, whose inputs need no gradient, is compiled apart
        cast("Any", model).enable_input_require_grads()
    for layer in layers:
        layer.compile(dynamic=True)


def _let_passes_be_derived_again() -> None:
    """Have backward passes leave what they read as it is: credit derives one pass in several directions."""
    from torch._functorch import config  # a second to import

    config.donated_buffer = False


def _try() -> None:
    """Compile something small: whatever is missing is told before a run begins."""

    def doubled(x: Tensor) -> Tensor:
        return x + x

    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    try:
        torch.compile(doubled)(torch.ones(2, device=device))
    except Exception as error:  # of torch, the compiler or the system, each with a class of its own
        cause = getattr(error, "inner_exception", error)  # torch's own says no more than where it was met
        raise UserError(
            f"model.compile = true, and torch.compile does not work here ({first_line(cause)}): on a CPU it needs a "
            "C++ compiler (g++, or what CXX names), on a GPU Triton and a C compiler; install one, or remove "
            "model.compile"
        ) from error
