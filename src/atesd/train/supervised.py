"""A short supervised warm-up of any model: the student becomes uncertain rather than ignorant, the teacher competent.

    L = - mean over the batch's tokens of log p(y*_t | prompt, y*_<t)          at temperature 1, the end token included

The prompt is the student's, or, for a share of the samples, the teacher's with a hint at one of the ratios 0, .25, .5,
.75 and 1. One set of weights learns both roles, so that afterwards the frozen teacher knows what to do with a hint.
Ours; supervised training on solutions is all it is. The precision is float32 throughout, so that no half precision
rounds the merged adapters.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from accelerate import Accelerator
from pydantic import Field

from atesd.codes.model import with_codes
from atesd.config import RunConfig
from atesd.files import dump_json
from atesd.sections import OptimConfig
from atesd.seeds import derive_seed
from atesd.tasks.base import Task, content_of
from atesd.train.admit import refuse_hostile, shown_instead
from atesd.train.agree import PROMPTS, refuse_disagreement
from atesd.train.batch import Passage
from atesd.train.checkpoint import save_model
from atesd.train.compiled import compile_layers
from atesd.train.hints import Hints
from atesd.train.model import context_length, load, set_threads
from atesd.train.optim import build_optimizer, build_schedule
from atesd.train.scorer import Scorer
from atesd.train.setup import make_renderer, make_scorer
from atesd.types import Config, NonFiniteError, Problem, UserError

RATIOS = (0.0, 0.25, 0.5, 0.75, 1.0)
RECORD = "warmup.json"


class WarmupConfig(Config):
    """How a warm-up is done; adapters, prompts and reveal are the recipe's. All numbers are ours."""

    steps: Annotated[int, Field(ge=1)] = 60
    """Updates."""
    batch: Annotated[int, Field(ge=1)] = 8
    """Samples an update."""
    lr: Annotated[float, Field(gt=0, le=10)] = 1e-3
    """Peak learning rate: a tenth of the updates up, then linearly to 0."""
    hinted: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of samples behind the teacher's prompt."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Fixes order, ratios and adapters."""


class Warmed(NamedTuple):
    """What a warm-up did: problems used and left out, and the mean loss of its last tenth, without and with hints."""

    problems: int
    left_out: int
    loss: float | None
    hinted_loss: float | None


def own_problems(problems: Sequence[Problem], task: Task) -> tuple[list[Problem], int]:
    """Return the problems whose text is none of the task's, in any of its sets, and the number of the others.

    UserError where none is left.
    """
    taken = {content_of(each) for each in (*task.train(), *task.probe(), *task.evaluation())}
    own = [problem for problem in problems if content_of(problem) not in taken]
    if not own:
        raise UserError(
            f"all {len(problems)} problems of the warm-up's data are the recipe's own, so that the run would train on "
            "what it has seen: give other ones with --data, or of generated tasks others with task.data_seed=1"
        )
    return own, len(problems) - len(own)


def warm_up(
    config: RunConfig,
    problems: Sequence[Problem],
    out: Path,
    plan: WarmupConfig,
    *,
    source: Task | None = None,
    progress: Callable[[int, int, float], object] = lambda *_: None,
) -> Warmed:
    """Train `config.model` on the problems that are not the recipe's and write a model folder, adapters merged.

    `source` is the task that the problems are from, which knows their rows. The folder gets its name when it is
    complete. UserError where texts, prompts or model do not fit.
    """
    set_threads(config.threads)
    settings = config.model.model_copy(update={"dtype": "float32"})
    if settings.quantization is not None:
        raise UserError("a warm-up ends in whole weights, and 4-bit ones would round them: remove model.quantization")
    model, tokenizer = load(settings, derive_seed(plan.seed, "lora"), config.prompt.chat_template)
    with_codes(None, model, config.model.path)
    model.to(Accelerator().device)
    renderer = make_renderer(config, tokenizer, model)
    task = config.task.build(config.facts())
    own, left_out = own_problems(problems, task)
    refuse_hostile(config, renderer, source, {"warm-up": own})
    hints = Hints(config.prompt, config.reveal.build(config.facts()), renderer, shown_instead(config, own))
    _refuse_overlong(own, hints, context_length(model))
    scorer = make_scorer(config, model, renderer)
    refuse_disagreement(scorer, [hints.student_ids(problem) for problem in own[:PROMPTS]])
    if settings.compile:
        compile_layers(model)
    losses = _train(scorer, own, hints, renderer.eos_ids[0], plan, progress)
    late = losses[-max(1, plan.steps // 10) :]
    found = Warmed(len(own), left_out, _mean(loss for loss, _ in late), _mean(loss for _, loss in late))
    merged: Any = model.merge_and_unload() if config.model.lora is not None else model
    record = {**plan.model_dump(), "model": config.model.path, **found._asdict()}
    save_model(out, merged, tokenizer, beside={RECORD: dump_json(record)})
    return found


def samples(problems: Sequence[Problem], hints: Hints, end: int, plan: WarmupConfig) -> Iterator[tuple[Passage, bool]]:
    """Yield prompts with their solutions, and whether the prompt is the teacher's: epoch by epoch, in a new order."""
    rng = random.Random(derive_seed(plan.seed, "warmup"))
    while True:
        for problem in rng.sample(problems, len(problems)):
            hinted, ratio = rng.random() < plan.hinted, rng.choice(RATIOS)
            prompt = hints.teacher_ids(problem, ratio) if hinted else hints.student_ids(problem)
            yield Passage(prompt, (*hints.solution_ids(problem), end)), hinted


def _refuse_overlong(problems: Sequence[Problem], hints: Hints, context: int | None) -> None:
    """UserError naming the problems whose longest prompt and solution exceed the context."""
    overlong = [each.id for each in problems if hints.fitting([each], context, len(hints.solution_ids(each)) + 1)[1]]
    if overlong:
        named = ", ".join(overlong[:5]) + (", ..." if len(overlong) > 5 else "")
        raise UserError(
            f"{len(overlong)} problems of the warm-up ({named}) do not fit the model's context of {context} tokens "
            "behind a prompt with the whole solution: take them out of the data"
        )


def _train(
    scorer: Scorer,
    problems: Sequence[Problem],
    hints: Hints,
    end: int,
    plan: WarmupConfig,
    progress: Callable[[int, int, float], object],
) -> list[tuple[float | None, float | None]]:
    """Train, and return every update's mean loss without and with a hint."""
    optim = OptimConfig(lr=plan.lr, schedule="linear", warmup_steps=max(1, plan.steps // 10), max_grad_norm=1.0)
    optimizer = build_optimizer(optim, scorer.model)
    schedule = build_schedule(optim, optimizer, plan.steps)
    drawn = samples(problems, hints, end, plan)
    losses = []
    for step in range(1, plan.steps + 1):
        batch = [next(drawn) for _ in range(plan.batch)]
        found = _accumulate(scorer, [passage for passage, _ in batch])
        norm = torch.nn.utils.clip_grad_norm_(scorer.model.parameters(), optim.max_grad_norm)
        if not norm.isfinite():
            raise NonFiniteError(f"the gradient of warm-up step {step} is not finite: lower --lr")
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        by_role: dict[bool, list[tuple[float, int]]] = {False: [], True: []}
        for (_, hinted), nll in zip(batch, found, strict=True):
            by_role[hinted].append(nll)
        losses.append((_per_token(by_role[False]), _per_token(by_role[True])))
        progress(step, plan.steps, _per_token(found) or 0.0)
    return losses


def _accumulate(scorer: Scorer, passages: Sequence[Passage]) -> list[tuple[float, int]]:
    """Add up the gradient of the batch's mean loss; return each passage's summed loss and its tokens."""
    tokens = sum(len(passage.completion) for passage in passages)
    found: dict[int, tuple[float, int]] = {}
    for members in scorer.batches(passages):
        chosen = [passages[member] for member in members]
        with scorer.recording():
            nll_N = -scorer.log_likelihood(chosen)
            (nll_N.sum() / tokens).backward()  # type: ignore[no-untyped-call]
        parts = nll_N.detach().split_with_sizes([len(passage.completion) for passage in chosen])
        found |= {member: (float(part.sum()), len(part)) for member, part in zip(members, parts, strict=True)}
    return [found[index] for index in range(len(passages))]


def _per_token(parts: Sequence[tuple[float, int]]) -> float | None:
    return sum(nll for nll, _ in parts) / sum(count for _, count in parts) if parts else None


def _mean(values: Iterator[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
