"""Several processes over vLLM servers: each asks for its own groups, one brings the adapter, and all train as one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from atesd.metrics import is_timing
from atesd.recipe import build_config
from atesd.runlog import RunDir
from atesd.train.loop import Trainer
from atesd.types import UserError

from support.fake_vllm import FakeVllm
from support.processes import NEEDS_SHARDS, together
from support.vllm_runs import TREE, started

pytestmark = [
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:the vLLM server at:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*LoRA.*:UserWarning"),
]
SHORT: dict[str, Any] = TREE | {
    "optim": {"lr": 2e-3, "eps": 1e-4, "max_grad_norm": 0},
    "step": {"num_steps": 3, "problems": 3},
}


def tree_of(ahead: int) -> dict[str, Any]:
    limits = {"gap_limit": 1e-2, "gap_warning": 1e-2}
    return SHORT | {"rollout": TREE["rollout"] | {"ahead": ahead} | limits}


def assert_as_one(one: Path, several: Path) -> None:
    texts = [[path.read_text() for path in sorted((run / "eval").iterdir())] for run in (one, several)]
    assert texts[0] == texts[1]
    for logged, expected in zip(RunDir(several).metrics(), RunDir(one).metrics(), strict=True):
        shown = {key: value for key, value in logged.items() if not is_timing(key) and key != "optim/micro_batches"}
        assert shown == pytest.approx({key: expected[key] for key in shown}, rel=1e-4, abs=1e-5)
    ours, theirs = (load_file(run / "final" / "adapter_model.safetensors") for run in (several, one))
    for name, found in ours.items():
        torch.testing.assert_close(found, theirs[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("ahead", "servers", "shard"), [(0, 1, False), (1, 2, False), pytest.param(1, 1, True, marks=NEEDS_SHARDS)]
)
def test_two_processes_train_as_one(ahead: int, servers: int, shard: bool, tmp_path: Path) -> None:
    """Of sharded weights the whole adapter is handed over."""
    one, two, tree = tmp_path / "one", tmp_path / "two", tree_of(ahead)
    tree = tree | {"model": tree["model"] | {"shard": shard}}
    with FakeVllm() as fake, FakeVllm() as other:
        urls = (fake.url, other.url)[:servers]
        result = together(tmp_path / "left", 2, lambda rank: started(fake, two, tree, url=urls).train()["step"])
        assert result == [3, 3]
        asked = len(fake.asked), len(other.asked)
        loaded = [[path.rpartition("-v")[2] for path in each.paths] for each in (fake, other)]
        assert fake.adapters == other.adapters == {}
        fake.asked.clear()
        started(fake, one, tree).train()
        whole = len(fake.asked)
    assert loaded == [["0", "1", "2", "3"], ["0", "1", "2", "3"] if servers == 2 else []]
    assert sum(asked) == whole, "no group was asked for twice"
    assert servers == 1 or min(asked) >= whole // 3
    assert_as_one(one, two)


def test_a_server_that_is_started_again_between_loses_nothing(tmp_path: Path) -> None:
    """Each process notices by itself, and loads the adapter; both go on with the same groups."""
    tree = tree_of(1)
    with FakeVllm() as fake:

        def restarted(server: FakeVllm, _: Any) -> str:
            server.adapters.clear()
            server._models.clear()
            return "reset"

        def run(rank: int) -> Any:
            return started(fake, tmp_path / "two", tree).train()["step"]

        fake.faults += [lambda _, answer: answer] * 8 + [restarted]
        assert together(tmp_path / "left", 2, run) == [3, 3]
        fake.faults.clear()
        started(fake, tmp_path / "one", tree).train()
    assert_as_one(tmp_path / "one", tmp_path / "two")


def test_a_server_that_refuses_ends_all_in_one_line(tmp_path: Path) -> None:
    tree = SHORT | {"model": {"path": "pico", "lora": {"r": 32, "alpha": 8}}}
    with FakeVllm() as fake:
        found = together(tmp_path / "left", 2, lambda rank: started(fake, tmp_path / "run", tree).train())
    assert type(found[0]) is UserError
    assert "takes no adapter of rank 32" in str(found[0])
    assert "process 0 failed: the vLLM server at" in str(found[1])
    assert not (tmp_path / "run").exists()


def test_a_run_of_two_goes_on_with_what_was_under_way(tmp_path: Path) -> None:
    whole, run, tree = tmp_path / "whole", tmp_path / "run", tree_of(1)
    with FakeVllm() as fake:
        together(tmp_path / "a", 2, lambda rank: started(fake, whole, tree).train())

        def stopped(rank: int) -> Any:
            trainer = started(fake, run, tree)
            trainer.listener = lambda row: row["step"] == 1 and trainer.stop()
            with pytest.raises(Exception, match="stopped after step 1"):
                trainer.train()

        together(tmp_path / "b", 2, stopped)
        together(tmp_path / "c", 2, lambda rank: Trainer.resume(run).train())
    rows = [
        [{k: v for k, v in row.items() if not is_timing(k)} for row in RunDir.open(path).metrics()]
        for path in (run, whole)
    ]
    assert rows[0] == rows[1]


def test_the_engine_is_no_longer_refused() -> None:
    config = build_config(SHORT | {"rollout": TREE["rollout"] | {"engine": {"kind": "vllm"}}})
    assert config.rollout.engine.samples_parts
