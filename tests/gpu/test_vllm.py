"""A vLLM server on the same GPU as the trainer. On a CPU a small server that answers as vLLM does stands in."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from atesd.recipe import build_config
from atesd.runlog import RunDir
from atesd.train.loop import Trainer

from support.fake_vllm import FakeVllm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:the vLLM server at:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*LoRA.*:UserWarning"),
]
ROOT = Path(__file__).parents[2]
ENV = Path(os.environ.get("VLLM_ENV", ROOT / "runs" / "vllm-env"))
PORT = os.environ.get("PORT", "8124")
TREE: dict[str, Any] = {
    "model": {"path": "pico", "dtype": "auto", "lora": {"r": 2, "alpha": 8}},
    "task": {"kind": "pico", "train_size": 6, "probe_size": 1, "eval_size": 2},
    "prompt": {"student": "{problem}", "teacher": "{problem}\n>{hint}", "answer": "\n#{answer}"},
    "loss": {"divergence": {"kind": "sampled"}},
    "rollout": {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 12, "group_size": 2},
    "optim": {"lr": 1e-2},
    "step": {"num_steps": 3, "problems": 2},
    "eval": {"every": 3, "k": 1},
    "save": {"every": 3},
}


@pytest.fixture
def url(device: torch.device, tmp_path: Path) -> Iterator[str]:
    """Start a server beside the trainer, with a third of the GPU's memory."""
    if device.type == "cpu":
        with FakeVllm() as fake:
            yield fake.url
        return
    if not (ENV / "bin" / "python").exists():
        pytest.skip(f"no environment with vLLM at {ENV}: docs/gpu.md says how to make one, and VLLM_ENV names it")
    settings = os.environ | {"VLLM_ENV": str(ENV), "DTYPE": "bfloat16", "MAX_RANK": "8", "PORT": PORT}
    command = [ROOT / "repro" / "vllm_server.sh", "pico", "--max-num-seqs", "32", "--gpu-memory-utilization", "0.3"]
    with (tmp_path / "server.log").open("w") as log:
        process = subprocess.Popen(command, env=settings, start_new_session=True, stdout=log, stderr=log)
        yield f"http://127.0.0.1:{PORT}"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_run_beside_its_server(url: str, tmp_path: Path, say: Callable[[str], None]) -> None:
    """Three updates of 1e-2: were one version of the adapter skipped, log-probabilities would differ by far more."""
    engine = {"kind": "vllm", "url": url, "wait_s": 300.0, "timeout_s": 120.0}
    Trainer.start(build_config(TREE | {"rollout": TREE["rollout"] | {"engine": engine}}), tmp_path / "run").train()
    gaps = [row["rollout/logprob_gap"] for row in RunDir.open(tmp_path / "run").metrics() if row["step"]]
    say("vLLM beside the trainer, mean gap of log-probabilities: " + ", ".join(f"{gap:.1e}" for gap in gaps))
    assert len(gaps) == 3
    assert max(gaps) < 0.05
