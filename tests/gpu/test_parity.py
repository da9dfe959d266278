"""The same numbers as on the CPU: scores, loss, gradients, updates and greedy samples of a tiny Qwen3."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from atesd.losses.divergence import LossConfig
from atesd.losses.target import Plain
from atesd.rollout.hf import HFSampler
from atesd.rollout.sampler import SamplingConfig
from atesd.train.scorer import Scorer

from support.models import EOS, PAD, ragged_rows, tiny_model
from support.steppers import make_stepper

pytestmark = pytest.mark.gpu
CPU = torch.device("cpu")
LOSSES = {
    "one tile": LossConfig(),
    "tiles": LossConfig(tile_logits=200),
    "pointwise clip": LossConfig(clip="pointwise"),
    "top-k with a tail": LossConfig(top_k=5, tail=True, tile_logits=200),
}


def scored(config: LossConfig, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return streams, loss and all gradients of some rows, in float64 on the CPU; weights are those of bfloat16."""
    model = tiny_model().to(torch.bfloat16).to(device, dtype)
    scorer = Scorer(model, pad_id=PAD, loss=config, temperature=1.0, token_budget=10_000)
    rows = ragged_rows(12)
    with torch.no_grad():
        view = scorer.hidden([row.view("teacher") for row in rows]).detached()
    streams = scorer.streams([row.student for row in rows], [view], Plain())
    loss = streams.divergence_N.mean() - 0.1 * streams.logprob_N.mean()
    named = dict(model.named_parameters())
    gradients = torch.autograd.grad(loss, list(named.values()))
    found = {"divergence": streams.divergence_N, "log-probabilities": streams.logprob_N, "loss": loss}
    found["entropy"] = streams.stats.student_entropy
    found["gradient"] = torch.cat([each.flatten() for each in gradients])
    return {name: each.detach().cpu().double() for name, each in found.items()}


def distances(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Return the norm of each difference over that of what is expected."""
    return {name: float((found[name] - value).norm() / value.norm()) for name, value in expected.items()}


@pytest.mark.parametrize("name", LOSSES)
def test_float32_gives_the_cpus_scores_loss_and_gradients(
    name: str, device: torch.device, say: Callable[[str], None]
) -> None:
    """Within 1e-4 of their norm: float32 adds up in another order, and nothing may be rounded to TF32."""
    found = distances(scored(LOSSES[name], device, torch.float32), scored(LOSSES[name], CPU, torch.float32))
    say(f"parity, float32, {name}: " + ", ".join(f"{key} {value:.1e}" for key, value in found.items()))
    assert max(found.values()) < 1e-4, found


@pytest.mark.parametrize("name", LOSSES)
def test_bfloat16_is_within_its_rounding(name: str, device: torch.device, say: Callable[[str], None]) -> None:
    """Within 6 % of float32 on the CPU at the same weights: activations of two layers are rounded to 2^-9.

    A clip has edges that a rounded summand may cross: there 20 %.
    """
    found = distances(scored(LOSSES[name], device, torch.bfloat16), scored(LOSSES[name], CPU, torch.float32))
    say(f"parity, bfloat16, {name}: " + ", ".join(f"{key} {value:.1e}" for key, value in found.items()))
    assert max(found.values()) < (0.2 if "clip" in name else 0.06), found


def test_an_update_logs_the_cpus_numbers(device: torch.device) -> None:
    """Within 1e-4, over two updates of all weights; eps is large, so that AdamW does not turn noise into steps."""
    logged = []
    for where in (device, CPU):
        stepper, _ = make_stepper(tiny_model().to(where), optim={"lr": 1e-2, "max_grad_norm": 1.0, "eps": 1e-2})
        stepper.optimize(ragged_rows(12))
        logged.append(stepper.optimize(ragged_rows(12, seed=1)).metrics)
    for key in ("loss/distil", "optim/grad_norm", "divergence/mean", "student/entropy", "teacher/entropy"):
        assert logged[0][key] == pytest.approx(logged[1][key], rel=1e-4), key


def test_greedy_samples_are_the_cpus(device: torch.device) -> None:
    """Token for token, with log-probabilities within 1e-4: float32, distributions without near ties."""
    prompts = [[2, 3, 4, 5], [7, 8], [9], [4, 4, 4, 4, 4, 4]]
    sampling = SamplingConfig(temperature=0.0, top_p=1.0, top_k=0, max_new_tokens=24)
    found, expected = (
        HFSampler(tiny_model().to(where), eos_ids=[EOS], pad_id=PAD, decode=str).sample(prompts, sampling, seed=0)
        for where in (device, CPU)
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.completion_ids == theirs.completion_ids
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)


def test_a_seed_draws_the_same_on_both(device: torch.device) -> None:
    """Uniform numbers come from the CPU; only where one falls between two rounded edges may a token differ."""
    sampling = SamplingConfig(temperature=1.0, top_p=0.9, top_k=10, max_new_tokens=16)
    drawn = [
        HFSampler(tiny_model().to(where), eos_ids=[EOS], pad_id=PAD, decode=str).sample([[2, 3]] * 16, sampling, seed=0)
        for where in (device, CPU)
    ]
    same = sum(ours.completion_ids == theirs.completion_ids for ours, theirs in zip(*drawn, strict=True))
    assert same >= 14
