"""Latent codes as part of a model, and in its folder.

A model holds its codes as `latent_codes`, which optimizers and gradient clipping see like any other weights. A folder
keeps them in codes.safetensors, beside the model, which loads without them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from atesd.codes.config import CodesConfig
from atesd.codes.steer import Codes, layers_of
from atesd.types import UserError

FILE = "codes.safetensors"
_NAME = "latent_codes"


def build_codes(config: CodesConfig, model: nn.Module) -> Codes:
    """Return codes that steer nothing yet. UserError for a layer that the model does not have."""
    depth = len(layers_of(model))
    layer = (depth - 1) // 2 if config.layer is None else config.layer
    if layer >= depth:
        raise UserError(
            f"codes.layer = {layer}, and the model's {depth} decoder layers are numbered from 0 to {depth - 1}: name "
            "one of those, or leave codes.layer out"
        )
    size = cast("Any", model).config.get_text_config().hidden_size
    return Codes(config.count, size, chunk=config.chunk, layer=layer, scale=config.scale, dtype=_precision(model))


def attach(model: nn.Module, codes: Codes) -> None:
    """Make codes part of a model. UserError where they are another model's."""
    layers, size = layers_of(model), cast("Any", model).config.get_text_config().hidden_size
    if codes.layer >= len(layers) or codes.shape["hidden size"] != size:
        raise UserError(
            f"the codes steer layer {codes.layer} of a model of hidden size {codes.shape['hidden size']}, and this one "
            f"has {len(layers)} layers and hidden size {size}: take codes and model from the same folder"
        )
    model.add_module(_NAME, codes.to(next(model.parameters()).device))


def codes_of(model: nn.Module) -> Codes | None:
    """Return a model's codes; None where it has none."""
    found = getattr(model, _NAME, None)
    return found if isinstance(found, Codes) else None


def with_codes(config: CodesConfig | None, model: nn.Module, path: str) -> Codes | None:
    """Give the model the codes that its recipe trains: those of its folder, or new ones; None where it trains none.

    UserError where a folder's codes would be left as they are, or are others than the recipe's.
    """
    found = codes_of(model)
    if config is None:
        if found is not None:
            raise UserError(
                f"the model in {path!r} is steered by latent codes, which this recipe does not train: add [codes] with "
                f"{_spelt(found)}, or train a copy of the folder without {FILE}"
            )
        return None
    codes = build_codes(config, model)
    if found is None:
        attach(model, codes)
        return codes
    if (found.shape, found.scale) != (codes.shape, codes.scale):
        raise UserError(
            f"[codes] asks for {_spelt(codes)}, and the codes in {path!r} have {_spelt(found)}: set these, or train a "
            f"copy of the folder without {FILE}"
        )
    return found.requires_grad_(True)


def _spelt(codes: Codes) -> str:
    shape = codes.shape
    return f"count = {shape['count']}, chunk = {codes.chunk}, layer = {codes.layer}, scale = {codes.scale:g}"


@contextmanager
def unsteered(model: nn.Module) -> Iterator[None]:
    """Neither score nor sample with a model's codes inside the block, unless a block within asks for them."""
    codes = codes_of(model)
    with nullcontext() if codes is None else codes._set(_on=False):
        yield


@contextmanager
def steered_rows(
    model: nn.Module, prompt_lengths: Sequence[int], lengths: Sequence[int], members: Sequence[int]
) -> Iterator[None]:
    """Let a model's codes, if it has some that are active, steer a pass inside the block, as `Codes.reading` does."""
    codes = codes_of(model)
    with nullcontext() if codes is None or not codes.active else codes.reading(model, prompt_lengths, lengths, members):
        yield


@contextmanager
def taken_off(model: nn.Module) -> Iterator[None]:
    """Leave a model without its codes inside the block, as it is saved and loaded."""
    codes = model._modules.pop(_NAME, None)
    try:
        yield
    finally:
        if codes is not None:
            model.add_module(_NAME, codes)


def _precision(model: nn.Module) -> torch.dtype:
    return torch.float64 if next(model.parameters()).dtype == torch.float64 else torch.float32


def save_codes(folder: Path, codes: Codes) -> None:
    """Write codes beside their model."""
    tensors = {"router": codes.router_CH.detach().contiguous(), "vectors": codes.vectors_CH.detach().contiguous()}
    facts = {"chunk": codes.chunk, "layer": codes.layer, "scale": codes.scale}
    save_file(tensors, folder / FILE, metadata={"codes": json.dumps(facts)})  # one entry: several have no fixed order


def load_codes(folder: str | Path) -> Codes:
    """Return the codes beside a model, as they were trained. UserError where there are none, or damaged ones.

    With a plain transformers model, on its device:

        codes = load_codes(folder)
        with codes.generating(model): model.generate(...)                          # one call a block
        with codes.reading(model, prompt_lengths, lengths): model(input_ids=...)   # prompts and completions, read whole
    """
    path = Path(folder) / FILE
    if not path.is_file():
        raise UserError(f"{folder} holds no {FILE}: give the folder of a model that was trained with codes")
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads(file.metadata()["codes"])
            router, vectors = file.get_tensor("router"), file.get_tensor("vectors")
        codes = Codes(
            *router.shape,
            chunk=int(facts["chunk"]),
            layer=int(facts["layer"]),
            scale=float(facts["scale"]),
            dtype=router.dtype,
        )
        codes.load_state_dict({"router_CH": router, "vectors_CH": vectors})
    except (SafetensorError, RuntimeError, KeyError, TypeError, ValueError) as error:
        why = " ".join(str(error).split())[:200]
        raise UserError(f"{path} is damaged ({why}): take it from a copy, or from a checkpoint of the run") from error
    return codes.requires_grad_(False)
