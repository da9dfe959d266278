"""Rectified flow as a chain of Gaussian transitions, and the divergence between two of them. Pure tensors.

    x_t = (1 - t) z + t x_1,   z ~ N(0, 1),   velocity v(x, t) = E[x_1 - z | x_t = x]
    dx  = [v + g^2 s / 2] dt + g dw,   s = (t v - x) / (1 - t),   g = eta sqrt(1 - t)

s is the score of x_t, so that every eta has the marginals of the ODE, eta = 0. Euler-Maruyama over K equal steps:

    x_k+1 ~ N(mu_k, sigma_k^2),   mu_k = x + dt [(1 + eta^2 t / 2) v - eta^2 x / 2],   sigma_k = eta sqrt((1 - t) dt)

The factor sqrt(1 - t) is ours: with it the score's pole at t = 1 cancels.

Shapes: B trajectories, K steps, D dimensions; times are [B, 1].
"""

from __future__ import annotations

import torch
from torch import Tensor


def times(start_B1: Tensor, steps: int) -> list[Tensor]:
    """Return the K times at which transitions begin, from `start`, in equal steps towards 1."""
    return [start_B1 + (1.0 - start_B1) * step / steps for step in range(steps)]


def sigma_of(t_B1: Tensor, dt_B1: Tensor, eta: float) -> Tensor:
    """Return the standard deviations of transitions; 0 for the ODE."""
    return eta * ((1.0 - t_B1) * dt_B1).sqrt()


def mean_of(x_BD: Tensor, velocity_BD: Tensor, t_B1: Tensor, dt_B1: Tensor, eta: float) -> Tensor:
    """Return the means of transitions."""
    half = eta * eta / 2.0
    return x_BD + dt_B1 * ((1.0 + half * t_B1) * velocity_BD - half * x_BD)


def interpolate(z_BD: Tensor, x1_BD: Tensor, t_B1: Tensor) -> Tensor:
    """Return x_t on the straight line from noise to data."""
    return (1.0 - t_B1) * z_BD + t_B1 * x1_BD


def transition_kl(student_BD: Tensor, teacher_BD: Tensor, sigma_B1: Tensor) -> Tensor:
    """KL(N(student, sigma^2) || N(teacher, sigma^2)) of each transition, [B], in nats; the teacher is held still.

    KL = ||mu_S - sg mu_T||^2 / (2 sigma^2), arXiv 2605.15055; both directions are equal. Where sigma is 0, what
    sigma^2 KL tends to: ||mu_S - sg mu_T||^2 / 2, the ODE's loss, which is not in nats.
    """
    half_B = (student_BD - teacher_BD.detach()).square().sum(-1) / 2.0
    variance_B = sigma_B1.squeeze(-1).square()
    return half_B / torch.where(variance_B > 0, variance_B, torch.ones_like(variance_B))
