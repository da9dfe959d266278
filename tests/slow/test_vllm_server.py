"""A real vLLM server on the CPU, started by repro/vllm_server.sh, and killed: minutes, by hand.

ATESD_VLLM_ENV=runs/vllm-env pytest -m slow -s tests/slow/test_vllm_server.py
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch

from atesd.recipe import build_config
from atesd.rollout.hf import HFSampler
from atesd.rollout.render import Renderer
from atesd.rollout.sampler import SamplingConfig, Weights
from atesd.rollout.vllm import VllmEngine
from atesd.runlog import RunDir
from atesd.sections import LoraConfig, ModelConfig
from atesd.train.loop import Trainer
from atesd.train.model import load
from atesd.types import UserError

ROOT = Path(__file__).parents[2]
ENV = os.environ.get("ATESD_VLLM_ENV", "")
MODEL = os.environ.get("ATESD_VLLM_MODEL", "pico")
PORT = int(os.environ.get("ATESD_VLLM_PORT", "8123"))
PATIENCE_S = 1200.0
GREEDY = SamplingConfig(temperature=0.0, top_p=1.0, top_k=0, max_new_tokens=40)
SAMPLED = SamplingConfig(temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=40)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not ENV, reason="ATESD_VLLM_ENV names no environment with vLLM"),
    pytest.mark.filterwarnings("ignore:the vLLM server at:UserWarning"),
]


class RealServer:
    """A server's process."""

    url = f"http://127.0.0.1:{PORT}"

    def start(self) -> None:
        settings = {"VLLM_ENV": ENV, "DTYPE": "float32", "MAX_RANK": "16", "PORT": str(PORT), "CPU_THREADS": "1"}
        self.process = subprocess.Popen(
            [ROOT / "repro" / "vllm_server.sh", MODEL, "--max-num-seqs", "32"],
            env=os.environ | settings,
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def kill(self) -> None:
        """Send SIGKILL to all of the server's processes."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def count(self, metric: str) -> float:
        lines = httpx2.get(f"{self.url}/metrics", timeout=60).text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(metric))


@pytest.fixture(scope="module")
def server() -> Iterator[RealServer]:
    real = RealServer()
    if os.environ.get("ATESD_VLLM_PID"):  # one that runs already, as the leader of a session
        real.process = _Running(int(os.environ["ATESD_VLLM_PID"]))  # type: ignore[assignment]
    else:
        real.start()
    yield real
    real.kill()


class _Running:
    def __init__(self, pid: int) -> None:
        self.pid = pid

    def wait(self) -> None:
        time.sleep(1)


@pytest.fixture(scope="module")
def trained() -> tuple[Any, Renderer]:
    """Return the model with an adapter that changes what it says."""
    model, tokenizer = load(ModelConfig(path=MODEL, lora=LoraConfig(r=4, alpha=8)), 0)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1 if MODEL.startswith("pico") else 0.02)
    return model, Renderer(tokenizer)


def sampler_of(server: RealServer, trained: tuple[Any, Renderer]) -> Any:
    return VllmEngine(url=server.url, wait_s=PATIENCE_S, timeout_s=PATIENCE_S).build(*trained)


def prompts_of(renderer: Renderer) -> list[list[int]]:
    """Return eight prompts of several blocks of the prefix cache."""
    return [renderer.student_ids([{"role": "user", "content": f"{n}+{n + 3}*2-1; " * 14}]) for n in range(11, 19)]


def test_tokens_and_log_probabilities_are_those_of_transformers(
    server: RealServer, trained: tuple[Any, Renderer], capsys: pytest.CaptureFixture[str]
) -> None:
    """The same weights, base and adapter, in float32."""
    model, renderer = trained
    prompts = prompts_of(renderer)
    sampler = sampler_of(server, trained)
    own = HFSampler(model, eos_ids=renderer.eos_ids, pad_id=renderer.pad_id, decode=renderer.decode)
    theirs, ours = sampler.sample(prompts, GREEDY, seed=1), own.sample(prompts, GREEDY, seed=1)
    assert [turn.completion_ids for turn in theirs] == [turn.completion_ids for turn in ours]
    with model.disable_adapter():
        base = own.sample(prompts, GREEDY, seed=1)
    assert [turn.completion_ids for turn in base] != [turn.completion_ids for turn in ours], "the adapter says other"
    before = server.count("vllm:prefix_cache_hits_total")
    groups = [prompt for prompt in prompts for _ in range(4)]
    turns = sampler.sample(groups, SAMPLED, seed=2)
    hits = server.count("vllm:prefix_cache_hits_total") - before
    logs = [value for turn in turns for value in own_logprobs(model, turn)]
    given = [value for turn in turns for value in turn.logprobs]
    ratios = [math.exp(mine - its) for mine, its in zip(logs, given, strict=True)]
    assert len({turn.completion_ids for turn in turns}) > 8
    assert turns == sampler.sample(groups, SAMPLED, seed=2), "the same seed asks for the same"
    assert max(abs(ratio - 1) for ratio in ratios) < 1e-2
    assert hits >= 3 * 8 * 128, "three of four attempts find a block of 128 tokens of the prompt in the cache"
    with capsys.disabled():
        print(
            f"\ngreedy: {sum(len(turn.completion_ids) for turn in ours)} tokens of {len(prompts)} completions equal; "
            f"importance ratio of {len(ratios)} sampled tokens: mean {sum(ratios) / len(ratios):.7f}, from "
            f"{min(ratios):.6f} to {max(ratios):.6f}; {hits:g} prompt tokens found in the prefix cache"
        )


def own_logprobs(model: Any, turn: Any) -> list[float]:
    """Return what transformers gives a completion, in one pass."""
    ids = torch.tensor([[*turn.prompt_ids, *turn.completion_ids]])
    with torch.no_grad():
        rows = model(input_ids=ids).logits[0, len(turn.prompt_ids) - 1 : -1].double().log_softmax(-1)
    return rows.gather(-1, torch.tensor(turn.completion_ids)[:, None]).squeeze(-1).tolist()


@pytest.fixture
def client(server: RealServer) -> Iterator[httpx2.Client]:
    """Another one who talks to the server."""
    with httpx2.Client(base_url=server.url, timeout=PATIENCE_S) as other:
        yield other


def test_a_stale_adapter_is_noticed(server: RealServer, trained: tuple[Any, Renderer], client: httpx2.Client) -> None:
    """Other weights under our name are replaced by ours; a rank that is too large is refused."""
    model, renderer = trained
    sampler = sampler_of(server, trained)
    first = adapter_of(client)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.mul_(-1.0)
    sampler.sync(Weights(1, is_adapter=True, tensors=dict))
    (expected,) = sampler.sample(prompts_of(renderer)[:1], GREEDY, seed=1)
    second = adapter_of(client)
    assert second["id"].endswith("-v1")
    client.post("/v1/unload_lora_adapter", json={"lora_name": second["id"]}).raise_for_status()
    stale = {"lora_name": second["id"], "lora_path": first["root"]}
    client.post("/v1/load_lora_adapter", json=stale).raise_for_status()
    with pytest.warns(UserWarning, match="under the adapter's name it has other weights"):
        (turn,) = sampler.sample(prompts_of(renderer)[:1], GREEDY, seed=1)
    assert (turn.completion_ids, turn.weights_version) == (expected.completion_ids, 1)
    assert adapter_of(client)["root"] == second["root"]
    large, _ = load(ModelConfig(path=MODEL, lora=LoraConfig(r=32, alpha=8)), 0)
    with pytest.raises(UserError, match=r"takes no adapter of rank 32 .*--max-lora-rank 32"):
        sampler_of(server, (large, renderer))


def adapter_of(client: httpx2.Client) -> dict[str, Any]:
    (card,) = [card for card in client.get("/v1/models").json()["data"] if card["parent"]]
    return card


TREE: dict[str, Any] = {
    "threads": 1,
    "model": {"path": MODEL, "lora": {"r": 4, "alpha": 8}},
    "task": {"kind": "pico", "train_size": 8, "probe_size": 1, "eval_size": 2},
    "prompt": {"student": "{problem}", "teacher": "{problem}\n>{hint}", "answer": "\n#{answer}"},
    "routing": {"kind": "both"},
    "loss": {"divergence": {"kind": "sampled"}},
    "rollout": {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 32, "group_size": 4},
    "optim": {"lr": 5e-3, "max_grad_norm": 0},
    "step": {"num_steps": 4, "problems": 4},
    "eval": {"every": 4, "k": 2},
    "save": {"every": 1, "rollouts_every": 4},
}


def test_a_server_that_is_killed_in_a_step_loses_nothing(
    server: RealServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed by SIGKILL while it samples, then started again: the run goes on, and ends as one that was not disturbed.

    In float32 its numbers are the same ones but for rounding, which depends on what shares a batch.
    """
    engine = {"kind": "vllm", "url": server.url, "wait_s": PATIENCE_S, "timeout_s": PATIENCE_S}
    config = build_config(TREE | {"rollout": TREE["rollout"] | {"engine": engine}})
    Trainer.start(config, tmp_path / "whole").train()
    trainer = Trainer.start(config, tmp_path / "killed")
    reached = threading.Event()

    def kill_while_it_samples() -> None:
        reached.wait()
        before = server.count("vllm:generation_tokens_total")
        while server.count("vllm:generation_tokens_total") <= before:
            time.sleep(0.05)
        server.kill()
        server.start()

    def listen(row: dict[str, Any]) -> None:
        if row["step"] == 2:
            reached.set()

    trainer.listener = listen
    killer = threading.Thread(target=kill_while_it_samples)
    killer.start()
    with pytest.warns(UserWarning, match="no longer knows the adapter, as after a restart"):
        trainer.train()
    killer.join()
    whole, killed = (list(RunDir.open(tmp_path / name).metrics()) for name in ("whole", "killed"))
    assert [row["step"] for row in killed] == [0, 1, 2, 3, 4]
    for ours, theirs in zip(killed, whole, strict=True):
        for key in ("reward/mean", "rollout/length_mean", "loss/total", "eval/pico/avg@2"):
            if key in theirs:
                assert ours[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-4), (key, ours["step"])
    rows = [row for row in killed if row["step"]]
    with capsys.disabled():
        print(
            "\nkilled in step 3 and started again; logprob_gap",
            json.dumps([row["rollout/logprob_gap"] for row in rows]),
            "rl/sampler_weight",
            json.dumps([row.get("rl/sampler_weight") for row in rows]),
        )
