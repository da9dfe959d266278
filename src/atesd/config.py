"""The recipe's tree: `RunConfig` and the sections of the model, the teacher, the optimizer and the cadences.

Sections of the other parts stand beside what they configure. `recipe.py` reads TOML and overrides into it.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from atesd.cliff import CliffConfig
from atesd.curriculum import CurriculumConfig, RandomConfig
from atesd.evaluate.runner import EvalConfig
from atesd.exposure.closed_form import ClosedForm
from atesd.exposure.difficulty import Difficulty
from atesd.exposure.kinds import ExposureConfig
from atesd.exposure.overlap import Overlap
from atesd.exposure.prompt import PromptConfig
from atesd.exposure.reveal import RevealConfig
from atesd.exposure.schedules import Fixed
from atesd.gates import GateConfig, OpenGate, SdarGate
from atesd.losses.divergence import LossConfig
from atesd.losses.policy import PolicyConfig
from atesd.losses.target import Extrapolate, Plain, TargetConfig
from atesd.rewards.kinds import RewardConfig
from atesd.rollout.sampler import SamplingConfig
from atesd.routing import CliffRouterConfig, DistilConfig, RoutingConfig
from atesd.selection import SelectAll, SelectionConfig
from atesd.tasks.kinds import PicoConfig, TaskConfig
from atesd.types import Config

Positive = Annotated[int, Field(ge=1)]

# Exposure that is measured or learned, and so costs something even where nothing is distilled.
_MEASURED = ("beta", "closed_form", "paired", "difficulty", "influence", "overlap")
_ALL_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoraConfig(Config):
    """Low-rank adapters instead of full fine-tuning; the defaults are OPSD's (2601.18734, released code)."""

    r: Annotated[int, Field(ge=1)] = 64
    """Rank."""
    alpha: Annotated[float, Field(gt=0)] = 128
    """Scale: the update is multiplied by alpha / r."""
    targets: tuple[str, ...] = _ALL_PROJECTIONS
    """Names of the linear layers that get an adapter."""


class ModelConfig(Config):
    """Which model learns."""

    path: str = "pico"
    """`pico` (the packaged warm start), `smollm2` (needs the extra of that name), a folder, or a hub id."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the loaded weights. Adapters are kept in float32 whatever this says."""
    lora: LoraConfig | None = None
    """Adapters; leave it out to train all weights."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""

    @model_validator(mode="after")
    def _full_tuning_needs_float32(self) -> ModelConfig:
        if self.dtype == "bfloat16" and self.lora is None:
            raise ValueError(
                "training all weights in bfloat16 rounds small updates away: "
                'set model.dtype = "float32", or train adapters with model.lora = {}'
            )
        return self


class TeacherConfig(Config):
    """Which weights score."""

    weights: Literal["frozen", "live", "ema"] = "frozen"
    """`frozen`: the step-0 weights (OPSD). `live`: the student's own. `ema`: their moving average, from the student."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """EMA only: share of the old average kept at each optimizer step; default .999 (OPSD's code)."""

    @model_validator(mode="after")
    def _decay_belongs_to_ema(self) -> TeacherConfig:
        if self.ema_decay is not None and self.weights != "ema":
            raise ValueError(f'teacher.ema_decay has no effect with weights = "{self.weights}": remove it')
        return self


class OptimConfig(Config):
    """AdamW and its schedule. Defaults: OPSD's released recipe (2601.18734), whose rate is effectively constant."""

    lr: Annotated[float, Field(gt=0)] = 5e-6
    """Peak learning rate."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """Decay rates of Adam's two moments."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Adam's denominator offset."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Shape after the warm-up; `linear` and `cosine` end at 0 with the last update."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Updates over which the rate rises linearly from 0."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 0.1
    """Largest gradient norm, over all trained weights; 0 switches clipping off."""


class ProbeConfig(Config):
    """How the student's progress is measured, on fixed problems that are never trained on."""

    max_tokens: Positive = 512
    """Leading tokens of the reference solution whose log-likelihood is measured."""
    sampling_k: Positive = 1
    """Completions a probe problem for `probe_accuracy` and for contract positions."""
    credit_parameters: Literal["last_layer", "all"] = "last_layer"
    """Weights whose gradients give influence credit: those of the last decoder layer are cheap."""
    credit_problems: Positive = 16
    """Distilled problems of the latest batch, at most, on which influence and paired credit are taken."""
    log_references: bool = False
    """Log in every step the NLL that the student gives to the references of the step's problems, before the update."""
    log_every: Annotated[int, Field(ge=0)] = 0
    """Steps between probe measurements taken for the log where no policy asks for them; 0 takes none."""


class StepConfig(Config):
    """How long a run is and what one step consists of."""

    num_steps: Positive = 100
    """Steps of the run: one generation batch each."""
    problems: Positive = 32
    """Problems in a generation batch."""
    updates_per_batch: Positive = 1
    """Optimizer updates into which a generation batch is split."""
    token_budget: Positive = 16384
    """Padded input positions of the longer role in one micro-batch: what bounds memory."""
    overlong: Literal["error", "drop"] = "error"
    """What to do with a problem whose teacher prompt plus a full completion exceeds the model's context."""
    truncated: Literal["train", "mask"] = "train"
    """Whether completions that hit the length limit are trained on. They always grade as wrong."""


class SaveConfig(Config):
    """What is written while training."""

    every: Positive = 25
    """Steps between checkpoints; one is always written at the end and on an interrupt."""
    keep: Positive = 2
    """How many of the latest checkpoints to keep. `final` and `best` are kept apart from them."""
    rollouts_every: Positive = 10
    """Steps between rollout files."""
    rollouts: Annotated[int, Field(ge=0)] = 4
    """Completions written to a rollout file."""


class RunConfig(Config):
    """One run: everything that a number depends on."""

    seed: Annotated[int, Field(ge=0)] = 0
    """Fixes the order of problems, the sampling, LoRA's initialisation and the controller."""
    model: ModelConfig = ModelConfig()
    """The model that learns."""
    task: TaskConfig = PicoConfig()
    """Problems to train on, to probe and to evaluate on."""
    reward: RewardConfig | None = None
    """How completions are graded; leave it out for the task's own grader."""
    prompt: PromptConfig = PromptConfig()
    """Texts of both roles."""
    reveal: RevealConfig = RevealConfig()
    """How a solution is cut into segments."""
    exposure: ExposureConfig = Fixed()
    """How much of the solution the teacher sees."""
    teacher: TeacherConfig = TeacherConfig()
    """Which weights the teacher has."""
    target: TargetConfig = Plain()
    """The distribution made from the teacher's view."""
    loss: LossConfig = LossConfig()
    """Divergence, clip, temperatures and tiles."""
    selection: SelectionConfig = SelectAll()
    """Which tokens are distilled at all."""
    gate: GateConfig = OpenGate()
    """How strongly they listen."""
    routing: RoutingConfig = DistilConfig()
    """Which loss trains a group."""
    rl: PolicyConfig = PolicyConfig()
    """The reinforcement branch of routers that reinforce."""
    cliff: CliffConfig = CliffConfig()
    """How the bound on extrapolation is measured: for the router `cliff`, `target.guard` and closed-form exposure."""
    curriculum: CurriculumConfig = RandomConfig()
    """The order of problems."""
    rollout: SamplingConfig = SamplingConfig()
    """How the student samples."""
    optim: OptimConfig = OptimConfig()
    """Optimizer and schedule."""
    step: StepConfig = StepConfig()
    """Length of the run and size of a step."""
    probe: ProbeConfig = ProbeConfig()
    """Hint-free measurement of progress."""
    eval: EvalConfig = EvalConfig()
    """Evaluation on held-out problems."""
    save: SaveConfig = SaveConfig()
    """Checkpoints and rollout files."""
    threads: Annotated[int, Field(ge=0)] = 0
    """CPU threads of torch; 0 leaves torch's choice. The pico recipes use 1: two runs share two cores."""
    arms: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Named lists of overrides that `atesd compare` runs side by side."""

    @model_validator(mode="after")
    def _training_samples(self) -> Self:
        if self.rollout.temperature == 0:
            raise ValueError("rollout.temperature = 0 cannot be trained with, as it divides the logits: raise it")
        return self

    @model_validator(mode="after")
    def _batch_divides(self) -> Self:
        if self.step.problems % self.step.updates_per_batch:
            raise ValueError(
                f"step.problems = {self.step.problems} cannot be split into step.updates_per_batch = "
                f"{self.step.updates_per_batch} equal parts: choose a divisor"
            )
        return self

    @property
    def cliff_c(self) -> float:
        """The importance clip behind lambda*: the section's own, that of the sampled-token loss in use, or 5."""
        sampled = getattr(self.loss.divergence, "importance_clip", None)
        return self.cliff.c or sampled or 5.0

    @property
    def needs_base(self) -> bool:
        """Whether the step-0 weights are read without a hint."""
        measured = isinstance(self.routing, CliffRouterConfig) or isinstance(self.exposure, ClosedForm)
        return measured or "base" in self.target.views or (self.routing.reinforces and self.rl.kl_coef > 0)

    @model_validator(mode="after")
    def _reinforcement_samples_untruncated(self) -> Self:
        """Truncated sampling biases the policy gradient: routers that reinforce switch it off, unless it is set.

        What is filled in here does not count as set, so that an override of the router alone takes it back.
        """
        untruncated = {"top_p": 1.0, "top_k": 0}
        missing = {name: value for name, value in untruncated.items() if name not in self.rollout.model_fields_set}
        if self.routing.reinforces and missing:
            rollout = self.rollout.model_copy(update=missing)
            rollout.model_fields_set.difference_update(missing)
            object.__setattr__(self, "rollout", rollout)
        return self

    @model_validator(mode="after")
    def _routing_fits(self) -> Self:
        kind = self.routing.kind
        if self.routing.reinforces and self.rollout.group_size < 2:
            raise ValueError(
                f'routing.kind = "{kind}" compares completions of a group, but rollout.group_size is '
                f"{self.rollout.group_size}: set it to at least 2 (8 is usual)"
            )
        if self.routing.reinforces and self.loss.temperature_student not in (None, self.rollout.temperature):
            raise ValueError(
                f'routing.kind = "{kind}" needs the probabilities that were sampled from: remove '
                f"loss.temperature_student = {self.loss.temperature_student} or set it to rollout.temperature"
            )
        if self.routing.shared and self.rl.aggregate != self.loss.aggregate:
            raise ValueError(
                f'routing.kind = "{kind}" divides both losses by one count, but rl.aggregate = "{self.rl.aggregate}" '
                f'and loss.aggregate = "{self.loss.aggregate}" count differently: set them alike'
            )
        uniform = isinstance(self.routing, CliffRouterConfig) and self.routing.uniform == "distil"
        if self.loss.prompt_weight == "paced" and (kind == "hdpo" or uniform):
            raise ValueError(
                f'loss.prompt_weight = "paced" gives weight 0 to problems of equal rewards, and router "{kind}" '
                "distils what has no other use: remove either"
            )
        if self.loss.prompt_weight == "paced" and self.rollout.group_size < 2:
            raise ValueError(
                f'loss.prompt_weight = "paced" needs pass rates, but rollout.group_size is {self.rollout.group_size}, '
                "so every weight would be 0: set it to at least 2"
            )
        return self

    @model_validator(mode="after")
    def _target_fits(self) -> Self:
        target, gate = self.target, self.gate
        extrapolates = isinstance(target, Extrapolate) and target.lambda_x > 1
        asks = [
            name
            for name, asked in (
                ('routing.kind = "cliff"', isinstance(self.routing, CliffRouterConfig)),
                ("target.guard = true", isinstance(target, Extrapolate) and target.guard),
                ('exposure.kind = "closed_form"', isinstance(self.exposure, ClosedForm)),
            )
            if asked
        ]
        if asks and not extrapolates:
            raise ValueError(
                f"{asks[0]} weighs how far the target is extrapolated, but here it is not: "
                'set target = {kind = "extrapolate", lambda_x = 1.25}'
            )
        if isinstance(target, Extrapolate) and target.guard and isinstance(self.routing, CliffRouterConfig):
            raise ValueError('routing.kind = "cliff" caps lambda itself where it must: remove target.guard')
        if isinstance(gate, SdarGate) and gate.target == "surrogate" and target.kind != "plain":
            raise ValueError(
                f'the SDAR surrogate has the same gradient whatever the target, so target.kind = "{target.kind}" would '
                'have no effect: set gate.target = "divergence" or target.kind = "plain"'
            )
        if not self.routing.distils:
            idle = [
                name
                for name, set_ in (
                    ("gate", self.gate.kind != "none"),
                    ("selection", self.selection.kind != "all"),
                    ("target", target.kind != "plain"),
                    ("loss.prompt_weight", self.loss.prompt_weight != "none"),
                    ("exposure", self.exposure.kind in _MEASURED),
                )
                if set_
            ]
            if idle:
                raise ValueError(
                    f'routing.kind = "{self.routing.kind}" distils nothing: remove {idle[0]}, which has no effect'
                )
        return self

    @model_validator(mode="after")
    def _loss_is_listened_to(self) -> Self:
        if isinstance(self.gate, SdarGate) and self.gate.target == "surrogate":
            ignored = [name for name in ("clip", "top_k") if getattr(self.loss, name) not in ("none", None)]
            ignored += ["divergence"] * (self.loss.divergence.kind == "sampled")
            if ignored:
                raise ValueError(
                    f"the SDAR surrogate looks at the sampled token alone, so loss.{ignored[0]} would have no effect: "
                    'remove it, or set gate.target = "divergence"'
                )
        return self

    @model_validator(mode="after")
    def _overlap_fits(self) -> Self:
        if self.prompt.hint == "none" and self.exposure.kind in _MEASURED:
            raise ValueError(
                f'prompt.hint = "none" shows nothing at any ratio, so exposure.kind = "{self.exposure.kind}" steers '
                'nothing: set exposure = {kind = "fixed"}'
            )
        if not isinstance(self.exposure, Overlap):
            return self
        if self.prompt.hint == "wrong_problem":
            raise ValueError(
                'exposure.kind = "overlap" compares with the own solution, but prompt.hint = "wrong_problem" shows '
                "another: set another exposure"
            )
        if self.reveal.order != "prefix":
            raise ValueError(
                f'exposure.kind = "overlap" counts revealed segments from the start: set reveal.order = "prefix" '
                f'instead of "{self.reveal.order}"'
            )
        guarded = isinstance(self.target, Extrapolate) and self.target.guard
        if guarded or isinstance(self.routing, CliffRouterConfig):
            raise ValueError(
                'exposure.kind = "overlap" is known only after the rollout, but lambda* needs the exposure before: '
                "set another exposure, or remove target.guard and the cliff router"
            )
        return self

    @model_validator(mode="after")
    def _difficulty_needs_rates(self) -> Self:
        exposure = self.exposure
        if isinstance(exposure, Difficulty) and exposure.by == "pass_rate" and self.rollout.group_size < 2:
            raise ValueError(
                'exposure.by = "pass_rate" with rollout.group_size = 1 knows two difficulties, right and wrong: raise '
                'the group size, or set exposure.by = "reference_ppl"'
            )
        if isinstance(exposure, Difficulty) and exposure.by == "pass_rate" and self.routing.kind == "hdpo":
            raise ValueError(
                'exposure.by = "pass_rate" with routing.kind = "hdpo", which distils failed groups alone, leaves one '
                'bin: set exposure.by = "reference_ppl"'
            )
        return self
