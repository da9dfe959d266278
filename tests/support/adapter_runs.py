"""A run of three steps that trains adapters, and what two such runs are compared by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from atesd.metrics import is_timing
from atesd.runlog import RunDir

TREE: dict[str, Any] = {
    "threads": 1,
    "model": {"path": "pico", "dtype": "auto", "lora": {"r": 4, "alpha": 8}},
    "task": {"kind": "pico", "train_size": 12, "probe_size": 2, "eval_size": 2},
    "prompt": {"student": "{problem}", "teacher": "{problem}\n>{hint}", "answer": "\n#{answer}"},
    "exposure": {"kind": "beta", "hold": 1, "look_ahead": 1},
    "rollout": {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 24},
    "optim": {"lr": 1e-3},
    "step": {"num_steps": 3, "problems": 4},
    "eval": {"every": 3, "k": 1},
    "save": {"every": 1, "keep": 3},
}


def finished(run: Path) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """Return what was logged, times left out, and the final adapter."""
    rows = [{k: v for k, v in row.items() if not is_timing(k)} for row in RunDir.open(run).metrics()]
    return rows, load_file(run / "final" / "adapter_model.safetensors")
