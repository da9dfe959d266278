"""Gates: the open gate, selection and weights, and that no gradient passes through weights."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from atesd.gates import Gated, OpenGate, apply_gate, gate_metrics
from atesd.losses.combine import Component, combine
from atesd.types import TokenStats


def stats_of(divergence: Tensor) -> TokenStats:
    names = TokenStats.__slots__
    return TokenStats(**{name: divergence if name == "divergence" else torch.zeros(len(divergence)) for name in names})


class Above:
    """Select tokens whose divergence exceeds a threshold, and weigh them by a multiple of it."""

    def __init__(self, threshold: float, scale: float, *, needs_batch: bool = False) -> None:
        self.threshold, self.scale, self.needs_batch = threshold, scale, needs_batch

    def selection(self, stats: TokenStats) -> Tensor:
        return (stats.divergence > self.threshold).float()

    def weights(self, stats: TokenStats) -> Tensor:
        return self.scale * stats.divergence

    def metrics(self, stats: TokenStats) -> Mapping[str, float]:
        return {f"gate/above_{self.threshold}": self.selection(stats).sum().item()}


STATS = stats_of(torch.tensor([0.1, 0.2, 0.4, 0.8]))


def test_the_open_gate_changes_nothing() -> None:
    gated = apply_gate(OpenGate().build(), STATS)
    assert gated.selection_N.tolist() == gated.weights_N.tolist() == [1, 1, 1, 1]
    assert gate_metrics(OpenGate(), STATS, gated) == {"gate/kept_frac": 1.0, "gate/mean": 1.0}
    assert not OpenGate().needs_batch


def test_weights_are_0_where_nothing_is_selected_and_metrics_cover_all_tokens() -> None:
    gate = Above(0.3, 0.5)
    gated = apply_gate(gate, STATS)
    assert gated.selection_N.tolist() == [0, 0, 1, 1]
    # .5 d where d > .3: .5 * .4, .5 * .8; the mean over all four tokens is .15
    torch.testing.assert_close(gated.weights_N, torch.tensor([0.0, 0.0, 0.2, 0.4]))
    assert gate_metrics(gate, STATS, gated) == pytest.approx(
        {"gate/kept_frac": 0.5, "gate/mean": 0.15, "gate/above_0.3": 2.0}
    )


def test_no_gradient_passes_through_weights() -> None:
    # loss = sum w d / 2 with w = d: the gradient is w / 2, not d.
    divergence = torch.tensor([0.3, 0.5], requires_grad=True)
    gated: Gated = apply_gate(Above(0.0, 1.0), stats_of(divergence))
    assert not gated.weights_N.requires_grad
    combine({"distil": Component(divergence, gated.weights_N, 2)}).backward()
    torch.testing.assert_close(divergence.grad, torch.tensor([0.15, 0.25]))


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValidationError, match="none"):
        OpenGate.model_validate({"kind": "sdar"})
