"""The axes of the composition with one or two values each, and which combinations make sense, stated apart from src."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import combinations, product
from typing import Any

BETA = {"hold": 1, "look_ahead": 1, "decisions_per_update": 1}
CONTROLLERS: dict[str, dict[str, Any]] = {
    "fixed": {"kind": "fixed", "ratio": 0.5},
    "linear": {"kind": "linear"},
    "cosine": {"kind": "cosine"},
    "steps": {"kind": "steps", "values": [1.0, 0.25], "boundaries": [1]},
    "random": {"kind": "random", "hold": 1},
    "beta": {"kind": "beta", **BETA},
    "closed_form": {"kind": "closed_form", "hold": 1},
    "paired": {"kind": "paired", "hold": 1},
    "difficulty": {"kind": "difficulty", "bins": 2, "policy": BETA},
    "difficulty_ppl": {"kind": "difficulty", "by": "reference_ppl", "policy": BETA},
    "influence": {"kind": "influence", "hold": 1, "grid": [0.0, 1.0]},
    "bandit": {"kind": "bandit", "hold": 1},
    "aligned": {"kind": "influence", "hold": 1, "grid": [0.0, 1.0], "reference": "reward", "by": "level"},
    "aligned_both": {"kind": "influence", "hold": 1, "grid": [0.0, 1.0], "reference": "both"},
    "paired_reward": {"kind": "paired", "hold": 1, "reference": "reward"},
    "dlr": {"kind": "dlr", "hold": 1, "grid": [1.0, 0.0], "draws": 2},
    "beta_aligned": {"kind": "beta", "reward": "aligned", "hold": 1, "decisions_per_update": 1},
}
REVEALS: dict[str, dict[str, Any]] = {
    "segments": {"unit": "line"},
    "overlap": {"kind": "overlap", "unit": "line", "n": 3},
    "retention": {"kind": "retention", "hidden": 4},
    "random_tokens": {"kind": "retention", "choose": "random_tokens"},
}
SELECTIONS: dict[str, dict[str, Any]] = {
    "all": {"kind": "all"},
    "tip": {"kind": "tip"},
    "tip_multinomial": {"kind": "tip", "score": "multinomial"},
}
GATES: dict[str, dict[str, Any]] = {
    "none": {"kind": "none"},
    "sdar": {"kind": "sdar"},
    "sdar_centered": {"kind": "sdar", "centered": True},
    "sdar_multiplier": {"kind": "sdar", "target": "divergence"},
    "aligned": {"kind": "aligned"},
}
ROUTERS: dict[str, dict[str, Any]] = {
    "distil": {"kind": "distil"},
    "rl": {"kind": "rl"},
    "both": {"kind": "both"},
    "hdpo": {"kind": "hdpo"},
    "retire": {
        "kind": "retire",
        "patience": 1,
        "decay": 0.0,
        "min_fall": 10.0,
        "teacher_share": 0.5,
        "every": 1,
    },
    "cliff": {"kind": "cliff"},
    "sft": {"kind": "sft"},
    "aligned": {"kind": "aligned", "every": 1, "grid": [0.0, 1.0], "margin": 0.0},
}
CURRICULA: dict[str, dict[str, Any]] = {
    "random": {"kind": "random"},
    "reverse_ppl": {"kind": "reverse_ppl"},
    "forward_ppl": {"kind": "forward_ppl"},
}
TARGETS: dict[str, dict[str, Any]] = {
    "plain": {"kind": "plain"},
    "extrapolate": {"kind": "extrapolate", "lambda_x": 1.25},
    "guarded": {"kind": "extrapolate", "lambda_x": 1.5, "guard": True},
    "aligned": {"kind": "extrapolate", "lambda_x": 1.25, "aligned": True},
    "anchor_mix": {"kind": "anchor_mix"},
    "residual": {"kind": "residual"},
    "paint": {"kind": "paint", "mismatch": 0.1},
    "avsd": {"kind": "avsd"},
}
GRADIENTS: dict[str, dict[str, Any]] = {
    "none": {"kind": "none"},
    "longact": {"kind": "longact", "ratio": 0.5},
    "longact_strict": {"kind": "longact", "score": "random", "strict": True},
}
MEASURED = (
    "beta",
    "bandit",
    "paired",
    "difficulty",
    "difficulty_ppl",
    "influence",
    "aligned",
    "aligned_both",
    "paired_reward",
    "dlr",
    "beta_aligned",
)
AXES = {
    "exposure": CONTROLLERS,
    "reveal": REVEALS,
    "selection": SELECTIONS,
    "gate": GATES,
    "routing": ROUTERS,
    "curriculum": CURRICULA,
    "target": TARGETS,
    "gradient": GRADIENTS,
}
BASE: dict[str, Any] = {
    "threads": 1,
    "task": {"kind": "pico", "train_size": 6, "probe_size": 2, "eval_size": 1},
    "prompt": {"student": "{problem}", "teacher": "{problem}\n>{hint}", "answer": "\n#{answer}"},
    "cliff": {"contract": {"answer": "#", "equals": "="}, "min_hits": 1, "every": 1},
    "rollout": {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 40, "group_size": 2},
    "optim": {"lr": 1e-3},
    "step": {"num_steps": 2, "problems": 4},
    "eval": {"every": 2, "k": 1},
    "save": {"every": 1, "rollouts_every": 1},
}

TURNS: dict[str, Any] = {
    "model": {"path": "pico-doors"},
    "task": {"kind": "doors", "train_size": 6, "probe_size": 2, "eval_size": 1},
    "env": {"kind": "doors"},
    "prompt": {"student": "{problem}", "teacher": "{problem}\n>{hint}", "answer": "\n{answer}"},
    "reveal": {"kind": "turns"},
    "rollout": BASE["rollout"] | {"max_new_tokens": 2},
    "cliff": BASE["cliff"] | {"contract": {"look": "[*]", "key": "[0-9]"}},
}
"""What a combination needs to be one of several turns; the reveal is by turns."""


def legal(names: dict[str, str]) -> bool:
    """Say whether a combination, or a part of one, makes sense (docs/method.md, "What composes with what")."""
    target, router, gate = names.get("target"), names.get("routing"), names.get("gate")
    extrapolates = target in ("extrapolate", "guarded", None)
    if (names.get("exposure") == "closed_form" or router == "cliff") and not extrapolates:
        return False
    if router == "cliff" and target == "guarded":
        return False  # the router caps lambda itself
    if (names.get("exposure") == "closed_form" or router == "cliff") and target == "aligned":
        return False  # they weigh a lambda that stays
    if gate in ("sdar", "sdar_centered") and target not in ("plain", None):
        return False
    if gate in ("sdar", "sdar_centered") and (router == "cliff" or names.get("exposure") == "closed_form"):
        return False
    idle = router in ("rl", "sft")
    if idle and names.get("exposure") == "closed_form":
        return False
    if idle and names.get("exposure") in MEASURED:
        return False
    if idle and names.get("reveal") not in ("segments", None):
        return False
    if router == "retire" and names.get("reveal") in ("retention", "random_tokens"):
        return False  # the teacher would have to write
    if names.get("exposure") == "difficulty" and router == "hdpo":
        return False
    if names.get("reveal") == "overlap" and (router == "cliff" or target == "guarded"):
        return False
    return not (idle and (gate not in ("none", None) or names.get("selection") not in ("all", None)
                          or target not in ("plain", None)))  # fmt: skip


def tree(names: dict[str, str]) -> dict[str, Any]:
    """Return the recipe of a combination."""
    return BASE | {axis: AXES[axis][name] for axis, name in names.items()}


def tree_in_turns(names: dict[str, str]) -> dict[str, Any]:
    """Return the recipe of a combination, but for its reveal, in an environment of several turns."""
    return tree(names) | TURNS


FREE = ("curriculum", "gradient")
"""Axes whose values go with everything: `legal` does not look at them."""


def every() -> Iterator[dict[str, str]]:
    """Return the full product, sensible or not."""
    for names in bound():
        for values in product(*(AXES[axis] for axis in FREE)):
            yield names | dict(zip(FREE, values, strict=True))


def bound() -> Iterator[dict[str, str]]:
    """Return the product of the axes that not everything goes with."""
    axes = [axis for axis in AXES if axis not in FREE]
    for values in product(*(AXES[axis] for axis in axes)):
        yield dict(zip(axes, values, strict=True))


_SEEN: dict[frozenset[tuple[str, str]], frozenset[tuple[str, str]]] = {}


def pairs(names: dict[str, str]) -> set[frozenset[tuple[str, str]]]:
    """Return the pairs of values in a combination, each of which is kept once."""
    found = map(frozenset, combinations(names.items(), 2))
    return {_SEEN.setdefault(pair, pair) for pair in found}


def covering() -> list[dict[str, str]]:
    """Return sensible combinations that hold every sensible pair of values, chosen greedily.

    A library for covering arrays drops pairs where what makes sense depends on more than two axes. Values of the free
    axes are dealt to the rows that come out, and to rows again where those are too few.
    """
    sensible = [(names, pairs(names)) for names in bound() if legal(names)]
    missing = set().union(*(held for _, held in sensible))
    order = random.Random(0)
    rows = []
    while missing:
        first = min(missing, key=sorted)
        holding = [row for row in sensible if first in row[1]]
        best, held = max(order.sample(holding, min(200, len(holding))), key=lambda row: len(row[1] & missing))
        rows.append(best)
        missing -= held
    return _dealt(rows)


def _dealt(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Give rows values of the free axes, so that every pair with one of these is held."""
    free = [dict(zip(FREE, values, strict=True)) for values in product(*(AXES[axis] for axis in FREE))]
    missing = {pair for row in rows for values in free for pair in pairs(row | values)}
    missing -= {pair for row in rows for pair in pairs(row)}
    dealt = []
    while missing:
        for row in rows:
            best = max((row | values for values in free), key=lambda names: len(pairs(names) & missing))
            if pairs(best) & missing or len(dealt) < len(rows):
                dealt.append(best)
                missing -= pairs(best)
    return dealt


def covering_in_turns(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Return rows of the covering array that hold every value of every axis but the reveal, which is by turns."""
    missing = {(axis, name) for axis, values in AXES.items() if axis != "reveal" for name in values}
    chosen = []
    while missing:
        best = max(rows, key=lambda row: len(set(row.items()) & missing))
        chosen.append(best)
        missing -= set(best.items())
    return chosen
