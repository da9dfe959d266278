"""How far a set of samples is from a set of data: energy distance, Fréchet distance, coverage of modes. Pure tensors.

Shapes: N samples, M data points, D dimensions, K modes.
"""

from __future__ import annotations

import torch
from torch import Tensor


def energy_distance(first_ND: Tensor, second_MD: Tensor) -> float:
    """Return 2 E|X - Y| - E|X - X'| - E|Y - Y'| of two samples (Székely and Rizzo); 0 where they are equal.

    Means are over all pairs, those of a point with itself included, so that it is never below 0.
    """
    first, second = first_ND.double(), second_MD.double()
    across, own, others = (torch.cdist(a, b).mean() for a, b in ((first, second), (first, first), (second, second)))
    return float(2 * across - own - others)


def frechet_distance(first_ND: Tensor, second_MD: Tensor) -> float:
    """Return |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of the normals with both samples' moments (1706.08500).

    tr (S1 S2)^(1/2) is the trace of (S1^(1/2) S2 S1^(1/2))^(1/2), whose argument is symmetric; S with ddof 1.
    """
    first, second = first_ND.double(), second_MD.double()
    gap = (first.mean(0) - second.mean(0)).square().sum()
    one, two = torch.cov(first.T).reshape(first.shape[1], -1), torch.cov(second.T).reshape(first.shape[1], -1)
    root = _root(one)
    return float(gap + one.trace() + two.trace() - 2 * _root(root @ two @ root).trace())


def mode_coverage(mode_N: Tensor, modes: int, samples: int) -> float:
    """Return the share of modes that have at least a quarter of an even share of the samples.

    `mode_N` are the modes of the samples that lie on one, of `samples` in all.
    """
    counts = torch.bincount(mode_N, minlength=modes)
    return float((counts >= samples / modes / 4).double().mean())


def _root(matrix_DD: Tensor) -> Tensor:
    """Return the square root of a symmetric matrix without negative eigenvalues but for rounding."""
    values, vectors = torch.linalg.eigh(matrix_DD)
    root_DD: Tensor = (vectors * values.clamp(min=0.0).sqrt()) @ vectors.T
    return root_DD
