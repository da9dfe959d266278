"""Put a run's parts together from its config, and refuse what does not fit before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedTokenizerBase

from atesd.codes.model import with_codes
from atesd.config import RunConfig
from atesd.curriculum import Curriculum
from atesd.exposure.controller import Controller
from atesd.exposure.prompt import evaluation_messages, student_messages
from atesd.exposure.revealer import Masker, Revealer
from atesd.gradients.rule import GradientRule
from atesd.rewards.weighted import build_reward
from atesd.rollout.driver import Driver
from atesd.rollout.render import Renderer
from atesd.rollout.sampler import Weights
from atesd.routing.route import Router
from atesd.sections import TeacherConfig
from atesd.seeds import derive_seed
from atesd.strength import Strength
from atesd.tasks.base import Task
from atesd.train.admit import fitting, refuse_hostile, refuse_lengths, sets_of, shown_instead, warn_of_problems
from atesd.train.agree import PROMPTS, refuse_disagreement
from atesd.train.asked import whole
from atesd.train.batch import Row
from atesd.train.compiled import compile_layers
from atesd.train.contract import Contract
from atesd.train.credit import Credit
from atesd.train.directions import Directions
from atesd.train.gap import GapRule
from atesd.train.hints import Hints
from atesd.train.latent import CodeTraining
from atesd.train.measure import Measurer
from atesd.train.micro import Losses
from atesd.train.model import context_length, load, set_threads
from atesd.train.optim import build_optimizer, build_schedule
from atesd.train.outcomes import Outcomes
from atesd.train.probe import Probe
from atesd.train.retention import Learning
from atesd.train.rows import Rows
from atesd.train.scorer import Scorer, Student
from atesd.train.shard import Shards, Whole
from atesd.train.share import refuse_uncredited, refuse_unshared, shared
from atesd.train.step import Stepper
from atesd.train.teacher import Teacher, Teachers, trained_tensors
from atesd.train.veils import Veils, veils_for
from atesd.train.world import World
from atesd.types import Policy, Problem, UserError

_UNREAD = TeacherConfig(weights="live")
"""The teacher of runs that distil nothing: the others hold copies of weights."""


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
    rows: Rows
    teacher: Teacher
    stepper: Stepper
    optimizer: Any
    scheduler: torch.optim.lr_scheduler.LambdaLR
    controller: Controller
    revealer: Revealer
    router: Router
    strength: Strength
    curriculum: Curriculum
    rule: GradientRule
    probe: Probe
    credit: Credit
    measurer: Measurer
    shards: Whole
    veils: Veils | None = None
    _asked: dict[str, Policy] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._asked = {"revealer": self.revealer, "rule": self.rule}
        if self.shards.is_sharded:
            refuse_uncredited(self.policies, self.shards.world)

    @property
    def policies(self) -> dict[str, Policy]:
        """What has the four verbs, by the name under which checkpoints keep its state."""
        names = ("controller", "revealer", "router", "strength", "curriculum", "rule")
        return {name: getattr(self, name) for name in names}

    @property
    def memories(self) -> dict[str, Any]:
        """What else a checkpoint keeps the state of, by name."""
        return {"probe": self.probe, "outcomes": self.credit.outcomes}

    def sync(self, version: int) -> None:
        """Let the sampler follow the student."""
        self.driver.sampler.sync(self.weights(version))

    def refuse_unheard(self) -> None:
        """UserError for a part put in by hand that nobody would ask, or that lacks what it will be asked."""
        for name, asked in self._asked.items():
            if getattr(self, name) is not asked:
                raise UserError(
                    f"trainer.parts.{name} was replaced, but other parts hold the recipe's: name the class in the "
                    'recipe, kind = "package.module:Class" (docs/extend.md)'
                )
        for name, policy in self.policies.items():
            whole(name, policy)

    def reached(self, row: Row) -> list[float]:
        """Return which share of each token of its hint a row's teacher reads; [] where it reads all of them."""
        passage = row.view("teacher") if "teacher" in row.veils else None
        if passage is None or self.veils is None:
            return []
        self.model.eval()
        with self.teacher.in_place():
            return self.veils.reached(passage)

    def weights(self, version: int) -> Weights:
        """Return the student's weights as engines take them."""
        is_adapter = hasattr(self.model, "peft_config")
        return Weights(version, is_adapter, lambda: trained_tensors(self.model))

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
    set_threads(config.threads)
    world = World.join()
    refuse_unshared(config, world)
    accelerator = Accelerator()
    model, tokenizer = load(config.model, derive_seed(config.seed, "lora"), config.prompt.chat_template)
    is_sharded = config.model.shard and world.size > 1
    if config.model.quantization is None and not is_sharded:  # else it is loaded, or cut, where it trains
        model.to(accelerator.device)
    codes = with_codes(config.codes, model, config.model.path)
    driver, renderer, task = sampling_side(config, model, tokenizer, world)
    config.rollout.engine.refuse_training(driver.sampler, config.rollout)
    context, room = context_length(model), config.rollout.engine.room(driver.sampler)
    driver = shared(driver, world)
    sets = sets_of(config, task)
    refuse_hostile(config, renderer, task, sets)
    facts = config.facts()
    revealer = whole("revealer", config.reveal.build(facts))
    hints = Hints(config.prompt, revealer, renderer, shown_instead(config, sets["train"], sets["probe"]))
    problems, sets, dropped = fitting(config, hints, renderer, sets, context)
    refuse_lengths(config, room, context, renderer, [*problems, *sets["probe"]], sets["evaluation"])
    facts = replace(
        facts,
        problem_ids=[problem.id for problem in problems],
        levels={problem.id: problem.level for problem in problems},
        has_probe=bool(sets["probe"]),
    )
    warn_of_problems(config, problems, renderer, task)
    if driver.room is not None:
        driver = replace(driver, reserved=hints.surplus([*problems, *sets["probe"]]))

    wrapped = Student(model, config.loss)
    shards = _cut(config, wrapped, model, world, accelerator.device) if is_sharded else Whole(world)
    teachers = _teachers(config, model, shards)
    updates = config.step.num_steps * config.step.updates_per_batch
    student, optimizer = _prepared(accelerator, wrapped, build_optimizer(config.optim, model), shards)
    shards.gather()
    scheduler = build_schedule(config.optim, optimizer, updates)
    veils = veils_for(model, cast("Masker", revealer)) if config.reveal.masks else None
    scorer = make_scorer(config, model, renderer, student, veils, shards)
    _check_and_compile(config, scorer, [hints.student_ids(problem) for problem in problems[:PROMPTS]])
    rows = Rows(
        hints,
        outcomes=Outcomes(config.probe.credit_steps),
        policy=config.rl,
        prompt_weight=config.loss.prompt_weight,
        mask_truncated=config.step.truncated == "mask",
    )
    rule = whole("rule", config.gradient.build(facts))
    rule.prepare(model)
    stepper = Stepper(
        accelerator=accelerator,
        world=world,
        shards=shards,
        scorer=scorer,
        teachers=teachers,
        optimizer=optimizer,
        scheduler=scheduler,
        gate=config.gate,
        selection=config.selection,
        rule=rule,
        losses=losses_of(config),
        updates_per_batch=config.step.updates_per_batch,
        max_grad_norm=config.optim.max_grad_norm,
        seed=config.seed,
        gap_rule=GapRule(config.rollout.gap_warning, config.rollout.gap_limit),
        codes=CodeTraining(config.codes, codes, scorer, config.seed, world) if config.codes and codes else None,
    )
    probe, credit, measurer = _measuring(
        config, sets["probe"], problems, scorer=scorer, teachers=teachers, rows=rows, driver=driver, optimizer=optimizer
    )
    return Parts(
        model=model,
        tokenizer=tokenizer,
        renderer=renderer,
        task=task,
        problems=problems,
        eval_problems=sets["evaluation"],
        dropped=dropped,
        driver=driver,
        hints=hints,
        rows=rows,
        teacher=teachers.own,
        stepper=stepper,
        optimizer=optimizer,
        scheduler=scheduler,
        controller=whole("controller", config.exposure.build(facts)),
        revealer=revealer,
        router=whole("router", config.routing.build(facts)),
        strength=config.strength(facts),
        curriculum=whole("curriculum", config.curriculum.build(facts)),
        rule=rule,
        probe=probe,
        credit=credit,
        measurer=measurer,
        shards=shards,
        veils=veils,
    )


def _teachers(config: RunConfig, model: nn.Module, shards: Whole) -> Teachers:
    """Return the teacher, and the step-0 weights where something reads them; a frozen teacher is both."""
    own = Teacher(config.teacher if config.routing.distils else _UNREAD, model)
    base = own if own.frozen else Teacher(TeacherConfig(), model) if config.needs_base else None
    return Teachers(own, base, shards)


def _measuring(
    config: RunConfig,
    held_out: Sequence[Problem],
    problems: Sequence[Problem],
    *,
    scorer: Scorer,
    teachers: Teachers,
    rows: Rows,
    driver: Driver,
    optimizer: Any,
) -> tuple[Probe, Credit, Measurer]:
    """Build what takes measurements: on the problems that are held out for it, and on those trained on."""
    probe = Probe(
        held_out,
        scorer=scorer,
        teacher=teachers.own,
        base=teachers.base,
        hints=rows.hints,
        driver=driver,
        sampling=config.rollout,
        completions=config.probe.sampling_k,
        max_tokens=config.probe.max_tokens,
        context=context_length(scorer.model),
        seed=config.seed,
    )
    contract = Contract(config.cliff, probe=probe, scorer=scorer, teachers=teachers, renderer=driver.renderer)
    credit = Credit(
        scorer=scorer,
        directions=Directions(scorer=scorer, teachers=teachers, rows=rows, gate=config.gate),
        outcomes=rows.outcomes,
        optimizer=optimizer,
        optim=config.optim,
        references=probe.references,
        parameters=config.probe.credit_parameters,
        problems=config.probe.credit_problems,
    )
    gates, veils = None, scorer.veils
    if veils is not None and veils.gates is not None:
        masker = cast("Masker", rows.hints.revealer)
        gates = Learning(masker, scorer=scorer, veils=veils, teachers=teachers, rows=rows, credit=credit)
    measurer = Measurer(probe, contract, credit, problems, gates, teachers, teaches=config.routing.distils)
    return probe, credit, measurer


def _check_and_compile(config: RunConfig, scorer: Scorer, prompts: Sequence[Sequence[int]]) -> None:
    """Hold the model to its own logits as it is written, and have it compiled where the recipe says so."""
    refuse_disagreement(scorer, prompts)
    if config.model.compile:
        compile_layers(scorer.model)


def _cut(config: RunConfig, root: nn.Module, model: nn.Module, world: World, device: torch.device) -> Shards:
    """Cut the weights into shares: of weights that all train in bfloat16 they are in float32."""
    computes_in = next(model.parameters()).dtype
    if config.model.lora is not None or computes_in == torch.float32:
        return Shards(root, model, world, device)
    return Shards(root, model.float(), world, device, computes_in)


def _prepared(
    accelerator: Accelerator, student: Student, optimizer: torch.optim.Optimizer, shards: Whole
) -> tuple[nn.Module, Any]:
    """Hand student and optimizer to accelerate, but not to DDP, which would take means where sums are wanted."""
    if shards.is_sharded:
        return student, accelerator.prepare_optimizer(optimizer)
    if accelerator.num_processes == 1:
        return cast("tuple[nn.Module, Any]", accelerator.prepare(student, optimizer))
    return accelerator.prepare_model(student, evaluation_mode=True), accelerator.prepare_optimizer(optimizer)


def make_scorer(
    config: RunConfig,
    model: nn.Module,
    renderer: Renderer,
    student: nn.Module | None = None,
    veils: Veils | None = None,
    shards: Whole | None = None,
) -> Scorer:
    """Return the recipe's scorer of a model."""
    return Scorer(
        model,
        pad_id=renderer.pad_id,
        loss=config.loss,
        temperature=config.rollout.temperature,
        token_budget=config.step.token_budget,
        checkpointing=config.model.gradient_checkpointing,
        student=student,
        veils=veils,
        world=None if shards is None else shards.world,
        shards=shards,
    )


def losses_of(config: RunConfig) -> Losses:
    """Return what the update must know of the recipe's losses."""
    return Losses(
        policy=config.rl,
        coefs=config.routing.coefs,
        shared=config.routing.shared,
        longest=config.rollout.max_new_tokens,
        aggregate=config.loss.aggregate,
        importance=config.reads_old,
        corrects=None if config.rollout.engine.samples_in_place else config.loss.importance_clip,
    )


def sampling_side(
    config: RunConfig, model: nn.Module, tokenizer: PreTrainedTokenizerBase, world: World | None = None
) -> tuple[Driver, Renderer, Task]:
    """Build what sampling and grading need: all that evaluation needs, too."""
    facts = config.facts()
    renderer = make_renderer(config, tokenizer, model)
    task = whole("task", config.task.build(facts))
    engine: Any = config.rollout.engine
    team = {"team": world} if engine.meets and world is not None else {}
    driver = Driver(
        sampler=whole("sampler", engine.build(model, renderer, **team)),
        renderer=renderer,
        environment=whole("environment", config.env.build(facts)),
        student_messages=lambda problem: student_messages(problem, config.prompt),
        reward=build_reward(config.reward, task.default_reward, facts),
        vocabulary=getattr(cast("Any", model).get_input_embeddings(), "num_embeddings", None),
        guesses=engine.guesses,
    )
    if driver.environment.limit > 1:
        rooms = filter(None, (context_length(model), engine.room(driver.sampler)))
        driver = replace(driver, room=min(rooms, default=None))
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
    """Return the driver with the prompts of evaluation, where no teacher reads what the student read."""
    return replace(driver, student_messages=lambda problem: evaluation_messages(problem, config.prompt), reserved=0)
