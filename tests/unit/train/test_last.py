"""The last layer behind its attention: for scored positions alone, and as it is where that could change something."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from atesd.rollout import llama
from atesd.rollout.llama import Decoder
from atesd.train.batch import Pass, Passage, view_input
from atesd.train.heads import decoder
from atesd.train.last import final_states
from atesd.train.lora import AdaptedLinear, in_fewer_passes

from support.families import FAMILIES, family_model

PASSAGES = [Passage((2, 3, 4, 5, 6, 7), (8, 9)), Passage((3, 5), (7, 11, 13, 2)), Passage((4,), (6, 6, 6))]
CPU = torch.device("cpu")
SCORED = 9


def read(passages: list[Passage] = PASSAGES) -> Pass:
    """Return three passages of several lengths as one pass of 7 columns."""
    (each,) = view_input(passages, 0, CPU, together=True).passes
    assert each.ids_BL.shape == (3, 7)
    return each


def adapted(model: Any, ours: bool) -> Any:
    """Give a model adapters that matter, peft's layers or ours."""
    torch.manual_seed(1)
    wrapped = get_peft_model(model, LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False)).eval()
    if ours:
        in_fewer_passes(wrapped)
        assert any(isinstance(module, AdaptedLinear) for module in wrapped.modules())
    return wrapped


MODELS: dict[str, Callable[[], Any]] = {
    **{name: lambda name=name: family_model(name, torch.float64) for name in FAMILIES},
    "peft's layers": lambda: adapted(family_model("qwen3", torch.float64), ours=False),
    "our layers": lambda: adapted(family_model("llama with yarn", torch.float64), ours=True),
}


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What goes through feed-forward networks and norms, and how many positions of it, by the name of the class."""
    seen: list[tuple[str, int]] = []

    def watch(kind: type[nn.Module]) -> None:
        own: Any = kind.forward

        def forward(self: nn.Module, x: Tensor) -> Any:
            if x.dim() < 4:  # heads have norms of their own
                seen.append((kind.__name__.removeprefix("Qwen3").removeprefix("Llama"), x.flatten(0, -2).shape[0]))
            return own(self, x)

        monkeypatch.setattr(kind, "forward", forward)

    from transformers.models.llama import modeling_llama as llama
    from transformers.models.qwen3 import modeling_qwen3 as qwen3

    for kind in (llama.LlamaMLP, llama.LlamaRMSNorm, qwen3.Qwen3MLP, qwen3.Qwen3RMSNorm):
        watch(kind)
    return seen


EVERYWHERE = [("RMSNorm", 21), ("RMSNorm", 21), ("MLP", 21)]
WHOLE = EVERYWHERE * 2 + [("RMSNorm", 21)]
LEAN = [*EVERYWHERE, ("RMSNorm", 21), ("RMSNorm", SCORED), ("MLP", SCORED), ("RMSNorm", SCORED)]


@pytest.mark.parametrize("name", MODELS)
def test_values_and_gradients_are_those_of_the_whole_layer(name: str) -> None:
    model, each = MODELS[name](), read()

    def derived(states_NH: Tensor) -> dict[str, Tensor]:
        model.zero_grad()
        (states_NH * torch.linspace(-1, 2, states_NH.numel()).view(states_NH.shape)).sum().backward()
        return {n: weight.grad.clone() for n, weight in model.named_parameters() if weight.grad is not None}

    found = final_states(model, each)
    found_grads = derived(found)
    whole_BLH = decoder(model)(input_ids=each.ids_BL, use_cache=False).last_hidden_state
    expected = whole_BLH.flatten(0, 1)[each.places_N]
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    assert found.shape == (SCORED, 32)
    expected_grads = derived(expected)
    assert found_grads.keys() == expected_grads.keys()
    for weight, want in expected_grads.items():
        torch.testing.assert_close(found_grads[weight], want, atol=1e-11, rtol=1e-11)
        assert bool(want.any())


@pytest.mark.parametrize("name", ["qwen3", "llama with yarn", "peft's layers", "our layers"])
def test_the_last_layer_sees_scored_positions_alone(name: str, rows: list[tuple[str, int]]) -> None:
    model = MODELS[name]()
    final_states(model, read())
    assert rows == LEAN
    assert not any("forward" in vars(module) for module in model.modules()), "everything is put back"


def hooked(where: Callable[[Any], nn.Module]) -> Callable[[Any], None]:
    return lambda model: where(model).register_forward_hook(lambda *_: None)  # type: ignore[func-returns-value]


def own_forward(model: Any) -> None:
    layer = model.model.layers[1]
    layer.mlp.down_proj.forward = layer.mlp.down_proj.forward


AS_IT_IS: dict[str, Callable[[Any], None]] = {
    "in training mode": lambda model: model.train(),
    "compiled": lambda model: setattr(model.model.layers[1], "_compiled_call_impl", model.model.layers[1]._call_impl),
    "a hook on the layer": hooked(lambda model: model.model.layers[1]),
    "a hook on its attention": hooked(lambda model: model.model.layers[1].self_attn),
    "a hook on the projection behind it": hooked(lambda model: model.model.layers[1].self_attn.o_proj),
    "a hook on its norm": hooked(lambda model: model.model.layers[1].post_attention_layernorm),
    "a hook inside its network": hooked(lambda model: model.model.layers[1].mlp.gate_proj),
    "a hook on the norm behind it": hooked(lambda model: model.model.norm),
    "a hook on the decoder": hooked(lambda model: model.model),
    "a forward of its own": own_forward,
}


@pytest.mark.parametrize("why", AS_IT_IS)
def test_a_layer_that_somebody_watches_runs_as_it_is(why: str, rows: list[tuple[str, int]]) -> None:
    model = family_model("qwen3", torch.float64)
    expected = final_states(model, read())
    rows.clear()
    AS_IT_IS[why](model)
    found = final_states(model, read())
    assert rows == WHOLE
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)


def test_hooks_elsewhere_do_not_matter(rows: list[tuple[str, int]]) -> None:
    model = family_model("qwen3", torch.float64)
    model.model.layers[0].register_forward_hook(lambda *_: None)
    model.model.layers[1].self_attn.q_proj.register_forward_hook(lambda *_: None)
    final_states(model, read())
    assert rows == LEAN


def test_layers_beyond_those_that_run_are_not_the_last(rows: list[tuple[str, int]]) -> None:
    model = family_model("qwen3", torch.float64, num_hidden_layers=3)
    model.config.num_hidden_layers = 2
    final_states(model, read())
    assert rows == LEAN


def test_an_architecture_of_its_own_runs_as_it_is(rows: list[tuple[str, int]]) -> None:
    model = family_model("qwen3", torch.float64)
    model.__class__ = type("Qwen3ForCausalLM", (type(model),), {"__module__": "somebody.elses"})
    final_states(model, read())
    assert rows == WHOLE


def test_a_pass_that_fails_leaves_the_layer_as_it_was(rows: list[tuple[str, int]]) -> None:
    model = family_model("qwen3", torch.float64)
    broken = read()._replace(places_N=torch.tensor([10**6]))
    with pytest.raises(IndexError):
        final_states(model, broken)
    assert not any("forward" in vars(module) for module in model.modules())
    rows.clear()
    assert final_states(model, read()).shape == (SCORED, 32)
    assert rows == LEAN


@pytest.mark.parametrize("name", ["qwen3", "mistral"])
def test_of_prompts_sampling_takes_their_ends_alone_through_the_last_layer(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = family_model(name)
    widths: list[tuple[int, ...]] = []
    linear: Any = nn.functional.linear

    def watched(x: Tensor, *parts: Any) -> Tensor:
        widths.append(tuple(x.shape[:-1]))
        return linear(x, *parts)

    prompts = [(2, 3, 4, 5, 6), (3, 5), (2, 3, 4, 5, 6)]
    expected = torch.stack([model(torch.tensor([prompt])).logits[0, -1] for prompt in prompts])
    monkeypatch.setattr(llama, "_FEW", 0)
    monkeypatch.setattr(nn.functional, "linear", watched)
    logits_BV, _ = Decoder(model).read(prompts, 3)
    everywhere, ends = (2, 5), (2,)  # of two different prompts, up to 5 tokens long
    assert widths == [everywhere] * 7 + [everywhere] * 3 + [ends] * 4 + [ends]
    torch.testing.assert_close(logits_BV, expected, atol=1e-4, rtol=1e-4)
