"""From per-token values to the scalar that is back-propagated.

Shapes: N tokens of one micro-batch. Every component is divided by a count over the whole optimizer step (all
micro-batches, all processes), so that 8 micro-batches of 1 give the gradient of 1 micro-batch of 8.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Aggregate = Literal["token", "sequence"]


@dataclass(frozen=True, slots=True)
class Component:
    """One loss term of a micro-batch: `values_N` carry the gradient, `weights_N` never do."""

    values_N: Tensor
    weights_N: Tensor
    normaliser: float


def combine(components: Mapping[str, Component]) -> Tensor:
    """Return sum over components of sum(w v) / normaliser, a scalar.

    A component may have no token in this micro-batch, and then adds 0. A normaliser that is not positive means that no
    token of the whole step is selected: there is no loss, and 0 would pass for one. ValueError then, as for no
    component at all; the loop leaves such a component out, and makes no update when none is left.
    """
    if not components:
        raise ValueError("no loss component: nothing of this step is selected, so there is no loss to take")
    terms = []
    for name, part in components.items():
        if not part.normaliser > 0:
            raise ValueError(
                f"loss component {name} has normaliser {part.normaliser}, expected a positive count over the whole "
                "step: leave the component out of a step that selects nothing"
            )
        terms.append((part.weights_N.detach() * part.values_N).sum() / part.normaliser)
    return torch.stack(terms).sum()


def selected_units(selection_N: Tensor, sequence_N: Tensor, aggregate: Aggregate) -> int:
    """Count what the mean is over: selected tokens, or sequences with at least one of them.

    Counts of micro-batches and processes add up to the normaliser, as long as no sequence is split between them.
    A token is selected where `selection_N` is positive; `sequence_N` numbers the token's sequence, in any order.
    """
    if aggregate == "token":
        return int((selection_N > 0).sum().item())
    return int(sequence_N[selection_N > 0].unique().numel())  # type: ignore[no-untyped-call]


def aggregate_weights(weights_N: Tensor, selection_N: Tensor, sequence_N: Tensor, aggregate: Aggregate) -> Tensor:
    """Return the weights whose sum with values, over `selected_units`, is the mean asked for.

    token: w. sequence: w / (sum of the selection over the token's sequence), so that every sequence counts alike
    whatever its length; with a selection of 0 and 1 that sum is its number of selected tokens. Tokens that are not
    selected get 0; `weights_N` hold the selection's own weights already.
    """
    selected_N = selection_N > 0
    weights_N = weights_N * selected_N
    if aggregate == "token":
        return weights_N
    index_N = numbered(sequence_N)
    sums_N = torch.zeros_like(weights_N).scatter_add_(0, index_N, selection_N.to(weights_N.dtype))
    return weights_N / torch.where(selected_N, sums_N[index_N], 1)


def numbered(sequence_N: Tensor) -> Tensor:
    """Number sequences from 0, in the order of the numbers given: `unique`'s inverse, without waiting for its size."""
    sorted_N, order_N = sequence_N.sort()
    is_next_N = torch.zeros_like(order_N)
    is_next_N[1:] = sorted_N[1:] != sorted_N[:-1]
    return torch.empty_like(order_N).scatter_(0, order_N, is_next_N.cumsum(0))
