"""Out of memory: what to lower, and to what."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from atesd.config import RunConfig
from atesd.types import UserError

Doing = Literal["loading the model", "sampling", "updating", "evaluating"]


@contextmanager
def within_memory(config: RunConfig, doing: Doing) -> Iterator[None]:
    """Turn an allocation that fails into a UserError that names the settings behind it; other errors pass."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"out of memory while {doing}: {'; or '.join(advice(config, doing))}") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether memory ran out, on a GPU or a CPU."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def advice(config: RunConfig, doing: Doing) -> list[str]:
    """Return what would help, the cheapest first: half of what is in use now, then what costs time or precision."""
    completion = config.rollout.max_new_tokens
    if doing == "loading the model":
        return _smaller_weights(config)
    if doing == "evaluating":
        sampled = config.eval.k * (config.eval.problems or 1) * (config.eval.max_new_tokens or completion)
        return [_half("rollout.batch_tokens", config.rollout.batch_tokens, sampled), *_smaller_weights(config)]
    tokens = config.step.problems * config.rollout.group_size * completion
    if doing == "sampling":
        return [_half("rollout.batch_tokens", config.rollout.batch_tokens, tokens), *_smaller_weights(config)]
    found = []
    if config.step.token_budget > completion:
        found.append(_half("step.token_budget", config.step.token_budget, tokens))
    if not config.model.gradient_checkpointing:
        found.append("set model.gradient_checkpointing = true")
    return [*found, f"lower rollout.max_new_tokens = {completion}", *_smaller_weights(config)]


def _half(name: str, value: int, used: int) -> str:
    """Say to what a setting must go down to halve what is in use, of which it may be far above."""
    return f"lower {name} from {value} to {max(1, min(value, used) // 2)}"


def _smaller_weights(config: RunConfig) -> list[str]:
    """Say how weights and their optimizer take less room."""
    model = config.model
    if model.lora is None:
        return ["train adapters with model.lora = {}", "take a smaller model"]
    if model.quantization is not None:
        return ["take a smaller model"]
    if model.dtype == "float32":
        return ['set model.dtype = "bfloat16"', 'set model.quantization = "4bit"', "take a smaller model"]
    return ['set model.quantization = "4bit"', "take a smaller model"]
