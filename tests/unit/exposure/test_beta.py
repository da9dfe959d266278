from __future__ import annotations

import json
from math import exp, lgamma, log, sqrt

import numpy as np
import pytest
import torch
from torch.distributions import Beta

from atesd.exposure.beta import BetaPolicy, controller_loss
from atesd.exposure.window import Decision

START = (3.0, 3.0)
FEATURES = [[0.1, 0.5, 1.0, 0.2, 0.9, 0.7], [0.9, -2.0, 0.3, 0.0, 1.1, 0.4]]


def policy_of(seed: int = 0, learning_rate: float = 0.01, start: tuple[float, float] = START) -> BetaPolicy:
    return BetaPolicy(6, 32, start, seed, learning_rate)


def decision(draw: float, logprob: float = 0.0, features: list[float] = FEATURES[0]) -> Decision:
    return Decision(0, draw, draw, features, logprob)


def update(policy: BetaPolicy, decisions: list[Decision], advantages: list[float], **options: float | None) -> float:
    settings: dict[str, float | None] = {"entropy_coef": 0.0, "entropy_target": -0.5, "importance_clip": None}
    return policy.update(decisions, advantages, **(settings | options))  # type: ignore[arg-type]


def beta_of(a: float, b: float) -> Beta:
    return Beta(torch.tensor([a], dtype=torch.float64), torch.tensor([b], dtype=torch.float64))


@pytest.mark.parametrize("start", [(3.0, 3.0), (1.5, 4.5), (12.0, 2.0)])
def test_policy_starts_at_the_given_beta_in_every_state(start: tuple[float, float]) -> None:
    policy = policy_of(start=start).distribution(FEATURES)
    assert policy.concentration1.tolist() == pytest.approx([start[0]] * 2, abs=1e-12)
    assert policy.concentration0.tolist() == pytest.approx([start[1]] * 2, abs=1e-12)


def test_first_bias_is_the_inverse_softplus_of_two() -> None:
    # softplus(1.854587) = log(1 + e^1.854587) = 2
    assert policy_of().tensors["bias_2"].tolist() == pytest.approx([1.854587, 1.854587], abs=1e-6)


def test_first_layer_starts_like_torch_from_its_own_generator() -> None:
    before = torch.get_rng_state()
    first, again, other = policy_of(1), policy_of(1), policy_of(2)
    assert torch.equal(torch.get_rng_state(), before)
    weights = first.tensors["weight_UF"].detach()
    assert torch.equal(weights, again.tensors["weight_UF"].detach())
    assert not torch.equal(weights, other.tensors["weight_UF"].detach())
    bound = 1.0 / sqrt(6.0)  # torch's Linear: uniform within 1 / sqrt(inputs), deviation bound / sqrt(3)
    assert weights.abs().max() < bound
    assert weights.std().item() == pytest.approx(bound / sqrt(3.0), rel=0.1)


def test_draw_is_scored_by_its_own_distribution() -> None:
    draw = policy_of(start=(2.0, 5.0)).draw(FEATURES[0], np.random.default_rng(0))
    assert draw.value == np.random.default_rng(0).beta(draw.ka, draw.kb)
    assert (draw.ka, draw.kb) == (pytest.approx(2.0), pytest.approx(5.0))
    # log x^(a-1) (1-x)^(b-1) / B(a, b)
    expected = (
        (draw.ka - 1) * log(draw.value)
        + (draw.kb - 1) * log(1 - draw.value)
        + lgamma(draw.ka + draw.kb)
        - lgamma(draw.ka)
        - lgamma(draw.kb)
    )
    assert draw.logprob == pytest.approx(expected, abs=1e-12)
    exact = beta_of(draw.ka, draw.kb)
    assert draw.logprob == exact.log_prob(torch.tensor([draw.value], dtype=torch.float64)).item()
    assert draw.entropy == exact.entropy().item()


def test_draws_stay_off_the_ends() -> None:
    class Ends:
        def beta(self, ka: float, kb: float) -> float:
            return 1.0 if ka > kb else 0.0

    for start, value in (((9.0, 2.0), 1 - 1e-4), ((2.0, 9.0), 1e-4)):
        assert policy_of(start=start).draw(FEATURES[0], Ends()).value == value  # type: ignore[arg-type]


def test_loss_by_hand() -> None:
    # Beta(3, 3) has density 30 x^2 (1-x)^2: log 30/16 at .5 and log 30 (.2 * .8)^2 at .2
    draws = torch.tensor([0.5, 0.2], dtype=torch.float64)
    policy = Beta(torch.full((2,), 3.0, dtype=torch.float64), torch.full((2,), 3.0, dtype=torch.float64))
    advantages = torch.tensor([2.0, -1.0], dtype=torch.float64)
    expected = -(2.0 * log(30 / 16) - log(30 * 0.16**2)) / 2
    loss = controller_loss(policy, draws, advantages, entropy_coef=0.0, entropy_target=-0.5)
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    weighted = controller_loss(
        policy,
        draws,
        advantages,
        entropy_coef=0.0,
        entropy_target=-0.5,
        weights_B=torch.tensor([0.5, 3.0], dtype=torch.float64),
    )
    assert weighted.item() == pytest.approx(-(1.0 * log(30 / 16) - 3.0 * log(30 * 0.16**2)) / 2, abs=1e-12)


def entropy_loss(a: torch.Tensor, b: torch.Tensor, target: float = -0.5) -> torch.Tensor:
    draws = torch.full_like(a, 0.5)
    return controller_loss(Beta(a, b), draws, torch.zeros_like(a), entropy_coef=2.0, entropy_target=target)


def test_entropy_above_the_target_is_penalised() -> None:
    # H[Beta(3, 3)] = log(1/30) - 4 psi(3) + 4 psi(6) = -3.4011974 + 4 (137/60 - 3/2) = -.2678641
    a = torch.tensor([3.0], dtype=torch.float64, requires_grad=True)
    b = torch.tensor([3.0], dtype=torch.float64, requires_grad=True)
    loss = entropy_loss(a, b)
    assert loss.item() == pytest.approx(2.0 * (-0.2678641 + 0.5) ** 2, abs=1e-6)
    loss.backward()  # type: ignore[no-untyped-call]
    assert a.grad is not None
    assert a.grad.item() < 0.0  # descent sharpens the policy
    assert torch.autograd.gradcheck(entropy_loss, (a, b))


def test_entropy_below_the_target_costs_nothing() -> None:
    a = torch.tensor([10.0], dtype=torch.float64, requires_grad=True)  # H[Beta(10, 10)] = -.798
    loss = entropy_loss(a, a)
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == 0.0
    assert a.grad is not None
    assert a.grad.item() == 0.0


def test_entropy_is_averaged_over_states_before_the_hinge() -> None:
    # -.2678641 and -.7984 average to -.533, below the target, although the first alone is above it
    a = torch.tensor([3.0, 10.0], dtype=torch.float64)
    assert entropy_loss(a, a).item() == 0.0


def test_update_descends_the_policy_gradient() -> None:
    policy = policy_of(learning_rate=0.01)
    before = policy.tensors["bias_2"].tolist()
    decisions = [decision(0.8), decision(0.3)]
    update(policy, decisions, [1.0, -1.0])
    # At the start d log pi / d ka = log x + psi(6) - psi(3), and log(.8) > log(.3): ka must rise, kb fall.
    # Adam's first step is the learning rate times the sign of the gradient.
    after = policy.tensors["bias_2"].tolist()
    assert after == pytest.approx([before[0] + 0.01, before[1] - 0.01], abs=1e-6)


def test_zero_advantage_leaves_a_fresh_policy_alone() -> None:
    policy = policy_of()
    loss = update(policy, [decision(0.8)], [0.0])
    assert loss == 0.0
    assert policy.distribution(FEATURES).mean.tolist() == pytest.approx([0.5, 0.5], abs=1e-15)


def test_importance_weights_compare_with_the_draw_and_are_capped() -> None:
    now = log(30 * (0.8 * 0.2) ** 2)  # Beta(3, 3) at .8

    def loss(old: float, clip: float | None) -> float:
        return update(policy_of(), [decision(0.8, logprob=old)], [1.0], importance_clip=clip)

    assert loss(now - log(2.0), None) == pytest.approx(-now)
    assert loss(now - log(2.0), 5.0) == pytest.approx(-2.0 * now)
    assert loss(now - log(2.0), 1.5) == pytest.approx(-1.5 * now)
    assert loss(now + log(4.0), 5.0) == pytest.approx(-now * exp(-log(4.0)))


def test_state_survives_json_and_continues_bit_for_bit() -> None:
    policy, copy = policy_of(0), policy_of(1)
    for _ in range(3):
        update(policy, [decision(0.8), decision(0.3, features=FEATURES[1])], [1.0, -0.5])
    copy.load_state_dict(json.loads(json.dumps(policy.state_dict(), allow_nan=False)))
    for _ in range(3):
        losses = [update(each, [decision(0.6), decision(0.1)], [0.7, -0.7]) for each in (policy, copy)]
        assert losses[0] == losses[1]
    assert policy.state_dict() == copy.state_dict()


def test_the_first_layer_starts_uniform_around_0_as_a_linear_layer_does() -> None:
    """Uniform in +-1/sqrt(6): of 400 numbers the mean is 0 to 3 bound / sqrt(3 * 400), both ends are nearly reached."""
    bound = 6**-0.5
    tensors = BetaPolicy(6, 400, (3.0, 3.0), seed=4, learning_rate=0.1).tensors
    for name in ("weight_UF", "bias_U"):
        values = tensors[name].detach()
        assert abs(float(values.mean())) < 3 * bound / (3 * 400) ** 0.5
        assert -bound <= float(values.min()) < -0.95 * bound
        assert 0.95 * bound < float(values.max()) <= bound
