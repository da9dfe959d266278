"""PAINT's target: at a few tokens, whose entropies disagree, the teacher is drawn a little towards the student.

    log q = (1 - w) log p_T + w log p_S      where |H(p_T) - H(p_S)| >= mismatch,  else log p_T
                                             up to a constant per token; p_S a constant

PAINT, arXiv 2604.26573. "A small energy-space interpolation on a sparse set of entropy-mismatch token positions" is in
its abstract; its other half, the share of the solution shown by overlap, is the reveal `overlap`. Ours, as neither
numbers nor formula were seen: 1. what the teacher is mixed with: the student at the present weights; 2. w; 3. the
tokens: by a threshold in nats, not the highest few in a hundred, so that no token's target depends on another token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.linalg import vecdot

from atesd.losses.stats import TokenStats
from atesd.losses.target import Unscaled, View


class Paint(Unscaled):
    """The teacher, drawn towards the student at tokens whose entropies disagree (PAINT 2604.26573).

    Numbers and what is mixed are ours. With reveal `overlap` it is both halves of PAINT.
    """

    kind: Literal["paint"] = "paint"
    weight: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """w: the student's share in the logarithm, at those tokens."""
    mismatch: Annotated[float, Field(ge=0, le=100)] = 0.5
    """Least difference of both entropies, in nats; `target/painted_frac` says at how many tokens it is reached."""

    views: ClassVar[tuple[View, ...]] = ("teacher",)
    is_first_view: ClassVar[bool] = False
    reads_student: ClassVar[bool] = True

    def describe(self) -> str:
        """Name share and threshold."""
        return (
            f"The target is drawn {100 * self.weight:.3g} % of the way to the student at tokens whose entropies differ "
            f"by at least {self.mismatch:g} nats (PAINT)"
        )

    def log_target(self, log_views: Sequence[Tensor]) -> Tensor:
        """Return the mixture where entropies disagree, else the teacher."""
        teacher_nV, student_nV = log_views
        entropies = [-vecdot(log_nV.exp(), log_nV) for log_nV in log_views]
        is_chosen_n = self._is_chosen(*entropies)
        return torch.where(is_chosen_n[:, None], teacher_nV.lerp(student_nV, self.weight), teacher_nV)

    def metrics(self, stats: TokenStats) -> Mapping[str, float]:
        """Return at what share of the tokens the target is drawn."""
        return {
            "target/painted_frac": float(self._is_chosen(stats.teacher_entropy, stats.student_entropy).double().mean())
        }

    def _is_chosen(self, teacher_entropy_n: Tensor, student_entropy_n: Tensor) -> Tensor:
        return (teacher_entropy_n - student_entropy_n).abs() >= self.mismatch
