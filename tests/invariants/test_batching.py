"""Micro-batches, padding and order change nothing but memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from atesd.losses.divergence import LossConfig
from atesd.train.batch import Row, labels, micro_batches, view_input
from atesd.train.forward import label_streams, scored_hidden

from support.models import EOS, PAD, VOCABULARY, ragged_rows, tiny_model
from support.steppers import make_stepper

CPU = torch.device("cpu")


def logprobs(model: torch.nn.Module, rows: list[Row], prompt: str) -> list[Tensor]:
    """Score the completions of all rows in one batch, and return one tensor a row."""
    completions = [row.completion for row in rows]
    inputs = view_input([getattr(row, prompt) for row in rows], completions, PAD, CPU)
    streams = label_streams(scored_hidden(model, inputs), labels(completions, CPU), LossConfig())
    return list(streams.logprob_N.detach().split([len(completion) for completion in completions]))


@pytest.mark.parametrize("prompt", ["student_prompt", "teacher_prompt"])
def test_a_sequence_alone_equals_itself_in_a_ragged_batch(prompt: str) -> None:
    model, rows = tiny_model(), ragged_rows(8)
    together = logprobs(model, rows, prompt)
    for row, inside in zip(rows, together, strict=True):
        (alone,) = logprobs(model, [row], prompt)
        torch.testing.assert_close(inside, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("prompt", ["student_prompt", "teacher_prompt"])
def test_scores_are_those_of_a_plain_forward_pass(prompt: str) -> None:
    """The first completion token is predicted from the last prompt token, in both roles, at unequal prompt lengths."""
    model, rows = tiny_model(), ragged_rows(5, seed=3)
    for row, scored in zip(rows, logprobs(model, rows, prompt), strict=True):
        start = getattr(row, prompt)
        ids = torch.tensor([[*start, *row.completion]])
        plain = model(ids).logits[0].log_softmax(-1)
        expected = [plain[len(start) - 1 + place, token] for place, token in enumerate(row.completion)]
        torch.testing.assert_close(scored, torch.stack(expected), atol=1e-5, rtol=0)


def test_masks_come_from_lengths_even_where_the_pad_id_is_an_end_token() -> None:
    completions = [(EOS, 5, EOS), (EOS,)]
    inputs = view_input([(EOS, 4), (7, EOS, 8, 9)], completions, EOS, CPU)
    assert inputs.scored_BL.sum().item() == 4
    # Row lengths without the last completion id: 2 + 2 and 4 + 0.
    assert inputs.attention_mask_BL.sum(dim=1).tolist() == [4, 4]
    assert inputs.position_ids_BL.tolist() == [[0, 1, 2, 3], [0, 1, 2, 3]]
    ragged = view_input([(3,), (4, 5, 6)], [(7,), (8,)], EOS, CPU)
    assert ragged.position_ids_BL.tolist() == [[0, 0, 0], [0, 1, 2]], "positions begin at the first real token"
    assert inputs.input_ids_BL.tolist() == [[EOS, 4, EOS, 5], [7, EOS, 8, 9]]


def test_the_head_sees_exactly_the_scored_rows() -> None:
    model, rows = tiny_model(), ragged_rows(6)
    completions = [row.completion for row in rows]
    scored = scored_hidden(model, view_input([row.teacher_prompt for row in rows], completions, PAD, CPU))
    assert scored.hidden_NH.shape == (sum(len(completion) for completion in completions), 32)


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
    assert len(list(micro_batches(rows, 1))) == 8
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
    rows = [replace(row, teacher_prompt=row.student_prompt) for row in ragged_rows(6)]
    stepper, _ = make_stepper(tiny_model(), teacher={"weights": "live"})
    outcome = stepper.optimize(rows)
    assert max(float(outcome.rows[index].stats.divergence.max()) for index in range(6)) < 1e-6
    assert outcome.metrics["optim/grad_norm"] < 1e-4


def test_micro_batches_hold_every_row_once_within_the_budget() -> None:
    rows = ragged_rows(40, seed=5)
    budget = 90
    batches = list(micro_batches(rows, budget))
    assert sorted(index for batch in batches for index in batch) == list(range(40))
    for batch in batches:
        longest = max(rows[index].cost for index in batch)
        assert len(batch) == 1 or longest * len(batch) <= budget


def test_labels_are_the_completion_ids_row_by_row() -> None:
    assert labels([(3, 4), (5,)], CPU).tolist() == [3, 4, 5]
    assert VOCABULARY > 5
