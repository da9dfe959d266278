"""Retention gates by hand values and float64: betas, fading, the budget's excess, eviction, state."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from atesd.exposure.retention_gates import Gates, capacity_excess, decay_bias, evict
from atesd.types import UserError

CPU = torch.device("cpu")


def gates(**settings: Any) -> Gates:
    sizes: dict[str, Any] = {
        "layers": 2, "heads": 3, "width": 5, "hidden": 4, "bias": 2.0, "learning_rate": 0.1, "weight_decay": 0.01,
        "ntp": 1.0, "cap": 1.0, "seed": 7, "device": CPU,
    }  # fmt: skip
    return Gates(**sizes | settings)


def test_log_beta_is_the_log_sigmoid_of_a_network_of_its_layer() -> None:
    made = gates()
    states = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0))
    for layer in (0, 1):
        found = made.log_beta(layer, states.to(torch.bfloat16))
        assert found.shape == (2, 3, 6)
        assert found.dtype == torch.float32
        first, _, last = made.networks[layer]
        x = states.to(torch.bfloat16).double().numpy()
        hidden = x @ first.weight.detach().double().numpy().T + first.bias.detach().double().numpy()
        hidden = hidden / (1 + np.exp(-hidden))
        score = hidden @ last.weight.detach().double().numpy().T + last.bias.detach().double().numpy()
        np.testing.assert_allclose(found.detach(), -np.log1p(np.exp(-score)).transpose(0, 2, 1), rtol=1e-5)
    assert not torch.equal(made.log_beta(0, states), made.log_beta(1, states))


def test_gates_start_by_seed_near_the_bias_and_leave_torchs_generator_alone() -> None:
    before = torch.get_rng_state()
    one, same, other = gates(), gates(), gates(seed=8)
    assert torch.equal(torch.get_rng_state(), before)
    pairs = list(zip(one.weights, same.weights, other.weights, strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert not all(torch.equal(a, c) for a, _, c in pairs)
    assert all(network[-1].bias.tolist() == [2.0] * 3 for network in one.networks)
    beta = gates(bias=10.0, width=64, hidden=64).log_beta(0, torch.randn(1, 4, 64)).detach().exp()
    assert 0.9997 < float(beta.min()) < 1


def test_a_key_fades_with_the_distance_to_later_queries_only() -> None:
    """log beta -.5 and -2 of two keys; the third has none."""
    bias = decay_bias(torch.tensor([[[-0.5, -2.0, 0.0]]]))
    assert bias.tolist() == [[[[0, 0, 0], [-0.5, 0, 0], [-1, -2, 0]]]]
    assert decay_bias(torch.zeros(2, 3, 4)).abs().sum() == 0


def test_the_excess_by_hand() -> None:
    """beta 1/2 and 1/4 of two tokens, T = 3, M = 1: held are 1; 1/2 + 1; 1/4 + 1/4, of which 1/2 is too much at t = 2.

    (1/3) (1/2) (1/2) = 1/12, and 0 in a head that forgets at once: 1/24 on average. By log beta_1 the excess at t = 2
    grows as beta_1 = 1/2: 1/24 too.
    """
    log_beta = torch.tensor([[0.5, 0.25], [1e-30, 1e-30]]).log().requires_grad_()
    excess = capacity_excess(log_beta, 3, 1)
    assert float(excess.detach()) == pytest.approx(1 / 24)
    (gradient,) = torch.autograd.grad(excess, log_beta)
    assert gradient.tolist() == [[pytest.approx(1 / 24), 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("budget", [2, 3, 50])
def test_nothing_is_in_excess_of_a_budget_that_holds_all(budget: int) -> None:
    log_beta = torch.zeros(2, 2, requires_grad=True)
    excess = capacity_excess(log_beta, 3, budget)
    assert float(excess.detach()) == 0
    assert torch.autograd.grad(excess, log_beta)[0].abs().sum() == 0


def test_the_excess_against_loops_in_float64() -> None:
    generator = torch.Generator().manual_seed(3)
    log_beta = -torch.rand(3, 5, generator=generator, dtype=torch.float64) / 4
    for positions in (5, 9):
        total = 0.0
        for head in range(3):
            for t in range(1, positions + 1):
                held = sum(math.exp(float(log_beta[head, i - 1]) * (t - i)) for i in range(1, min(t, 5) + 1))
                total += max(0.0, held - 2) / t / positions / 3
        assert float(capacity_excess(log_beta, positions, 2)) == pytest.approx(total, rel=1e-12)
    assert torch.autograd.gradcheck(lambda each: capacity_excess(each, 9, 2), log_beta.requires_grad_())


@pytest.mark.parametrize("budget", [1, 3, 6])
def test_eviction_is_the_order_of_age_times_log_beta_and_its_budget_is_exact(budget: int) -> None:
    log_beta = -torch.rand(4, 2, 6, generator=torch.Generator().manual_seed(budget))
    last = 9
    kept = evict(log_beta, last, budget)
    scores = {
        (layer, head, token): (last - token) * float(log_beta[layer, head, token])
        for layer in range(4) for head in range(2) for token in range(6)
    }  # fmt: skip
    best = sorted(scores, key=lambda entry: -scores[entry])[: 4 * 2 * budget]
    assert {tuple(entry) for entry in kept.nonzero().tolist()} == set(best)
    assert int(kept.sum()) == 4 * 2 * budget
    if budget == 3:
        assert len({int(count) for count in kept.sum(-1).flatten()}) > 1, "one budget for all layers and heads"


def test_age_counts_and_not_beta_alone() -> None:
    """At t = 3: ages 3, 2, 1. Scores -.3 and -.4 of the first two, -.35 of the last."""
    log_beta = torch.tensor([[[-0.1, -0.2, -0.35]]])
    assert evict(log_beta, 3, 1).tolist() == [[[True, False, False]]]
    assert evict(log_beta, 3, 2).tolist() == [[[True, False, True]]]
    assert evict(log_beta, 30, 1).tolist() == [[[True, False, False]]]


def test_of_equals_the_later_token_stays_then_the_first_layer_and_head() -> None:
    kept = evict(torch.zeros(2, 2, 3), 5, 1)
    assert kept[..., 2].all()
    assert int(kept.sum()) == 4
    log_beta = torch.zeros(1, 2, 1)
    assert evict(log_beta.expand(2, 2, 1), 5, 1).all()
    assert evict(torch.tensor([[[-1.0, -1.0]], [[-1.0, -1.0]]]), 2, 1).tolist() == [[[False, True]], [[False, True]]]


def gradients(made: Gates, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(weight.shape, generator=generator) for weight in made.weights]


def test_an_update_is_adamws() -> None:
    """The first step moves every weight by the rate against its gradient's sign, after the decay."""
    made = gates()
    before, given = [weight.detach().clone() for weight in made.weights], gradients(made, 1)
    made.update(given)
    for weight, old, gradient in zip(made.weights, before, given, strict=True):
        torch.testing.assert_close(weight.detach(), old * (1 - 0.1 * 0.01) - 0.1 * gradient.sign())
        assert weight.grad is None
    assert made.updates == 1


def test_gates_restored_from_json_go_on_bit_for_bit() -> None:
    made = gates()
    for seed in (1, 2):
        made.update(gradients(made, seed))
    again = gates(seed=99)
    again.load_state_dict(json.loads(json.dumps(made.state_dict())))
    assert again.updates == 2
    for each in (made, again):
        each.update(gradients(each, 3))
    assert all(torch.equal(a, b) for a, b in zip(made.weights, again.weights, strict=True))
    fresh = gates()
    fresh.load_state_dict(json.loads(json.dumps(gates(seed=3).state_dict())))
    assert all(torch.equal(a, b) for a, b in zip(fresh.weights, gates(seed=3).weights, strict=True))


def test_the_state_of_other_gates_is_refused() -> None:
    with pytest.raises(UserError, match=r"of another model.* written by another run"):
        gates().load_state_dict(gates(layers=3).state_dict())
    with pytest.raises(UserError, match=r"of another size.* written by another run"):
        gates().load_state_dict(gates(hidden=8).state_dict())
