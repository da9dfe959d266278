"""Targets against their formulas, and where two of them are the same."""

from __future__ import annotations

from dataclasses import replace
from math import exp, log

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from atesd.kinds import TargetSection
from atesd.losses.avsd import Avsd
from atesd.losses.paint import Paint
from atesd.losses.stats import TokenStats
from atesd.losses.target import AnchorMix, Extrapolate, Plain, Residual, Target

P = torch.tensor([[0.7, 0.2, 0.1]], dtype=torch.float64)
B = torch.tensor([[0.4, 0.4, 0.2]], dtype=torch.float64)


def distribution(target: Target, *views: torch.Tensor) -> list[float]:
    values: list[float] = target.log_target([view.log() for view in views]).softmax(-1)[0].tolist()
    return values


def normalised(*weights: float) -> list[float]:
    return [weight / sum(weights) for weight in weights]


def test_extrapolation_by_hand() -> None:
    # p^1.5 / b^.5
    expected = normalised(0.7**1.5 / 0.4**0.5, 0.2**1.5 / 0.4**0.5, 0.1**1.5 / 0.2**0.5)
    assert distribution(Extrapolate(lambda_x=1.5), P, B) == pytest.approx(expected)
    assert expected[0] > 0.7


def test_at_lambda_1_it_is_the_plain_target_and_asks_for_no_base() -> None:
    neutral = Extrapolate(lambda_x=1.0)
    assert neutral.views == Plain().views == ("teacher",)
    assert neutral.is_first_view
    assert neutral.log_target([P.log()]) is not None
    assert torch.equal(neutral.log_target([P.log()]), Plain().log_target([P.log()]))


def test_another_strength_gives_another_target_and_leaves_the_first() -> None:
    target = Extrapolate(lambda_x=1.5, guard=True)
    assert target.at(1.2) == Extrapolate(lambda_x=1.2, guard=True)
    assert target.at(1.5) is target
    assert target.at(1.0).views == ("teacher",)
    for fixed in (Plain(), AnchorMix(), Residual()):
        assert fixed.at(1.7) is fixed
        assert fixed.strength == 1.0
        assert not fixed.capped
    assert (target.strength, target.capped) == (1.5, True)
    assert not Extrapolate().capped


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_a_guard_without_extrapolation_is_refused(strength: float) -> None:
    with pytest.raises(ValidationError, match=r"set target\.lambda_x above 1, such as 1\.25, or remove target\.guard"):
        Extrapolate(lambda_x=strength, guard=True)
    Extrapolate(lambda_x=1.01, guard=True)


def test_the_anchor_mix_is_a_geometric_mean_and_with_the_base_an_interpolation() -> None:
    expected = normalised(*((0.25 * p.log() + 0.75 * b.log()).exp().item() for p, b in zip(P[0], B[0], strict=True)))
    assert distribution(AnchorMix(weight=0.25), P, B) == pytest.approx(expected)
    assert distribution(AnchorMix(weight=0.25), P, B) == pytest.approx(distribution(Extrapolate(lambda_x=0.25), P, B))
    assert AnchorMix().views == ("teacher", "base")
    assert AnchorMix(anchor="answer").views == ("teacher", "answer")


def test_the_residual_is_scaled_and_clipped_per_entry() -> None:
    full = torch.tensor([[0.9, 0.0999, 0.0001]], dtype=torch.float64)
    # residuals log(.9/.7), log(.0999/.2), log(.0001/.1) = -6.9 cut at -5; times .6
    expected = normalised(0.7 * (0.9 / 0.7) ** 0.6, 0.2 * (0.0999 / 0.2) ** 0.6, 0.1 * 2.718281828459045**-3.0)
    assert distribution(Residual(), P, full) == pytest.approx(expected)
    assert distribution(Residual(), P, P) == pytest.approx(P[0].tolist())
    assert Residual().views == ("teacher", "full")


# (1/2, 1/2) has entropy ln 2 = .693147, (.9, .1) has .9 ln(1/.9) + .1 ln 10 = .325083: .368064 apart.
EVEN = torch.tensor([[0.5, 0.5]], dtype=torch.float64)
SURE = torch.tensor([[0.9, 0.1]], dtype=torch.float64)


@pytest.mark.parametrize(("teacher", "student"), [(EVEN, SURE), (SURE, EVEN)])
def test_paint_draws_the_teacher_to_the_student_where_entropies_disagree(
    teacher: torch.Tensor, student: torch.Tensor
) -> None:
    near, far = Paint(weight=0.25, mismatch=0.3682), Paint(weight=0.25, mismatch=0.3680)
    assert distribution(near, teacher, student) == pytest.approx(teacher[0].tolist(), rel=1e-14)
    # (p_1 / p_2)^.75 (q_1 / q_2)^.25 = 9^.25 = sqrt(3) one way, 9^.75 = sqrt(27) the other way
    odds = 3**0.5 if teacher is EVEN else 27**0.5
    assert distribution(far, teacher, student) == pytest.approx([odds / (1 + odds), 1 / (1 + odds)])


def test_paint_decides_token_by_token() -> None:
    target = Paint(weight=0.25, mismatch=0.3)
    rows = target.log_target([torch.cat([EVEN, SURE, SURE]).log(), torch.cat([SURE, SURE, EVEN]).log()])
    assert torch.equal(rows[1], SURE[0].log())
    assert rows.softmax(-1)[:, 0].tolist() == pytest.approx([3**0.5 / (1 + 3**0.5), 0.9, 27**0.5 / (1 + 27**0.5)])
    always = Paint(weight=0.25, mismatch=0.0).log_target([SURE.log(), SURE.log()])
    torch.testing.assert_close(always, SURE.log())


def test_paint_counts_the_tokens_at_which_it_draws() -> None:
    nothing = torch.zeros(4)
    stats = TokenStats(**dict.fromkeys(TokenStats.__slots__, nothing))
    entropies = {"teacher_entropy": torch.tensor([1.0, 0.1, 0.5, 2.0]), "student_entropy": torch.ones(4)}
    assert Paint(mismatch=0.5).metrics(replace(stats, **entropies)) == {"target/painted_frac": 0.75}
    assert Paint(mismatch=0.95).metrics(replace(stats, **entropies)) == {"target/painted_frac": 0.25}
    assert Plain().metrics(stats) == Avsd().metrics(stats) == {}


def test_avsd_by_hand() -> None:
    """Views (.8, .2) twice and (.2, .8), student (.5, .5)."""
    views = [torch.tensor([row], dtype=torch.float64) for row in ([0.8, 0.2], [0.8, 0.2], [0.2, 0.8])]
    # q_G: (.8 .8 .2)^(1/3) : (.2 .2 .8)^(1/3) = 4^(1/3) : 1. q_A = (.6, .4): J is 0 for the first entry alone.
    second = 1 / (1 + 4 ** (1 / 3))
    residual = log(0.4 / second)
    assert log(0.6 / (1 - second)) < 0 < residual
    down, up = log(0.2 / 0.5), log(0.8 / 0.5)
    pull = abs(2 * down + up) / 3
    agreement = pull / ((-2 * down + up) / 3)
    gate = agreement * pull / (pull + residual)
    assert (agreement, gate) == (pytest.approx(0.59176, abs=1e-5), pytest.approx(0.55014, abs=1e-5))
    expected = normalised(1 - second, second * exp(gate * residual))
    assert distribution(Avsd(), *views, 0 * EVEN + 0.5) == pytest.approx(expected, abs=1e-7)


def test_avsd_is_the_teacher_where_all_views_are_and_the_consensus_where_they_pull_apart() -> None:
    assert distribution(Avsd(), P, P, P, B) == pytest.approx(P[0].tolist())
    assert distribution(Avsd(), P, P, P, P) == pytest.approx(P[0].tolist())
    # moves ln 3, ln 1, ln(1/3) of the first entry cancel: no gate, whatever the residual
    views = [torch.tensor([row], dtype=torch.float64) for row in ([0.6, 0.4], [0.2, 0.8], [0.2 / 3, 1 - 0.2 / 3])]
    found = Avsd().log_target([*(view.log() for view in views), torch.tensor([[0.2, 0.8]], dtype=torch.float64).log()])
    weights = [(0.6 * 0.2 * 0.2 / 3) ** (1 / 3), (0.4 * 0.8 * (1 - 0.2 / 3)) ** (1 / 3)]
    assert float(found[0, 0]) == pytest.approx(log(normalised(*weights)[0]), abs=1e-7)


def test_what_the_new_targets_read() -> None:
    assert (Paint().views, Avsd().views) == (("teacher",), ("teacher", "full", "answer"))
    assert [target.reads_student for target in (Plain(), Residual(), Paint(), Avsd())] == [False, False, True, True]
    assert not Paint().is_first_view
    assert not Avsd().is_first_view


def test_targets_leave_what_they_read_as_it_is() -> None:
    for target, count in ((Paint(mismatch=0.0), 2), (Avsd(), 4)):
        views = [torch.randn(3, 5, dtype=torch.float64).log_softmax(-1) for _ in range(count)]
        before = [view.clone() for view in views]
        target.log_target(views)
        for view, old in zip(views, before, strict=True):
            assert torch.equal(view, old)


@pytest.mark.parametrize(
    "fields",
    [{"kind": "extrapolate", "lambda_x": 0.0}, {"kind": "extrapolate", "lambda_x": -1.0},
     {"kind": "extrapolate", "lambda_x": float("inf")}, {"kind": "anchor_mix", "weight": 1.0},
     {"kind": "anchor_mix", "anchor": "full"}, {"kind": "residual", "bound": 0.0}, {"kind": "paint", "weight": 0.0},
     {"kind": "paint", "weight": 1.0}, {"kind": "paint", "mismatch": -0.1}],
)  # fmt: skip
def test_numbers_outside_the_domain_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(TargetSection).validate_python(fields)
