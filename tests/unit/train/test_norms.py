"""Norms in fewer passes: the same values and gradients, and which norms compute so."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from atesd.sections import LoraConfig, ModelConfig
from atesd.train.model import load
from atesd.train.norms import rms_norm, use_lean_norms

EPS = 1e-3


def reference(x: Tensor, weight: Tensor, outer: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the norm in float64, and the gradients of its product with `outer`."""
    x, weight = (each.detach().double().requires_grad_() for each in (x, weight))
    y = weight * x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()
    y.backward(outer.double())
    assert x.grad is not None
    assert weight.grad is not None
    return y.detach(), x.grad, weight.grad


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_a_norm_by_hand() -> None:
    """Mean square of (1, 7) is 25: y = (2 / 5, 3 * 7 / 5).

    For dL/dy = (1, 0): g = (2, 0), n = (.2, 1.4), mean(g n) = .2.
    """
    x = torch.tensor([[1.0, 7.0]], requires_grad=True)
    weight = torch.tensor([2.0, 3.0], requires_grad=True)
    y = rms_norm(x, weight, 0.0)
    torch.testing.assert_close(y, torch.tensor([[0.4, 4.2]]))
    y.backward(torch.tensor([[1.0, 0.0]]))  # type: ignore[no-untyped-call]
    torch.testing.assert_close(x.grad, torch.tensor([[0.2 * (2 - 0.2 * 0.2), 0.2 * (0 - 1.4 * 0.2)]]))
    torch.testing.assert_close(weight.grad, torch.tensor([0.2, 0.0]))


@pytest.mark.parametrize("shape", [(3, 8), (2, 5, 3, 16), (7,)])
def test_values_and_gradients_are_those_in_float64(shape: tuple[int, ...]) -> None:
    x, weight, outer = drawn(*shape).requires_grad_(), drawn(shape[-1]).requires_grad_(), drawn(*shape) + 1
    y = rms_norm(x, weight, EPS)
    y.backward(outer)  # type: ignore[no-untyped-call]
    expected = reference(x, weight, outer)
    for found, want in zip((y.detach(), x.grad, weight.grad), expected, strict=True):
        assert found is not None
        torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [48, 1000])
def test_values_are_bit_for_bit_the_models_own_and_gradients_as_near_to_the_truth(
    dtype: torch.dtype, width: int
) -> None:
    norm = LlamaRMSNorm(width, EPS).to(dtype)
    norm.weight.data = drawn(width).to(dtype)
    x, outer = drawn(40, width).to(dtype), drawn(40, width).to(dtype)
    expected = reference(x, norm.weight, outer)
    off: list[list[float]] = []
    for compute in (norm, lambda x: rms_norm(x, norm.weight, EPS)):
        x, norm.weight.grad = x.detach().requires_grad_(), None
        y = compute(x)
        y.backward(outer)
        assert torch.equal(y, norm(x))
        assert x.grad is not None
        assert norm.weight.grad is not None
        assert {x.grad.dtype, norm.weight.grad.dtype, y.dtype} == {dtype}
        found = x.grad, norm.weight.grad
        off.append([float((a.double() - b).norm() / b.norm()) for a, b in zip(found, expected[1:], strict=True)])
    theirs, ours = off
    assert all(0 < mine <= 1.1 * other < 0.02 for mine, other in zip(ours, theirs, strict=True)), off


def test_a_frozen_weight_gets_no_gradient_and_a_frozen_row_none_either() -> None:
    x, weight = drawn(4, 8), drawn(8)
    y = rms_norm(x.clone().requires_grad_(), weight, EPS)
    y.sum().backward()  # type: ignore[no-untyped-call]
    assert weight.grad is None
    trained = weight.clone().requires_grad_()
    rms_norm(x, trained, EPS).sum().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(trained.grad, reference(x, weight, torch.ones(4, 8))[2].float())
    assert not rms_norm(x, weight, EPS).requires_grad


class Other(nn.Module):
    """Norms with another eps of their own, a bias, or no weights."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.gemma = LlamaRMSNorm(8, 1e-6), LlamaRMSNorm(8, 1e-2), Gemma2RMSNorm(8)
        self.plain, self.layer = nn.RMSNorm(8, EPS, False), nn.LayerNorm(8)
        self.nameless = nn.RMSNorm(8)
        self.hooked = LlamaRMSNorm(8, 1e-6)
        self.hooked.forward = lambda x: x


def fast(model: nn.Module) -> set[str]:
    kinds = {name: type(module) for name, module in model.named_modules()}
    use_lean_norms(model)
    return {name for name, module in model.named_modules() if type(module) is not kinds[name]}


def test_norms_that_the_formula_describes_compute_by_it_and_others_stay() -> None:
    model, same = Other(), Other()
    same.load_state_dict(model.state_dict())
    assert fast(model) == {"a", "b"}
    x = drawn(3, 8)
    for name, module in model.named_children():
        assert torch.equal(module(x), same.get_submodule(name)(x))
    assert type(model.a).__name__ == "LlamaRMSNorm"
    assert isinstance(model.a, LlamaRMSNorm)
    assert model.state_dict().keys() == same.state_dict().keys()


def test_one_that_multiplies_before_it_rounds_computes_so_in_float32_alone() -> None:
    assert fast(nn.ModuleList([Olmo2RMSNorm(32)])) == {"0"}
    assert fast(nn.ModuleList([Olmo2RMSNorm(32)]).to(torch.bfloat16)) == set()
    assert fast(nn.ModuleList([Olmo2RMSNorm(32), Olmo2RMSNorm(32).to(torch.bfloat16)])) == {"0"}
    assert fast(nn.ModuleList([LlamaRMSNorm(32)]).to(torch.bfloat16)) == {"0"}


def test_a_copy_has_weights_of_its_own_and_other_precisions_are_the_models_affair() -> None:
    model = nn.ModuleList([LlamaRMSNorm(8, EPS)])
    use_lean_norms(model)
    other = copy.deepcopy(model)
    other[0].weight.data.mul_(3)
    x = drawn(2, 8)
    torch.testing.assert_close(other[0](x), 3 * model[0](x))
    half = x.to(torch.bfloat16)
    torch.testing.assert_close(model[0](half), LlamaRMSNorm(8, EPS)(half))
    assert model[0](half).dtype is torch.float32


@pytest.mark.parametrize("has_gpu", [False, True])
def test_loaded_models_compute_so_but_on_a_gpu(monkeypatch: pytest.MonkeyPatch, has_gpu: bool) -> None:
    monkeypatch.setattr("atesd.train.model.has_accelerator", lambda: has_gpu)
    called: list[int] = []
    own: Any = Qwen3RMSNorm.forward
    monkeypatch.setattr(Qwen3RMSNorm, "forward", lambda self, x: (called.append(1), own(self, x))[1])
    model, _ = load(ModelConfig(path="pico"), 0)
    called.clear()
    model(torch.tensor([[1, 2, 3]]))
    assert len(called) == (9 if has_gpu else 0), "four a layer, and one behind the last"


def test_second_derivatives_are_those_of_the_models_own() -> None:
    norm = LlamaRMSNorm(6, EPS)
    norm.weight.data = drawn(6)
    x = drawn(4, 6).requires_grad_()
    found = []
    for compute in (norm, lambda x: rms_norm(x, norm.weight, EPS)):
        first = torch.autograd.grad(compute(x).pow(3).sum(), (x, norm.weight), create_graph=True)
        found.append(torch.autograd.grad(sum(each.square().sum() for each in first), (x, norm.weight)))
    for ours, theirs in zip(*reversed(found), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)
        assert float(theirs.abs().max()) > 1


def test_gradients_an_example_of_functional_torch() -> None:
    weight, x = drawn(6), drawn(5, 6)
    of_each = torch.func.vmap(torch.func.grad(lambda x: rms_norm(x, weight, EPS).pow(2).sum()))(x)
    given = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(rms_norm(given, weight, EPS).pow(2).sum(), given)
    torch.testing.assert_close(of_each, expected)


def test_a_loaded_model_can_be_pickled(tmp_path: Path) -> None:
    model, _ = load(ModelConfig(path="pico", lora=LoraConfig(r=2, alpha=4)), 0)
    ids = torch.tensor([[1, 2, 3]])
    again = pickle.loads(pickle.dumps(model))
    kinds = [type(module) for module in again.modules() if type(module).__name__ == "Qwen3RMSNorm"]
    assert len(kinds) == 9
    assert {*kinds} == {type(module) for module in model.modules() if type(module).__name__ == "Qwen3RMSNorm"}
    assert torch.equal(again(ids).logits, model(ids).logits)
    torch.save(model, tmp_path / "model.pt")
    assert torch.equal(torch.load(tmp_path / "model.pt", weights_only=False)(ids).logits, model(ids).logits)
