"""LoRA's layers: peft's values and gradients in fewer passes, and what is left to peft."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from shutil import copy
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from atesd.rollout.known import why_unknown
from atesd.rollout.llama import _projections
from atesd.sections import LoraConfig, ModelConfig
from atesd.train import lora
from atesd.train.lora import AdaptedLinear, adapted, in_fewer_passes
from atesd.train.model import load, resolve

from support.architectures import family

IN, OUT, RANK, SCALE = 24, 40, 3, 4 / 3  # a scale that no precision holds exactly


def layer(dtype: torch.dtype = torch.float64, *, bias: bool = False, adapter: torch.dtype | None = None) -> Any:
    """Return peft's layer over a frozen one, with random weights; its adapter in a precision of its own."""
    torch.manual_seed(0)
    frozen = nn.Linear(IN, OUT, bias=bias, dtype=dtype).requires_grad_(False)
    settings = PeftLoraConfig(r=RANK, lora_alpha=cast("int", SCALE * RANK), init_lora_weights=False)
    made: Any = PeftLinear(frozen, "default", settings, r=RANK, lora_alpha=SCALE * RANK)
    for part in (made.lora_A, made.lora_B):
        nn.init.normal_(part.to(adapter or dtype)["default"].weight)  # numbers that half precision has to round
    return made


def quick(made: Any) -> Any:
    """Return the same layer as ours, on the same weights."""
    whole = nn.Sequential(made)
    in_fewer_passes(whole)
    assert type(made) is AdaptedLinear
    return made


def drawn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


def results(made: Any, x: Tensor) -> dict[str, Tensor]:
    """Return the layer's values and what they derive to."""
    x = x.clone().requires_grad_()
    weights = {"A": made.lora_A["default"].weight, "B": made.lora_B["default"].weight}
    out = made(x)
    slope = torch.linspace(-1, 2, out.numel()).reshape(out.shape).to(out.dtype)
    found = torch.autograd.grad(out, (x, *weights.values()), slope)
    return {"out": out.detach()} | dict(zip(("x", *weights), found, strict=True))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(5, IN), (2, 7, IN), (2, 3, 2, IN), (IN,)])
def test_values_and_gradients_are_pefts(shape: tuple[int, ...], bias: bool) -> None:
    made, x = layer(bias=bias), drawn(*shape)
    theirs, ours = results(made, x), results(quick(made), x)
    for name, expected in theirs.items():
        assert ours[name].shape == expected.shape
        torch.testing.assert_close(ours[name], expected, rtol=1e-12, atol=1e-12)


def test_a_layer_worked_by_hand() -> None:
    """W = (1 2), A = (1 0), B = (3), scale 2 and bias 1 at x = (1, 10): 1 + 20 + 1 + 2 * 3 * 1 = 28."""
    x = torch.tensor([[1.0, 10.0]], requires_grad=True)
    down, up = torch.tensor([[1.0, 0.0]], requires_grad=True), torch.tensor([[3.0]], requires_grad=True)
    out = adapted(x, torch.tensor([[1.0, 2.0]]), torch.tensor([1.0]), down, up, 2.0)
    assert out.item() == 28
    of_x, of_down, of_up = torch.autograd.grad(out, (x, down, up), torch.tensor([[0.5]]))
    assert of_x.tolist() == [[0.5 * (1 + 2 * 3), 0.5 * 2]]  # dL/dout (W + scale B A)
    assert of_down.tolist() == [[0.5 * 2 * 3 * 1, 0.5 * 2 * 3 * 10]]  # scale B dL/dout x
    assert of_up.tolist() == [[0.5 * 2 * 1]]  # scale dL/dout (x A)


def test_first_and_second_derivatives_are_those_of_the_values() -> None:
    made = quick(layer(bias=True))
    down, up = (part["default"].weight.detach().requires_grad_() for part in (made.lora_A, made.lora_B))
    frozen = made.base_layer

    def values(x: Tensor, down_RI: Tensor, up_OR: Tensor) -> Tensor:
        return adapted(x, frozen.weight, frozen.bias, down_RI, up_OR, SCALE)

    inputs = (drawn(3, IN).requires_grad_(), down, up)
    assert torch.autograd.gradcheck(values, inputs)
    assert torch.autograd.gradgradcheck(values, inputs)


@pytest.mark.parametrize("alone", ["x", "A", "B"])
def test_what_does_not_train_gets_no_gradient(alone: str) -> None:
    made, x = quick(layer()), drawn(4, IN)
    inputs = {"x": x, "A": made.lora_A["default"].weight, "B": made.lora_B["default"].weight}
    expected = results(made, x)
    for name, each in inputs.items():
        each.requires_grad_(name == alone)
    out = made(x)
    out.backward(torch.linspace(-1, 2, out.numel()).reshape(out.shape).to(out.dtype))
    assert [name for name, each in inputs.items() if each.grad is not None] == [alone]
    torch.testing.assert_close(inputs[alone].grad, expected[alone])


def test_no_gradient_is_made_of_an_input_that_needs_none() -> None:
    out = quick(layer())(drawn(4, IN)).sum()
    with FlopCounterMode(display=False) as products:
        out.backward()
    assert products.get_total_flops() == 2 * 4 * RANK * (2 * OUT + IN)  # of low, A and B


def test_half_precision_is_as_near_to_the_truth_as_peft_under_autocast() -> None:
    half = torch.bfloat16
    made, x = layer(half, adapter=torch.float32), drawn(64, IN, dtype=half)
    exact = layer()
    exact.load_state_dict(made.state_dict())  # the same numbers in float64
    truth = results(exact, x.double())
    with torch.autocast("cpu", dtype=half):
        theirs = results(made, x)
    ours = results(quick(made), x)
    assert {name: each.dtype for name, each in ours.items()} == {
        "out": half,
        "x": half,
        "A": torch.float32,
        "B": torch.float32,
    }
    for name, expected in truth.items():
        error, of_theirs = (float((found[name].double() - expected).norm()) for found in (ours, theirs))
        assert error <= 1.1 * of_theirs, name
        assert error <= 0.01 * float(expected.norm()), name


def test_half_precision_rounds_as_the_sampling_loop_does() -> None:
    made = quick(layer(torch.bfloat16, adapter=torch.float32))
    x = drawn(8, IN, dtype=torch.bfloat16)
    assert torch.equal(made(x), _projections([made])(x)[0])


def kept(made: Any, x: Tensor) -> int:
    """Return how many bytes a forward pass keeps for the backward pass, beyond weights."""
    sizes: dict[int, int] = {}
    weights = {each.data_ptr() for each in made.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in weights:
            sizes[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = made(x)
        del out
    return sum(sizes.values())


def test_the_input_is_kept_once_and_in_its_own_precision() -> None:
    made, x = layer(torch.bfloat16, adapter=torch.float32), drawn(64, IN, dtype=torch.bfloat16).requires_grad_()
    theirs = kept(made, x)
    assert kept(quick(made), x) == 2 * 64 * (IN + RANK)
    assert theirs >= 4 * 64 * (IN + RANK)


def _second(made: Any) -> None:
    settings = PeftLoraConfig(r=2, lora_alpha=2, init_lora_weights=False)
    made.update_layer("other", 2, lora_alpha=2, config=settings)
    made.double()
    made.set_adapter(["default", "other"])


def _with_dropout(made: Any) -> None:
    made.lora_dropout["default"] = nn.Dropout(0.5)


def _with_bias(made: Any) -> None:
    made.lora_B["default"].bias = nn.Parameter(drawn(OUT))


def _watched(part: str, kind: str) -> Callable[[Any], None]:
    def watch(made: Any) -> None:
        module = made.base_layer if part == "base_layer" else getattr(made, part)["default"]
        getattr(module, f"register_{kind}")(lambda *_: None)

    return watch


LEFT: dict[str, Callable[[Any], object]] = {
    "switched off": lambda made: made.enable_adapters(enabled=False),
    "merged": lambda made: made.merge(),
    "two adapters": _second,
    "another adapter": lambda made: made.__dict__.update(_active_adapter="other"),
    "dropout": _with_dropout,
    "an adapter with a bias": _with_bias,
    "a variant": lambda made: made.__dict__.update(lora_variant={"default": _Variant()}),
    "weights the other way round": lambda made: made.__dict__.update(fan_in_fan_out=True),
    "a base that trains": lambda made: made.base_layer.weight.requires_grad_(),
    "watched forward": _watched("lora_A", "forward_hook"),
    "watched before": _watched("lora_B", "forward_pre_hook"),
    "watched backward": _watched("base_layer", "full_backward_hook"),
    "watched before the backward pass": _watched("lora_A", "full_backward_pre_hook"),
}


class _Variant:
    """Adds nothing."""

    def forward(self, module: Any, *, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        return result


@pytest.mark.parametrize("kind", LEFT)
def test_what_is_more_than_one_plain_adapter_is_left_to_peft(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = layer()
    LEFT[kind](made)
    x = drawn(4, IN).requires_grad_()
    torch.manual_seed(1)
    expected = made(x)
    taken: list[object] = []
    monkeypatch.setattr(lora, "adapted", lambda *given: taken.append(given))
    torch.manual_seed(1)
    assert torch.equal(quick(made)(x), expected)
    assert not taken


def test_a_base_whose_bias_trains_is_left_to_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    made = quick(layer(bias=True))
    made.base_layer.bias.requires_grad_()
    monkeypatch.setattr(lora, "adapted", None)
    made(drawn(4, IN)).sum().backward()
    assert made.base_layer.bias.grad is not None


def test_autocast_and_inputs_of_another_precision_are_left_to_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    made = quick(layer(torch.float32))
    monkeypatch.setattr(lora, "adapted", None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert made(drawn(4, IN, dtype=torch.float32)).dtype is torch.bfloat16
    with pytest.raises(RuntimeError, match="dtype"):  # as peft has it
        made(drawn(4, IN, dtype=torch.bfloat16))


def test_what_peft_is_told_beside_the_input_reaches_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made = quick(layer())
    monkeypatch.setattr(lora, "adapted", None)
    mixed = made(drawn(2, IN), adapter_names=["default", "__base__"])
    assert torch.equal(mixed[1], made.base_layer(drawn(2, IN))[1])
    assert not torch.equal(mixed[0], made.base_layer(drawn(2, IN))[0])


class _Pefts(PeftLinear):
    """A layer that something else made."""


class _Special(nn.Linear):
    """A layer that adds one, as no formula of ours would know."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


def test_layers_over_a_kind_of_their_own_stay_pefts() -> None:
    model = nn.ModuleDict({"plain": nn.Linear(4, 4), "special": _Special(4, 4), "table": nn.Embedding(4, 4)})
    whole = get_peft_model(cast("Any", model), PeftLoraConfig(r=2, target_modules=["plain", "special", "table"]))
    theirs = layer()
    theirs.__class__ = _Pefts
    whole.base_model.model["theirs"] = theirs
    before = {name: type(each) for name, each in whole.named_modules()}
    in_fewer_passes(whole)
    changed = [name for name, each in whole.named_modules() if type(each) is not before[name]]
    assert changed == ["base_model.model.plain"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny Qwen3, with the packaged tokenizer."""
    made = tmp_path / "model"
    family("qwen3").save_pretrained(made)
    for each in Path(resolve("pico")).iterdir():
        if "token" in each.name or "template" in each.name:
            copy(each, made / each.name)
    return made


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_loaded_model_computes_so_and_is_sampled_by_the_loop(dtype: Any, folder: Path) -> None:
    model, _ = load(ModelConfig(path=str(folder), dtype=dtype, lora=LoraConfig(r=2)), 0)
    layers = [each for each in model.modules() if hasattr(each, "lora_A")]
    assert len(layers) == 14
    assert {type(each) for each in layers} == {AdaptedLinear}
    assert why_unknown(cast("Any", model).get_base_model(), 16) is None


def test_an_adapter_beside_its_base_computes_so(folder: Path, tmp_path: Path) -> None:
    model, tokenizer = load(ModelConfig(path=str(folder), lora=LoraConfig(r=2)), 0)
    saved = tmp_path / "adapter"
    model.save_pretrained(saved)
    tokenizer.save_pretrained(saved)
    beside, _ = load(ModelConfig(path=str(saved), dtype="bfloat16"), 0)
    assert any(type(each) is AdaptedLinear for each in beside.modules())


def test_training_and_merging_equal_pefts(folder: Path) -> None:
    """Three steps of a whole model, then merged: the same weights within float32's rounding."""
    merged = []
    for is_quick in (False, True):
        torch.manual_seed(0)
        settings = PeftLoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        model: Any = get_peft_model(family("qwen3"), settings)
        if is_quick:
            in_fewer_passes(model)
        optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.1)
        ids = torch.arange(24).reshape(2, 12)
        for _ in range(3):
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
        merged.append(list(model.merge_and_unload().parameters()))
    for theirs, ours in zip(*merged, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
