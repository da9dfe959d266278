"""Numbers for the log, worked by hand from small statistics."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from atesd.gates.gate import OpenGate
from atesd.gates.sdar import SdarGate
from atesd.losses.combine import Component
from atesd.losses.paint import Paint
from atesd.losses.policy import PolicyValues
from atesd.losses.stats import TokenStats
from atesd.losses.target import Plain
from atesd.train.batch import Row
from atesd.train.stats import (
    Listening,
    MicroScores,
    RowStats,
    concatenate,
    fetched,
    listening_metrics,
    logprob_gap,
    policy_metrics,
    ratio_bin,
    split_rows,
    stream_metrics,
)


def stats_of(count: int, **columns: list[float]) -> TokenStats:
    made = {name: torch.tensor(columns.get(name, [0.0] * count)) for name in TokenStats.__slots__}
    return TokenStats(**made)


def row(ratio: float = 0.5, components: tuple[str, ...] = ("distil",), sampler: tuple[float, ...] = ()) -> Row:
    return Row((1,), (2, 3), components, 0, ratio, sampler_logprobs=sampler)


def scored(stats: TokenStats) -> RowStats:
    return RowStats(stats, torch.ones_like(stats.divergence))


def test_streams_are_summarised_over_tokens_and_by_quarter_of_the_ratio() -> None:
    rows = [row(0.1), row(0.6), row(0.9, ("rl",))]
    kept = {
        0: scored(stats_of(2, divergence=[1.0, 3.0], top1_agree=[1.0, 0.0], student_entropy=[0.2, 0.4])),
        1: scored(stats_of(2, divergence=[5.0, 7.0], top1_agree=[1.0, 1.0], student_entropy=[0.6, 0.8])),
        2: scored(stats_of(2, divergence=[9.0, 9.0], student_entropy=[1.0, 1.2])),
    }
    found = stream_metrics(rows, kept)
    assert found["divergence/mean"] == 4.0
    assert found["loss/first_token"] == 3.0
    assert found["mismatch/top1"] == 0.25
    assert found["student/entropy"] == pytest.approx(0.7), "the student's own numbers are over reinforced tokens too"
    assert found["bin/0.00-0.25/divergence"] == 2.0
    assert found["bin/0.50-0.75/mismatch"] == 0.0
    assert "bin/0.75-1.00/divergence" not in found
    assert set(stream_metrics(rows, {2: kept[2]})) == {"student/entropy", "student/confidence"}
    assert stream_metrics(rows, {}) == {}


def test_every_number_is_of_its_own_column() -> None:
    columns = {
        "clip_frac": [0.1, 0.3], "clipped_mass": [0.2, 0.6], "reversed": [1.0, 0.0], "student_max_prob": [0.5, 0.7],
        "teacher_entropy": [1.0, 2.0], "student_entropy": [3.0, 5.0], "divergence": [1.0, 9.0],
    }  # fmt: skip
    found = stream_metrics([row(0.5)], {0: scored(stats_of(2, **columns))})
    assert found == pytest.approx(
        {
            "student/entropy": 4.0,
            "student/confidence": 0.6,
            "loss/clip_frac": 0.2,
            "loss/clipped_mass": 0.4,
            "loss/reversed_frac": 0.5,
            "loss/first_token": 1.0,
            "divergence/mean": 5.0,
            "divergence/p99": 9.0,
            "mismatch/top1": 1.0,
            "teacher/entropy": 1.5,
            "bin/0.50-0.75/divergence": 5.0,
            "bin/0.50-0.75/p99": 9.0,
            "bin/0.50-0.75/mismatch": 1.0,
            "bin/0.50-0.75/clip_frac": 0.2,
        }
    )


def test_the_upper_tail_is_the_value_that_99_percent_do_not_exceed() -> None:
    values = [float(value) for value in range(200)]
    found = stream_metrics([row()], {0: scored(stats_of(200, divergence=values))})
    assert found["divergence/p99"] == 197.0


@pytest.mark.parametrize(
    ("ratio", "name"),
    [(0.0, "0.00-0.25"), (0.25, "0.25-0.50"), (0.4999, "0.25-0.50"), (0.75, "0.75-1.00"), (1.0, "0.75-1.00")],
)
def test_bins_are_quarters_and_the_last_holds_1(ratio: float, name: str) -> None:
    assert ratio_bin(ratio) == name


def test_the_gap_to_the_sampler_leaves_out_rows_that_were_not_sampled() -> None:
    kept = {index: scored(stats_of(2, student_logprob=[-1.0, -2.0])) for index in (0, 1)}
    found = logprob_gap([row(sampler=(-1.5, -2.25)), row()], kept)
    assert found == {"rollout/logprob_gap": 0.375}
    assert logprob_gap([row()], {0: kept[0]}) == {}


def test_rows_are_cut_out_of_a_micro_batch_and_joined_again() -> None:
    whole = stats_of(3, divergence=[1.0, 2.0, 3.0])
    micro = MicroScores(whole, torch.tensor([0.1, 0.2, 0.3]), {})
    first, second = split_rows(micro, [1, 2])
    assert first.stats.divergence.tolist() == [1.0]
    assert second.weight_T.tolist() == pytest.approx([0.2, 0.3])
    assert second.as_sampled is second.stats.student_logprob
    micro.sampled_logprob_N = torch.tensor([-1.0, -2.0, -3.0])
    assert [each.as_sampled.tolist() for each in split_rows(micro, [1, 2])] == [[-1.0], [-2.0, -3.0]]
    assert torch.equal(concatenate([first.stats, second.stats]).divergence, whole.divergence)


def test_listening_is_described_over_all_micro_batches() -> None:
    def part(gap: list[float], selected: list[float], gate: list[float]) -> Listening:
        stats = stats_of(len(gap), teacher_logprob=gap, teacher_entropy=gap)
        return Listening(stats, torch.tensor(selected), torch.tensor(gate))

    parts = [part([1.0, -1.0], [1.0, 0.0], [0.9, 0.4]), part([3.0], [1.0], [0.6])]
    found = listening_metrics(SdarGate(), Paint(mismatch=2.0), parts)
    assert found == pytest.approx(
        {
            "gate/kept_frac": 2 / 3,
            "gate/mean": 0.5,
            "gate/open_frac": 2 / 3,
            "gate/gap": 1.0,
            "gate/gap_negative": 1 / 3,
            "target/painted_frac": 1 / 3,
        }
    )


def test_kept_is_every_token_with_a_weight_however_large() -> None:
    part = Listening(stats_of(3), torch.tensor([0.0, 0.5, 2.5]), torch.tensor([1.0, 0.2, 0.4]))
    found = listening_metrics(OpenGate(), Plain(), [part])
    assert found == pytest.approx({"gate/kept_frac": 2 / 3, "gate/mean": (0.5 * 0.2 + 2.5 * 0.4) / 3})


def test_the_policy_is_described_over_all_micro_batches() -> None:
    def part(value: float, count: int) -> PolicyValues:
        column: Tensor = torch.full((count,), value)
        return PolicyValues(column, column, column * 0, column, column + 1, column + 2)

    assert policy_metrics([part(1.0, 1), part(2.0, 3)]) == {
        "rl/ratio": 1.75,
        "rl/clip_frac": 0.0,
        "rl/sampler_weight": 1.75,
        "rl/kl": 2.75,
        "rl/credit": 3.75,
    }


def test_what_is_fetched_is_what_was_sent() -> None:
    """Losses are sums of weights times values over their normalisers: (1 * 2 + 3 * 4) / 7 = 2, 5 * 2 / 4 = 2.5."""

    def tensors(start: int, count: int, size: int) -> list[Tensor]:
        return [torch.arange(size) + 10.0 * place + start for place in range(count)]

    first = TokenStats(*tensors(0, len(TokenStats.__slots__), 2))
    second = TokenStats(*tensors(500, len(TokenStats.__slots__), 3))
    ones, kept = torch.ones(2), torch.tensor([True, False])
    policy = PolicyValues(*tensors(900, 6, 3))
    distil = Component(torch.tensor([2.0, 4.0], requires_grad=True), torch.tensor([1.0, 3.0]), 7.0)
    exact = Component(torch.tensor([2.0], dtype=torch.float64), torch.tensor([5.0]), 4.0)
    sent = [
        MicroScores(first, 3 * ones, {"distil": distil}, heard=Listening(first, kept, 5 * ones)),
        MicroScores(second, torch.zeros(3), {"rl": exact, "nll": exact}, policy=policy),
    ]
    found = fetched([each.detached() for each in sent])
    assert [each.losses for each in found] == [{"distil": 2.0}, {"rl": 2.5, "nll": 2.5}]
    for one, other in zip(found, sent, strict=True):
        for name in TokenStats.__slots__:
            torch.testing.assert_close(getattr(one.stats, name), getattr(other.stats, name), atol=0, rtol=0)
        torch.testing.assert_close(one.weight_N, other.weight_N, atol=0, rtol=0)
    heard = found[0].heard
    assert heard is not None
    assert heard.stats is found[0].stats
    assert heard.selection_N.tolist() == [True, False]
    assert heard.gate_N.tolist() == [5.0, 5.0]
    assert found[1].heard is None
    assert found[1].policy is not None
    assert found[1].policy.kl_N.tolist() == policy.kl_N.tolist()
    assert found[1].policy.ratio_N.tolist() == policy.ratio_N.tolist()
