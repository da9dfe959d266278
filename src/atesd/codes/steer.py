"""Latent codes: a learned vector for every chunk of K tokens, added to what one decoder layer puts out.

B rows, L positions of a pass, N scored positions of all rows, M chunks of all rows, H hidden size, C codes.

    m(t)  = floor((t - 1) / K)                        chunk of completion token t, which is predicted at position t
    z_m   = W sg(h at the first position of chunk m)  logits of the codes; h is what the layer puts out
    h_t  += scale e_c,  c the code of m(t)            e begins at 0: nothing is steered; W at 0: all codes are as likely

Dynamic Latent Routing, arXiv 2605.14323. What a position reads lies below all steering, so that the logits of all
chunks come from one pass, whatever the codes, and codes of different chunks are independent given the tokens. No
gradient reaches the model through the router. Wherever nothing else is said the most probable code steers (argmax): in
sampling, in evaluation and in every score of the student. It is a function of the tokens, so that samples can be scored
again. Prompts are not steered, but for their last position, which predicts the first token; teachers never are.

Ours, as the paper leaves them open: 1. scale is 1; 2. position t is the one that predicts token t; 3. W begins at 0;
4. argmax where the model is used. `train/latent.py` chooses codes and trains them.

`codes/model.py` makes codes part of a model, and keeps them beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from atesd.transfer import sent
from atesd.types import UserError


class Codes(nn.Module):
    """Router and vectors, and what is steered by them at present."""

    def __init__(
        self, count: int, hidden_size: int, *, chunk: int, layer: int, scale: float = 1.0, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.router_CH = nn.Parameter(torch.zeros(count, hidden_size, dtype=dtype))
        self.vectors_CH = nn.Parameter(torch.zeros(count, hidden_size, dtype=dtype))
        self.chunk = chunk
        self.layer = layer
        self.scale = scale
        self._on = True
        self._given: Sequence[Tensor] | None = None
        self._noted: dict[int, Tensor] | None = None

    @property
    def shape(self) -> dict[str, int]:
        """What two sets of codes must share for one to stand for the other."""
        count, size = self.router_CH.shape
        return {"count": count, "hidden size": size, "chunk": self.chunk, "layer": self.layer}

    def logits(self, hidden_MH: Tensor) -> Tensor:
        """Return the router's logits, [M, C], from hidden states as constants."""
        return hidden_MH.detach().to(self.router_CH.dtype) @ self.router_CH.T

    def greedy(self, hidden_MH: Tensor) -> Tensor:
        """Return the most probable code of each chunk, [M]."""
        with torch.no_grad():
            return self.logits(hidden_MH).argmax(-1)

    def steps(self, codes_M: Tensor, like: Tensor) -> Tensor:
        """Return what is added at a position with each of the codes, [M, H]."""
        return (self.scale * self.vectors_CH[codes_M]).to(like.dtype)

    def starts(self, tokens: int) -> Tensor:
        """Return the first token of every chunk, from 0: the last chunk of a completion may be shorter."""
        return torch.arange(0, tokens, self.chunk)

    # ---- what steers at present

    @contextmanager
    def _set(self, **state: Any) -> Iterator[None]:
        before = {name: getattr(self, name) for name in state}
        for name, value in state.items():
            setattr(self, name, value)
        try:
            yield
        finally:
            for name, value in before.items():
                setattr(self, name, value)

    @property
    def active(self) -> bool:
        """Whether scores and samples are steered at present."""
        return self._on

    @contextmanager
    def following(self, codes: Sequence[Tensor]) -> Iterator[None]:
        """Steer scores by given codes, one tensor [M] a passage, inside the block."""
        with self._set(_on=True, _given=codes):
            yield

    @contextmanager
    def noting(self) -> Iterator[dict[int, Tensor]]:
        """Steer scores greedily, and keep what the router reads of every passage, by its index: [M, H]."""
        noted: dict[int, Tensor] = {}
        with self._set(_on=True, _given=None, _noted=noted):
            yield noted

    # ---- steering a model's passes

    @contextmanager
    def reading(
        self,
        model: nn.Module,
        prompt_lengths: Sequence[int],
        lengths: Sequence[int],
        members: Sequence[int] | None = None,
    ) -> Iterator[None]:
        """Steer passes over whole rows, which begin at column 0, inside the block.

        `prompt_lengths` are the positions of each row's prompt, `lengths` all of its positions without padding, which
        stands behind them. `members` are the passages that the rows hold, by index.
        """

        def steer(hidden_BLH: Tensor) -> Tensor:
            return self._steer_rows(hidden_BLH, prompt_lengths, lengths, members or range(len(lengths)))

        with self._hooked(model, steer):
            yield

    @contextmanager
    def generating(self, model: nn.Module) -> Iterator[None]:
        """Steer one call of `generate` with a cache and without beams inside the block; prompts padded on the left."""
        walk = Walk(self)

        def steer(hidden_BLH: Tensor) -> Tensor:
            return torch.cat((hidden_BLH[:, :-1], walk.steer(hidden_BLH[:, -1])[:, None]), dim=1)

        with self._hooked(model, steer):
            yield

    @contextmanager
    def _hooked(self, model: nn.Module, steer: Callable[[Tensor], Tensor]) -> Iterator[None]:
        def hook(module: nn.Module, given: object, output: Any) -> Any:  # noqa: ARG001
            return (steer(output[0]), *output[1:]) if isinstance(output, tuple) else steer(output)

        handle = layers_of(model)[self.layer].register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    def _steer_rows(
        self, hidden_BLH: Tensor, prompt_lengths: Sequence[int], lengths: Sequence[int], members: Sequence[int]
    ) -> Tensor:
        width = hidden_BLH.shape[1]
        places, chunks, first = [], [], []
        count = 0
        for row, (prompt, length) in enumerate(zip(prompt_lengths, lengths, strict=True)):
            begin, tokens = row * width + prompt - 1, length - prompt + 1
            starts = self.starts(tokens)
            places.append(begin + torch.arange(tokens))
            chunks.append(count + torch.arange(tokens) // self.chunk)
            first.append(begin + starts)
            count += len(starts)
        flat_XH, device = hidden_BLH.flatten(0, 1), hidden_BLH.device
        read_MH = flat_XH.detach().index_select(0, sent(torch.cat(first), device))
        if self._noted is not None:
            self._noted.update(zip(members, read_MH.split_with_sizes([len(each) for each in first]), strict=True))
        if self._given is None:
            codes_M = self.greedy(read_MH)
        else:
            codes_M = torch.cat([self._given[member] for member in members])
        added_NH = self.steps(codes_M, hidden_BLH)[sent(torch.cat(chunks), device)]
        return flat_XH.index_add(0, sent(torch.cat(places), device), added_NH).view_as(hidden_BLH)


class Walk:
    """The codes of rows that grow by a token a pass, all at the same place of their completions."""

    def __init__(self, codes: Codes) -> None:
        self._codes = codes
        self._place = 0
        self._codes_B = torch.empty(0, dtype=torch.long)

    def steer(self, last_BH: Tensor) -> Tensor:
        """Return the steered output at each row's latest position."""
        if self._place % self._codes.chunk == 0:
            self._codes_B = self._codes.greedy(last_BH)
        self._place += 1
        return last_BH + self._codes.steps(self._codes_B, last_BH)

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these, or repeat some."""
        self._codes_B = self._codes_B[rows]


def layers_of(model: nn.Module) -> nn.ModuleList:
    """Return the decoder layers, beneath adapters. UserError for a model without a list of them."""
    beneath = cast("Any", model).get_base_model() if hasattr(model, "get_base_model") else cast("Any", model)
    decoder = beneath.get_decoder() if hasattr(beneath, "get_decoder") else getattr(beneath, "model", None)
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise UserError(
            f"codes are added behind a decoder layer, and {type(beneath).__name__} has no list of them, called layers: "
            "take another model (Qwen, Llama, Mistral, Gemma), or remove codes"
        )
    return layers
