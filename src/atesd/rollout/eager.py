"""Layers that torch.compile has compiled for training, as sampling must not meet them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import cast

import torch
from torch import nn


def uncompiled(model: nn.Module) -> AbstractContextManager[object]:
    """Within the block every part of a model computes as it is written.

    A cache that grows by a token a pass would have its layers compiled again and again.
    """
    if not any(module._compiled_call_impl is not None for module in model.modules()):
        return nullcontext()  # torch.compiler takes seconds to import
    return cast("AbstractContextManager[object]", torch.compiler.set_stance("force_eager"))
