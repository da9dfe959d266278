"""Attention of short rows: torch's values, the formula's gradients, and where it is used."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import FalconConfig, FalconForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from atesd.rollout.known import SHORT_ROWS, why_unknown
from atesd.sections import ModelConfig
from atesd.train import attention
from atesd.train.attention import SHORT
from atesd.train.model import load
from atesd.train.veils import Veils
from atesd.types import UserError

from support.architectures import family

HALF = torch.bfloat16
MODULE: Any = SimpleNamespace(is_causal=True, num_key_value_groups=2)


def inputs(dtype: torch.dtype, keys: int = 7, queries: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return q [2, 4, Q, 16], and k and v with half as many heads."""
    generator = torch.Generator().manual_seed(keys)

    def drawn(heads: int, length: int) -> Tensor:
        return (3 * torch.randn(2, heads, length, 16, generator=generator)).to(dtype).requires_grad_()

    return drawn(4, queries or keys), drawn(2, keys), drawn(2, keys)


def padded(keys: int) -> Tensor:
    """Return a causal mask [2, 1, K, K] whose second row lacks its last two keys."""
    mask = torch.ones(keys, keys, dtype=torch.bool).tril().repeat(2, 1, 1, 1)
    mask[1, :, :, keys - 2 :] = False
    return mask


def weights(out: Tensor) -> Tensor:
    return torch.linspace(-1, 2, out.numel()).reshape(out.shape).to(out.dtype)


def through(out: Tensor, of: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return gradients as autograd has them."""
    return torch.autograd.grad(out, of, weights(out))


@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize("scaling", [0.25, 0.1])
@pytest.mark.parametrize("keys", [1, 7])
def test_gradients_are_autograds(is_masked: bool, scaling: float, keys: int) -> None:
    given, mask = inputs(torch.float64, keys), padded(keys) if is_masked and keys > 2 else None
    out, _ = sdpa_attention_forward(MODULE, *given, mask, scaling=scaling)
    ours = attention.gradients(*[each.detach() for each in given], mask, scaling, weights(out))
    for found, expected in zip(ours, through(out, given), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_a_gradient_by_hand() -> None:
    """Two keys with scores 0 and ln 3: P = (1/4, 3/4). For out = P v, v = (4, 8) and o = 1: o v^T = (4, 8), their mean
    under P is 7, S = (-3/4, 3/4), dL/dq = scaling S k = 3/4 ln 3, dL/dk = scaling S^T q, dL/dv = P.
    """
    log3 = float(torch.tensor(3.0).log())
    query, key, value = (torch.tensor(each).view(1, 1, -1, 1) for each in ([1.0], [0.0, log3], [4.0, 8.0]))
    mask = torch.ones(1, 1, 1, 2, dtype=torch.bool)
    found = attention.gradients(query, key, value, mask, 1.0, torch.ones(1, 1, 1, 1))
    for each, expected in zip(found, ([0.75 * log3], [-0.75, 0.75], [0.25, 0.75]), strict=True):
        torch.testing.assert_close(each.flatten(), torch.tensor(expected))


@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize("scaling", [None, 0.5])
def test_values_are_transformers_own_and_gradients_as_near_to_the_truth(is_masked: bool, scaling: float | None) -> None:
    """Also where weights are peaked, as with twice the scaling."""
    given, mask = inputs(HALF, 40), padded(40) if is_masked else None
    options = {} if scaling is None else {"scaling": scaling}
    theirs, _ = sdpa_attention_forward(MODULE, *given, mask, **options)
    ours, nothing = attention._attention(MODULE, *given, mask, **options)
    assert nothing is None
    assert torch.equal(ours, theirs)
    exact = tuple(each.detach().double().requires_grad_() for each in given)
    truth = through(sdpa_attention_forward(MODULE, *exact, mask, **options)[0], exact)
    off = [
        [float((a.double() - b).norm() / b.norm()) for a, b in zip(through(out, given), truth, strict=True)]
        for out in (theirs, ours)
    ]
    for one, other in zip(*off, strict=True):
        assert other < 1.5 * one < 0.02, off


def test_queries_that_read_nothing_move_nothing() -> None:
    """As the padding before a shorter row, read by somebody or not."""
    given, mask = inputs(torch.float64), torch.ones(7, 7, dtype=torch.bool).tril().repeat(2, 1, 1, 1)
    mask[1, :, :, :2] = False
    out, _ = sdpa_attention_forward(MODULE, *given, mask)
    ours = attention.gradients(*[each.detach() for each in given], mask, 0.25, weights(out))
    for found, expected in zip(ours, through(out, given), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        assert not bool(found[1, :, :2].any())


def test_a_second_derivative_is_refused() -> None:
    given = inputs(HALF)
    out, _ = attention._attention(MODULE, *given, None)
    with pytest.raises(UserError, match=r'no second derivative here: set model.attn_implementation = "eager", or'):
        torch.autograd.grad(out.float().square().sum(), given, create_graph=True)


def is_taken(monkeypatch: pytest.MonkeyPatch, given: Any, mask: Tensor | None = None, **options: Any) -> bool:
    taken: list[int] = []
    apply = attention._ShortRows.apply
    monkeypatch.setattr(attention._ShortRows, "apply", lambda *each: (taken.append(1), apply(*each))[1])
    module = options.pop("module", MODULE)
    out, _ = attention._attention(module, *given, mask, **options)
    assert torch.equal(out, sdpa_attention_forward(module, *given, mask, **options)[0])
    return bool(taken)


def test_it_is_taken_where_it_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_taken(monkeypatch, inputs(HALF))
    assert is_taken(monkeypatch, inputs(HALF, SHORT))
    assert not is_taken(monkeypatch, inputs(HALF, SHORT + 1))
    assert not is_taken(monkeypatch, inputs(torch.float32))
    assert not is_taken(monkeypatch, [each.detach() for each in inputs(HALF)])
    one = [each.detach().requires_grad_(place == 2) for place, each in enumerate(inputs(HALF))]
    assert is_taken(monkeypatch, one)
    with torch.no_grad():
        assert not is_taken(monkeypatch, inputs(HALF))


def test_it_is_not_taken_where_transformers_computes_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    given, mask = inputs(HALF), padded(7)
    assert is_taken(monkeypatch, given, mask, dropout=0.0, position_bias=None, sliding_window=4)
    assert not is_taken(monkeypatch, given, mask, position_bias=torch.ones(1, 4, 7, 7, dtype=HALF))
    assert not is_taken(monkeypatch, given, torch.zeros(2, 1, 7, 7, dtype=HALF))
    assert not is_taken(monkeypatch, given, mask.expand(2, 4, 7, 7))
    assert not is_taken(monkeypatch, given, mask[1, 0])
    assert not is_taken(monkeypatch, given, mask[:1, 0, -1:])
    assert is_taken(monkeypatch, given, mask[1:])
    assert not is_taken(monkeypatch, given, is_causal=False)
    assert not is_taken(monkeypatch, given, module=SimpleNamespace(is_causal=False, num_key_value_groups=2))
    assert is_taken(monkeypatch, given, mask, is_causal=False)
    # Without a mask fewer queries than keys are not the last ones: transformers takes them for the first.
    assert not is_taken(monkeypatch, inputs(HALF, keys=7, queries=3))
    monkeypatch.setattr(attention._ShortRows, "apply", lambda *_: pytest.fail("dropout is drawn anew"))
    attention._attention(MODULE, *given, mask, dropout=0.5)


@pytest.mark.parametrize(
    ("dtype", "has_gpu", "asked", "expected"),
    [
        ("bfloat16", False, None, SHORT_ROWS),
        ("bfloat16", False, "eager", "eager"),
        ("bfloat16", True, None, "sdpa"),
        ("float32", False, None, "sdpa"),
    ],
)
def test_models_in_bfloat16_attend_so_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dtype: Any, has_gpu: bool, asked: str | None, expected: str
) -> None:
    monkeypatch.setattr("atesd.train.model.has_accelerator", lambda: has_gpu)
    model, _ = load(ModelConfig(path="pico", dtype=dtype, attn_implementation=asked), 0)
    settings: Any = model.config
    assert settings._attn_implementation == expected
    assert why_unknown(model, 20) is None
    model.save_pretrained(tmp_path)
    assert expected not in json.dumps(json.loads((tmp_path / "config.json").read_text()))


def test_a_loaded_model_learns_through_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once a layer, with padding and without; not where nothing learns."""
    model, _ = load(ModelConfig(path="pico", dtype="bfloat16"), 0)
    taken: list[int] = []
    own = attention.gradients
    monkeypatch.setattr(attention, "gradients", lambda *each: (taken.append(1), own(*each))[1])
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 0, 0]])
    for mask in (None, torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])):
        taken.clear()
        model(ids, attention_mask=mask).logits.float().square().mean().backward()  # type: ignore[no-untyped-call]
        assert len(taken) == 2
    taken.clear()
    with torch.no_grad():
        model(ids)
    assert not taken


@pytest.mark.parametrize("name", ["falcon", "qwen3-moe", "mistral", "llama"])
def test_models_that_ask_for_the_attentions_name_keep_it(name: str) -> None:
    """Falcon adds its mask to scores where the name is another than sdpa, and a boolean one then hides nothing."""
    if name == "falcon":
        settings = FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
        model: Any = FalconForCausalLM(settings).to(HALF)
    else:
        model = family(name, HALF)
    before = model.config._attn_implementation
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    expected = model(ids).logits
    attention.use_short_rows(model)
    assert torch.equal(model(ids).logits, expected)
    is_known = name in ("mistral", "llama")
    assert model.config._attn_implementation == (SHORT_ROWS if is_known else before)


def test_hints_can_be_hidden_from_a_model_that_attends_so() -> None:
    """Their bias is added where they are hidden, and gone where they are not."""
    model, _ = load(ModelConfig(path="pico", dtype="bfloat16"), 0)
    Veils(model, None)
    settings: Any = model.config
    assert settings._attn_implementation == SHORT_ROWS
