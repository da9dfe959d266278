"""Independent reference for the tiled divergences: dense, float64, NumPy, straight from the definitions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def log_softmax(logits: Array) -> Array:
    high = logits.max(-1, keepdims=True)
    result: Array = logits - high - np.log(np.exp(logits - high).sum(-1, keepdims=True))
    return result


def summands(kind: str, beta: float, p: Array, q: Array) -> Array:
    """The summands l_i, with 0 log 0 = 0."""

    def plogp(a: Array, b: Array) -> Array:
        safe = np.where(a > 0, a, 1.0)
        return np.where(a > 0, a * (np.log(safe) - np.log(np.where(b > 0, b, 1.0))), 0.0)

    if kind == "forward_kl":
        return plogp(p, q)
    if kind == "reverse_kl":
        return plogp(q, p)
    m = beta * p + (1 - beta) * q
    return beta * plogp(p, m) + (1 - beta) * plogp(q, m)


def restrict(p: Array, q: Array, top_k: int | None, tail: bool, ranked: Array | None = None) -> tuple[Array, Array]:
    """The K entries largest in `ranked`, by default p: renormalised, or with the rest as one more entry."""
    if top_k is None:
        return p, q
    ids = np.argsort(-(p if ranked is None else ranked), -1)[:, :top_k]
    p_k, q_k = np.take_along_axis(p, ids, -1), np.take_along_axis(q, ids, -1)
    if not tail:
        return p_k / p_k.sum(-1, keepdims=True), q_k / q_k.sum(-1, keepdims=True)
    outside = np.ones_like(p)
    np.put_along_axis(outside, ids, 0.0, -1)
    rest_p, rest_q = (p * outside).sum(-1, keepdims=True), (q * outside).sum(-1, keepdims=True)
    return np.concatenate([p_k, rest_p], -1), np.concatenate([q_k, rest_q], -1)


def divergence(
    p: Array,
    q: Array,
    kind: str,
    beta: float,
    top_k: int | None,
    tail: bool,
    clip: str,
    tau: float,
    ranked: Array | None = None,
) -> Array:
    """Per-token loss, [N], of probabilities [N, V]; `ranked` says whose top K entries count, by default p's."""
    entries = summands(kind, beta, *restrict(p, q, top_k, tail, ranked))
    if clip == "pointwise":
        return np.minimum(entries, tau).sum(-1)
    return np.minimum(entries.sum(-1), tau) if clip == "token" else entries.sum(-1)


def numeric_gradient(function: Callable[[Array], Array], logits: Array, step: float = 1e-5) -> Array:
    """Central differences of a per-token function of its own row of logits, [N, V]."""
    gradient = np.zeros_like(logits)
    for entry in range(logits.shape[1]):
        shift = np.zeros_like(logits)
        shift[:, entry] = step
        gradient[:, entry] = (function(logits + shift) - function(logits - shift)) / (2 * step)
    return gradient
