"""Tiled divergences against hand-computed numbers, a dense NumPy reference and finite differences."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from atesd.losses import scores, tiles
from atesd.losses.avsd import Avsd
from atesd.losses.divergence import (
    JSD,
    Divergence,
    ForwardKL,
    LossConfig,
    ReverseKL,
    SampledToken,
    Scored,
    TokenStreams,
    Use,
    label_logprobs,
    token_streams,
)
from atesd.losses.paint import Paint
from atesd.losses.stats import TokenStats
from atesd.losses.target import Plain
from atesd.types import UserError

from support import dense_divergence as dense
from support import dense_targets as targets

N, V, H = 7, 11, 5
KINDS: list[Divergence] = [ForwardKL(), ReverseKL(), JSD(beta=0.3)]
SUPPORTS: list[tuple[int | None, bool]] = [(None, False), (4, False), (4, True), (1, True), (V, False), (V, True)]


def make(
    dtype: torch.dtype = torch.float64, *, n: int = N, v: int = V, bias: bool = True
) -> tuple[Scored, Scored, Tensor]:
    """Return student and teacher with different heads, moderately far apart, and labels."""
    generator = torch.Generator().manual_seed(3)

    def scored() -> Scored:
        hidden, head, offset = (torch.randn(*size, generator=generator, dtype=dtype) for size in ((n, H), (v, H), (v,)))
        return Scored(hidden.requires_grad_(), head.requires_grad_(), offset.requires_grad_() if bias else None)

    return scored(), scored(), torch.randint(0, v, (n,), generator=generator)


def logits_of(scored: Scored, temperature: float = 1.0) -> Tensor:
    logits = scored.hidden_NH @ scored.head_VH.T
    return (logits if scored.bias_V is None else logits + scored.bias_V) / temperature


def from_logits(logits: Sequence[Sequence[float]] | Tensor, dtype: torch.dtype = torch.float64) -> Scored:
    """Logits as hidden states under an identity head, so that gradients to hidden states are those to logits."""
    hidden = torch.as_tensor(logits, dtype=dtype).clone().requires_grad_()
    return Scored(hidden, torch.eye(hidden.shape[1], dtype=dtype))


def from_probs(*rows: Sequence[float], dtype: torch.dtype = torch.float64) -> Scored:
    return from_logits(torch.tensor(rows, dtype=torch.float64).log(), dtype)


def run(student: Scored, teacher: Scored, labels: Tensor, config: LossConfig, temperature: float = 1.0) -> TokenStreams:
    return token_streams(student, [teacher], labels, config, target=Plain(), temperature=temperature)


def parameters(scored: Scored) -> list[Tensor]:
    return [tensor for tensor in (scored.hidden_NH, scored.head_VH, scored.bias_V) if tensor is not None]


def one_token(p: Sequence[float], q: Sequence[float], config: LossConfig) -> tuple[float, list[float], TokenStreams]:
    """Loss, gradient to logits and streams of a single position."""
    student = from_probs(q)
    streams = run(student, from_probs(p), torch.tensor([0]), config)
    (gradient,) = torch.autograd.grad(streams.divergence_N.sum(), student.hidden_NH)
    return streams.divergence_N.item(), gradient[0].tolist(), streams


class TestMethodExample:
    """p = (.5, .3, .2), q = (.4, .35, .25)."""

    p, q = (0.5, 0.3, 0.2), (0.4, 0.35, 0.25)

    def test_unclipped(self) -> None:
        # .5 ln(1.25) + .3 ln(6/7) + .2 ln(.8) = .111572 - .046245 - .044629; gradient q - p.
        value, gradient, streams = one_token(self.p, self.q, LossConfig())
        assert value == pytest.approx(0.111572 - 0.046245 - 0.044629, abs=2e-6)
        assert gradient == pytest.approx([-0.10, 0.05, 0.05], abs=1e-12)
        assert streams.stats.reversed.item() == 0
        assert streams.stats.clip_frac.item() == 0

    @pytest.mark.parametrize(("tau", "value"), [(0.05, 0.05 - 0.046245 - 0.044629), (1e-6, 1e-6 - 0.046245 - 0.044629)])
    def test_pointwise_reverses_the_sign(self, tau: float, value: float) -> None:
        # A = {2, 3}, P_A = .5: gradient P_A q - p 1[A] = (.2, .175 - .3, .125 - .2); the loss is negative.
        loss, gradient, streams = one_token(self.p, self.q, LossConfig(clip="pointwise", clip_tau=tau))
        assert loss == pytest.approx(value, abs=2e-6)
        assert loss < 0
        assert gradient == pytest.approx([0.20, -0.125, -0.075], abs=1e-12)
        assert streams.stats.reversed.item() == 1
        assert streams.stats.clip_frac.item() == pytest.approx(1 / 3)
        assert streams.stats.clipped_mass.item() == pytest.approx(0.5)
        assert streams.stats.divergence.item() == pytest.approx(0.020698, abs=1e-6)  # unclipped

    def test_what_counts_as_reversed_is_told_by_the_whole_divergence(self) -> None:
        # Reverse KL, p = (.05, .45, .5), q = (.4, .06, .54): l = (.8318, -.1209, .0416), D = .7524. At the third entry
        # l - q D = -.3648 without a clip; with the first held at .05, its u is -q: .0416 - .54 (-.4 - .1209 + .0416)
        # = .3004.
        config = LossConfig(divergence=ReverseKL(), clip="pointwise")
        _, gradient, streams = one_token((0.05, 0.45, 0.5), (0.4, 0.06, 0.54), config)
        assert gradient[2] == pytest.approx(0.3004, abs=1e-4)
        assert streams.stats.reversed.item() == 1

    def test_token_clip_below_tau_changes_nothing(self) -> None:
        clipped = one_token(self.p, self.q, LossConfig(clip="token"))
        plain = one_token(self.p, self.q, LossConfig())
        assert clipped[:2] == plain[:2]
        assert clipped[2].stats.clip_frac.item() == 0

    def test_token_clip_above_tau_stops_the_gradient(self) -> None:
        value, gradient, streams = one_token(self.p, self.q, LossConfig(clip="token", clip_tau=0.01))
        assert value == pytest.approx(0.01)
        assert gradient == [0, 0, 0]
        assert streams.stats.clip_frac.item() == streams.stats.clipped_mass.item() == 1
        assert streams.stats.reversed.item() == 0
        assert streams.stats.divergence.item() == pytest.approx(0.020698, abs=1e-6)

    def test_an_entry_at_tau_is_held(self) -> None:
        # l_1 = .5 ln(.5/.25) = .5 ln 2 exactly tau; held, so P_A = .5 and the first entry's gradient is P_A q_1 = .125.
        tau = (from_probs([0.5, 0.5]).hidden_NH[0, 0] - from_probs([0.25, 0.75]).hidden_NH[0, 0]).item() * 0.5
        logits = from_probs([0.25, 0.75]), from_probs([0.5, 0.5])
        for scale, expected in ((1.0 - 1e-9, 0.125), (1.0 + 1e-9, -0.25)):
            student = from_logits(logits[0].hidden_NH.detach())
            config = LossConfig(clip="pointwise", clip_tau=tau * scale)
            run(student, logits[1], torch.tensor([0]), config).divergence_N.sum().backward()
            assert student.hidden_NH.grad is not None
            assert student.hidden_NH.grad[0, 0].item() == pytest.approx(expected, abs=1e-12)

    def test_descent_under_the_pointwise_clip_forgets_the_teachers_favourite(self) -> None:
        # 2,000 steps of .05 drive q_1 from .40 to .014.
        logits = torch.tensor([self.q], dtype=torch.float64).log()
        teacher, label = from_probs(self.p), torch.tensor([0])
        for _ in range(2000):
            student = from_logits(logits)
            loss = run(student, teacher, label, LossConfig(clip="pointwise")).divergence_N.sum()
            logits = logits - 0.05 * torch.autograd.grad(loss, student.hidden_NH)[0]
        assert logits.softmax(-1)[0, 0].item() == pytest.approx(0.014, abs=5e-4)


def test_reverse_kl_by_hand() -> None:
    # p = (1/2, 1/2), q = (1/4, 3/4): D = .25 ln .5 + .75 ln 1.5 = .130812; dD/dz_1 = .25 (ln .5 - D) = -.205990.
    value, gradient, _ = one_token((0.5, 0.5), (0.25, 0.75), LossConfig(divergence=ReverseKL()))
    assert value == pytest.approx(0.130812, abs=1e-6)
    assert gradient == pytest.approx([-0.205990, 0.205990], abs=1e-6)


def test_jsd_weights_the_teacher_in_the_mixture() -> None:
    # b = .2, p = (1, 3)/4, q = (1, 1)/2: m = .2 p + .8 q = (.45, .55).
    # D = .2 (.25 ln(.25/.45) + .75 ln(.75/.55)) + .8 (.5 ln(.5/.45) + .5 ln(.5/.55)) = .017127 + .004020 = .021147.
    # s = ln(q/m) = (.105361, -.095310), mean .005025; gradient .8 * .5 * (s - mean) = (.040134, -.040134).
    value, gradient, _ = one_token((0.25, 0.75), (0.5, 0.5), LossConfig(divergence=JSD(beta=0.2)))
    expected = 0.2 * (0.25 * np.log(0.25 / 0.45) + 0.75 * np.log(0.75 / 0.55)) + 0.4 * np.log(0.25 / (0.45 * 0.55))
    assert value == pytest.approx(expected, abs=1e-12)
    assert gradient == pytest.approx([0.040134, -0.040134], abs=1e-6)


@pytest.mark.parametrize("divergence", KINDS, ids=lambda kind: kind.kind)
@pytest.mark.parametrize(("top_k", "tail"), SUPPORTS)
@pytest.mark.parametrize("clip", ["none", "token", "pointwise"])
@pytest.mark.parametrize("temperatures", [(1.0, 1.0), (1.3, 0.7)])
def test_equals_the_dense_reference(
    divergence: Divergence, top_k: int | None, tail: bool, clip: Any, temperatures: tuple[float, float]
) -> None:
    student, teacher, labels = make()
    beta = divergence.beta if isinstance(divergence, JSD) else 0.0
    p = np.exp(dense.log_softmax(logits_of(teacher, temperatures[1]).detach().numpy()))
    q = np.exp(dense.log_softmax(logits_of(student, temperatures[0]).detach().numpy()))
    unclipped = dense.divergence(p, q, divergence.kind, beta, top_k, tail, "none", 0.0)
    tau = float(unclipped.mean()) if clip == "token" else 0.05  # with tokens, or entries, on both sides
    config = LossConfig(
        divergence=divergence, top_k=top_k, tail=tail, clip=clip, clip_tau=tau, tile_logits=33,
        temperature_student=temperatures[0], temperature_teacher=temperatures[1],
    )  # fmt: skip

    def loss(logits: dense.Array) -> dense.Array:
        q = np.exp(dense.log_softmax(logits / temperatures[0]))
        return dense.divergence(p, q, divergence.kind, beta, top_k, tail, clip, tau)

    streams = run(student, teacher, labels, config, temperature=9.0)
    raw = logits_of(student).detach().numpy()
    np.testing.assert_allclose(streams.divergence_N.detach().numpy(), loss(raw), rtol=1e-10, atol=1e-12)
    upstream = torch.linspace(0.5, 2.0, N, dtype=torch.float64)
    gradient = torch.as_tensor(dense.numeric_gradient(loss, raw)) * upstream[:, None]
    hidden, head, bias = torch.autograd.grad((streams.divergence_N * upstream).sum(), parameters(student))
    torch.testing.assert_close(hidden, gradient @ student.head_VH.detach(), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(head, gradient.T @ student.hidden_NH.detach(), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(bias, gradient.sum(0), rtol=1e-6, atol=1e-8)
    if clip != "none":
        assert 0 < streams.stats.clip_frac.mean() < 1


@pytest.mark.parametrize("divergence", KINDS, ids=lambda kind: kind.kind)
@pytest.mark.parametrize(("top_k", "tail"), [(4, False), (4, True), (1, True), (V - 1, False), (V, False), (V, True)])
@pytest.mark.parametrize("clip", ["none", "token", "pointwise"])
@pytest.mark.parametrize("mixed", [False, True])
def test_the_students_support_equals_the_dense_reference(
    divergence: Divergence, top_k: int, tail: bool, clip: Any, mixed: bool
) -> None:
    student, teacher, labels = make()
    beta = divergence.beta if isinstance(divergence, JSD) else 0.0
    second = from_logits(torch.linspace(-1, 1, N * V).reshape(N, V).double().sin())
    views = [teacher, second] if mixed else [teacher]
    target: Any = Extrapolated() if mixed else Plain()
    log_views = [logits_of(view, 1.2).detach().log_softmax(-1) for view in views]
    p = target.log_target(log_views).log_softmax(-1).exp().numpy()
    raw = logits_of(student).detach().numpy()
    ranked = raw.copy()  # the choice stands still while logits are moved to take differences
    unclipped = dense.divergence(
        p, np.exp(dense.log_softmax(raw / 1.1)), divergence.kind, beta, top_k, tail, "none", 0.0, ranked
    )
    tau = float(unclipped.mean()) if clip == "token" else 0.05

    def loss(logits: dense.Array) -> dense.Array:
        q = np.exp(dense.log_softmax(logits / 1.1))
        return dense.divergence(p, q, divergence.kind, beta, top_k, tail, clip, tau, ranked)

    config = LossConfig(
        divergence=divergence, top_k=top_k, top_k_support="student", tail=tail, clip=clip, clip_tau=tau, tile_logits=33,
        temperature_student=1.1,
    )  # fmt: skip
    streams = token_streams(student, views, labels, config, target=target, temperature=1.2)
    np.testing.assert_allclose(streams.divergence_N.detach().numpy(), loss(raw), rtol=1e-10, atol=1e-12)
    upstream = torch.linspace(0.5, 2.0, N, dtype=torch.float64)
    gradient = torch.as_tensor(dense.numeric_gradient(loss, raw)) * upstream[:, None]
    hidden, head, bias = torch.autograd.grad((streams.divergence_N * upstream).sum(), parameters(student))
    torch.testing.assert_close(hidden, gradient @ student.head_VH.detach(), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(head, gradient.T @ student.hidden_NH.detach(), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(bias, gradient.sum(0), rtol=1e-6, atol=1e-8)
    plain = dense.numeric_gradient(
        lambda logits: dense.divergence(
            p, np.exp(dense.log_softmax(logits / 1.1)), divergence.kind, beta, top_k, tail, "none", 0.0, ranked
        ),
        raw,
    )
    rows, tops = np.arange(N), p.argmax(-1)
    turned = (gradient.numpy()[rows, tops] > 1e-9) & (plain[rows, tops] < -1e-9)
    np.testing.assert_array_equal(streams.stats.reversed.numpy(), turned)
    ours = config.model_copy(update={"top_k_support": "target"})
    theirs = token_streams(student, views, labels, ours, target=target, temperature=1.2)
    if top_k < V - 1 and clip == "none":
        assert ((streams.divergence_N - theirs.divergence_N).abs() > 1e-3).sum() >= N - 2, (
            "another support, another loss"
        )
    for name in ("divergence", "student_max_prob", "top1_agree", "reverse_kl"):
        assert torch.equal(getattr(streams.stats, name), getattr(theirs.stats, name))


def test_the_students_support_by_hand() -> None:
    """p = (.5, .3, .2), q = (.1, .3, .6): the student's two are entries 3 and 2: p there (.4, .6), q (2/3, 1/3)."""
    config = LossConfig(top_k=2, top_k_support="student")
    value, gradient, streams = one_token((0.5, 0.3, 0.2), (0.1, 0.3, 0.6), config)
    assert value == pytest.approx(0.4 * np.log(0.4 / (2 / 3)) + 0.6 * np.log(0.6 / (1 / 3)), abs=1e-12)
    assert gradient == pytest.approx([0.0, 1 / 3 - 0.6, 2 / 3 - 0.4], abs=1e-12)
    assert streams.stats.reversed.item() == 0  # the target's top entry, 1, lies outside: nothing moves it
    # With a tail that entry is the rest: forward KL over all three, gradient q - p.
    value, gradient, _ = one_token((0.5, 0.3, 0.2), (0.1, 0.3, 0.6), config.model_copy(update={"tail": True}))
    assert value == pytest.approx(0.5 * np.log(5) + 0.2 * np.log(1 / 3), abs=1e-12)
    assert gradient == pytest.approx([-0.4, 0.0, 0.4], abs=1e-12)


@pytest.mark.parametrize("config", [
    *(LossConfig(divergence=kind, clip=clip, clip_tau=0.05) for kind in KINDS for clip in ("none", "pointwise")),
    *(LossConfig(divergence=kind, top_k=4, tail=tail) for kind in KINDS for tail in (False, True)),
    *(LossConfig(divergence=kind, top_k=3, top_k_support="student", tail=True) for kind in KINDS),
], ids=lambda c: f"{c.divergence.kind}-{c.clip}-{c.top_k}-{c.tail}")  # fmt: skip
def test_gradcheck(config: LossConfig) -> None:
    student, teacher, labels = make(n=3, v=6)
    config = config.model_copy(update={"tile_logits": 22, "temperature_student": 1.1})

    def outputs(hidden: Tensor, head: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        streams = run(Scored(hidden, head, bias), teacher, labels, config)
        return streams.divergence_N, streams.logprob_N

    assert torch.autograd.gradcheck(outputs, parameters(student))


@pytest.mark.parametrize("config", [
    LossConfig(), LossConfig(divergence=JSD(), clip="pointwise"), LossConfig(top_k=9),
    LossConfig(divergence=ReverseKL(), top_k=5, tail=True), LossConfig(clip="token", clip_tau=0.4),
    LossConfig(divergence=SampledToken()), LossConfig(divergence=JSD(), top_k=5, top_k_support="student", tail=True),
])  # fmt: skip
def test_tile_sizes_change_nothing(config: LossConfig) -> None:
    def everything(tile_logits: int | None, use: Use, trains: int) -> list[Tensor]:
        student, teacher, labels = make()
        trained = parameters(student)[:trains]
        for fixed in parameters(student)[trains:]:
            fixed.requires_grad_(False)
        tiled = config.model_copy(update={"tile_logits": tile_logits})
        streams = token_streams(student, [teacher], labels, tiled, target=Plain(), temperature=1.1, use=use)
        total = (streams.divergence_N * WEIGHTS).sum()
        if use.logprob:
            total = total + (streams.logprob_N * WEIGHTS.flip(0)).sum()
        stats = [getattr(streams.stats, name) for name in streams.stats.__slots__]
        return [streams.divergence_N, streams.logprob_N, *stats, *torch.autograd.grad(total, trained)]

    for trains, logprob in itertools.product((1, 2, 3), (False, True)):
        whole = everything(None, Use(logprob=logprob), trains)
        uses = [Use(logprob=logprob), Use(logprob=logprob, weights=lambda _, rows: 3 * WEIGHTS[rows])]
        for tile_logits, use in itertools.product((1, V, 3 * V, 100 * V), uses):
            for tensor, expected in zip(everything(tile_logits, use, trains), whole, strict=True):
                torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=1e-12)


WEIGHTS = torch.linspace(-1, 1, N, dtype=torch.float64)


def test_logprob_and_divergence_share_one_backward() -> None:
    student, teacher, labels = make()
    streams = run(student, teacher, labels, LossConfig(tile_logits=33), temperature=1.1)
    a, b = torch.randn(2, N, dtype=torch.float64)
    got = torch.autograd.grad((a * streams.divergence_N + b * streams.logprob_N).sum(), parameters(student))
    log_q, log_p = logits_of(student, 1.1).log_softmax(-1), logits_of(teacher, 1.1).log_softmax(-1).detach()
    logprob = log_q.gather(1, labels[:, None])[:, 0]
    total = (a * (log_p.exp() * (log_p - log_q)).sum(-1) + b * logprob).sum()
    torch.testing.assert_close(streams.logprob_N, logprob)
    for tensor, expected in zip(got, torch.autograd.grad(total, parameters(student)), strict=True):
        torch.testing.assert_close(tensor, expected)


def test_views_get_no_gradient() -> None:
    student, teacher, labels = make()
    shared = Scored(teacher.hidden_NH, student.head_VH, student.bias_V)
    streams = run(student, shared, labels, LossConfig())
    frozen = run(student, Scored(*(tensor.detach() for tensor in parameters(shared))), labels, LossConfig())
    assert torch.autograd.grad(streams.divergence_N.sum(), teacher.hidden_NH, allow_unused=True, retain_graph=True) == (
        None,
    )
    # A shared head is trained through the student's use of it alone.
    for one, other in zip(
        torch.autograd.grad(streams.divergence_N.sum(), parameters(student)),
        torch.autograd.grad(frozen.divergence_N.sum(), parameters(student)),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("config", [
    *(LossConfig(divergence=kind) for kind in KINDS), LossConfig(clip="pointwise"),
    *(LossConfig(divergence=kind, top_k=3, tail=True) for kind in KINDS),
    LossConfig(clip="token"), LossConfig(divergence=SampledToken()), LossConfig(top_k=3),
    LossConfig(top_k=3, top_k_support="student", tail=True),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_student_equal_to_its_teacher_has_neither_loss_nor_gradient(config: LossConfig, dtype: torch.dtype) -> None:
    student, _, labels = make(dtype)
    same = Scored(*(tensor.detach().clone() for tensor in parameters(student)))
    streams = run(student, same, labels, config)
    assert streams.divergence_N.abs().max().item() == 0
    for gradient in torch.autograd.grad(streams.divergence_N.sum(), parameters(student)):
        assert gradient.abs().max().item() <= 1e-7
    assert streams.stats.top1_agree.tolist() == [1.0] * N
    assert streams.stats.reversed.tolist() == [0.0] * N


@pytest.mark.parametrize("divergence", KINDS, ids=lambda kind: kind.kind)
def test_a_constant_added_to_logits_changes_nothing(divergence: Divergence) -> None:
    student, teacher, labels = make()
    assert student.bias_V is not None
    assert teacher.bias_V is not None
    config = LossConfig(divergence=divergence, top_k=4, tail=True)
    moved = Scored(student.hidden_NH, student.head_VH, student.bias_V + 30)
    moved_teacher = Scored(teacher.hidden_NH, teacher.head_VH, teacher.bias_V - 50)
    torch.testing.assert_close(
        run(moved, moved_teacher, labels, config).divergence_N, run(student, teacher, labels, config).divergence_N
    )


@pytest.mark.parametrize("divergence", KINDS, ids=lambda kind: kind.kind)
def test_with_a_tail_the_value_grows_with_k_up_to_the_full_one(divergence: Divergence) -> None:
    student, teacher, labels = make()
    values = [run(student, teacher, labels, LossConfig(divergence=divergence, top_k=k, tail=True)).divergence_N
              for k in range(1, V + 1)]  # fmt: skip
    full = run(student, teacher, labels, LossConfig(divergence=divergence)).divergence_N
    for smaller, larger in itertools.pairwise(values):
        assert (larger - smaller).min().item() >= -1e-12
    assert (full - values[0]).mean().item() > 0.1
    torch.testing.assert_close(values[-1], full)
    whole = run(student, teacher, labels, LossConfig(divergence=divergence, top_k=V)).divergence_N
    torch.testing.assert_close(whole, full)


def test_tail_survives_a_rest_too_small_for_float32() -> None:
    # The teacher's rest is exp(-200): 0 in float32. Reverse KL then is large but finite, and the loss still pulls.
    teacher, student = from_logits([[200.0, 0.0, 0.0]], torch.float32), from_logits([[0.0, 0.0, 0.0]], torch.float32)
    for divergence in KINDS:
        streams = run(student, teacher, torch.tensor([0]), LossConfig(divergence=divergence, top_k=1, tail=True))
        (gradient,) = torch.autograd.grad(streams.divergence_N.sum(), student.hidden_NH)
        assert torch.isfinite(gradient).all()
        assert gradient[0, 0].item() < -0.1


@pytest.mark.parametrize("divergence", KINDS, ids=lambda kind: kind.kind)
def test_extreme_logits_stay_finite(divergence: Divergence) -> None:
    teacher = from_logits([[120.0, 0.0, -120.0]], torch.float32)
    student = from_logits([[-120.0, 0.0, 120.0]], torch.float32)
    streams = run(student, teacher, torch.tensor([0]), LossConfig(divergence=divergence))
    (gradient,) = torch.autograd.grad(streams.divergence_N.sum(), student.hidden_NH)
    # KL either way is 240 nats; JSD(b) of disjoint distributions is the binary entropy of b.
    expected = -(0.3 * np.log(0.3) + 0.7 * np.log(0.7)) if isinstance(divergence, JSD) else 240.0
    assert streams.divergence_N.item() == pytest.approx(expected, rel=1e-5)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("widened", [8192, 96], ids=["whole head", "head in parts of 96"])
@pytest.mark.parametrize("divergence", KINDS, ids=lambda kind: kind.kind)
def test_bf16_inputs_give_nonnegative_values_near_float64(
    divergence: Divergence, widened: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "WIDENED", widened)
    # A teacher that differs by bf16's own resolution: a log-softmax in bf16 makes such divergences negative.
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 32, generator=generator).bfloat16()
    near = (hidden.float() * (1 + 0.02 * torch.randn(64, 32, generator=generator))).bfloat16()
    head = torch.randn(500, 32, generator=generator).bfloat16()
    config = LossConfig(divergence=divergence, tile_logits=50 * 500)
    labels = torch.zeros(64, dtype=torch.long)
    low = Scored(hidden.clone().requires_grad_(), head.clone().requires_grad_())
    high = Scored(hidden.double().requires_grad_(), head.double().requires_grad_())
    streams = run(low, Scored(near, head), labels, config)
    exact = run(high, Scored(near.double(), head.double()), labels, config)
    assert streams.divergence_N.dtype == torch.float32
    assert streams.divergence_N.min().item() >= 0
    torch.testing.assert_close(streams.divergence_N.double(), exact.divergence_N, rtol=1e-4, atol=1e-7)
    got = torch.autograd.grad(streams.divergence_N.sum(), parameters(low))
    expected = torch.autograd.grad(exact.divergence_N.sum(), parameters(high))
    for tensor, reference in zip(got, expected, strict=True):
        assert tensor.dtype == torch.bfloat16
        torch.testing.assert_close(tensor.double(), reference, rtol=2**-8, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("config", [LossConfig(), LossConfig(clip="pointwise"), LossConfig(top_k=20, tail=True)])
def test_bf16_on_a_gpu_equals_float64_on_the_cpu(config: LossConfig) -> None:
    student, teacher, labels = make(torch.bfloat16, n=300, v=5000)
    tiled = config.model_copy(update={"tile_logits": 128 * 5000})

    def outcome(device: str, dtype: torch.dtype) -> list[Tensor]:
        roles = [Scored(*(tensor.detach().to(device, dtype).requires_grad_() for tensor in parameters(role)))
                 for role in (student, teacher)]  # fmt: skip
        streams = run(roles[0], roles[1], labels.to(device), tiled, temperature=1.1)
        total = streams.divergence_N.sum() + streams.logprob_N.sum()
        outputs = [streams.divergence_N, streams.logprob_N, *torch.autograd.grad(total, parameters(roles[0]))]
        return [tensor.detach().double().cpu() for tensor in outputs]

    for tensor, expected in zip(outcome("cuda", torch.bfloat16), outcome("cpu", torch.float64), strict=True):
        assert ((tensor - expected).norm() / expected.norm()).item() < 2**-7


def test_tiny_divergences_keep_their_digits_in_float32() -> None:
    # Perturbing logits by d gives KL = Var_p(d) / 2 to leading order: about 5e-9 here. Rounding of the log-normalisers
    # (4e-7 at a value near 7.4) would enter a plain sum of p log(p/q) in full.
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(32, 1000, generator=generator)
    teacher = from_logits(base + 1e-4 * torch.randn(32, 1000, generator=generator), torch.float32)
    student, labels = from_logits(base, torch.float32), torch.zeros(32, dtype=torch.long)
    streams = run(student, teacher, labels, LossConfig())
    exact = run(from_logits(base.double()), from_logits(teacher.hidden_NH.detach().double()), labels, LossConfig())
    torch.testing.assert_close(streams.divergence_N.double(), exact.divergence_N, rtol=0, atol=2e-8)
    log_q, log_p = student.hidden_NH.detach().log_softmax(-1), teacher.hidden_NH.detach().log_softmax(-1)
    plain = (log_p.exp() * (log_p - log_q)).sum(-1)
    assert (plain.double() - exact.divergence_N).abs().max().item() > 1e-7


def test_autocast_does_not_lower_the_precision() -> None:
    student, teacher, labels = make(torch.float32)
    plain = run(student, teacher, labels, LossConfig())
    expected = torch.autograd.grad(plain.divergence_N.sum(), parameters(student))
    with torch.autocast("cpu", torch.bfloat16):
        cast = run(student, teacher, labels, LossConfig())
        got = torch.autograd.grad(cast.divergence_N.sum(), parameters(student))
    torch.testing.assert_close(cast.divergence_N, plain.divergence_N, rtol=0, atol=0)
    for tensor, reference in zip(got, expected, strict=True):
        torch.testing.assert_close(tensor, reference, rtol=0, atol=0)


def test_sampled_token_value_and_gradient() -> None:
    # p = (.5, .5), q = (.25, .75), y = 0: gap = ln 2; loss = -ln 2 ln .25 = .960906; gradient -ln 2 (1 - .25, -.75).
    value, gradient, streams = one_token((0.5, 0.5), (0.25, 0.75), LossConfig(divergence=SampledToken()))
    assert value == pytest.approx(np.log(2) * np.log(4), abs=1e-12)
    assert gradient == pytest.approx([-np.log(2) * 0.75, np.log(2) * 0.75], abs=1e-12)
    assert streams.stats.divergence.item() == pytest.approx(0.130812, abs=1e-6)  # the reverse KL


def test_sampled_token_gradient_is_reverse_kls_in_expectation() -> None:
    generator = torch.Generator().manual_seed(5)
    teacher, student_logits = (
        from_logits(torch.randn(1, 6, generator=generator)),
        torch.randn(1, 6, generator=generator),
    )

    def gradient(config: LossConfig, label: int) -> Tensor:
        student = from_logits(student_logits)
        loss = run(student, teacher, torch.tensor([label]), config).divergence_N.sum()
        return torch.autograd.grad(loss, student.hidden_NH)[0][0]

    q = student_logits.double().softmax(-1)[0]
    expected = sum((q[label] * gradient(LossConfig(divergence=SampledToken()), label) for label in range(6)), q * 0)
    torch.testing.assert_close(expected, gradient(LossConfig(divergence=ReverseKL()), 0), rtol=1e-10, atol=1e-12)
    assert expected.abs().max() > 0.05


@pytest.mark.parametrize("config", [
    LossConfig(), LossConfig(clip="pointwise"), LossConfig(top_k=4, tail=True), LossConfig(divergence=JSD(), top_k=3),
    LossConfig(divergence=ReverseKL(), clip="token", clip_tau=2.8), LossConfig(divergence=SampledToken()),
])  # fmt: skip
def test_statistics(config: LossConfig) -> None:
    student, teacher, labels = make()
    tiled = config.model_copy(update={"tile_logits": 33})
    streams = run(student, teacher, labels, tiled, temperature=1.2)
    stats = streams.stats
    log_q = dense.log_softmax(logits_of(student, 1.2).detach().numpy())
    log_p = dense.log_softmax(logits_of(teacher, 1.2).detach().numpy())
    p, q, rows = np.exp(log_p), np.exp(log_q), np.arange(N)
    kind = "reverse_kl" if config.divergence.kind == "sampled" else config.divergence.kind
    expected = {
        "divergence": dense.summands(kind, 0.5, p, q).sum(-1),
        "student_logprob": log_q[rows, labels.numpy()],
        "teacher_logprob": log_p[rows, labels.numpy()],
        "student_entropy": -(q * log_q).sum(-1),
        "teacher_entropy": -(p * log_p).sum(-1),
        "student_max_prob": q.max(-1),
        "top1_agree": (q.argmax(-1) == p.argmax(-1)).astype(float),
    }
    for name, value in expected.items():
        tensor = getattr(stats, name)
        assert tensor.dtype == torch.float32
        assert not tensor.requires_grad
        np.testing.assert_allclose(tensor.numpy(), value, rtol=1e-5, atol=1e-6, err_msg=name)
    assert 0 < stats.top1_agree.sum() < N

    # reversed: the actual gradient at the teacher's top entry points down, that of the unclipped divergence up.
    tops = []
    for clip in (config.clip, "none"):
        logits = logits_of(student).detach().requires_grad_()
        role = Scored(logits, torch.eye(V, dtype=torch.float64))
        direct = run(role, teacher, labels, tiled.model_copy(update={"clip": clip}), temperature=1.2)
        (gradient,) = torch.autograd.grad(direct.divergence_N.sum(), logits)
        tops.append(gradient.numpy()[rows, p.argmax(-1)])
    np.testing.assert_array_equal(stats.reversed.numpy(), (tops[0] > 0) & (tops[1] < 0))
    assert (tops[0] > 0).any() or config.clip == "token", "entries pushed down without the clip's doing are not counted"
    assert (0 < stats.reversed.sum() < N) == (config.clip == "pointwise")

    if config.clip == "pointwise":
        held = dense.summands(kind, 0.5, p, q) >= config.clip_tau
        np.testing.assert_allclose(stats.clip_frac.numpy(), held.mean(-1), rtol=1e-6)
        np.testing.assert_allclose(stats.clipped_mass.numpy(), (p * held).sum(-1), rtol=1e-6)
    elif config.clip == "none":
        assert stats.clip_frac.abs().sum() == stats.clipped_mass.abs().sum() == 0


class Extrapolated:
    """1.5 log p_first - 0.5 log p_second: a target that needs a normaliser of its own."""

    views = ("teacher", "base")
    is_first_view = False
    reads_student = False
    strength = 1.5

    def at(self, strength: float) -> Extrapolated:
        return self

    def metrics(self, stats: TokenStats) -> dict[str, float]:
        return {}

    def log_target(self, log_views: Sequence[Tensor]) -> Tensor:
        return 1.5 * log_views[0] - 0.5 * log_views[1]


@pytest.mark.parametrize("config", [
    *(LossConfig(divergence=kind) for kind in KINDS), LossConfig(clip="pointwise"),
    LossConfig(divergence=ReverseKL(), top_k=4, tail=True), LossConfig(divergence=JSD(beta=0.3), top_k=4),
])  # fmt: skip
def test_a_target_of_two_views(config: LossConfig) -> None:
    student, first, labels = make()
    generator = torch.Generator().manual_seed(8)
    second = Scored(
        torch.randn(N, H, generator=generator, dtype=torch.float64),
        torch.randn(V, H, generator=generator, dtype=torch.float64),
    )
    tiled = config.model_copy(update={"tile_logits": 33})
    streams = token_streams(student, [first, second], labels, tiled, target=Extrapolated(), temperature=1.2)
    log_views = [logits_of(view, 1.2).detach().log_softmax(-1) for view in (first, second)]
    # The same target given as the logits of a single view; temperature 1.2 is applied by the call again.
    mixed = Scored(1.2 * Extrapolated().log_target(log_views), torch.eye(V, dtype=torch.float64))
    single = run(student, mixed, labels, config, temperature=1.2)
    torch.testing.assert_close(streams.divergence_N, single.divergence_N)
    for tensor, expected in zip(
        torch.autograd.grad(streams.divergence_N.sum(), parameters(student)),
        torch.autograd.grad(single.divergence_N.sum(), parameters(student)),
        strict=True,
    ):
        torch.testing.assert_close(tensor, expected)
    # Statistics of the pair stay those of the first view; those of the clip follow the target.
    plain = run(student, first, labels, config, temperature=1.2).stats
    for name in ("divergence", "teacher_logprob", "teacher_entropy", "top1_agree", "student_entropy"):
        torch.testing.assert_close(getattr(streams.stats, name), getattr(plain, name))
    for name in ("clip_frac", "clipped_mass", "reversed"):
        torch.testing.assert_close(getattr(streams.stats, name), getattr(single.stats, name))


# Entropies of the tokens of `make` lie on both sides of .4 nats apart.
READING: list[Any] = [Paint(weight=0.3, mismatch=0.4), Paint(weight=0.9, mismatch=0.0), Avsd()]


def of_student(target: Any, views: Sequence[dense.Array], q: dense.Array) -> dense.Array:
    """The target's probabilities, [N, V], of those of the views and the student."""
    if isinstance(target, Paint):
        return targets.rows(lambda p, q: targets.paint(p, q, target.weight, target.mismatch), *views, q)
    return targets.rows(lambda *roles: targets.avsd(roles[:-1], roles[-1]), *views, q)


@pytest.mark.parametrize("target", READING, ids=lambda target: f"{target.kind}-{getattr(target, 'weight', '')}")
@pytest.mark.parametrize("config", [
    *(LossConfig(divergence=kind) for kind in KINDS), LossConfig(clip="pointwise"), LossConfig(top_k=4, tail=True),
])  # fmt: skip
@pytest.mark.parametrize("tile_logits", [1, 3 * V, 100 * V])
def test_a_target_that_reads_the_student_holds_it_constant(target: Any, config: LossConfig, tile_logits: int) -> None:
    """Against the dense float64 reference; gradients are differences at a target that stands still."""
    student, first, labels = make()
    others = [make(bias=False)[1] if name == "full" else make(bias=False)[0] for name in target.views[1:]]
    views = [first, *others]
    p_views = [np.exp(dense.log_softmax(logits_of(view, 1.2).detach().numpy())) for view in views]
    raw = logits_of(student).detach().numpy()
    p = of_student(target, p_views, np.exp(dense.log_softmax(raw / 1.1)))

    def loss(logits: dense.Array) -> dense.Array:
        q = np.exp(dense.log_softmax(logits / 1.1))
        kind, beta = config.divergence.kind, getattr(config.divergence, "beta", 0.0)
        return dense.divergence(p, q, kind, beta, config.top_k, config.tail, config.clip, config.clip_tau)

    tiled = config.model_copy(update={"temperature_student": 1.1, "tile_logits": tile_logits})
    for trained in (parameters(student), [student.hidden_NH]):
        if len(trained) == 1:
            student = replace(
                student,
                head_VH=student.head_VH.detach(),
                bias_V=None if student.bias_V is None else student.bias_V.detach(),
            )
        streams = token_streams(student, views, labels, tiled, target=target, temperature=1.2)
        np.testing.assert_allclose(streams.divergence_N.detach().numpy(), loss(raw), rtol=1e-6, atol=1e-8)
        upstream = torch.linspace(0.5, 2.0, N, dtype=torch.float64)
        gradient = torch.as_tensor(dense.numeric_gradient(loss, raw)) * upstream[:, None]
        expected = [gradient @ student.head_VH.detach(), gradient.T @ student.hidden_NH.detach(), gradient.sum(0)]
        found = torch.autograd.grad((streams.divergence_N * upstream).sum(), trained)
        for tensor, wanted in zip(found, expected, strict=False):
            torch.testing.assert_close(tensor, wanted, rtol=1e-5, atol=1e-7)
    if isinstance(target, Paint) and target.mismatch:
        assert 0 < np.isclose(p, p_views[0]).all(-1).sum() < N, "tokens on both sides of the threshold"


@pytest.mark.parametrize("target", READING, ids=lambda target: f"{target.kind}-{getattr(target, 'weight', '')}")
def test_the_sampled_token_loss_asks_a_target_that_reads_the_student_about_whole_distributions(target: Any) -> None:
    student, first, labels = make()
    views = [first, *(make(bias=False)[1] for _ in target.views[1:])]
    streams = token_streams(
        student, views, labels, LossConfig(divergence=SampledToken(), tile_logits=33), target=target, temperature=1.2
    )
    log_views = [logits_of(view, 1.2).detach().log_softmax(-1) for view in (*views, student)]
    log_q = logits_of(student, 1.2).log_softmax(-1).gather(1, labels[:, None])[:, 0]
    advantage = target.log_target(log_views).gather(1, labels[:, None])[:, 0] - log_q.detach()
    torch.testing.assert_close(streams.divergence_N, -advantage * log_q)
    (found,) = torch.autograd.grad(streams.divergence_N.sum(), [student.hidden_NH])
    (expected,) = torch.autograd.grad((-advantage * log_q).sum(), [student.hidden_NH])
    torch.testing.assert_close(found, expected)


def test_the_sampled_token_loss_takes_a_target_without_its_constant() -> None:
    student, first, labels = make()
    second = make(bias=False)[1]
    streams = token_streams(
        student, [first, second], labels, LossConfig(divergence=SampledToken()), target=Extrapolated(), temperature=1.2
    )
    log_q, log_t, log_b = (
        logits_of(role, 1.2).log_softmax(-1).gather(1, labels[:, None])[:, 0] for role in (student, first, second)
    )
    advantage = (1.5 * log_t - 0.5 * log_b - log_q).detach()
    torch.testing.assert_close(streams.divergence_N, -advantage * log_q)
    for tensor, expected in zip(
        torch.autograd.grad(streams.divergence_N.sum(), parameters(student)),
        torch.autograd.grad((-advantage * log_q).sum(), parameters(student)),
        strict=True,
    ):
        torch.testing.assert_close(tensor, expected)


def test_the_sampled_token_loss_weighs_by_the_truncated_ratio_and_keeps_the_old_advantage() -> None:
    # q = (.5, .5), p = (.8, .2); old probabilities .25, .4, .05 give ratios 2, 1.25 and 10, the last cut at 5.
    student, teacher = from_logits([[0.0, 0.0]] * 3), from_logits(torch.tensor([[0.8, 0.2]] * 3).double().log())
    labels, old = torch.tensor([0, 1, 0]), torch.tensor([0.25, 0.4, 0.05]).double().log()
    streams = token_streams(
        student, [teacher], labels, LossConfig(divergence=SampledToken()), target=Plain(), temperature=1.0,
        old_logprob_N=old,
    )  # fmt: skip
    weights = torch.tensor([2.0 * np.log(0.8 / 0.25), 1.25 * np.log(0.2 / 0.4), 5.0 * np.log(0.8 / 0.05)])
    torch.testing.assert_close(streams.divergence_N, -weights * np.log(0.5))
    streams.divergence_N.sum().backward()
    sign = torch.tensor([[1.0, -1.0], [-1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    torch.testing.assert_close(student.hidden_NH.grad, -0.5 * weights[:, None] * sign)
    assert streams.stats.clip_frac.tolist() == [0, 0, 1]


@pytest.mark.parametrize("kind", KINDS)
def test_the_reverse_kl_of_the_statistics_is_that_of_the_first_view(kind: Divergence) -> None:
    student, teacher, labels = make()
    stats = run(student, teacher, labels, LossConfig(divergence=kind, tile_logits=33), temperature=1.0).stats
    q, p = (logits_of(role).log_softmax(-1).exp() for role in (student, teacher))
    torch.testing.assert_close(stats.reverse_kl.double(), (q * (q / p).log()).sum(-1).detach(), rtol=1e-6, atol=1e-7)


class LargestTensor(TorchDispatchMode):
    """Record the largest storage that any operation creates."""

    def __init__(self, allowed: Sequence[tuple[int, ...]] = ()) -> None:
        super().__init__()
        self.allowed, self.largest, self.shape = set(allowed), 0, torch.Size()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        seen = {tensor.untyped_storage().data_ptr() for tensor in args if isinstance(tensor, Tensor)}
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if not isinstance(tensor, Tensor) or tensor.untyped_storage().data_ptr() in seen:
                continue
            if tuple(tensor.shape) not in self.allowed and tensor.numel() > self.largest:
                self.largest, self.shape = tensor.numel(), tensor.shape
        return result


@pytest.mark.parametrize("config", [
    LossConfig(), LossConfig(divergence=JSD(), clip="pointwise"), LossConfig(top_k=20, tail=True),
    LossConfig(divergence=SampledToken()),
])  # fmt: skip
def test_no_tensor_exceeds_a_tile(config: LossConfig) -> None:
    tokens, vocabulary, hidden = 64, 50_000, 8
    student, teacher, labels = make(torch.float32, n=tokens, v=vocabulary)
    hidden = student.hidden_NH.shape[1]
    tiled = config.model_copy(update={"tile_logits": 2 * vocabulary})
    with LargestTensor(allowed=[(vocabulary, hidden), (vocabulary,)]) as record:  # gradients of head and bias
        streams = run(student, teacher, labels, tiled)
        (streams.divergence_N.sum() + streams.logprob_N.sum()).backward()
    assert record.largest == 2 * 2 * vocabulary, record.shape  # two tokens, two roles


class Products(TorchDispatchMode):
    """Counts products with the head."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += func.__name__ in ("mm.default", "mm.out", "addmm_.default")
        return func(*args, **(kwargs or {}))


EQUAL, FALLING = torch.full((N,), 0.25, dtype=torch.float64), torch.linspace(2, 1, N, dtype=torch.float64)


@pytest.mark.parametrize(("trains", "tile", "use", "loss", "logprob", "forward", "backward"), [
    # One tile: logits of both roles, then the gradient of each trained part, whatever arrives.
    ("both", None, Use(), FALLING, None, 2, 2),
    ("hidden", None, Use(), FALLING, None, 2, 1),
    # A frozen head: gradients beside the scores, weighed later, whatever arrives.
    ("hidden", V, Use(), FALLING, None, 3, 0),
    ("hidden", V, Use(logprob=True), FALLING, EQUAL, 4, 0),
    ("hidden", V, Use(loss=False, logprob=True), None, FALLING, 3, 0),
    ("hidden", V, Use(), None, FALLING, 3, 2),  # not what was said: the student's logits again, no teacher's
    # A trained head: summed under the weights that were expected; made again under others.
    ("both", V, Use(), EQUAL, None, 4, 0),
    ("both", V, Use(weights=lambda _, rows: 3 * FALLING[rows]), FALLING, None, 4, 0),
    ("both", V, Use(weights=lambda stats, _: stats.student_logprob), FALLING, None, 4, 4),
    ("both", V, Use(), FALLING, None, 4, 4),
    ("both", V, Use(), EQUAL, EQUAL, 4, 4),
    ("both", V, Use(logprob=True), EQUAL, EQUAL, 2, 4),
    ("both", V, Use(loss=False, logprob=True), None, EQUAL, 2, 3),
    ("none", V, Use(), None, None, 2, 0),
])  # fmt: skip
def test_products_with_the_head(
    trains: str, tile: int | None, use: Use, loss: Tensor | None, logprob: Tensor | None, forward: int, backward: int
) -> None:
    student, teacher, labels = make(bias=False)
    student = Scored(student.hidden_NH.detach(), student.head_VH.detach())
    trained = {"both": [student.hidden_NH, student.head_VH], "hidden": [student.hidden_NH], "none": []}[trains]
    for tensor in trained:
        tensor.requires_grad_()
    config = LossConfig(tile_logits=tile)
    tiles = N if tile else 1
    with Products() as products:
        streams = token_streams(student, [teacher], labels, config, target=Plain(), temperature=1.0, use=use)
    assert products.count == forward * tiles
    if not trained:
        assert not streams.divergence_N.requires_grad
        return
    pairs = ((streams.divergence_N, loss), (streams.logprob_N, logprob))
    total = torch.stack([(values * weights).sum() for values, weights in pairs if weights is not None]).sum()
    with Products() as products:
        torch.autograd.grad(total, trained, retain_graph=True)
    assert products.count == backward * tiles
    with Products() as products:
        torch.autograd.grad(total, trained)  # what was kept is used up
    assert products.count >= 2 * tiles


@pytest.mark.parametrize(
    "config", [LossConfig(), LossConfig(divergence=JSD(), temperature_student=1.3, tile_logits=3 * V)]
)
def test_roles_of_one_head_share_a_product(config: LossConfig) -> None:
    student, teacher, labels = make()
    with Products() as products:
        view = Scored(teacher.hidden_NH, student.head_VH.detach(), teacher.bias_V)
        one = run(student, view, labels, config, temperature=0.8)
    apart = run(
        student, Scored(teacher.hidden_NH, student.head_VH.detach().clone(), teacher.bias_V), labels, config, 0.8
    )
    tiles = 3 if config.tile_logits else 1
    assert products.count == tiles * (1 if tiles == 1 else 3)  # gradients of hidden states and head, in tiles at once
    torch.testing.assert_close(one.divergence_N, apart.divergence_N)
    gradients = [torch.autograd.grad(streams.divergence_N.sum(), parameters(student)) for streams in (one, apart)]
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(one.stats.teacher_entropy, apart.stats.teacher_entropy)


@pytest.mark.parametrize("use", [Use(), Use(logprob=True), Use(loss=False, logprob=True)])
@pytest.mark.parametrize("tile", [None, V])
def test_labels_alone_have_no_divergence_to_derive(use: Use, tile: int | None) -> None:
    student, _, labels = make()
    streams = token_streams(student, [], labels, LossConfig(tile_logits=tile), target=Plain(), temperature=1.0, use=use)
    assert not streams.divergence_N.requires_grad
    total = (streams.divergence_N + streams.logprob_N).sum()
    dense_total = logits_of(student).log_softmax(-1).gather(1, labels[:, None]).sum()
    found, expected = (torch.autograd.grad(value, parameters(student)) for value in (total, dense_total))
    for tensor, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(tensor, reference)


def test_labels_without_a_teacher_cost_no_logits_of_one() -> None:
    student, _, labels = make()
    with Products() as products:
        streams = token_streams(student, [], labels, LossConfig(), target=Plain(), temperature=1.0)
    assert products.count == 1
    torch.testing.assert_close(streams.logprob_N, logits_of(student).log_softmax(-1).gather(1, labels[:, None])[:, 0])
    assert streams.divergence_N.tolist() == streams.stats.reverse_kl.tolist() == [0.0] * N
    assert torch.equal(streams.stats.teacher_logprob, streams.stats.student_logprob)


@pytest.mark.parametrize("clip_tau", [1.0, 3.0])
def test_tokens_that_the_clip_holds_are_expected_to_weigh_nothing(clip_tau: float) -> None:
    student, teacher, labels = make()
    config = LossConfig(clip="token", clip_tau=clip_tau, tile_logits=V)
    streams = run(student, teacher, labels, config)
    assert 0 < streams.stats.clip_frac.sum() < N
    with Products() as products:
        torch.autograd.grad(streams.divergence_N.sum(), parameters(student))
    assert products.count == 0


def test_no_token_at_all() -> None:
    student, teacher, labels = make(n=0)
    streams = run(student, teacher, labels, LossConfig(top_k=3, tail=True))
    assert streams.divergence_N.shape == streams.stats.reversed.shape == (0,)
    for gradient in torch.autograd.grad(streams.divergence_N.sum(), parameters(student)):
        assert gradient.abs().sum() == 0


def test_a_label_outside_the_vocabulary_is_nan() -> None:
    student, teacher, labels = make()
    labels[2] = -100
    streams = run(student, teacher, labels, LossConfig(tile_logits=33))
    assert torch.isnan(streams.logprob_N).tolist() == [index == 2 for index in range(N)]


def test_top_k_beyond_the_vocabulary_is_refused() -> None:
    student, teacher, labels = make()
    with pytest.raises(UserError, match=r"loss\.top_k=12 exceeds the vocabulary of 11"):
        run(student, teacher, labels, LossConfig(top_k=12))


@pytest.mark.parametrize(("section", "message"), [
    ({"divergence": {"kind": "jsd", "beta": 0.0}}, "greater than 0"),
    ({"divergence": {"kind": "jsd", "beta": 1.0}}, "less than 1"),
    ({"top_k": 1}, "always 0"),
    ({"top_k": 0}, "greater than or equal to 1"),
    ({"tail": True}, "tail=true without top_k"),
    ({"top_k_support": "student"}, "top_k_support=student without top_k"),
    ({"divergence": {"kind": "sampled"}, "clip": "token"}, "clip=token with the sampled-token"),
    ({"divergence": {"kind": "sampled"}, "top_k": 5}, "top_k=5 with the sampled-token"),
    ({"clip_tau": 0.0}, "greater than 0"),
    ({"temperature_teacher": 0.0}, "greater than 0"),
    ({"divergence": {"beta": 0.5}}, "kind"),
])  # fmt: skip
def test_nonsense_is_refused_at_configuration(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        LossConfig.model_validate(section)


def test_a_resolved_config_reads_back() -> None:
    for kind in (*KINDS, SampledToken()):
        config = LossConfig(divergence=kind)
        assert TypeAdapter(LossConfig).validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize("tile_logits", [1, 3 * V, None])
@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_labels_alone_score_as_the_dense_computation_does(
    tile_logits: int | None, cap: float | None, temperature: float
) -> None:
    """Values and gradients to 1e-12 in float64: log softmax(cap tanh(y / cap) / temperature) at the label."""
    student, _, labels = make()
    student = replace(student, cap=cap)
    weigh = torch.linspace(-1, 2, N, dtype=torch.float64)
    parts = [part for part in (student.hidden_NH, student.head_VH, student.bias_V) if part is not None]
    found = label_logprobs(student, labels, temperature, tile_logits)
    gradients = torch.autograd.grad((weigh * found).sum(), parts)
    y = logits_of(student)
    z = (y if cap is None else cap * (y / cap).tanh()) / temperature
    expected = z.log_softmax(-1).gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    for one, other in zip(gradients, torch.autograd.grad((weigh * expected).sum(), parts), strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(
            label_logprobs(student, labels, temperature, tile_logits), expected, atol=1e-12, rtol=0
        )


def test_labels_alone_outside_the_vocabulary_are_not_a_number() -> None:
    student, _, labels = make()
    labels[1], labels[4] = V, -1
    assert label_logprobs(student, labels, 1.0).isnan().nonzero().flatten().tolist() == [1, 4]


def test_labels_alone_survive_logits_that_float32_could_not_exponentiate() -> None:
    """Of 200 and 0 the larger has log-probability 0, the other -200."""
    student = from_logits([[200.0, 0.0], [200.0, 0.0]], torch.float32)
    assert label_logprobs(student, torch.tensor([0, 1]), 1.0).tolist() == [0.0, -200.0]


@pytest.mark.parametrize("vocabulary", [5, 4096, 4097, 5000, 8191, 8192])
def test_the_largest_entry_is_found_wherever_it_stands(vocabulary: int) -> None:
    """First, last, at both ends of a stretch of 1,024, and of equal ones the first."""
    places = sorted({0, 1, 1023, 1024, 2047, 4095, 4096, vocabulary - 2, vocabulary - 1} & set(range(vocabulary)))
    x = torch.rand(len(places), vocabulary, generator=torch.Generator().manual_seed(0))
    x[torch.arange(len(places)), places] = 2.0
    x[:, -1] = 2.0
    assert scores._argmax(x)[:, 0].tolist() == places


def test_probabilities_made_with_one_exponential_are_those_of_a_soft_max() -> None:
    z = 30 * torch.randn(4, 500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z[0, 3] = -torch.inf
    log_p, p = scores._normalised(z)
    torch.testing.assert_close(log_p, z.log_softmax(-1), atol=1e-13, rtol=0)
    torch.testing.assert_close(p, z.softmax(-1), atol=1e-15, rtol=0)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda views: views[0][:, :1], r"returned shape \(\d+, 1\) for views of shape \(\d+, \d+\): return one log-"),
        (lambda views: views[0].mean(0), r"returned shape \(\d+,\) for views"),
        (lambda views: None, "returned None for views"),
        (lambda views: views[0].mul_(2.0), "changed a view in place, which others read, too: change a copy"),
        (lambda views: [views[0], views[1].zero_()][0], "changed a view in place"),
    ],
)
def test_a_target_of_ones_own_is_held_to_the_vocabulary(change: Any, says: str) -> None:
    class Odd(Extrapolated):
        def log_target(self, log_views: Sequence[Tensor]) -> Tensor:
            found: Tensor = change(log_views)
            return found

    student, first, labels = make()
    with pytest.raises(UserError, match=rf"Odd\.log_target {says}"):
        token_streams(student, [first, make(bias=False)[1]], labels, LossConfig(), target=Odd(), temperature=1.2)
