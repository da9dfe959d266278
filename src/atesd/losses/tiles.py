"""Tiles of logits: the only form in which logits over the vocabulary exist.

Shapes: N tokens, n tokens of a tile, V vocabulary, v entries of a tile, H hidden, k ids looked at per token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property, reduce
from typing import NamedTuple

import torch
from torch import Tensor


class Role(NamedTuple):
    """One role's scoring inputs."""

    hidden_NH: Tensor
    head_VH: Tensor
    bias_V: Tensor | None
    temperature: float


def compute_dtype(student: Role, views: tuple[Role, ...]) -> torch.dtype:
    """Return the wider of float32 and all inputs' dtypes."""
    tensors = [tensor for role in (student, *views) for tensor in (role.hidden_NH, role.head_VH)]
    return reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)


def product_dtype(role: Role, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the operands of a role's products.

    That is `dtype`, but for bfloat16 on a GPU: there products of bfloat16 are fast, and exact in float32. float16 is
    widened, as its range is too small for gradients to logits.
    """
    common = torch.promote_types(role.hidden_NH.dtype, role.head_VH.dtype)
    return common if role.hidden_NH.is_cuda and common == torch.bfloat16 else dtype


def product(left: Tensor, right: Tensor, operands: torch.dtype, dtype: torch.dtype) -> Tensor:
    """Multiply matrices of any dtypes as `operands`, giving `dtype` unrounded."""
    left, right = left.to(operands), right.to(operands)
    return torch.mm(left, right) if operands == dtype else torch.mm(left, right, out_dtype=dtype)


def logits_tile(role: Role, rows: slice, columns: slice, dtype: torch.dtype) -> Tensor:
    """Tempered logits of some tokens on some entries."""
    operands = product_dtype(role, dtype)
    logits_nv = product(role.hidden_NH[rows], role.head_VH[columns].T, operands, dtype)
    if role.bias_V is not None:
        logits_nv += role.bias_V[columns]
    return logits_nv if role.temperature == 1 else logits_nv.div_(role.temperature)


def slices(total: int, size: int) -> list[slice]:
    """Cut 0..total into slices of `size`; nothing at all makes one empty slice, so that results keep their shapes."""
    return [slice(start, min(start + size, total)) for start in range(0, max(total, 1), size)]


class RowTiles:
    """Logits of every role for one tile of tokens; kept between passes where a single vocabulary tile holds them."""

    def __init__(self, roles: tuple[Role, ...], rows: slice, tile_vocab: int, dtype: torch.dtype) -> None:
        self.roles, self.rows, self.dtype = roles, rows, dtype
        self.columns = slices(roles[0].head_VH.shape[0], tile_vocab)
        self.only = self._tile(self.columns[0]) if len(self.columns) == 1 else None

    def __iter__(self) -> Iterator[tuple[int, list[Tensor]]]:
        for columns in self.columns:
            yield columns.start, self.only or self._tile(columns)

    def _tile(self, columns: slice) -> list[Tensor]:
        return [logits_tile(role, self.rows, columns, self.dtype) for role in self.roles]


def local_ids(ids_nk: Tensor, start: int, size: int) -> tuple[Tensor, Tensor]:
    """Return ids counted from the tile's start, kept inside it, and whether they were inside."""
    local_nk = ids_nk - start
    return local_nk.clamp(0, size - 1), (local_nk >= 0) & (local_nk < size)


def pick(tile_nv: Tensor, ids_nk: Tensor, start: int, picked_nk: Tensor) -> Tensor:
    """Take the entries that lie in this tile, keeping what other tiles gave."""
    local_nk, inside_nk = local_ids(ids_nk, start, tile_nv.shape[1])
    return torch.where(inside_nk, tile_nv.gather(1, local_nk), picked_nk)


class Normaliser:
    """Log-sum-exp, the k largest entries and the label's value per row of logits that come in tiles."""

    def __init__(self, k: int, labels_n1: Tensor) -> None:
        self.k, self.labels_n1 = k, labels_n1
        self.parts: _Parts | None = None

    def add(self, tile_nv: Tensor, start: int) -> None:
        """Take in the entries from `start` on; each tile once."""
        k = min(self.k, tile_nv.shape[1])
        values_nk, ids_nk = tile_nv.max(-1, keepdim=True) if k == 1 else tile_nv.topk(k)
        total_n = (tile_nv - values_nk[:, :1]).exp_().sum(-1)
        # A label outside the vocabulary stays NaN and stops the run, instead of scoring some other token.
        label_n1 = torch.full_like(values_nk[:, :1], torch.nan) if self.parts is None else self.parts.label_n1
        new = _Parts(total_n, values_nk, ids_nk + start, pick(tile_nv, self.labels_n1, start, label_n1))
        self.parts = new if self.parts is None else _merged(self.parts, new, self.k)

    @property
    def ids_nk(self) -> Tensor:
        """The k largest entries, the largest first."""
        assert self.parts is not None
        return self.parts.ids_nk

    @cached_property
    def log(self) -> Tensor:
        """The log-normaliser, [n]; asked for once all tiles are in, like all that follows."""
        assert self.parts is not None
        return self.parts.values_nk[:, 0] + self.parts.total_n.log()

    @cached_property
    def top_logprobs_nk(self) -> Tensor:
        """Log-probabilities of `ids_nk`."""
        assert self.parts is not None
        return self.parts.values_nk - self.log[:, None]

    @cached_property
    def label_logprob(self) -> Tensor:
        """Log-probability of the label, [n]."""
        assert self.parts is not None
        return self.parts.label_n1[:, 0] - self.log


class _Parts(NamedTuple):
    """What is known of the tiles so far; `total_n` is sum exp(logit - values_nk[:, 0])."""

    total_n: Tensor
    values_nk: Tensor
    ids_nk: Tensor
    label_n1: Tensor


def _merged(old: _Parts, new: _Parts, k: int) -> _Parts:
    """Join disjoint entries of the same rows; `new` already carries the labels' values of `old`."""
    both_nk = torch.cat([old.values_nk, new.values_nk], -1)
    values_nk, order_nk = both_nk.topk(min(k, both_nk.shape[1]))
    ids_nk = torch.cat([old.ids_nk, new.ids_nk], -1).gather(1, order_nk)
    high_n = values_nk[:, 0]
    total_n = old.total_n * (old.values_nk[:, 0] - high_n).exp() + new.total_n * (new.values_nk[:, 0] - high_n).exp()
    return _Parts(total_n, values_nk, ids_nk, new.label_n1)


def log_tiles(logits: Sequence[Tensor], logs: Sequence[Tensor]) -> list[Tensor]:
    """Subtract log-normalisers [n] from tiles [n, v]."""
    return [logits_nv - log_n[:, None] for logits_nv, log_n in zip(logits, logs, strict=True)]
