"""Write the base model of the cliff experiment: the pico warm start, undecided between two forms of the answer line.

    python repro/cliff_base.py runs/cliff/base

Without a hint it closes a solution with `#7` or `>7`, half each; with a hint it always writes `#7`, which is the output
contract: the grader reads nothing else. So at the first character of the answer line the base has b near 1/2 and the
hinted teacher p near 1: the kind of place where the Extrapolation Cliff has something to say (docs/method.md).
Two minutes on one core.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import torch
from torch.nn import functional

from atesd.config import RunConfig
from atesd.exposure.prompt import hint_text, student_messages, teacher_messages
from atesd.recipe import load_config
from atesd.rollout.render import Renderer
from atesd.tasks.synthetic import pico
from atesd.train.batch import labels, view_input
from atesd.train.forward import scored_hidden
from atesd.train.model import load
from atesd.train.setup import make_renderer
from atesd.types import Problem

STEPS, BATCH, RATE = 300, 64, 1e-3
RECIPE = Path(__file__).parent.parent / "recipes" / "pico-cliff.toml"


def main(out: Path, seed: int = 0) -> None:
    """Fine-tune on reference solutions and save."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    config = load_config(RECIPE, ['model.path="pico"'])
    model, tokenizer = load(config.model, seed)
    renderer = make_renderer(config, tokenizer, model)
    drawn = pico.problems("train", STEPS * BATCH // 8, seed=4242)
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / STEPS)
    for step in range(STEPS):
        prompts, completions = zip(
            *[sample(rng, rng.choice(drawn), renderer, config) for _ in range(BATCH)], strict=True
        )
        inputs = view_input(prompts, completions, renderer.pad_id, torch.device("cpu"))
        scored = scored_hidden(model, inputs)
        loss = functional.cross_entropy(scored.hidden_NH @ scored.head_VH.T, labels(completions, torch.device("cpu")))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"step {step}/{STEPS} loss {float(loss.detach()):.4f}", flush=True)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    print(f"written to {out}")


def sample(rng: random.Random, problem: Problem, renderer: Renderer, config: RunConfig) -> tuple[list[int], list[int]]:
    """Return prompt and completion: half with a hint and the contract, half without and undecided."""
    hinted = rng.random() < 0.5
    mark = "#" if hinted or rng.random() < 0.5 else ">"
    solution = problem.solution.replace("#", mark)
    if hinted:
        shown = config.reveal.build(config.facts()).reveal(problem, rng.random())
        messages = teacher_messages(problem, hint_text(problem, shown, config.prompt), config.prompt)
        prompt = renderer.teacher_ids(messages)
    else:
        prompt = renderer.student_ids(student_messages(problem, config.prompt))
    return prompt, [*renderer.solution_ids(solution), renderer.eos_ids[0]]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
