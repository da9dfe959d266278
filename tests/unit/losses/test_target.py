"""Targets against their formulas, and where two of them are the same."""

from __future__ import annotations

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from atesd.kinds import TargetSection
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


@pytest.mark.parametrize(
    "fields",
    [{"kind": "extrapolate", "lambda_x": 0.0}, {"kind": "extrapolate", "lambda_x": -1.0},
     {"kind": "extrapolate", "lambda_x": float("inf")}, {"kind": "anchor_mix", "weight": 1.0},
     {"kind": "anchor_mix", "anchor": "full"}, {"kind": "residual", "bound": 0.0}],
)  # fmt: skip
def test_numbers_outside_the_domain_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(TargetSection).validate_python(fields)
