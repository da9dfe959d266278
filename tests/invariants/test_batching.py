"""Micro-batches, padding and order change nothing but memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from atesd.losses.divergence import LossConfig
from atesd.train.batch import Passage, Row, labels, micro_batches, view_input
from atesd.train.scorer import Scorer

from support.models import EOS, PAD, VOCABULARY, ragged_rows, tiny_model
from support.steppers import make_stepper

CPU = torch.device("cpu")


def passage(row: Row, role: str) -> Passage:
    return row.student if role == "student" else row.view("teacher")


def scorer_of(model: torch.nn.Module) -> Scorer:
    return Scorer(model, pad_id=PAD, loss=LossConfig(), temperature=1.0, token_budget=10_000)


def logprobs(model: torch.nn.Module, rows: list[Row], role: str) -> list[Tensor]:
    """Score the completions of all rows in one batch, and return one tensor a row."""
    found = scorer_of(model).log_likelihood([passage(row, role) for row in rows])
    return list(found.detach().split([len(row.completion) for row in rows]))


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_sequence_alone_equals_itself_in_a_ragged_batch(role: str) -> None:
    model, rows = tiny_model(), ragged_rows(8)
    together = logprobs(model, rows, role)
    for row, inside in zip(rows, together, strict=True):
        (alone,) = logprobs(model, [row], role)
        torch.testing.assert_close(inside, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_scores_are_those_of_a_plain_forward_pass(role: str) -> None:
    """The first completion token is predicted from the last prompt token, in both roles, at unequal prompt lengths."""
    model, rows = tiny_model(), ragged_rows(5, seed=3)
    for row, scored in zip(rows, logprobs(model, rows, role), strict=True):
        start = passage(row, role).prompt
        ids = torch.tensor([[*start, *row.completion]])
        plain = model(ids).logits[0].log_softmax(-1)
        expected = [plain[len(start) - 1 + place, token] for place, token in enumerate(row.completion)]
        torch.testing.assert_close(scored, torch.stack(expected), atol=1e-5, rtol=0)


def test_masks_come_from_lengths_even_where_the_pad_id_is_an_end_token() -> None:
    inputs = view_input([Passage((EOS, 4), (EOS, 5, EOS)), Passage((7, EOS, 8, 9), (EOS,))], EOS, CPU)
    assert inputs.scored_BL.sum().item() == 4
    # Row lengths without the last completion id: 2 + 2 and 4 + 0.
    assert inputs.attention_mask_BL.sum(dim=1).tolist() == [4, 4]
    assert inputs.position_ids_BL.tolist() == [[0, 1, 2, 3], [0, 1, 2, 3]]
    ragged = view_input([Passage((3,), (7,)), Passage((4, 5, 6), (8,))], EOS, CPU)
    assert ragged.position_ids_BL.tolist() == [[0, 0, 0], [0, 1, 2]], "positions begin at the first real token"
    assert inputs.input_ids_BL.tolist() == [[EOS, 4, EOS, 5], [7, EOS, 8, 9]]


def test_the_head_sees_exactly_the_scored_rows() -> None:
    model, rows = tiny_model(), ragged_rows(6)
    scored = scorer_of(model).hidden([row.view("teacher") for row in rows])
    assert scored.hidden_NH.shape == (sum(len(row.completion) for row in rows), 32)


def updated(budget: int, rows: list[Row], **sections: object) -> tuple[dict[str, Tensor], float]:
    """Return the weights after one update in micro-batches of a budget, and the logged loss.

    Adam's eps of 1 makes the update nearly proportional to the gradient, so that rounding is not blown up to its sign.
    """
    model = tiny_model()
    optim = {"lr": 1e-2, "eps": 1.0, "max_grad_norm": 0.0}
    stepper, _ = make_stepper(model, step={"token_budget": budget}, optim=optim, **sections)
    outcome = stepper.optimize(rows)
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}, outcome.metrics["loss/total"]


@pytest.mark.parametrize("aggregate", ["token", "sequence"])
def test_eight_micro_batches_of_one_equal_one_of_eight(aggregate: str) -> None:
    rows = ragged_rows(8)
    one, loss_one = updated(10_000, rows, loss={"aggregate": aggregate})
    eight, loss_eight = updated(1, rows, loss={"aggregate": aggregate})
    assert len(list(micro_batches([row.cost for row in rows], 1))) == 8
    assert loss_one == pytest.approx(loss_eight, abs=1e-6)
    for name, weight in one.items():
        torch.testing.assert_close(weight, eight[name], atol=1e-6, rtol=0)


def test_the_order_of_rows_does_not_matter() -> None:
    rows = ragged_rows(8)
    forwards, _ = updated(80, rows)
    backwards, _ = updated(80, rows[::-1])
    for name, weight in forwards.items():
        torch.testing.assert_close(weight, backwards[name], atol=1e-6, rtol=0)


def test_sequence_mean_weighs_sequences_alike_and_token_mean_weighs_tokens_alike() -> None:
    rows = ragged_rows(4)
    model = tiny_model()
    stepper, _ = make_stepper(model, loss={"aggregate": "sequence"}, optim={"lr": 1e-9})
    outcome = stepper.optimize(rows)
    per_row = [outcome.rows[index].stats.divergence.mean() for index in range(4)]
    assert outcome.metrics["loss/distil"] == pytest.approx(float(torch.stack(per_row).mean()), abs=1e-6)
    stepper, _ = make_stepper(tiny_model(), optim={"lr": 1e-9})
    outcome = stepper.optimize(rows)
    every = torch.cat([outcome.rows[index].stats.divergence for index in range(4)])
    assert outcome.metrics["loss/distil"] == pytest.approx(float(every.mean()), abs=1e-6)


def test_equal_prompts_of_both_roles_give_zero_divergence_at_every_token() -> None:
    rows = [replace(row, view_prompts={"teacher": row.prompt}) for row in ragged_rows(6)]
    stepper, _ = make_stepper(tiny_model(), teacher={"weights": "live"})
    outcome = stepper.optimize(rows)
    assert max(float(outcome.rows[index].stats.divergence.max()) for index in range(6)) < 1e-6
    assert outcome.metrics["optim/grad_norm"] < 1e-4


def test_micro_batches_hold_every_row_once_within_the_budget() -> None:
    rows = ragged_rows(40, seed=5)
    budget = 90
    batches = list(micro_batches([row.cost for row in rows], budget))
    assert sorted(index for batch in batches for index in batch) == list(range(40))
    for batch in batches:
        longest = max(rows[index].cost for index in batch)
        assert len(batch) == 1 or longest * len(batch) <= budget


def test_labels_are_the_completion_ids_row_by_row() -> None:
    assert labels([Passage((9,), (3, 4)), Passage((9,), (5,))], CPU).tolist() == [3, 4, 5]
    assert VOCABULARY > 5
