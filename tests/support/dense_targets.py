"""Independent reference for targets that read the student: entry by entry in float64, straight from the formulas."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from support.dense_divergence import Array

Row = Sequence[float]


def entropy(p: Row) -> float:
    return -sum(value * math.log(value) for value in p)


def normalised(weights: Row) -> list[float]:
    return [weight / sum(weights) for weight in weights]


def paint(teacher: Row, student: Row, weight: float, mismatch: float) -> list[float]:
    """p_T^(1-w) p_S^w, normalised, where both entropies are at least so far apart; else p_T."""
    if abs(entropy(teacher) - entropy(student)) < mismatch:
        return list(teacher)
    return normalised([p ** (1 - weight) * q**weight for p, q in zip(teacher, student, strict=True)])


def avsd(views: Sequence[Row], student: Row) -> list[float]:
    """q_G exp(gate J), normalised, as the module text of atesd.losses.avsd has it."""
    count = len(views)
    geometric = normalised([math.prod(entries) ** (1 / count) for entries in zip(*views, strict=True)])
    weights = []
    for entries, consensus, q in zip(zip(*views, strict=True), geometric, student, strict=True):
        residual = max(0.0, math.log(sum(entries) / count) - math.log(consensus))
        moves = [math.log(entry / q) for entry in entries]
        pull, size = abs(sum(moves)) / count, sum(abs(move) for move in moves) / count
        gate = pull / size * pull / (pull + residual) if pull else 0.0
        weights.append(consensus * math.exp(gate * residual))
    return normalised(weights)


def rows(function: object, *roles: Array) -> Array:
    """Apply a target to every token, [N, V]."""
    assert callable(function)
    return np.array([function(*tokens) for tokens in zip(*roles, strict=True)])
