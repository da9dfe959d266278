"""Scaled or softly capped logits: streams and gradients are those of logits made beforehand by autograd."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from atesd.losses.divergence import (
    JSD,
    LossConfig,
    ReverseKL,
    SampledToken,
    Scored,
    TokenStreams,
    Use,
    token_streams,
)
from atesd.losses.target import Extrapolate, Plain, Target

from support import dense_divergence as dense

N, V, H = 7, 11, 5
CAP, SCALE = 2.0, 0.7
CONFIGS = {
    "forward": LossConfig(),
    "reverse": LossConfig(divergence=ReverseKL()),
    "jsd": LossConfig(divergence=JSD(beta=0.3)),
    "sampled": LossConfig(divergence=SampledToken()),
    "token clip": LossConfig(clip="token", clip_tau=0.3),
    "pointwise clip": LossConfig(clip="pointwise", clip_tau=0.02),
    "top k": LossConfig(top_k=4),
    "top k of the student with a tail": LossConfig(top_k=4, top_k_support="student", tail=True),
    "own temperatures": LossConfig(temperature_student=0.8, temperature_teacher=1.7),
}
MANY = 3 * V
"""Logits of a tile of 3 tokens, so that there are three tiles."""


def make() -> tuple[Scored, Scored, Tensor]:
    """Return student and teacher, some of whose logits lie far beyond the cap, and labels."""
    generator = torch.Generator().manual_seed(3)

    def scored(cap: float) -> Scored:
        hidden, head, bias = (
            torch.randn(*size, generator=generator, dtype=torch.float64) for size in ((N, H), (V, H), (V,))
        )
        return Scored(hidden.requires_grad_(), head.requires_grad_(), bias.requires_grad_(), SCALE, cap)

    return scored(CAP), scored(3.0), torch.randint(0, V, (N,), generator=generator)


def weights(scored: Scored) -> list[Tensor]:
    return [weight for weight in (scored.hidden_NH, scored.head_VH, scored.bias_V) if weight is not None]


def logits(scored: Scored) -> Tensor:
    """The definition: cap tanh(scale (hidden @ head.T + bias) / cap)."""
    assert scored.cap is not None
    raw = scored.scale * (scored.hidden_NH @ scored.head_VH.T + scored.bias_V)
    return scored.cap * torch.tanh(raw / scored.cap)


def as_logits(scored: Scored) -> Scored:
    """Logits as hidden states under an identity head: nothing is left to scale or cap."""
    return Scored(logits(scored), torch.eye(V, dtype=torch.float64))


def run(student: Scored, views: Sequence[Scored], labels: Tensor, config: LossConfig, **more: Any) -> TokenStreams:
    target: Target = more.pop("target", Plain())
    return token_streams(student, views, labels, config, target=target, temperature=1.3, **more)


def test_the_examples_reach_beyond_the_cap() -> None:
    student, _, _ = make()
    student = student.detached()
    assert SCALE * float((student.hidden_NH @ student.head_VH.T + student.bias_V).abs().max()) > 1.5 * CAP
    assert float(logits(student).abs().max()) < CAP


@pytest.mark.parametrize("tile_logits", [None, MANY])
@pytest.mark.parametrize("name", CONFIGS)
def test_streams_and_gradients_are_those_of_the_logits(name: str, tile_logits: int | None) -> None:
    student, teacher, labels = make()
    config = CONFIGS[name].model_copy(update={"tile_logits": tile_logits})
    weigh = torch.linspace(0.5, 2, N, dtype=torch.float64)
    found = run(student, [teacher], labels, config, use=Use(weights=lambda _, rows: weigh[rows]))
    expected = run(as_logits(student), [as_logits(teacher)], labels, config)
    torch.testing.assert_close(found.divergence_N, expected.divergence_N)
    torch.testing.assert_close(found.logprob_N, expected.logprob_N)
    torch.testing.assert_close(asdict(found.stats), asdict(expected.stats))
    for of in ("divergence_N", "logprob_N"):
        got, want = (
            torch.autograd.grad((weigh * getattr(each, of)).sum(), weights(student), retain_graph=True)
            for each in (found, expected)
        )
        assert all(float(part.abs().max()) > 1e-3 for part in want)
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("tile_logits", [None, MANY])
def test_a_head_that_stands_still_and_labels_alone(tile_logits: int | None) -> None:
    student, teacher, labels = make()
    frozen = replace(student.detached(), hidden_NH=student.hidden_NH)
    config = LossConfig(tile_logits=tile_logits)
    for views in ([teacher], []):
        for use, of in ((Use(), "divergence_N"), (Use(loss=False, logprob=True), "logprob_N")):
            if not views and of == "divergence_N":
                continue
            got, want = (
                torch.autograd.grad(getattr(run(each, seen, labels, config, use=use), of).sum(), student.hidden_NH)
                for each, seen in ((frozen, views), (as_logits(student), [as_logits(view) for view in views]))
            )
            torch.testing.assert_close(got, want)


def test_an_extrapolated_target_reads_capped_views() -> None:
    student, teacher, labels = make()
    base = replace(teacher, hidden_NH=teacher.hidden_NH.flip(0), cap=5.0)
    target = Extrapolate(lambda_x=1.4).at(1.4)
    found = run(student, [teacher, base], labels, LossConfig(), target=target)
    expected = run(as_logits(student), [as_logits(teacher), as_logits(base)], labels, LossConfig(), target=target)
    torch.testing.assert_close(found.divergence_N, expected.divergence_N)


def test_forward_kl_against_a_dense_reference_and_finite_differences() -> None:
    """At temperature T the raw logits x make p = softmax(cap tanh(scale x / cap) / T)."""
    student, teacher, labels = make()
    raw = (student.hidden_NH @ student.head_VH.T + student.bias_V).detach()
    p = dense.log_softmax((logits(teacher) / 1.3).detach().numpy())

    def loss(raw_NV: Any) -> Any:
        q = dense.log_softmax(CAP * np.tanh(SCALE * raw_NV / CAP) / 1.3)
        return dense.divergence(np.exp(p), np.exp(q), "forward_kl", 0.5, None, False, "none", 0.05)

    hidden = raw.clone().requires_grad_()
    found = run(Scored(hidden, torch.eye(V, dtype=torch.float64), None, SCALE, CAP), [teacher], labels, LossConfig())
    (gradient,) = torch.autograd.grad(found.divergence_N.sum(), hidden)
    torch.testing.assert_close(found.divergence_N.detach(), torch.tensor(loss(raw.numpy())))
    expected = torch.tensor(dense.numeric_gradient(loss, raw.numpy()))
    torch.testing.assert_close(gradient, expected, atol=1e-8, rtol=1e-6)


def test_a_cap_of_none_costs_no_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Tensor:
        raise AssertionError("a pass over logits that nothing asks for")

    student, teacher, labels = make()
    plain = [replace(each, cap=None) for each in (student, teacher)]
    monkeypatch.setattr(Tensor, "tanh_", refuse)
    monkeypatch.setattr(Tensor, "square_", refuse)
    run(plain[0], plain[1:], labels, LossConfig()).divergence_N.sum().backward()
    with pytest.raises(AssertionError):
        run(student, plain[1:], labels, LossConfig())
