"""Short runs over a vLLM server that is none."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from atesd.metrics import is_timing
from atesd.recipe import build_config
from atesd.runlog import RunDir
from atesd.train.loop import Trainer

from support.fake_vllm import FakeVllm

TREE: dict[str, Any] = {
    "threads": 1,
    "model": {"path": "pico", "lora": {"r": 2, "alpha": 8}},
    "task": {"kind": "pico", "train_size": 6, "probe_size": 1, "eval_size": 2},
    "prompt": {"student": "{problem}", "teacher": "{problem}\n>{hint}", "answer": "\n#{answer}"},
    "routing": {"kind": "both"},
    "loss": {"divergence": {"kind": "sampled"}},
    "rollout": {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 12, "group_size": 2},
    "optim": {"lr": 2e-2, "max_grad_norm": 0},
    "step": {"num_steps": 3, "problems": 2},
    "eval": {"every": 3, "k": 1},
    "save": {"every": 1, "rollouts_every": 3},
}


def started(fake: FakeVllm, run: Path, tree: dict[str, Any] = TREE, **engine: Any) -> Trainer:
    settings = {"kind": "vllm", "url": fake.url, "wait_s": 120.0, "timeout_s": 120.0} | engine
    return Trainer.start(build_config(tree | {"rollout": tree["rollout"] | {"engine": settings}}), run)


def outcome(run: Path) -> tuple[list[dict[str, Any]], dict[str, bytes], dict[str, bytes]]:
    rows = [{k: v for k, v in row.items() if not is_timing(k)} for row in RunDir.open(run).metrics()]
    adapter = load_file(run / "final" / "adapter_model.safetensors")
    texts = {path.name: path.read_bytes() for folder in ("eval", "rollouts") for path in (run / folder).iterdir()}
    return rows, {name: value.numpy().tobytes() for name, value in adapter.items()}, texts


def killed_in_step_2(fake: FakeVllm, trainer: Trainer) -> threading.Event:
    """Have the server reset the second connection after step 1, and forget every adapter; tell when it has.

    What was asked for ahead of that has come to the server by then: else chance has one of its connections reset.
    """
    gone = threading.Event()
    config = trainer.config
    ahead = config.step.problems * (1 + config.rollout.ahead)

    def come() -> int:
        return sum(body["n"] == config.rollout.group_size for body in fake.asked)

    def killed(server: FakeVllm, _: Any) -> str:
        server.adapters.clear()
        server._models.clear()
        gone.set()
        return "reset"

    def listen(row: dict[str, Any]) -> None:
        if row["step"] == 1:
            deadline = time.monotonic() + 300
            while come() < ahead:
                assert time.monotonic() < deadline, "not all was asked for"
                time.sleep(0.01)
            fake.faults += [lambda _, answer: answer, killed]

    trainer.listener = listen
    return gone
