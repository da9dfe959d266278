"""AVSD's target: what several teacher views agree on, and a gated part of what single ones know.

K views k, each token and entry of the vocabulary by itself; p_S a constant:

    log q_G = mean_k log q_k + const     the consensus, a distribution
    q_A     = mean_k q_k
    J       = max(0, log q_A - log q_G)                          what single views know
    d_k     = log q_k - log p_S
    C       = |mean_k d_k| / mean_k |d_k|                        1 where all views move the entry the same way
    gate    = C |mean_k d_k| / (|mean_k d_k| + J)
    log q   = log q_G + gate J                                   up to a constant per token

AVSD, arXiv 2605.20643; formulas of its released code (github duykhuongnguyen/AVSD). Deviations: 1. over the whole
vocabulary, where the code takes the union of the views' 64 most probable entries; 2. also with the sampled-token loss
q_G is the normalised one, where the code leaves out its constant, so that J is smaller here; 3. the partial view is the
teacher at the ratio in force, where the paper's stays at one half; 4. views have equal weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log
from typing import ClassVar, Literal

import torch
from torch import Tensor

from atesd.losses.target import Unscaled, View

_EPS = 1e-8
"""Added to both denominators, as in the released code: where nothing moves an entry, its gate is 0."""


class Avsd(Unscaled):
    """What the teachers at the ratio in force, at 1 and at 0 agree on, and a gated rest (AVSD 2605.20643)."""

    kind: Literal["avsd"] = "avsd"

    views: ClassVar[tuple[View, ...]] = ("teacher", "full", "answer")
    is_first_view: ClassVar[bool] = False
    reads_student: ClassVar[bool] = True

    def describe(self) -> str:
        """Name the views."""
        return (
            "The target is what three teachers agree on, who see the share in force, the whole solution and the answer "
            "alone, and a gated part of what they do not (AVSD)"
        )

    def log_target(self, log_views: Sequence[Tensor]) -> Tensor:
        """Return the consensus plus the gated residual."""
        *views, student_nV = log_views
        log_KnV = torch.stack(views)
        consensus_nV = log_KnV.mean(0).log_softmax(-1)
        residual_nV = (log_KnV.logsumexp(0) - log(len(views)) - consensus_nV).clamp_(min=0)
        moves_KnV = log_KnV.sub_(student_nV)
        pull_nV = moves_KnV.mean(0).abs_()
        agreement_nV = pull_nV / (moves_KnV.abs_().mean(0) + _EPS)
        gate_nV = agreement_nV * pull_nV / (pull_nV + residual_nV + _EPS)
        return consensus_nV.addcmul_(gate_nV, residual_nV)
