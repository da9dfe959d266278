"""Transitions and their divergence: against torch's own normals, by values and gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from atesd.flow.sde import interpolate, mean_of, sigma_of, times, transition_kl

RANDOM = torch.Generator().manual_seed(0)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=RANDOM, dtype=torch.float64)


def test_the_divergence_is_torchs_of_two_normals() -> None:
    student, teacher = draw(50, 7), draw(50, 7)
    sigma = 0.05 + torch.rand(50, 1, generator=RANDOM, dtype=torch.float64)
    own = transition_kl(student, teacher, sigma)
    theirs = kl_divergence(Normal(student, sigma), Normal(teacher, sigma)).sum(-1)
    torch.testing.assert_close(own, theirs, rtol=1e-12, atol=0)
    back = kl_divergence(Normal(teacher, sigma), Normal(student, sigma)).sum(-1)
    torch.testing.assert_close(own, back, rtol=1e-12, atol=0)


def test_the_gradient_is_the_score_functions_in_expectation_and_reaches_the_student_alone() -> None:
    """d KL / d mu_S = (mu_S - mu_T) / sigma^2, and E[(log p_S - log p_T) d log p_S / d mu_S] the same by sampling."""
    student, teacher = draw(1, 3).requires_grad_(), draw(1, 3).requires_grad_()
    sigma = torch.full((1, 1), 0.7, dtype=torch.float64)
    transition_kl(student, teacher, sigma).sum().backward()
    assert teacher.grad is None
    assert student.grad is not None
    expected = (student - teacher).detach() / 0.7**2
    torch.testing.assert_close(student.grad, expected)
    draws = 100_000
    with torch.no_grad():
        x = student + sigma * draw(draws, 3)
        ratio = Normal(student, sigma).log_prob(x).sum(-1) - Normal(teacher, sigma).log_prob(x).sum(-1)
        by_score = ratio[:, None] * (x - student) / sigma**2
        error = by_score.std(0) / math.sqrt(draws)
        assert bool(((by_score.mean(0) - expected[0]).abs() < 4 * error).all())


def test_without_noise_it_is_the_odes_loss_and_finite() -> None:
    """sigma^2 KL -> ||mu_S - mu_T||^2 / 2: for (3, 0) and (0, 4) that is 25 / 2, whatever sigma."""
    student, teacher = torch.tensor([[3.0, 0.0]]).double(), torch.tensor([[0.0, 4.0]]).double()
    assert transition_kl(student, teacher, torch.zeros(1, 1)).tolist() == [12.5]
    for sigma in (1e-2, 1e-4, 1e-6):
        small = torch.full((1, 1), sigma, dtype=torch.float64)
        assert float(sigma**2 * transition_kl(student, teacher, small)) == pytest.approx(12.5, rel=1e-12)
    mixed = transition_kl(student.repeat(2, 1), teacher.repeat(2, 1), torch.tensor([[0.0], [0.5]]))
    assert mixed.tolist() == [12.5, 50.0], "12.5 / .25"
    student = student.clone().requires_grad_()
    transition_kl(student, teacher, torch.zeros(1, 1)).sum().backward()
    assert student.grad is not None
    assert student.grad.tolist() == [[3.0, -4.0]]


def test_equal_roles_have_no_loss_and_no_gradient() -> None:
    student = draw(4, 3).float().requires_grad_()
    for sigma in (0.0, 0.3):
        loss = transition_kl(student, student.detach().clone(), torch.full((4, 1), sigma))
        assert loss.tolist() == [0.0] * 4
        (gradient,) = torch.autograd.grad(loss.sum(), student)
        assert not gradient.any()


def test_a_grid_of_times_and_a_transition_by_hand() -> None:
    assert [float(t) for t in times(torch.zeros(1, 1), 4)] == [0.0, 0.25, 0.5, 0.75]
    assert [float(t) for t in times(torch.full((1, 1), 0.5), 2)] == [0.5, 0.75]
    t, dt = torch.full((1, 1), 0.5), torch.full((1, 1), 0.25)
    # x + dt [(1 + eta^2 t / 2) v - eta^2 x / 2] = 2 + .25 [(1 + 4 * .25) * 3 - 2 * 2]
    assert float(mean_of(torch.tensor([[2.0]]), torch.tensor([[3.0]]), t, dt, 2.0)) == 2.5
    assert float(sigma_of(t, dt, 2.0)) == pytest.approx(2 * math.sqrt(0.5 * 0.25))
    assert float(mean_of(torch.tensor([[2.0]]), torch.tensor([[3.0]]), t, dt, 0.0)) == 2.75, "Euler's step of the ODE"
    assert float(interpolate(torch.tensor([[1.0]]), torch.tensor([[5.0]]), torch.full((1, 1), 0.25))) == 2.0


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_every_eta_has_the_marginals_of_the_ode(eta: float) -> None:
    """Data N(2, .5^2): v(x, t) = E[x_1 - z | x_t], linear in x, so that x_1 ends with mean 2 and deviation .5."""
    mean, spread, steps = 2.0, 0.5, 100
    x = draw(10_000, 1)
    dt = torch.full((1, 1), 1 / steps, dtype=torch.float64)
    for t in times(torch.zeros(1, 1, dtype=torch.float64), steps):
        variance = (1 - t) ** 2 + (t * spread) ** 2
        slope = (t * spread**2 - (1 - t)) / variance  # cov(x_1 - z, x_t) / var(x_t)
        velocity = mean + slope * (x - t * mean)
        x = mean_of(x, velocity, t, dt, eta) + sigma_of(t, dt, eta) * draw(10_000, 1)
    assert float(x.mean()) == pytest.approx(2.0, abs=0.02)
    assert float(x.std()) == pytest.approx(0.5, abs=0.02)
