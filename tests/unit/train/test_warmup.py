"""The pico tier's warm start: its learning rate by hand, and what a short one leaves behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from atesd.train.warmup import build_model, build_tokenizer, rate, train_warm_start


def test_the_rate_rises_for_50_steps_stays_and_falls_to_0() -> None:
    """Of 1000 steps the first 300 are not on the way down, the other 700 linearly."""
    points = {0: 1 / 50, 24: 1 / 2, 49: 1.0, 50: 1.0, 299: 1.0, 300: 1.0, 650: 0.5, 1000: 0.0}
    assert {step: rate(step, 1000) for step in points} == pytest.approx(points, abs=1e-12)


def test_a_short_warm_start_loads_and_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    seen: list[tuple[int, int, float]] = []
    made = train_warm_start(
        tmp_path / "warm", steps=2, seed=3, batch_size=4, learning_rate=1e-2, progress=lambda *step: seen.append(step)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert [(step, steps) for step, steps, _ in seen] == [(1, 2), (2, 2)]
    assert made.loss == seen[-1][2]
    with torch.random.fork_rng():
        first = build_model(build_tokenizer(), seed=3)
    model, tokenizer = (kind.from_pretrained(made.directory) for kind in (AutoModelForCausalLM, AutoTokenizer))
    assert tokenizer.get_vocab() == build_tokenizer().get_vocab()
    assert made.num_parameters == sum(weight.numel() for weight in model.parameters())
    # Adam's first steps move every weight by about the rate: a fiftieth of it, then two, the decay being far less.
    moved = max(
        float((weight - first.get_parameter(name)).detach().abs().max()) for name, weight in model.named_parameters()
    )
    assert moved == pytest.approx(1e-2 * 3 / 50, rel=0.2)
