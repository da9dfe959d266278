"""Put a flow run's parts together from its config, and refuse what does not fit before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch

from atesd.config import RunConfig
from atesd.curriculum import Curriculum
from atesd.exposure.controller import Controller
from atesd.flow.judge import JUDGES, Judge
from atesd.flow.measure import FlowCredit, FlowMeasurer
from atesd.flow.net import VelocityNet
from atesd.flow.probe import FlowProbe
from atesd.flow.rollout import Views
from atesd.flow.step import FlowStepper
from atesd.flow.warm import warm_start
from atesd.sections import TeacherConfig
from atesd.tasks.flows import FlowTask, FlowTaskMethod
from atesd.train.model import set_threads
from atesd.train.optim import build_optimizer, build_schedule
from atesd.train.setup import Parts
from atesd.train.shard import Whole
from atesd.train.teacher import Teacher
from atesd.types import Policy, UserError


@dataclass(slots=True)
class FlowParts:
    """Everything that the loop moves."""

    task: FlowTask
    model: VelocityNet
    views: Views
    judge: Judge
    teacher: Teacher
    stepper: FlowStepper
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LambdaLR
    controller: Controller
    curriculum: Curriculum
    probe: FlowProbe
    credit: FlowCredit
    measurer: FlowMeasurer
    tokenizer: None = None
    shards: Whole = field(default_factory=Whole)

    @property
    def policies(self) -> dict[str, Policy]:
        """What has the four verbs, by the name under which checkpoints keep its state."""
        return {"controller": self.controller, "curriculum": self.curriculum}

    @property
    def memories(self) -> dict[str, Any]:
        """Nothing else has a state: probes and credit read the weights alone."""
        return {}

    def sync(self, version: int) -> None:
        """Nobody samples from a copy of the weights."""

    def refuse_unheard(self) -> None:
        """Nobody but the loop holds a policy."""

    def set_schedule(self, updates: int) -> None:
        """Put the learning-rate schedule where it stood after so many updates."""
        Parts.set_schedule(cast("Parts", self), updates)

    def levels(self, at: Sequence[int]) -> list[str]:
        """Return the label of each of some training points, in words."""
        return [self.task.labels[label] for label in self.task.train.label_N[list(at)].tolist()]


def assemble(config: RunConfig) -> FlowParts:
    """Build the parts of a run: data, judge, warm start, policies. UserError names what does not fit."""
    set_threads(config.threads)
    section = config.task
    assert isinstance(section, FlowTaskMethod)
    facts = config.facts()
    task = section.points(facts)
    if task.name not in JUDGES:
        raise UserError(f"nobody can judge the samples of task {task.name!r}: known are {', '.join(JUDGES)}")
    samples = config.eval.k * min(config.eval.problems or len(task.evaluation), len(task.evaluation))
    if samples < 2:
        raise UserError("eval.k and eval.problems make one sample, of which no distance can be told: raise eval.k")
    judge = JUDGES[task.name](task)
    net = warm_start(task, config.flow, config.seed)
    views = Views(net, task.layout)
    teacher = Teacher(config.teacher, net)
    base = teacher if teacher.frozen else Teacher(TeacherConfig(), net) if config.needs_base else None
    optimizer = build_optimizer(config.optim, net)
    scheduler = build_schedule(config.optim, optimizer, config.step.num_steps)
    stepper = FlowStepper(
        views,
        teacher,
        judge,
        optimizer=optimizer,
        scheduler=scheduler,
        eta=config.flow.eta,
        max_grad_norm=config.optim.max_grad_norm,
    )
    probe = FlowProbe(task, views, teacher, judge, stepper, config.flow, config.seed, base)
    credit = FlowCredit(probe, stepper, views, optimizer, config.optim, config.probe.credit_problems)
    words = [task.labels[label] for label in task.train.label_N.tolist()]
    facts = replace(
        facts,
        problem_ids=task.train.ids,
        levels=dict(zip(task.train.ids, words, strict=True)),
        has_probe=bool(probe.problems),
    )
    parts = FlowParts(
        task=task,
        model=net,
        views=views,
        judge=judge,
        teacher=teacher,
        stepper=stepper,
        optimizer=optimizer,
        scheduler=scheduler,
        controller=config.exposure.build(facts),
        curriculum=config.curriculum.build(facts),
        probe=probe,
        credit=credit,
        measurer=FlowMeasurer(probe, credit),
    )
    parts.measurer.refuse_unserved(f'exposure.kind = "{config.exposure.kind}"', parts.controller)
    parts.measurer.refuse_unserved(f'curriculum.kind = "{config.curriculum.kind}"', parts.curriculum)
    return parts
