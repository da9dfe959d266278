"""Micro-batches, padding and order change nothing but memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from atesd.losses.divergence import LossConfig
from atesd.train import batch
from atesd.train.batch import Passage, Row, cheapest_passes, labels, micro_batches, view_input
from atesd.train.scorer import Scorer

from support.models import EOS, PAD, VOCABULARY, ragged_rows, tiny_model
from support.steppers import make_stepper

CPU = torch.device("cpu")


def passage(row: Row, role: str) -> Passage:
    return row.student if role == "student" else row.view("teacher")


def scorer_of(model: torch.nn.Module, budget: int = 10_000) -> Scorer:
    return Scorer(model, pad_id=PAD, loss=LossConfig(), temperature=1.0, token_budget=budget)


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


def test_places_come_from_lengths_even_where_the_pad_id_is_an_end_token() -> None:
    """In a width of 5, the first row is scored behind its prompt of 2 at 1, 2, 3, the second behind 4 at 5 + 3, 4."""
    inputs = view_input([Passage((EOS, 4), (EOS, 5, EOS)), Passage((7, EOS, 8, 9), (EOS, 3))], EOS, CPU)
    (only,) = inputs.passes
    assert only.ids_BL.tolist() == [[EOS, 4, EOS, 5, EOS], [7, EOS, 8, 9, EOS]]
    assert only.places_N.tolist() == [1, 2, 3, 8, 9]
    outputs = torch.arange(10.0).view(2, 5, 1)
    assert inputs.scored([outputs])[:, 0].tolist() == [1, 2, 3, 8, 9]


def test_passes_of_like_lengths_are_chosen_and_put_back_in_order() -> None:
    """Costs 3, 100, 4 with 64 a pass: 100 apart and 3, 4 together cost 100 + 8 + 128 = 236; all at once 300 + 64."""
    assert cheapest_passes([3, 100, 4], 64) == [[1], [0, 2]]
    assert cheapest_passes([3, 100, 4], 200) == [[0, 1, 2]]  # 300 + 200 against 108 + 400
    passages = [Passage((9,), (1, 2, 3)), Passage((9,) * 98, (4, 5, 6)), Passage((9, 9), (7, 8, 9))]
    inputs = view_input(passages, PAD, CPU)
    assert [each.ids_BL.shape for each in inputs.passes] == [(1, 100), (2, 4)]
    outputs = [each.ids_BL[..., None] for each in inputs.passes]
    # What stands at a scored position is the token before the one that it predicts.
    assert inputs.scored(outputs)[:, 0].tolist() == [9, 1, 2, 9, 4, 5, 9, 7, 8]


@pytest.mark.parametrize("overhead", [0, 5, 64])
@pytest.mark.parametrize("budget", [None, 30])
def test_no_cut_into_neighbours_in_length_is_cheaper(overhead: int, budget: int | None) -> None:
    """Tried: all 2^7 cuts of eight passages."""
    costs = [5, 9, 9, 30, 2, 14, 3, 8]
    ordered = sorted(costs, reverse=True)

    def price(passes: list[list[int]]) -> int:
        return sum(max(each) * len(each) + overhead for each in passes)

    every = []
    for cut in range(2**7):
        ends = [place + 1 for place in range(7) if cut >> place & 1] + [8]
        passes = [ordered[start:end] for start, end in zip([0, *ends], ends, strict=False)]
        if budget is None or all(max(each) * len(each) <= budget for each in passes):
            every.append(price(passes))
    found = cheapest_passes(costs, overhead, budget)
    assert sorted(index for each in found for index in each) == list(range(8))
    assert price([[costs[index] for index in each] for each in found]) == min(every)


def test_a_passage_longer_than_the_budget_is_read_alone() -> None:
    assert cheapest_passes([50, 50, 10, 10], 1, 20) == [[0], [1], [2, 3]]


@pytest.mark.parametrize("budget", [1, 60, 10_000])
def test_scores_do_not_depend_on_the_passes(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients are the same in one pass, in those that padding asks for, and in one a passage."""
    monkeypatch.setattr(batch, "PASS_POSITIONS", 10)
    model, rows = tiny_model(), ragged_rows(8)
    passages = [row.view("teacher") for row in rows]
    found = []
    for own in (scorer_of(model, budget), scorer_of(model, 10_000)):
        values_N = own.log_likelihood(passages)
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        found.append([values_N.detach(), *torch.autograd.grad((values_N * torch.arange(len(values_N))).sum(), weights)])
        monkeypatch.setattr(batch, "PASS_POSITIONS", 10**9)
    assert len(view_input(passages, PAD, CPU).passes) == 1
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5 * max(1.0, float(other.abs().max())), rtol=0)


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
    assert sorted(index for members in batches for index in members) == list(range(40))
    for members in batches:
        longest = max(rows[index].cost for index in members)
        assert len(members) == 1 or longest * len(members) <= budget


def test_labels_are_the_completion_ids_row_by_row() -> None:
    assert labels([Passage((9,), (3, 4)), Passage((9,), (5,))], CPU).tolist() == [3, 4, 5]
    assert VOCABULARY > 5
