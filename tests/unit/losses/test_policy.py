"""The reinforcement branch against numbers worked by hand and a scalar float64 reference."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from atesd.losses.policy import PolicyConfig, PolicyTokens, TeacherCredit, group_advantages, policy_values


def tokens(
    advantage: list[float], old: list[float], *, sampler: list[float] | None = None, sequence: list[int] | None = None,
    reference: list[float] | None = None, teacher: list[float] | None = None,
) -> PolicyTokens:  # fmt: skip
    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)

    return PolicyTokens(
        advantage_N=column(advantage),
        old_logprob_N=column(old),
        sampler_logprob_N=column(old if sampler is None else sampler),
        reference_logprob_N=None if reference is None else column(reference),
        teacher_logprob_N=None if teacher is None else column(teacher),
        sequence_N=torch.tensor(sequence or list(range(len(old)))),
    )


def scalar(now: float, old: float, sampler: float, reference: float, advantage: float, config: PolicyConfig) -> float:
    """The loss of one token, spelled out."""
    ratio = math.exp(now - old)
    gain = min(ratio * advantage, min(max(ratio, 1 - config.eps_low), 1 + config.eps_high) * advantage)
    if config.dual_clip is not None and advantage < 0:
        gain = max(gain, config.dual_clip * advantage)
    weight = 1.0 if config.importance_clip is None else min(math.exp(old - sampler), config.importance_clip)
    d = reference - now
    return config.kl_coef * (math.exp(d) - d - 1) - weight * gain


def test_advantages_by_hand() -> None:
    # mean .5, std .5: (1 - .5) / (.5 + 1e-6)
    assert group_advantages([1, 0, 0, 1], "std") == pytest.approx([1, -1, -1, 1], abs=1e-5)
    assert group_advantages([1, 0, 0, 0], "none") == [0.75, -0.25, -0.25, -0.25]
    assert group_advantages([1, 0, 0, 0], "std")[0] == pytest.approx(0.75 / (math.sqrt(3) / 4 + 1e-6), rel=1e-12)


def test_advantages_as_trl_computes_them() -> None:
    """torch.std is TRL's, with ddof 1; it adds 1e-4."""
    # sum of squares .75, over 3: std 1/2
    assert group_advantages([1, 0, 0, 0], "std_trl")[0] == pytest.approx(0.75 / (0.5 + 1e-4), rel=1e-12)
    rewards = torch.tensor([0.3, -1.2, 0.31, 2.0, 0.0, 0.0], dtype=torch.float64)
    expected = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
    assert group_advantages(rewards.tolist(), "std_trl") == pytest.approx(expected.tolist(), rel=1e-12)
    near = group_advantages([0.5, 0.5 + 1e-5], "std_trl")  # the eps is most of the divisor here
    assert near[1] == pytest.approx(5e-6 / (1e-5 / math.sqrt(2) + 1e-4), rel=1e-6)


@pytest.mark.parametrize("rewards", [[1.0, 1.0, 1.0], [0.0], [0.3, 0.3], [0.1] * 3, [0.7] * 6])
def test_equal_rewards_have_no_advantage(rewards: list[float]) -> None:
    zero = [0.0] * len(rewards)
    assert group_advantages(rewards, "std") == group_advantages(rewards, "std_trl") == zero
    assert group_advantages(rewards, "none") == zero


@given(st.lists(st.floats(-1, 0), min_size=4, max_size=4), st.floats(-2, 2), st.sampled_from([None, 3.0]))
def test_values_and_gradients_equal_the_scalar_reference(
    logs: list[float], advantage: float, dual_clip: float | None
) -> None:
    config = PolicyConfig(kl_coef=0.05, dual_clip=dual_clip, eps_high=0.28)
    now, old, sampler, reference = logs
    logprob = torch.tensor([3 * now], dtype=torch.float64, requires_grad=True)
    batch = tokens([advantage], [3 * old], sampler=[sampler], reference=[reference])
    values = policy_values(logprob, batch, config)
    expected = scalar(3 * now, 3 * old, sampler, reference, advantage, config)
    assert float(values.loss_N.detach()) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    values.loss_N.sum().backward()
    step = 1e-6
    slope = (
        scalar(3 * now + step, 3 * old, sampler, reference, advantage, config)
        - scalar(3 * now - step, 3 * old, sampler, reference, advantage, config)
    ) / (2 * step)
    at_a_kink = abs(math.exp(3 * now - 3 * old) - 0.8) < 1e-3 or abs(math.exp(3 * now - 3 * old) - 1.28) < 1e-3
    at_a_kink |= abs(math.exp(3 * now - 3 * old) - 3.0) < 1e-3 or now == old
    assert logprob.grad is not None
    if not at_a_kink:
        assert float(logprob.grad) == pytest.approx(slope, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize(
    ("ratio", "advantage", "held"),
    [(1.0, 1.0, 0), (1.3, 1.0, 1), (0.7, 1.0, 0), (1.3, -1.0, 0), (0.7, -1.0, 1), (4.0, -1.0, 1), (2.9, -1.0, 0)],
)
def test_where_a_clip_holds_there_is_no_gradient(ratio: float, advantage: float, held: int) -> None:
    logprob = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    values = policy_values(logprob, tokens([advantage], [0.0]), PolicyConfig())
    values.loss_N.sum().backward()
    assert values.clipped_N.tolist() == [held]
    assert logprob.grad is not None
    assert float(logprob.grad) == pytest.approx(0.0 if held else -ratio * advantage)


def test_on_policy_the_gradient_is_that_of_reinforce_with_the_advantage() -> None:
    logprob = torch.tensor([-0.5, -1.5], dtype=torch.float64, requires_grad=True)
    batch = tokens([2.0, -1.0], [-0.5, -1.5])
    policy_values(logprob, batch, PolicyConfig()).loss_N.sum().backward()
    torch.testing.assert_close(logprob.grad, torch.tensor([-2.0, 1.0], dtype=torch.float64))


def test_a_sampler_with_other_probabilities_is_corrected_up_to_the_clip() -> None:
    batch = tokens([1.0, 1.0], [math.log(0.6), math.log(0.6)], sampler=[math.log(0.4), math.log(0.1)])
    logprob = batch.old_logprob_N.clone()
    assert policy_values(logprob, batch, PolicyConfig()).weight_N.tolist() == pytest.approx([1.5, 2.0])
    free = policy_values(logprob, batch, PolicyConfig(importance_clip=None))
    assert free.weight_N.tolist() == [1.0, 1.0]


def test_k3_is_the_kl_in_expectation_and_never_negative() -> None:
    q = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    r = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    batch = replace_reference(tokens([0.0] * 3, q.log().tolist()), r.log())
    values = policy_values(q.log(), batch, PolicyConfig(kl_coef=1.0))
    assert float((q * values.kl_N).sum()) == pytest.approx(float((q * (q / r).log()).sum()))
    assert (values.kl_N >= 0).all()


def replace_reference(batch: PolicyTokens, reference: Tensor) -> PolicyTokens:
    return batch._replace(reference_logprob_N=reference)


def test_gspo_uses_the_sequences_mean_ratio_and_its_gradient() -> None:
    """Sequence 0 has log ratios .2 and -.1 (mean .05), sequence 1 has .1: s dA/dlogp_t = s A / |y| after the mean."""
    logprob = torch.tensor([-0.8, -1.1, -0.9], dtype=torch.float64, requires_grad=True)
    batch = tokens([2.0, 2.0, -1.0], [-1.0, -1.0, -1.0], sequence=[4, 4, 9])
    values = policy_values(logprob, batch, PolicyConfig(ratio="sequence", eps_low=0.5, eps_high=0.5))
    expected = torch.tensor([0.05, 0.05, 0.1], dtype=torch.float64).exp()
    torch.testing.assert_close(values.ratio_N, expected)
    (values.loss_N[:2].mean() + values.loss_N[2]).backward()
    s = math.exp(0.05)
    torch.testing.assert_close(logprob.grad, torch.tensor([-2 * s / 2, -2 * s / 2, math.exp(0.1)], dtype=torch.float64))


@pytest.mark.parametrize("importance_clip", [None, 2.0])
@pytest.mark.parametrize("per_token", [False, True])
def test_gspos_gradient_is_that_of_its_value_whatever_weighs_the_tokens(
    importance_clip: float | None, per_token: bool
) -> None:
    """Finite differences; sampler weights of .5, 1.5 and 2 (a cut 4) in one sequence, then 1.2 and .9; one is held."""
    sequence = [5, 5, 5, 2, 2, 8]
    old = torch.tensor([-1.0, -1.2, -0.7, -2.0, -0.4, -1.0], dtype=torch.float64)
    sampler = old - torch.tensor([0.5, 1.5, 4.0, 1.2, 0.9, 0.7], dtype=torch.float64).log()
    advantage = [1.0, 1.0, 1.0, -0.8, -0.8, 1.0]
    batch = tokens(advantage, old.tolist(), sampler=sampler.tolist(), sequence=sequence, reference=[-1.0] * 6)
    config = PolicyConfig(ratio="sequence", importance_clip=importance_clip, kl_coef=0.1)
    outer = torch.tensor([1.0, 0.3, 2.0, 0.7, 1.1, 1.0] if per_token else [1 / 3] * 3 + [0.5] * 2 + [1.0]).double()

    def loss(logprob: Tensor) -> Tensor:
        return (outer * policy_values(logprob, batch, config).loss_N).sum()

    moved = torch.tensor([0.1, -0.05, 0.2, -0.1, 0.3, 0.4], dtype=torch.float64)
    logprob = (old + moved).requires_grad_()
    loss(logprob).backward()
    assert logprob.grad is not None
    assert policy_values(logprob, batch, config).clipped_N.tolist() == [0, 0, 0, 0, 0, 1]
    step = 1e-6
    for place in range(6):
        shift = torch.zeros(6, dtype=torch.float64)
        shift[place] = step
        with torch.no_grad():
            slope = float(loss(logprob + shift) - loss(logprob - shift)) / (2 * step)
        assert float(logprob.grad[place]) == pytest.approx(slope, rel=1e-7, abs=1e-9)


# ---- RLSD: the teacher's say in the size of advantages ------------------------------------------------------------

RLSD = PolicyConfig(teacher_credit=TeacherCredit())


@pytest.mark.parametrize(
    ("advantage", "old", "teacher", "factor"),
    [
        (1.0, 0.5, 0.55, 0.5 + 0.5 * 1.1),  # p_T / p_old = 1.1, the attempt was good: more
        (-1.0, 0.5, 0.55, 0.5 + 0.5 / 1.1),  # the attempt was bad: less blame on what the teacher likes
        (2.0, 0.5, 0.45, 0.5 + 0.5 * 0.9),
        (-2.0, 0.5, 0.45, 0.5 + 0.5 / 0.9),
        (1.0, 0.1, 0.9, 0.5 + 0.5 * 1.2),  # clipped at 1.2
        (-1.0, 0.1, 0.9, 0.5 + 0.5 * 0.8),  # 1/9, clipped at .8
        (1.0, 1e-30, 1.0, 0.5 + 0.5 * 1.2),
        (0.0, 0.5, 0.9, 1.0),  # sign(0) = 0: exp(0)
    ],
)
def test_the_teacher_scales_an_advantage_by_hand(advantage: float, old: float, teacher: float, factor: float) -> None:
    """A_t = A (1/2 + 1/2 clip((p_T / p_old)^sign(A), .8, 1.2)): value, gradient and what is logged."""
    batch = tokens([advantage], [math.log(old)], teacher=[math.log(teacher)])
    logprob = batch.old_logprob_N.clone().requires_grad_()
    values = policy_values(logprob, batch, RLSD)
    assert float(values.credit_N) == pytest.approx(factor)
    values.loss_N.sum().backward()
    assert float(values.loss_N.detach()) == pytest.approx(-advantage * factor)
    assert logprob.grad is not None
    assert float(logprob.grad) == pytest.approx(-advantage * factor)


def test_the_share_and_the_clip_of_the_teachers_credit() -> None:
    batch = tokens([1.0, 1.0], [math.log(0.5)] * 2, teacher=[math.log(0.6), math.log(0.9)])
    config = PolicyConfig(teacher_credit=TeacherCredit(share=1.0, clip=0.5))
    assert policy_values(batch.old_logprob_N, batch, config).credit_N.tolist() == pytest.approx([1.2, 1.5])
    config = PolicyConfig(teacher_credit=TeacherCredit(share=0.25, clip=0.5))
    assert policy_values(batch.old_logprob_N, batch, config).credit_N.tolist() == pytest.approx([1.05, 1.125])


@pytest.mark.parametrize("teacher", [None, [math.log(0.9)] * 2])
def test_without_the_option_or_without_a_teacher_advantages_are_the_attempts(teacher: list[float] | None) -> None:
    batch = tokens([1.0, -1.0], [math.log(0.5)] * 2, teacher=teacher)
    config = PolicyConfig() if teacher else RLSD
    values = policy_values(batch.old_logprob_N, batch, config)
    assert values.credit_N.tolist() == [1.0, 1.0]
    assert values.loss_N.tolist() == [-1.0, 1.0]


@given(st.lists(st.floats(-1, 0), min_size=5, max_size=5), st.floats(-2, 2), st.floats(0.05, 1.0), st.floats(0.05, 0.9))
def test_the_scaled_advantage_stands_in_every_place_of_the_loss(
    logs: list[float], advantage: float, share: float, clip: float
) -> None:
    """Clips, dual clip and correction of the scalar reference, at the scaled advantage; its gradient by differences."""
    config = PolicyConfig(kl_coef=0.05, eps_high=0.28, teacher_credit=TeacherCredit(share=share, clip=clip))
    now, old, sampler, reference, teacher = logs
    sign = (advantage > 0) - (advantage < 0)
    scale = min(max(math.exp(sign * (2 * teacher - 3 * old)), 1 - clip), 1 + clip)
    scaled = advantage * (1 - share + share * scale)
    logprob = torch.tensor([3 * now], dtype=torch.float64, requires_grad=True)
    batch = tokens([advantage], [3 * old], sampler=[sampler], reference=[reference], teacher=[2 * teacher])
    values = policy_values(logprob, batch, config)
    assert float(values.loss_N.detach()) == pytest.approx(
        scalar(3 * now, 3 * old, sampler, reference, scaled, config), rel=1e-9, abs=1e-12
    )
    values.loss_N.sum().backward()
    ratio, step = math.exp(3 * now - 3 * old), 1e-6
    ends = [scalar(3 * now + move, 3 * old, sampler, reference, scaled, config) for move in (step, -step)]
    assert logprob.grad is not None
    if min(abs(ratio - kink) for kink in (0.8, 1.28, 3.0)) > 1e-3 and now != old:
        assert float(logprob.grad) == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("fields", [{"share": 0.0}, {"share": 1.1}, {"clip": 0.0}, {"clip": 1.0}])
def test_a_credit_that_makes_no_sense_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        TeacherCredit(**fields)


@pytest.mark.parametrize("fields", [{"eps_low": 1.0}, {"eps_high": 0.0}, {"dual_clip": 1.0}, {"importance_clip": 0.5}])
def test_settings_that_make_no_sense_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        PolicyConfig(**fields)
