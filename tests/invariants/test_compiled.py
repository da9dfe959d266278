"""Compiled layers: the eager numbers, one compilation for all layers and sizes, nothing compiled by sampling."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from atesd.recipe import build_config
from atesd.rollout.eager import uncompiled
from atesd.rollout.hf import HFSampler
from atesd.rollout.sampler import SamplingConfig
from atesd.runlog import RunDir
from atesd.train import compiled, setup, supervised
from atesd.train.compiled import compile_layers
from atesd.train.heads import decoder
from atesd.train.loop import Trainer
from atesd.train.lora import in_fewer_passes
from atesd.types import UserError

from support.architectures import family

pytestmark = [  # torch warns of itself while it compiles
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]
can_compile = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")


@pytest.fixture(autouse=True)
def forgets() -> Iterator[None]:
    """Leave no compiled code and no setting behind."""
    from torch._functorch import config

    before = config.donated_buffer
    torch._dynamo.reset()
    yield
    config.donated_buffer = before
    torch._dynamo.reset()


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every graph that is compiled from now on, by the number of its operations."""
    found: list[int] = []
    plain = torch.compile

    def counting(graph: Any, inputs: Any) -> Callable[..., Any]:
        found.append(len(graph.graph.nodes))
        return graph.forward  # type: ignore[no-any-return]

    def compile_counting(*given: Any, **options: Any) -> Any:
        return plain(*given, **options | {"backend": counting})

    monkeypatch.setattr(torch, "compile", compile_counting)
    return found


def adapted_model() -> nn.Module:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model: Any = get_peft_model(
        family("qwen3", num_hidden_layers=4), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    )
    in_fewer_passes(model)
    return model  # type: ignore[no-any-return]


def through(model: nn.Module, rows: int, length: int) -> list[Tensor]:
    """Return hidden states, and the gradients of all that trains."""
    ids = torch.arange(rows * length).reshape(rows, length) % 100
    hidden: Tensor = decoder(model)(input_ids=ids, use_cache=False).last_hidden_state
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    loss = (hidden * torch.linspace(-1, 1, hidden.numel()).reshape(hidden.shape)).sum()
    found = torch.autograd.grad(loss, weights, allow_unused=True)
    return [hidden.detach(), *(each for each in found if each is not None)]


SIZES = ((3, 7), (5, 9), (2, 12))


@can_compile
def test_compiled_layers_give_the_eager_values_and_gradients() -> None:
    model = adapted_model().train()
    expected = [through(model, *size) for size in SIZES]
    compile_layers(model)
    for size, eager in zip(SIZES, expected, strict=True):
        for ours, theirs in zip(through(model, *size), eager, strict=True):
            assert float((ours - theirs).abs().max()) <= 1e-5 * float(theirs.abs().max())


def test_layers_are_compiled_once_for_all_and_for_batches_of_any_size(graphs: list[int]) -> None:
    model = adapted_model()
    compile_layers(model)
    compiled_ones = [type(each).__name__ for each in model.modules() if each._compiled_call_impl is not None]
    assert compiled_ones == ["Qwen3DecoderLayer"] * 4
    assert len(graphs) == 1, "what was tried"
    for size in SIZES:
        through(model, *size)
    assert len(graphs) == 2, "one graph serves four layers and three sizes"


@pytest.mark.parametrize("always_generate", [False, True])
def test_sampling_compiles_nothing_and_draws_what_it_drew(always_generate: bool, graphs: list[int]) -> None:
    model = adapted_model()

    def drawn() -> list[tuple[int, ...]]:
        sampler = HFSampler(model, eos_ids=(1,), pad_id=0, decode=str, always_generate=always_generate)
        turns = sampler.sample([[5, 6, 7], [9, 8]], SamplingConfig(max_new_tokens=8), seed=0)
        return [turn.completion_ids for turn in turns]

    expected = drawn()
    compile_layers(model)
    graphs.clear()
    assert drawn() == expected
    assert not graphs
    through(model, 3, 7)
    assert graphs, "training compiles again afterwards"


def test_a_plain_model_needs_no_compiler() -> None:
    with uncompiled(family("qwen3")) as stance:
        assert stance is None


def test_a_pass_can_be_derived_more_than_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As credit does: compiled backward passes must not use up what they read."""
    from torch._functorch import config

    monkeypatch.setattr(compiled, "_try", lambda: None)
    config.donated_buffer = True
    compile_layers(family("qwen3"))
    assert config.donated_buffer is False


class _WrappedError(Exception):
    """As torch wraps what a backend raised."""

    def __init__(self, inner: Exception) -> None:
        super().__init__("\nbackend='inductor' raised:")
        self.inner_exception = inner


@pytest.mark.parametrize("wrap", [lambda error: error, _WrappedError])
def test_a_machine_that_cannot_compile_is_told_what_it_lacks(
    wrap: Callable[[Exception], Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise wrap(RuntimeError("No working C++ compiler found\nand much more"))

    model = family("qwen3")
    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(
        UserError, match=r"does not work here \(No working C\+\+ compiler found\).*install one, or remove"
    ):
        compile_layers(model)
    assert all(module._compiled_call_impl is None for module in model.modules())


def test_a_model_that_does_not_name_its_layers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_try", lambda: pytest.fail("refused before anything is compiled"))
    with pytest.raises(UserError, match="Linear does not name its own: remove it"):
        compile_layers(nn.Linear(2, 2))


TREE: dict[str, Any] = {
    "threads": 1,
    "task": {"kind": "pico", "train_size": 20, "probe_size": 6, "eval_size": 4},
    "prompt": {"student": "{problem}", "teacher": "{problem}\n>{hint}", "answer": "\n#{answer}"},
    "exposure": {"kind": "influence", "reference": "reward", "by": "level", "hold": 2},
    "routing": {"kind": "aligned", "otherwise": "skip", "every": 2},
    "rollout": {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 40},
    "optim": {"lr": 1e-3},
    "step": {"num_steps": 5, "problems": 6},
    "eval": {"every": 5, "k": 2},
    "save": {"every": 2, "rollouts_every": 100},
}


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in RunDir.open(run).metrics()]


class _StopError(Exception):
    pass


@can_compile
def test_a_run_with_credit_is_the_eager_one_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    """Credit derives one pass several times; a resumed run compiles anew, at the sizes that it meets first."""
    Trainer.start(build_config(TREE), tmp_path / "eager").train()
    tree = TREE | {"model": {"path": "pico", "compile": True}}
    Trainer.start(build_config(tree), tmp_path / "whole").train()

    def stop(row: dict[str, Any]) -> None:
        if row["step"] == 3:
            raise _StopError

    torch._dynamo.reset()
    with pytest.raises(_StopError):
        Trainer.start(build_config(tree), tmp_path / "cut", listener=stop).train()
    torch._dynamo.reset()
    Trainer.resume(tmp_path / "cut").train()
    eager, whole, resumed = (rows_of(tmp_path / name) for name in ("eager", "whole", "cut"))
    timing_free = [{k: v for k, v in row.items() if not k.startswith("memory/")} for row in whole]
    assert timing_free == [{k: v for k, v in row.items() if not k.startswith("memory/")} for row in resumed]
    losses = [[row["loss/distil"] for row in rows if "loss/distil" in row] for rows in (eager, whole)]
    assert len(losses[0]) >= 3
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize("asked", [False, True])
def test_a_recipe_decides_and_the_model_is_checked_before(asked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(setup, "refuse_disagreement", lambda *_: done.append("checked"))
    monkeypatch.setattr(setup, "compile_layers", lambda model: done.append(f"compiled {type(model).__name__}"))
    tree = TREE | {"model": {"path": "pico", "compile": asked}}
    setup.assemble(build_config(tree))
    assert done == ["checked"] + ["compiled Qwen3ForCausalLM"] * asked


@pytest.mark.parametrize("asked", [False, True])
def test_a_run_says_what_it_will_wait_for(asked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "compile_layers", lambda _: None)
    said: list[str] = []
    Trainer.start(build_config(TREE | {"model": {"path": "pico", "compile": asked}}), tmp_path / "run", say=said.append)
    assert [line for line in said if "compiled in their first passes" in line] == said[1:]
    assert len(said) == 1 + asked


@pytest.mark.parametrize("asked", [False, True])
def test_a_warm_up_compiles_too(asked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[object] = []
    monkeypatch.setattr(supervised, "compile_layers", done.append)
    config = build_config(TREE | {"model": {"path": "pico", "compile": asked}})
    problems = build_config(TREE | {"task": TREE["task"] | {"data_seed": 1}}).task.build(config.facts()).train()
    supervised.warm_up(config, problems, tmp_path / "warm", supervised.WarmupConfig(steps=1))
    assert len(done) == asked


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"model": {"shard": True}}, r"model\.shard = true gathers or unpacks"),
        ({"model": {"quantization": "4bit", "lora": {}}}, r'model\.quantization = "4bit" gathers or unpacks'),
        ({"codes": {}, "routing": {"kind": "distil"}, "exposure": {"kind": "fixed"}}, r"\[codes\] reads or changes"),
        (
            {
                "reveal": {"kind": "retention"},
                "routing": {"kind": "distil"},
                "exposure": {"kind": "fixed", "ratio": 0.5},
            },
            r'reveal\.kind = "retention" reads or changes',
        ),
        (
            {"gradient": {"kind": "longact"}, "routing": {"kind": "distil"}, "exposure": {"kind": "fixed"}},
            r'gradient\.kind = "longact" reads or changes',
        ),
    ],
)
def test_what_reads_or_changes_layers_is_refused_beside_compiled_ones(more: dict[str, Any], named: str) -> None:
    tree = TREE | more
    build_config(tree)
    with pytest.raises(UserError, match=f"{named}.*remove either"):
        build_config(tree | {"model": {"path": "pico", **more.get("model", {}), "compile": True}})
