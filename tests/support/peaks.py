"""Peak bytes of real updates and real sampling, by torch's own record of every allocation, beside what a plan says."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import Qwen3Config, Qwen3ForCausalLM

from atesd.config import RunConfig
from atesd.recipe import build_config
from atesd.rollout.hf import HFSampler
from atesd.train.batch import Row
from atesd.train.model import load
from atesd.train.plan import Device, Lengths, make_plan

from support.folders import write_byte_model
from support.steppers import make_stepper

VOCABULARY = 8192
LENGTHS = Lengths(prompt=24, solution=72)
COMPLETION = 40
CPU = Device("cpu", 8 * 2**30, 1e11, 1e10, is_gpu=False, context=0.0)


def small_config(folder: Path, /, **sections: Any) -> RunConfig:
    """Write a Qwen3 of some 4 million weights, unless it is there, and return a recipe for it."""
    if not folder.exists():
        write_byte_model(folder)
        settings = Qwen3Config(
            vocab_size=VOCABULARY,
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=32,
            tie_word_embeddings=True,
            max_position_embeddings=512,
            eos_token_id=1,
        )
        torch.manual_seed(0)
        Qwen3ForCausalLM(settings).save_pretrained(folder)
    sections["model"] = {"path": str(folder), **sections.get("model", {})}
    sections["rollout"] = {"max_new_tokens": COMPLETION, **sections.get("rollout", {})}
    return build_config(sections)


def planned(config: RunConfig, phase: str) -> float:
    """Return the bytes that a phase needs beyond weights, copies and optimizer."""
    return sum(make_plan(config, CPU, LENGTHS).phases[phase].values())


def measured_update(config: RunConfig) -> float:
    """Return the peak of the second update, on rows of the assumed lengths; the first makes the optimizer's state."""
    model, _ = load(config.model, 0)
    sections = config.model_dump(mode="json", exclude_unset=True, include={"model", "step", "loss", "teacher"})
    stepper, _ = make_stepper(model, **sections)
    draw = random.Random(0)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(2, 250) for _ in range(count))

    rows = []
    for group in range(config.step.problems):
        prompt, solution = ids(LENGTHS.prompt), ids(LENGTHS.solution)
        views = {"teacher": solution + prompt}
        rows.append(Row(prompt, ids(COMPLETION), ("distil",), group=group, view_prompts=views, ratio=1.0))
    stepper.optimize(rows)
    return peak_of(lambda: stepper.optimize(rows))


def measured_sampling(config: RunConfig) -> float:
    """Return the peak of sampling all completions of a step, none of which ends early and all of which are guessed."""
    model, _ = load(config.model, 0)
    model.eval()
    most = config.rollout.engine.guess  # type: ignore[union-attr]
    sampler = HFSampler(model, eos_ids=[VOCABULARY + 1], pad_id=0, decode=str, guess=most)
    prompts = [[2 + number] * LENGTHS.prompt for number in range(config.step.problems)]
    known = [turn.completion_ids for turn in sampler.sample(prompts, config.rollout, seed=0)]  # and compares two loops
    return peak_of(lambda: sampler.sample(prompts, config.rollout, seed=0, references=known))


def peak_of(call: Callable[[], object]) -> float:
    """Return the most bytes that were allocated at once during a call, above what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    events = [each for each in record.profiler.kineto_results.events() if each.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda each: each.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return float(most)
