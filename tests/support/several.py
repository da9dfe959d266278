"""Runs of several processes: recipes, what is logged of each process, and the run of one that they must equal."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from atesd.metrics import is_timing
from atesd.recipe import build_config
from atesd.runlog import RunDir
from atesd.train.loop import Trainer
from atesd.train.teacher import trained_tensors

STEPS = 3
TREE: dict[str, Any] = {
    "threads": 1,
    "task": {"kind": "pico", "train_size": 20, "probe_size": 3, "eval_size": 5},
    "prompt": {"student": "{problem}", "teacher": "{problem}\n>{hint}", "answer": "\n#{answer}"},
    "exposure": {"kind": "fixed", "ratio": 0.5},
    "rollout": {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 32, "group_size": 2},
    # Adam makes as much of a gradient that is rounding alone as of any other: eps tells them apart.
    "optim": {"lr": 1e-3, "eps": 1e-4, "max_grad_norm": 1.0},
    "step": {"num_steps": STEPS, "problems": 5},
    "eval": {"every": 3, "k": 2},
    "save": {"every": 1, "keep": 5, "rollouts_every": 1},
}
RECIPES: dict[str, dict[str, Any]] = {
    # Several micro-batches a process, an update of less than a row a process, and a selection over all tokens.
    "distil": {
        "step": {"num_steps": STEPS, "problems": 6, "updates_per_batch": 3, "token_budget": 120},
        "selection": {"kind": "tip", "score": "soft_or", "ratio": 0.5},
        "gate": {"kind": "sdar", "target": "divergence"},
        "teacher": {"weights": "ema", "ema_decay": 0.9},
        "loss": {"aggregate": "sequence"},
        "curriculum": {"kind": "reverse_ppl"},
    },
    "rl": {
        "routing": {"kind": "rl"},
        "rl": {"kl_coef": 0.01},
        "rollout": {"temperature": 1.0, "top_p": 0.9, "top_k": 8, "max_new_tokens": 48, "group_size": 4},
        "step": {"num_steps": STEPS, "problems": 4, "updates_per_batch": 2},
        "model": {"lora": {"r": 4, "alpha": 8.0}},
    },
    "aligned": {
        "exposure": {"kind": "influence", "reference": "reward", "by": "level", "hold": 1, "grid": [0.0, 0.5, 1.0]},
        "routing": {"kind": "aligned", "every": 1, "grid": [0.0, 1.0], "margin": 1.0},
        "gate": {"kind": "aligned"},
        "probe": {"credit_steps": 2, "credit_problems": 4},
    },
    "learned": {
        "exposure": {
            "kind": "beta",
            "hold": 1,
            "look_ahead": 1,
            "decisions_per_update": 1,
            "progress_metric": "probe_kl",
        },
        "loss": {"divergence": {"kind": "sampled"}},
        "probe": {"log_every": 1},
    },
    # Several turns, some more than others; an expert's hint; measurements that replay experts.
    "agents": {
        "model": {"path": "pico-doors"},
        "task": {"kind": "doors", "train_size": 8, "probe_size": 2, "eval_size": 3},
        "env": {"kind": "doors", "invalid_penalty": 0.1},
        "prompt": {"student": "{problem}", "teacher": "{problem}\n>{hint}", "answer": "\n{answer}"},
        "reveal": {"kind": "turns"},
        "routing": {"kind": "both"},
        "gate": {"kind": "sdar"},
        "rollout": {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 3, "group_size": 2},
        "step": {"num_steps": STEPS, "problems": 3},
        "curriculum": {"kind": "reverse_ppl"},
        "probe": {"log_every": 1},
    },
    # Gates learn on three rows, an odd number of which the second process has one.
    "retention": {
        "reveal": {"kind": "retention", "hidden": 8, "bias": 2.0, "learning_rate": 1e-3, "warmup": 1},
        "rollout": TREE["rollout"] | {"max_new_tokens": 16, "group_size": 1},
        "step": {"num_steps": 2, "problems": 3, "token_budget": 100},
        "eval": {"every": 2, "k": 1},
    },
    "codes": {
        "codes": {"count": 3, "chunk": 3, "draws": 3, "layer": 1},
        "rollout": TREE["rollout"] | {"max_new_tokens": 12, "group_size": 1},
        "step": {"num_steps": STEPS, "problems": 3, "token_budget": 100},
        "eval": {"every": STEPS, "k": 1},
    },
    "longact": {
        "gradient": {"kind": "longact", "ratio": 0.5},
        "rollout": TREE["rollout"] | {"max_new_tokens": 12, "group_size": 1},
        "step": {"num_steps": 2, "problems": 1},
        "eval": {"every": 2, "k": 1},
    },
}


def begin(out: Path, tree: dict[str, Any]) -> Trainer:
    return Trainer.start(build_config(tree), out)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def mark(trainer: Trainer) -> str:
    """A digest of every bit of the weights, and of what the policies remember."""
    digest = hashlib.sha256()
    for name, weight in sorted(trained_tensors(trainer.parts.model).items()):
        digest.update(name.encode() + bits(weight.clone()))  # a view would fix its memory
    states = {name: policy.state_dict() for name, policy in trainer.parts.policies.items()}
    digest.update(json.dumps(states, sort_keys=True).encode())
    return digest.hexdigest()


def followed(trainer: Trainer) -> tuple[list[dict[str, Any]], list[str]]:
    """Train and return what is logged of every step, and the mark after it."""
    rows: list[dict[str, Any]] = []
    marks: list[str] = []

    def listen(row: dict[str, Any]) -> None:
        rows.append({key: value for key, value in row.items() if not is_timing(key)})
        marks.append(mark(trainer))

    trainer.listener = listen
    trainer.train()
    return rows, marks


def weights(run: Path) -> dict[str, torch.Tensor]:
    folder = run / "final"
    return load_file(next(folder.glob("*model.safetensors")))


def texts(run: Path) -> list[str]:
    files = sorted([*(run / "rollouts").iterdir(), *(run / "eval").iterdir()])
    return [row["completion"] for path in files for row in map(json.loads, path.read_text().splitlines())]


def near(value: Any) -> Any:
    return pytest.approx(value, rel=1e-5, abs=1e-5)


def assert_as_one(one: Path, several: Path) -> None:
    """The same run but for rounding: metrics, routes and exposure of every group, samples, weights."""
    assert texts(several) == texts(one)
    for logged, expected in zip(RunDir(several).metrics(), RunDir(one).metrics(), strict=True):
        shown = {key: value for key, value in logged.items() if not is_timing(key) and key != "optim/micro_batches"}
        assert shown == near({key: expected.get(key) for key in shown})
        assert {*logged} == {*expected}
    for group, expected in zip(RunDir(several).groups(), RunDir(one).groups(), strict=True):
        assert group == {k: near(v) if isinstance(v, float) else v for k, v in expected.items()}
    expected_weights = weights(one)
    for name, found in weights(several).items():
        torch.testing.assert_close(found, expected_weights[name], rtol=1e-5, atol=1e-5)


def outcome(run: Path) -> Any:
    rows = [{k: v for k, v in row.items() if not is_timing(k)} for row in RunDir.open(run).metrics()]
    return rows, {name: bits(value) for name, value in weights(run).items()}, texts(run)
