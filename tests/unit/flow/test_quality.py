"""Distances between samples: by hand, and against the closed form for normals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from atesd.flow.quality import energy_distance, frechet_distance, mode_coverage


def test_energy_distance_by_hand() -> None:
    """X = {0, 2}, Y = {1}: 2 E|X-Y| = 2, E|X-X'| = (0 + 2 + 2 + 0) / 4 = 1, E|Y-Y'| = 0, so 1."""
    first, second = torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0]])
    assert energy_distance(first, second) == pytest.approx(1.0)
    assert energy_distance(second, first) == pytest.approx(1.0)
    assert energy_distance(first, first) == pytest.approx(0.0, abs=1e-12)
    # (3, 4) away in the plane: 2 * 5
    assert energy_distance(torch.zeros(3, 2), torch.tensor([[3.0, 4.0]])) == pytest.approx(10.0)


def test_frechet_distance_is_the_closed_form_of_the_moments() -> None:
    rng = np.random.default_rng(0)
    first = rng.standard_normal((300, 4)) @ rng.standard_normal((4, 4))
    second = rng.standard_normal((200, 4)) @ rng.standard_normal((4, 4)) + 1.5
    one, two = np.cov(first.T), np.cov(second.T)
    gap = ((first.mean(0) - second.mean(0)) ** 2).sum()
    expected = gap + np.trace(one + two - 2 * np.real(sqrtm(one @ two)))
    found = frechet_distance(torch.as_tensor(first), torch.as_tensor(second))
    assert found == pytest.approx(float(expected), rel=1e-9)
    assert frechet_distance(torch.as_tensor(first), torch.as_tensor(first)) == pytest.approx(0.0, abs=1e-9)


def test_frechet_distance_in_one_dimension() -> None:
    """{-1, 1} and {1, 5}: means 0 and 3, deviations (ddof 1) sqrt 2 and 2 sqrt 2: 9 + (sqrt 2)^2 = 11."""
    found = frechet_distance(torch.tensor([[-1.0], [1.0]]), torch.tensor([[1.0], [5.0]]))
    assert found == pytest.approx(11.0)


def test_a_flat_direction_is_no_trouble() -> None:
    flat = torch.tensor([[0.0, 1.0], [2.0, 1.0], [4.0, 1.0]])
    assert frechet_distance(flat, flat) == pytest.approx(0.0, abs=1e-9)


def test_coverage_counts_modes_with_a_quarter_of_their_share() -> None:
    """16 samples, 4 modes: an even share is 4, a quarter of it 1."""
    assert mode_coverage(torch.tensor([0] * 10 + [1] + [3] * 2), 4, 16) == 0.75
    assert mode_coverage(torch.tensor([0] * 10 + [1]), 4, 32) == 0.25, "now 2 are asked for"
    assert mode_coverage(torch.empty(0, dtype=torch.long), 4, 16) == 0.0
