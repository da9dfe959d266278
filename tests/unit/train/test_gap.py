"""When a gap between sampler and trainer is told, and when it stops the run."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from atesd.losses.divergence import LossConfig
from atesd.train.batch import Row
from atesd.train.gap import GapRule
from atesd.train.scorer import Scorer
from atesd.types import UserError

from support.models import PAD, ragged_rows, tiny_model
from support.steppers import make_stepper


def gap(value: float) -> dict[str, float]:
    return {"rollout/logprob_gap": value}


def test_up_to_the_warning_nothing_is_said() -> None:
    rule = GapRule(0.25, 0.5)
    rule.heed({})
    rule.heed(gap(0.25))


def test_a_large_gap_is_told_once() -> None:
    rule = GapRule(0.25, 0.5)
    with pytest.warns(UserWarning, match=r"differ by 0.26 nats on average, more than rollout.gap_warning = 0.25: set"):
        rule.heed(gap(0.26))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rule.heed(gap(0.5))


@pytest.mark.parametrize("value", [0.51, float("nan"), float("inf")])
def test_a_gross_gap_stops_the_run(value: float) -> None:
    with pytest.raises(UserError, match=rf"differ by {value} nats .* than rollout.gap_limit = 0.5: .*or raise the lim"):
        GapRule(0.25, 0.5).heed(gap(value))


def sampled_rows(model: torch.nn.Module, off: float) -> list[Row]:
    """Return rows whose sampler gave every token a log-probability that is `off` from the trainer's."""
    rows: Sequence[Row] = ragged_rows(6)
    scorer = Scorer(model, pad_id=PAD, loss=LossConfig(), temperature=1.0, token_budget=1000)
    with torch.no_grad():
        found = scorer.each([row.student for row in rows], scorer.log_likelihood)
    return [replace(row, sampler_logprobs=tuple((each + off).tolist())) for row, each in zip(rows, found, strict=True)]


def test_a_run_stops_before_its_weights_move() -> None:
    model = tiny_model()
    stepper, _ = make_stepper(model, gap_rule=GapRule(0.05, 0.3))
    before = [weight.detach().clone() for weight in model.parameters()]
    with pytest.raises(UserError, match=r"differ by 0\.4 nats on average"):
        stepper.optimize(sampled_rows(model, 0.4))
    assert all(map(torch.equal, before, model.parameters()))
    with pytest.warns(UserWarning, match=r"differ by 0\.2 nats"):
        stepper.optimize(sampled_rows(model, 0.2))


def test_only_the_weights_that_sampled_are_judged() -> None:
    """A second update of the same completions differs from their sampler because the first has moved the weights."""
    model = tiny_model()
    stepper, _ = make_stepper(model, gap_rule=GapRule(1e-3, 1e-3), step={"updates_per_batch": 2, "problems": 6})
    metrics = stepper.optimize(sampled_rows(model, 0.0)).metrics
    assert metrics["rollout/logprob_gap"] > 1e-3


def test_another_temperature_of_the_student_is_no_gap() -> None:
    model = tiny_model()
    stepper, _ = make_stepper(model, gap_rule=GapRule(1e-3, 1e-3), loss={"temperature_student": 2.0})
    stepper.optimize(sampled_rows(model, 0.0))
