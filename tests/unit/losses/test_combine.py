"""Reduction to a scalar: hand-computed means, and micro-batches that add up."""

from __future__ import annotations

import pytest
import torch

from atesd.losses.combine import Aggregate, Component, aggregate_weights, combine, selected_units

# Three sequences of 1, 2 and 3 tokens, interleaved; the last token is not selected.
VALUES = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], dtype=torch.float64)
WEIGHTS = torch.tensor([1.0, 0.5, 1.0, 1.0, 2.0, 9.0], dtype=torch.float64)
SELECTION = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 0.0], dtype=torch.float64)
SEQUENCE = torch.tensor([7, 3, 9, 3, 9, 9])


@pytest.mark.parametrize(("aggregate", "units", "mean"), [
    ("token", 5, (1 + 1 + 3 + 4 + 10) / 5),  # w v = 1, 1, 3, 4, 10 over five selected tokens
    ("sequence", 3, (1 / 1 + (1 + 4) / 2 + (3 + 10) / 2) / 3),
])  # fmt: skip
def test_means_by_hand(aggregate: Aggregate, units: int, mean: float) -> None:
    assert selected_units(SELECTION, SEQUENCE, aggregate) == units
    weights = aggregate_weights(WEIGHTS, SELECTION, SEQUENCE, aggregate)
    assert combine({"distil": Component(VALUES, weights, units)}).item() == pytest.approx(mean)


@pytest.mark.parametrize("aggregate", ["token", "sequence"])
def test_micro_batches_of_one_sequence_equal_one_batch(aggregate: Aggregate) -> None:
    values = VALUES.clone().requires_grad_()
    normaliser = 0
    for index in SEQUENCE.unique():
        rows = index == SEQUENCE
        normaliser += selected_units(SELECTION[rows], SEQUENCE[rows], aggregate)
    for index in SEQUENCE.unique():
        rows = index == SEQUENCE
        weights = aggregate_weights(WEIGHTS[rows], SELECTION[rows], SEQUENCE[rows], aggregate)
        combine({"distil": Component(values[rows], weights, normaliser)}).backward()
    whole = VALUES.clone().requires_grad_()
    weights = aggregate_weights(WEIGHTS, SELECTION, SEQUENCE, aggregate)
    combine({"distil": Component(whole, weights, selected_units(SELECTION, SEQUENCE, aggregate))}).backward()
    assert values.grad is not None
    torch.testing.assert_close(values.grad, whole.grad)
    assert values.grad[-1].item() == 0


def test_a_selection_with_weights_counts_its_tokens_and_is_not_applied_twice() -> None:
    selection = torch.tensor([0.5, 3.0, 0.0, 1.0], dtype=torch.float64)
    sequence, gate = torch.tensor([0, 0, 0, 1]), torch.tensor([1.0, 0.5, 1.0, 1.0], dtype=torch.float64)
    assert selected_units(selection, sequence, "token") == 3
    assert selected_units(selection, sequence, "sequence") == 2
    assert aggregate_weights(selection * gate, selection, sequence, "token").tolist() == [0.5, 1.5, 0.0, 1.0]
    # over .5 + 3 = 3.5
    expected = [0.5 / 3.5, 1.5 / 3.5, 0.0, 1.0]
    assert aggregate_weights(selection * gate, selection, sequence, "sequence").tolist() == pytest.approx(expected)
    light = torch.tensor([0.25], dtype=torch.float64)  # a sum below 1 divides as well
    assert aggregate_weights(light, light, torch.tensor([3]), "sequence").tolist() == [1.0]


def test_components_keep_their_own_denominators() -> None:
    # 6 / 2 + 10 / 5 = 5
    distil = Component(torch.tensor([1.0, 5.0]), torch.ones(2), 2)
    rl = Component(torch.tensor([10.0]), torch.ones(1), 5)
    assert combine({"distil": distil, "rl": rl}).item() == 5


def test_weights_carry_no_gradient() -> None:
    weights = torch.tensor([2.0], requires_grad=True)
    values = torch.tensor([3.0], requires_grad=True)
    combine({"distil": Component(values, weights, 1)}).backward()
    assert weights.grad is None
    assert values.grad is not None
    assert values.grad.item() == 2


def test_a_micro_batch_without_tokens_adds_zero() -> None:
    empty = Component(torch.zeros(0, requires_grad=True), torch.zeros(0), 12)
    assert combine({"distil": empty}).item() == 0


@pytest.mark.parametrize("normaliser", [0.0, -1.0, float("nan")])
def test_nothing_selected_in_the_whole_step_is_no_zero_loss(normaliser: float) -> None:
    with pytest.raises(ValueError, match="component distil has normaliser"):
        combine({"distil": Component(VALUES, WEIGHTS * 0, normaliser)})
    with pytest.raises(ValueError, match="no loss component"):
        combine({})


def test_a_sequence_without_a_selected_token_is_not_counted() -> None:
    selection = torch.tensor([1.0, 1.0, 0.0])
    sequence = torch.tensor([0, 0, 1])
    assert selected_units(selection, sequence, "sequence") == 1
    assert aggregate_weights(torch.ones(3), selection, sequence, "sequence").tolist() == [0.5, 0.5, 0.0]
