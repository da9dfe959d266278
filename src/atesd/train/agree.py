"""Whether the tiled head gives the model's own logits: tried before a run, whatever the architecture is called.

N tokens, V vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from atesd.codes.model import unsteered
from atesd.losses.tiles import Tile
from atesd.rollout.known import PATH_TOLERANCE, relative_distance
from atesd.train.batch import Passage, ViewInput, view_input
from atesd.train.heads import kind_of, output_layer
from atesd.train.scorer import Scorer, hidden_states
from atesd.types import UserError, first_line

PROMPTS = 2
"""How many prompts are compared."""

_LENGTHS = (32, 16)
"""How many of their last tokens: less work than any update."""

TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 2**-8, torch.bfloat16: 2**-6}
"""Largest difference of log-probabilities as a share of the largest logit. Hidden states are the same on both ways, so
that only the model's own logits are rounded: by 2^-9 of themselves in bfloat16, up to thrice where they are capped."""


def refuse_disagreement(scorer: Scorer, prompts: Sequence[Sequence[int]]) -> None:
    """UserError where the log-probabilities that losses are made of are not the model's own, on some real prompts.

    Models that no pass can be made through are refused, too. Logits that are not finite decide nothing: they stop the
    run later, with their cause.
    """
    cut = [ids[-length:] for ids, length in zip(prompts, _LENGTHS, strict=False)]
    passages = [Passage(tuple(ids[:1]), tuple(ids[1:])) for ids in cut if len(ids) > 1]
    if not passages:
        return
    model = scorer.model
    inputs = view_input(passages, scorer.pad_id, scorer.device)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), unsteered(model):
            own_NV, tiled_NV = _both(model, inputs)
            alone_NV = _logits_of(model, passages[-1], scorer)
            padded_NV = _logits_of(model, passages[-1], scorer, padding=_LENGTHS[0] - _LENGTHS[1])
    except (TypeError, AttributeError, KeyError, IndexError, RuntimeError, ValueError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise UserError(
            f"{kind_of(model)} does not run as a causal language model on text alone ({type(error).__name__}: "
            f"{first_line(error)}): take an architecture that maps ids, a mask and positions to logits"
        ) from error
    finally:
        model.train(was_training)
    if own_NV.shape != tiled_NV.shape:
        raise UserError(
            f"{kind_of(model)} gives {own_NV.shape[-1]} logits a token, but its output head has "
            f"{tiled_NV.shape[-1]} rows: losses cannot be computed from that head; take another model"
        )
    _compare(model, own_NV, tiled_NV)
    _warn_of_padding(model, padded_NV, alone_NV)


def _both(model: nn.Module, inputs: ViewInput) -> tuple[Tensor, Tensor]:
    """Return the logits [N, V] of the model's forward pass, and those of the tiles, both in float32 or wider."""
    own = [cast("Any", model)(input_ids=each.ids_BL, use_cache=False).logits for each in inputs.passes]
    role = hidden_states(model, inputs).at(temperature=1.0)
    (tiled_NV,) = Tile(role, (), len(role.hidden_NH)).logits(slice(0, len(role.hidden_NH)))
    return inputs.scored(own).to(tiled_NV.dtype), tiled_NV


def _compare(model: nn.Module, own_NV: Tensor, tiled_NV: Tensor) -> None:
    if not bool(own_NV.isfinite().all()):
        return
    dtype = next(iter(output_layer(model).parameters())).dtype  # type: ignore[union-attr]
    largest = float((own_NV.log_softmax(-1) - tiled_NV.log_softmax(-1)).abs().max())
    allowed = TOLERANCE[dtype] * max(1.0, float(own_NV.abs().max()))
    if not largest <= allowed:
        raise UserError(
            f"{kind_of(model)} makes its logits in a way that losses do not reproduce: log-probabilities differ by up "
            f"to {largest:.3g} nats from the model's own, and at most {allowed:.2g} comes of rounding in "
            f"{str(dtype).removeprefix('torch.')}; take an architecture whose logits are its head times its last "
            "hidden states, but for a scale or a soft cap (Qwen, Llama, Gemma, Mistral, Granite)"
        )


def _logits_of(model: nn.Module, passage: Passage, scorer: Scorer, padding: int = 0) -> Tensor:
    """Return the model's own logits of a passage, [N, V], behind masked padding, as `generate` reads prompts."""
    ids = [*passage.prompt, *passage.completion[:-1]]
    columns = torch.arange(-padding, len(ids), device=scorer.device)[None]
    own = cast("Any", model)(
        input_ids=torch.tensor([[scorer.pad_id] * padding + ids], device=scorer.device),
        attention_mask=(columns >= 0).long(),
        position_ids=columns.clamp(min=0),
        use_cache=False,
    )
    return cast("Tensor", own.logits[0, padding:])


def _warn_of_padding(model: nn.Module, padded_NV: Tensor, alone_NV: Tensor) -> None:
    """Warn where what stands in front of a prompt as padding changes what the model makes of it."""
    found = relative_distance(padded_NV.double(), alone_NV.double(), PATH_TOLERANCE[alone_NV.dtype])
    if found is not None and found > 1:
        warnings.warn(
            f"{kind_of(model)} lets padding in front of a prompt change its logits ({found:.3g} times the tolerance), "
            "so that samples depend on which prompts stand together: set rollout.batch_tokens = 1, so that each "
            "stands alone",
            stacklevel=3,
        )
