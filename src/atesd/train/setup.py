"""Put a run's parts together from its config, and refuse combinations that do not fit before anything is trained."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedTokenizerBase

from atesd.config import RunConfig, TeacherConfig
from atesd.curriculum import Curriculum
from atesd.envs.single_turn import SingleTurn
from atesd.exposure.controller import Controller, RunFacts
from atesd.exposure.prompt import donors, evaluation_messages, student_messages
from atesd.exposure.reveal import segmentation_warning
from atesd.losses.target import Extrapolate
from atesd.rollout.driver import Driver
from atesd.rollout.hf import HFSampler
from atesd.rollout.render import Renderer
from atesd.routing import Guarded, Router
from atesd.seeds import derive_seed
from atesd.tasks.base import Task
from atesd.train.credit import Credit
from atesd.train.forward import Student
from atesd.train.hints import Hints, refuse_overlong
from atesd.train.model import context_length, load
from atesd.train.optim import build_optimizer, learning_rate_factor
from atesd.train.probe import Probe
from atesd.train.step import Stepper
from atesd.train.teacher import Teacher
from atesd.types import Problem, UserError


@dataclass(slots=True)
class Parts:
    """Everything that the loop moves."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    renderer: Renderer
    task: Task
    problems: Sequence[Problem]
    eval_problems: Sequence[Problem]
    dropped: Sequence[str]
    driver: Driver
    hints: Hints
    teacher: Teacher
    stepper: Stepper
    optimizer: Any
    scheduler: torch.optim.lr_scheduler.LambdaLR
    controller: Controller
    router: Router
    credit: Credit
    curriculum: Curriculum
    probe: Probe

    def set_schedule(self, updates: int) -> None:
        """Put the learning-rate schedule where it stood after so many updates."""
        state = self.scheduler.state_dict()
        self.scheduler.load_state_dict({**state, "last_epoch": updates, "_step_count": updates + 1})
        for group, base, factor in zip(
            self.optimizer.param_groups, self.scheduler.base_lrs, self.scheduler.lr_lambdas, strict=True
        ):
            group["lr"] = base * factor(updates)
        self.scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]


def assemble(config: RunConfig) -> Parts:
    """Build the parts of a run. UserError names what does not fit and the remedy."""
    if config.threads:
        torch.set_num_threads(config.threads)
    accelerator = Accelerator()
    if accelerator.num_processes > 1:
        raise UserError(f"{accelerator.num_processes} processes were launched, one is supported: start atesd directly")
    model, tokenizer = load(config.model, derive_seed(config.seed, "lora"))
    model.to(accelerator.device)
    driver, renderer, task = sampling_side(config, model, tokenizer)
    train = task.train()
    hints = Hints(config, renderer, donors(train, config.seed) if config.prompt.hint == "wrong_problem" else {})
    problems, dropped = _fitting(config, hints, train, model)
    _warn_about_segments(config, problems)
    teacher = Teacher(config.teacher, model)
    base = teacher if teacher.frozen else Teacher(TeacherConfig(), model) if config.needs_base else None
    gate = config.gate
    optimizer = build_optimizer(config.optim, model)
    updates = config.step.num_steps * config.step.updates_per_batch
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda update: learning_rate_factor(config.optim, update, updates)
    )
    student = Student(model, config.loss)
    student, optimizer = accelerator.prepare(student, optimizer)
    stepper = Stepper(
        accelerator=accelerator,
        student=student,
        teacher=teacher,
        base=base,
        optimizer=optimizer,
        scheduler=scheduler,
        gate=gate,
        selection=config.selection,
        config=config,
        pad_id=renderer.pad_id,
    )
    probe = Probe(
        task.probe(),
        model=model,
        teacher=teacher,
        hints=hints,
        renderer=renderer,
        driver=driver,
        config=config,
        training=problems,
        base=base,
    )
    credit = Credit(
        model=model,
        stepper=stepper,
        optimizer=optimizer,
        gate=gate,
        hints=hints,
        references=probe.reference_rows,
        config=config,
    )
    probe.credit = credit
    facts = RunFacts(
        total_steps=config.step.num_steps,
        seed=derive_seed(config.seed, "exposure"),
        teacher_frozen=teacher.frozen,
        strength=config.target.strength,
        cliff=config.cliff,
        c=config.cliff_c,
    )
    return Parts(
        model=model,
        tokenizer=tokenizer,
        renderer=renderer,
        task=task,
        problems=problems,
        eval_problems=task.evaluation()[: config.eval.problems],
        dropped=dropped,
        driver=driver,
        hints=hints,
        teacher=teacher,
        stepper=stepper,
        optimizer=optimizer,
        scheduler=scheduler,
        controller=config.exposure.build(facts),
        router=_router(config),
        credit=credit,
        curriculum=config.curriculum.build([problem.id for problem in problems], config.step.problems, config.seed),
        probe=probe,
    )


def _router(config: RunConfig) -> Router:
    """Return the router, with lambda capped where the target asks for it."""
    router = config.routing.build(config.cliff, config.cliff_c)
    guarded = isinstance(config.target, Extrapolate) and config.target.guard
    return Guarded(router, config.cliff, config.cliff_c) if guarded else router


def sampling_side(
    config: RunConfig, model: nn.Module, tokenizer: PreTrainedTokenizerBase
) -> tuple[Driver, Renderer, Task]:
    """Build what sampling and grading need: all that evaluation needs, too."""
    renderer = make_renderer(config, tokenizer, model)
    sampler = HFSampler(model, eos_ids=renderer.eos_ids, pad_id=renderer.pad_id, decode=renderer.decode)
    task = config.task.build(config.seed)
    driver = Driver(
        sampler=sampler,
        renderer=renderer,
        environment=SingleTurn(),
        student_messages=lambda problem: student_messages(problem, config.prompt),
        reward=(config.reward or task.default_reward).build(),
    )
    return driver, renderer, task


def make_renderer(config: RunConfig, tokenizer: PreTrainedTokenizerBase, model: nn.Module | None = None) -> Renderer:
    """Return the recipe's renderer; a model's generation config may name further end tokens."""
    listed = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return Renderer(
        tokenizer,
        enable_thinking_student=config.prompt.enable_thinking_student,
        enable_thinking_teacher=config.prompt.enable_thinking_teacher,
        teacher_prefill=config.prompt.teacher_prefill,
        extra_eos_ids=listed if isinstance(listed, list) else [listed] if isinstance(listed, int) else [],
    )


def for_evaluation(driver: Driver, config: RunConfig) -> Driver:
    """Return the driver with the prompts of evaluation."""
    return replace(driver, student_messages=lambda problem: evaluation_messages(problem, config.prompt))


def _fitting(
    config: RunConfig, hints: Hints, problems: Sequence[Problem], model: nn.Module
) -> tuple[list[Problem], list[str]]:
    """Keep the problems whose prompts fit, before step 0."""
    context = context_length(model)
    fitting, overlong = hints.fitting(problems, context)
    if config.step.overlong == "error" or not fitting:
        refuse_overlong(overlong, context)
    if not fitting:
        raise UserError("the task has no training problem: give it some, or lower its probe and evaluation sizes")
    if overlong:
        warnings.warn(f"dropped {len(overlong)} overlong problems: {', '.join(overlong[:20])}", stacklevel=2)
    return fitting, overlong


def _warn_about_segments(config: RunConfig, problems: Sequence[Problem]) -> None:
    warning = segmentation_warning([problem.solution for problem in problems], config.reveal.unit)
    if warning:
        warnings.warn(warning, stacklevel=2)
    unanswered = sum(problem.answer is None for problem in problems)
    if unanswered:
        warnings.warn(
            f"{unanswered} of {len(problems)} training problems have no recognisable answer: their hints below ratio 1 "
            "show the revealed part alone; add an `answer` column to show it",
            stacklevel=2,
        )
