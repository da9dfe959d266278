"""Tiles of logits: some tokens, the whole vocabulary. Logits exist in no other form.

Shapes: N tokens, n tokens of a tile, V vocabulary, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

WIDENED = 8192
"""Rows of a head that are widened at a time."""


class Role(NamedTuple):
    """One role's scoring inputs: x = (hidden @ head.T + bias) / temperature, its logits cap tanh(x / cap), or x."""

    hidden_NH: Tensor
    head_VH: Tensor
    bias_V: Tensor | None
    temperature: float
    cap: float | None = None


def compute_dtype(student: Role, views: Sequence[Role]) -> torch.dtype:
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


def slices(total: int, size: int) -> list[slice]:
    """Cut 0..total into slices of `size`; nothing at all makes one empty slice, so that results keep their shapes."""
    return [slice(start, min(start + size, total)) for start in range(0, max(total, 1), size)]


class Widened:
    """Memory for parts of a head in a wider dtype, filled anew for each: fresh memory costs more than the copy."""

    def __init__(self) -> None:
        self._room_vH: Tensor | None = None

    def __call__(self, part_vH: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the part in a dtype: itself, or a copy that lasts until the next call. The first is the longest."""
        if part_vH.dtype == dtype:
            return part_vH
        if self._room_vH is None:
            self._room_vH = torch.empty_like(part_vH, dtype=dtype)
        return self._room_vH[: len(part_vH)].copy_(part_vH)


class Tile:
    """Memory for the logits of every role on one tile of tokens, filled anew for each tile."""

    def __init__(self, student: Role, views: Sequence[Role], tokens: int) -> None:
        self._roles = (student, *views)
        self._dtype = compute_dtype(student, views)
        size = (len(self._roles) * tokens, student.head_VH.shape[0])
        self._room = torch.empty(size, dtype=self._dtype, device=student.hidden_NH.device)
        heads = {
            (role.head_VH.data_ptr(), role.head_VH.dtype, product_dtype(role, self._dtype)) for role in self._roles
        }
        self._shares_head = len(heads) == 1
        self._widened = Widened()

    def logits(self, rows: slice) -> list[Tensor]:
        """Return the tempered logits of some tokens, [n, V] a role, the student's first; the caller may overwrite."""
        count = rows.stop - rows.start
        found = list(self._room[: len(self._roles) * count].split_with_sizes([count] * len(self._roles)))
        if self._shares_head:  # one product of twice as many rows is faster than two
            self._multiply(self._roles, rows, self._room[: len(self._roles) * count])
        else:
            for role, logits_nV in zip(self._roles, found, strict=True):
                self._multiply([role], rows, logits_nV)
        for role, logits_nV in zip(self._roles, found, strict=True):
            if role.bias_V is not None:
                logits_nV.add_(role.bias_V)
            if role.temperature != 1:
                logits_nV.div_(role.temperature)
            if role.cap is not None:
                logits_nV.div_(role.cap).tanh_().mul_(role.cap)
        return found

    def _multiply(self, roles: Sequence[Role], rows: slice, out: Tensor) -> None:
        """Multiply the roles' hidden states, one behind the other, with the head of the first."""
        head_VH = roles[0].head_VH
        operands = product_dtype(roles[0], self._dtype)
        hidden = torch.cat([role.hidden_NH[rows].to(operands) for role in roles])
        for columns in head_slices(head_VH, operands):
            head_Hv = self._widened(head_VH[columns], operands).T
            if operands == self._dtype:
                torch.mm(hidden, head_Hv, out=out[:, columns])
            else:
                out[:, columns] = torch.mm(hidden, head_Hv, out_dtype=self._dtype)


def head_slices(head_VH: Tensor, operands: torch.dtype) -> list[slice]:
    """Cut a head into parts that can be widened one by one; one part where it need not be."""
    return slices(head_VH.shape[0], head_VH.shape[0] if head_VH.dtype == operands else WIDENED)


class Sums:
    """Gradients of hidden states, head and bias, added up over tiles in the compute dtype; None where not asked for."""

    def __init__(self, student: Role, dtype: torch.dtype, needs: tuple[bool, bool, bool]) -> None:
        self._student, self._dtype = student, dtype
        self._operands = product_dtype(student, dtype)
        self._widened = Widened()
        self.hidden_NH = torch.zeros_like(student.hidden_NH, dtype=dtype) if needs[0] else None
        self.head_VH = torch.zeros_like(student.head_VH, dtype=dtype) if needs[1] else None
        self.bias_V = torch.zeros_like(student.bias_V, dtype=dtype) if needs[2] and student.bias_V is not None else None

    def add(self, gradient_nV: Tensor, rows: slice) -> None:
        """Take in the gradient to the tempered, uncapped logits of some tokens, each token once; it is overwritten."""
        if self._student.temperature != 1:
            gradient_nV.div_(self._student.temperature)
        if self.bias_V is not None:
            self.bias_V += gradient_nV.sum(0)
        head_VH, hidden_nH = self._student.head_VH, self._student.hidden_NH[rows].to(self._operands)
        for columns in head_slices(head_VH, self._operands):
            gradient_nv = gradient_nV[:, columns].to(self._operands)
            if self.hidden_NH is not None:
                self._add(self.hidden_NH[rows], gradient_nv, self._widened(head_VH[columns], self._operands))
            if self.head_VH is not None:
                self._add(self.head_VH[columns], gradient_nv.T, hidden_nH)

    def _add(self, total: Tensor, left: Tensor, right: Tensor) -> None:
        if self._operands == self._dtype:
            total.addmm_(left, right)
        else:
            total += torch.mm(left, right, out_dtype=self._dtype)
