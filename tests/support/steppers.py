"""A `Stepper` around a tiny model, as `train/setup.py` builds it around a real one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator

from atesd.codes.model import with_codes
from atesd.facts import RunFacts
from atesd.gates.gate import Gate
from atesd.gradients.rule import GradientRule
from atesd.losses.target import Target
from atesd.recipe import build_config
from atesd.sections import TeacherConfig
from atesd.selection import Selection
from atesd.train.batch import Row
from atesd.train.gap import GapRule
from atesd.train.latent import CodeTraining
from atesd.train.optim import build_optimizer
from atesd.train.scorer import Scorer, Student
from atesd.train.setup import losses_of
from atesd.train.shard import Shards, Whole
from atesd.train.stats import StepOutcome
from atesd.train.step import Stepper
from atesd.train.teacher import Teacher, Teachers
from atesd.train.world import World

from support.models import PAD


class Stepping(Stepper):
    """A stepper that distils to the target of its recipe unless it is given another."""

    default: Target

    def optimize(self, rows: Sequence[Row], target: Target | None = None) -> StepOutcome:
        return super().optimize(rows, self.default if target is None else target)


def make_stepper(
    model: torch.nn.Module,
    gate: Gate | None = None,
    selection: Selection | None = None,
    /,
    rule: GradientRule | None = None,
    gap_rule: GapRule | None = None,
    world: World | None = None,
    shard: bool = False,
    **sections: Any,
) -> tuple[Stepping, Teacher]:
    """Return a stepper that learns by plain SGD-like AdamW at a constant rate, and its teacher.

    `shard`: on shares of the weights, of which each process of `world` keeps one.
    """
    tree: dict[str, Any] = {
        "optim": {"lr": 1e-2, "max_grad_norm": 0.0},
        "rollout": {"temperature": 1.0},
    }
    config = build_config(tree | sections)
    codes = with_codes(config.codes, model, "tiny")
    wrapped = Student(model, config.loss)
    shards = Shards(wrapped, model, world or World(), torch.device("cpu")) if shard else Whole(world)
    teacher, base = Teacher(config.teacher, model), Teacher(TeacherConfig(), model)
    optimizer = build_optimizer(config.optim, model)
    accelerator = Accelerator(cpu=True, device_placement=False)  # the model stays where it is
    student, prepared = (
        (wrapped, accelerator.prepare_optimizer(optimizer)) if shard else accelerator.prepare(wrapped, optimizer)
    )
    shards.gather()
    scorer = Scorer(
        model,
        pad_id=PAD,
        loss=config.loss,
        temperature=config.rollout.temperature,
        token_budget=config.step.token_budget,
        checkpointing=config.model.gradient_checkpointing,
        student=student,
        shards=shards,
    )
    stepper = Stepping(
        accelerator=accelerator,
        scorer=scorer,
        teachers=Teachers(teacher, base, shards),
        optimizer=prepared,
        scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: 1.0),
        gate=gate or config.gate,
        selection=selection or config.selection,
        rule=rule or config.gradient.build(RunFacts()),
        losses=losses_of(config),
        updates_per_batch=config.step.updates_per_batch,
        max_grad_norm=config.optim.max_grad_norm,
        seed=config.seed,
        gap_rule=gap_rule,
        codes=CodeTraining(config.codes, codes, scorer, config.seed, world) if config.codes and codes else None,
        world=world,
        shards=shards,
    )
    stepper.default = config.target
    return stepper, teacher
