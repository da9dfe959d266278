"""Memory: flat in the vocabulary, and for a step of Qwen3-0.6B's shape what `atesd plan` says."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from atesd.losses.divergence import LossConfig, Scored, token_streams
from atesd.losses.target import Plain
from atesd.recipe import build_config
from atesd.rollout.hf import HFSampler
from atesd.train.batch import Row
from atesd.train.fit import this_machine
from atesd.train.model import add_lora
from atesd.train.plan import GIB, Lengths, make_plan

from support.peaks import CPU
from support.steppers import make_stepper

pytestmark = pytest.mark.gpu
Peak = Callable[[Callable[[], object]], float]
QWEN3: dict[str, Any] = {
    "vocab_size": 151_936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
TINY: dict[str, Any] = {
    "vocab_size": 8192,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
SCORED = {"cuda": (37_984, 1024, 4096, 2**24, torch.bfloat16), "cpu": (2048, 32, 128, 2**14, torch.float32)}
# On a GPU one micro-batch, on a CPU two.
STEP = {
    "cuda": (16, 256, Lengths(prompt=128, solution=384), 12_800),
    "cpu": (8, 40, Lengths(prompt=24, solution=72), 300),
}


def scoring(vocabulary: int, device: torch.device) -> Callable[[], object]:
    """Return what scores random tokens of a vocabulary, and takes the gradient."""
    _, width, tokens, tile, dtype = SCORED[device.type]
    generator = torch.Generator().manual_seed(0)
    head, own, other = (
        torch.randn(rows, width, generator=generator).to(device, dtype) for rows in (vocabulary, tokens, tokens)
    )
    labels = torch.randint(vocabulary, (tokens,), generator=generator).to(device)
    student, config = Scored(own.requires_grad_(), head), LossConfig(tile_logits=tile)

    def score() -> None:
        streams = token_streams(student, [Scored(other, head)], labels, config, target=Plain(), temperature=1.0)
        streams.divergence_N.mean().backward()

    return score


def test_scores_of_four_times_the_vocabulary_take_no_more_memory(
    device: torch.device, peak: Peak, say: Callable[[str], None]
) -> None:
    """With a frozen head, beside the head itself: at most 10 % more."""
    vocabulary, _, tokens, *_ = SCORED[device.type]
    taken = []
    for size in (vocabulary, 4 * vocabulary):
        score = scoring(size, device)
        score()
        taken.append(peak(score))
    say(f"scores and gradient of {tokens} tokens: " + ", ".join(f"{each / 2**20:.1f} MiB" for each in taken))
    assert taken[1] < 1.1 * taken[0], taken


@pytest.fixture
def shaped(device: torch.device, tmp_path: Path) -> Any:
    """Return a recipe with LoRA for a model of Qwen3-0.6B's shape, and the model with random weights."""
    shape = QWEN3 if device.type == "cuda" else TINY
    settings = Qwen3Config(**shape, tie_word_embeddings=True, max_position_embeddings=40_960, eos_token_id=1)
    settings.save_pretrained(tmp_path / "model")
    problems, completion, _, budget = STEP[device.type]
    config = build_config(
        {
            "model": {"path": str(tmp_path / "model"), "dtype": "bfloat16", "lora": {"r": 64, "alpha": 128}},
            "rollout": {"max_new_tokens": completion, "top_p": 1.0, "top_k": 0},
            "step": {"problems": problems, "token_budget": budget},
        }
    )
    torch.manual_seed(0)
    with device:
        plain = AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16)
    assert config.model.lora is not None
    return config, add_lora(plain, config.model.lora, 0).to(device)


def test_a_step_of_qwen3s_shape_takes_what_was_planned(
    device: torch.device, shaped: Any, peak: Peak, say: Callable[[str], None]
) -> None:
    """Between 60 % and 125 % of the plan, weights and optimizer not counted: a plan has never been held to a GPU."""
    config, model = shaped
    problems, completion, lengths, _ = STEP[device.type]
    plan = make_plan(config, this_machine() if device.type == "cuda" else CPU, lengths)
    sections = config.model_dump(mode="json", exclude_unset=True, include={"model", "step"})
    stepper, _ = make_stepper(model, **sections)
    draw, size = random.Random(0), model.config.vocab_size

    def ids(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(2, size) for _ in range(count))

    rows = []
    for group in range(problems):
        prompt = ids(lengths.prompt)
        views = {"teacher": ids(lengths.solution) + prompt}
        rows.append(Row(prompt, ids(completion), ("distil",), group=group, view_prompts=views, ratio=1.0))
    stepper.optimize(rows)  # makes the optimizer's state
    begin = perf_counter()
    outcome = stepper.optimize(rows)
    seconds = perf_counter() - begin  # what is logged was fetched: nothing is under way
    taken, planned = peak(lambda: stepper.optimize(rows)), sum(plan.phases["update"].values())
    own, said = sum(each.nbytes for each in model.parameters()), plan.always["weights"]
    say(
        f"update of {problems} x {completion} tokens, {plan.parameters / 1e6:.0f} M weights, V {size}: "
        f"{taken / GIB:.3f} GiB, planned {planned / GIB:.3f} ({taken / planned:.2f}); {seconds:.2f} s, planned "
        f"{plan.seconds['teacher'] + plan.seconds['update']:.2f} s"
    )
    assert outcome.metrics["loss/distil"] > 0
    assert own == pytest.approx(said, rel=0.01)
    assert 0.6 < taken / planned < 1.25


def test_sampling_from_qwen3s_shape_takes_what_was_planned(
    device: torch.device, shaped: Any, peak: Peak, say: Callable[[str], None]
) -> None:
    """At most 125 % of the plan; no completion ends early."""
    config, model = shaped
    problems, completion, lengths, _ = STEP[device.type]
    plan = make_plan(config, this_machine() if device.type == "cuda" else CPU, lengths)
    sampler = HFSampler(model, eos_ids=[model.config.vocab_size + 1], pad_id=0, decode=str)
    prompts = [[2 + number] * lengths.prompt for number in range(problems)]
    sampler.sample(prompts[:1], config.rollout, seed=0)  # compares the two loops once
    begin = perf_counter()
    sampler.sample(prompts, config.rollout, seed=0)
    seconds = perf_counter() - begin
    taken = peak(lambda: sampler.sample(prompts, config.rollout, seed=0))
    planned = sum(plan.phases["sampling"].values())
    say(
        f"sampling {problems} x {completion} tokens: {taken / GIB:.3f} GiB, planned {planned / GIB:.3f} "
        f"({taken / planned:.2f}); {seconds:.2f} s, planned {plan.seconds['sampling']:.2f} s"
    )
    assert taken / planned < 1.25
