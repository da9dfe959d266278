"""SDAR's gates: the paper's gradient form, its constants, and what the centred form and the multiplier are."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from atesd.gates.gate import OpenGate
from atesd.gates.sdar import SdarGate
from atesd.kinds import GateSection
from atesd.losses.divergence import TokenStreams
from atesd.losses.stats import TokenStats

Score = Literal["gap", "entropy", "soft_or"]


def stats_of(**columns: Tensor) -> TokenStats:
    zero = torch.zeros_like(next(iter(columns.values())))
    return TokenStats(**{name: columns.get(name, zero) for name in TokenStats.__slots__})


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def gate_of(gate: SdarGate, gap: float, entropy: float) -> float:
    stats = stats_of(
        teacher_logprob=torch.tensor([gap - 1.0]),
        student_logprob=torch.tensor([-1.0]),
        student_entropy=torch.tensor([entropy]),
    )
    return float(gate.weights(stats)[0])


def test_the_open_gate_listens_to_the_divergence_fully() -> None:
    streams = TokenStreams(torch.tensor([0.1, 0.4]), torch.tensor([-1.0, -2.0]), stats_of(divergence=torch.zeros(2)))
    assert OpenGate().weights(streams.stats).tolist() == [1, 1]
    assert OpenGate().values(streams) is streams.divergence_N
    assert OpenGate().metrics(streams.stats) == {}
    assert OpenGate().reads_divergence


@pytest.mark.parametrize(("gap", "entropy"), [(0.3, 0.5), (-0.8, 0.5), (0.3, 1.7), (-2.0, 0.0)])
def test_gates_by_hand(gap: float, entropy: float) -> None:
    expected = {
        "gap": sigmoid(5 * gap),
        "entropy": sigmoid(5 * entropy),
        "soft_or": sigmoid(5 * (1 - (1 - entropy) * (1 - gap))),
    }
    for score, value in expected.items():
        assert gate_of(SdarGate(score=score), gap, entropy) == pytest.approx(value, abs=1e-6)  # type: ignore[arg-type]
        centred = SdarGate(score=score, centered=True)  # type: ignore[arg-type]
        assert gate_of(centred, gap, entropy) == pytest.approx(value - 0.5, abs=1e-6)


def test_soft_or_falls_with_the_gap_where_the_entropy_exceeds_1_nat() -> None:
    gate = SdarGate(score="soft_or")
    assert gate_of(gate, 0.5, 0.5) > gate_of(gate, -0.5, 0.5)
    assert gate_of(gate, 0.5, 1.5) < gate_of(gate, -0.5, 1.5)


def test_a_beta_of_0_is_the_constant_one_half() -> None:
    gate = SdarGate(beta=0.0)
    assert [gate_of(gate, gap, 1.0) for gap in (-3.0, 0.0, 3.0)] == [0.5, 0.5, 0.5]


def test_the_surrogates_gradient_is_the_papers_and_lacks_the_undetached_term() -> None:
    """The gradient of g (log p_T - log p_S) is -g grad log p_S; undetached, g would be g + beta Delta g (1 - g)."""
    logits = torch.tensor([0.2, -0.4, 1.1], dtype=torch.float64, requires_grad=True)
    log_q, log_t, label = logits.log_softmax(-1), math.log(0.2), 1
    gap = log_t - float(log_q[label].detach())
    stats = stats_of(teacher_logprob=torch.tensor([log_t]).double(), student_logprob=log_q[label : label + 1].detach())
    gate = SdarGate()
    streams = TokenStreams(torch.zeros(1).double(), log_q[label : label + 1], stats)
    (gate.weights(stats).detach() * gate.values(streams)).sum().backward()
    g = sigmoid(5 * gap)
    onehot = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    score = onehot - logits.detach().softmax(-1)
    torch.testing.assert_close(logits.grad, -g * score)
    undetached = -(g + 5 * gap * g * (1 - g)) * score
    assert (logits.grad - undetached).abs().max() > 0.1


def test_the_gate_and_the_centred_gate_have_the_same_expected_update_and_the_centred_one_less_variance() -> None:
    q = torch.tensor([0.35, 0.25, 0.15, 0.12, 0.08, 0.05], dtype=torch.float64)
    p = torch.tensor([0.10, 0.40, 0.20, 0.05, 0.15, 0.10], dtype=torch.float64)
    stats = stats_of(teacher_logprob=p.log(), student_logprob=q.log())
    scores = torch.eye(6, dtype=torch.float64) - q  # row y: gradient of log q(y) to the logits
    means, variances = [], []
    for centered in (False, True):
        updates = SdarGate(centered=centered).weights(stats)[:, None] * scores
        mean = (q[:, None] * updates).sum(0)
        means.append(mean)
        variances.append(float((q[:, None] * (updates - mean) ** 2).sum()))
    torch.testing.assert_close(means[0], means[1], rtol=0, atol=1e-15)
    assert variances[1] < 0.8 * variances[0]
    assert float(means[0] @ (p - q)) > 0, "the expected update points from the student to the teacher"


def expected_gradient(gate: SdarGate, target: Tensor) -> Tensor:
    """E over y ~ p_S of the loss's gradient to the logits at one position: every token of 5, through the real gate."""
    logits = torch.tensor([0.2, -0.4, 1.1, 0.0, -2.0], dtype=torch.float64, requires_grad=True)
    log_q = logits.log_softmax(-1)
    entropy = -(log_q.exp() * log_q).sum().detach()
    stats = stats_of(teacher_logprob=target.log(), student_logprob=log_q.detach(), student_entropy=entropy.expand(5))
    divergence = (log_q.exp() * (log_q - target.log())).sum().expand(5)  # the same whatever was sampled
    streams = TokenStreams(divergence, log_q, stats)
    losses = gate.weights(stats).detach() * gate.values(streams)
    (gradient,) = torch.autograd.grad((log_q.exp().detach() * losses).sum(), logits)
    return gradient


TEACHER = torch.tensor([0.1, 0.4, 0.2, 0.05, 0.25], dtype=torch.float64)
NO_TEACHER = [SdarGate(score="entropy"), SdarGate(score="entropy", beta=0.3, centered=True), SdarGate(beta=0.0)]
TAUGHT = [
    SdarGate(),
    SdarGate(centered=True),
    SdarGate(score="soft_or"),
    SdarGate(score="entropy", target="divergence"),
    SdarGate(beta=0.0, target="divergence"),
]


@pytest.mark.parametrize("gate", NO_TEACHER, ids=repr)
def test_a_surrogate_whose_gate_does_not_know_the_token_has_no_expected_gradient_and_warns(gate: SdarGate) -> None:
    assert expected_gradient(gate, TEACHER).abs().max() < 1e-15
    assert expected_gradient(gate, TEACHER.flip(0)).abs().max() < 1e-15
    warning = gate.warning()
    assert 'or gate.target = "divergence"' in (warning or ""), "the remedy can be copied into a recipe"
    assert warning is not None
    assert ("gate.beta = 0" if gate.beta == 0 else 'gate.score = "entropy"') in warning
    assert "expected gradient is 0" in warning


@pytest.mark.parametrize("gate", TAUGHT, ids=repr)
def test_every_other_gate_teaches_and_does_not_warn(gate: SdarGate) -> None:
    gradient = expected_gradient(gate, TEACHER)
    assert gradient.abs().max() > 1e-3
    assert (gradient - expected_gradient(gate, TEACHER.flip(0))).abs().max() > 1e-3
    assert gate.warning() is None


def test_an_open_gate_has_nothing_to_warn_of() -> None:
    assert OpenGate().warning() is None


def test_the_surrogate_looks_at_the_sampled_token_alone() -> None:
    stats = stats_of(teacher_logprob=torch.tensor([-1.0]), student_logprob=torch.tensor([-2.0]))
    streams = TokenStreams(torch.tensor([0.7]), torch.tensor([-2.5]), stats)
    assert float(SdarGate().values(streams)) == 1.5
    assert not SdarGate().reads_divergence
    assert not SdarGate(centered=True).reads_divergence


def test_the_multiplier_scales_the_divergence() -> None:
    stats = stats_of(teacher_logprob=torch.tensor([-1.0]), student_logprob=torch.tensor([-2.0]))
    streams = TokenStreams(torch.tensor([0.7]), torch.tensor([-2.0]), stats)
    gate = SdarGate(target="divergence")
    assert gate.values(streams) is streams.divergence_N
    assert gate.reads_divergence
    assert float(gate.weights(stats)) == pytest.approx(sigmoid(5.0))


def test_statistics_of_the_gate() -> None:
    gaps = torch.tensor([0.5, -0.5, -1.0, 1.0, 2.0])
    stats = stats_of(teacher_logprob=gaps, student_logprob=torch.zeros(5), student_entropy=torch.ones(5))
    assert SdarGate().metrics(stats) == pytest.approx(
        {"gate/open_frac": 0.6, "gate/gap": 0.4, "gate/gap_negative": 0.4}
    )
    assert SdarGate(score="entropy").metrics(stats)["gate/open_frac"] == 1.0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "sdar", "centered": True, "target": "divergence"}, "would maximise the divergence"),
        ({"kind": "sdar", "beta": -1.0}, "greater than or equal to 0"),
        ({"kind": "tip"}, "none"),
    ],
)
def test_what_makes_no_sense_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TypeAdapter(GateSection).validate_python(fields)
