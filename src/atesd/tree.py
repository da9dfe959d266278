"""The recipe's tree, `RecipeTree`: every section and its default, and what follows from all of them.

Sections stand beside what they configure, or in `sections.py`; choices by `kind` in `kinds.py`. Which of them do not go
together is said in `config.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Self, cast

from pydantic import Discriminator, Field, Tag, model_validator

from atesd.cliff import CliffConfig
from atesd.codes.config import CodesConfig
from atesd.curriculum import RandomConfig
from atesd.envs.single_turn import SingleTurn
from atesd.evaluate.runner import EvalConfig
from atesd.exposure.prompt import PromptConfig
from atesd.exposure.schedules import Fixed
from atesd.exposure.segments import Segments
from atesd.facts import RunFacts
from atesd.gates.gate import OpenGate
from atesd.gradients.rule import AllGradients
from atesd.kinds import (
    CurriculumSection,
    EngineSection,
    EnvSection,
    ExposureSection,
    GateSection,
    GradientSection,
    RevealSection,
    RewardSection,
    RoutingSection,
    SelectionSection,
    TargetSection,
    TaskSection,
)
from atesd.losses.divergence import LossConfig
from atesd.losses.policy import PolicyConfig
from atesd.losses.target import Plain
from atesd.rollout.hf import HFEngine
from atesd.rollout.sampler import SamplingConfig
from atesd.routing.fixed import Distil
from atesd.sections import (
    FlowConfig,
    ModelConfig,
    OptimConfig,
    ProbeConfig,
    SaveConfig,
    StepConfig,
    TeacherConfig,
    TrackConfig,
)
from atesd.selection import SelectAll
from atesd.strength import Aligned, Constant, Guard, Strength
from atesd.tasks.kinds import PicoConfig
from atesd.types import Config

_MEANT = {  # what exposure is, where the reference is no solution in words
    "the whole solution (OPSD)": "the whole condition",
    "the final answer only": "nothing but what it is always told",
    "of the solution": "of the condition",
}


ONE, SEVERAL = "(one)", "(several)"  # in places of pydantic's errors; recipe.py leaves them out
Rewards = Annotated[
    Annotated[RewardSection, Tag(ONE)] | Annotated[tuple[RewardSection, ...], Tag(SEVERAL)],
    Discriminator(lambda given: SEVERAL if isinstance(given, list | tuple) else ONE),
]


class RolloutConfig(SamplingConfig):
    """How the student samples while it trains, and with which engine. Defaults: OPSD's released recipe."""

    engine: EngineSection = HFEngine()
    """What samples completions, in training and evaluation."""
    ahead: Annotated[int, Field(ge=0, le=1)] = 0
    """1: sample the next step's completions while this one updates (one-step off-policy), with an engine that is beside
    the trainer, such as `vllm`: they come from weights one update older, and losses of sampled tokens weigh that."""
    gap_warning: Annotated[float, Field(gt=0)] = 0.1
    """Warn once where sampler and trainer differ by more nats in the log-probabilities of sampled tokens, on average
    over a step; bfloat16 made .05 on SmolLM2-135M. Not looked at where loss.temperature_student is another."""
    gap_limit: Annotated[float, Field(gt=0)] = 0.3
    """Stop the run, before weights move, where they differ by more than this."""


class RecipeTree(Config):
    """Everything that a number of a run depends on."""

    seed: Annotated[int, Field(ge=0)] = 0
    """Fixes the order of problems, the sampling, LoRA's initialisation and the controller."""
    model: ModelConfig = ModelConfig()
    """The model that learns."""
    task: TaskSection = PicoConfig()
    """Problems to train on, to probe and to evaluate on."""
    reward: Rewards | None = None
    """How completions are graded; leave it out for the task's own grader. A list, `[[reward]]`, is a weighted sum; its
    first entry says in evaluation what is correct."""
    prompt: PromptConfig = PromptConfig()
    """Texts of both roles."""
    reveal: RevealSection = Segments()
    """How a ratio becomes what is visible of a solution."""
    exposure: ExposureSection = Fixed()
    """How much of the solution the teacher sees."""
    teacher: TeacherConfig = TeacherConfig()
    """Which weights the teacher has."""
    target: TargetSection = Plain()
    """The distribution made from the teacher's view. lambda and the scale of a residual are at most 100."""
    loss: LossConfig = LossConfig()
    """Divergence, clip, temperatures (from .001 to 1000) and tiles."""
    selection: SelectionSection = SelectAll()
    """Which tokens are distilled at all."""
    gate: GateSection = OpenGate()
    """How strongly they listen. Steepness is at most a million."""
    routing: RoutingSection = Distil()
    """Which loss trains a group."""
    rl: PolicyConfig = PolicyConfig()
    """The reinforcement branch of routers that reinforce. Its KL coefficient is at most a million."""
    cliff: CliffConfig = CliffConfig()
    """How the bound on extrapolation is measured: for the router `cliff`, `target.guard` and closed-form exposure."""
    curriculum: CurriculumSection = RandomConfig()
    """The order of problems."""
    gradient: GradientSection = AllGradients()
    """Which weights an update moves, and how."""
    codes: CodesConfig | None = None
    """Latent codes that steer the student and are trained with it; leave it out for none."""
    env: EnvSection = SingleTurn()
    """What the student acts in: single problems, or several turns with an environment."""
    rollout: RolloutConfig = RolloutConfig()
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
    flow: FlowConfig = FlowConfig()
    """A student that makes points instead of text, for the tasks `ring` and `digits`."""
    track: TrackConfig = TrackConfig()
    """Trackers beside the run directory."""
    threads: Annotated[int, Field(ge=0, le=4096)] = 0
    """CPU threads of torch; 0 leaves torch's choice. The pico recipes use 1: two runs share two cores."""
    arms: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Named lists of overrides that `atesd compare` runs side by side."""

    @property
    def cliff_c(self) -> float:
        """The importance clip behind lambda*: the section's own, that of the sampled-token loss in use, or 5."""
        return self.cliff.c or self.loss.importance_clip or 5.0

    @property
    def reads_old(self) -> bool:
        """Whether a loss reads the probabilities of the weights that a step began with."""
        return self.routing.reinforces or self.loss.importance_clip is not None

    @property
    def needs_base(self) -> bool:
        """Whether the step-0 weights are read, without a hint or as the teacher that progress is measured against."""
        measured = self.routing.reads_lambda or self.exposure.reads_lambda or self.exposure.reads_base
        return measured or "base" in self.target.views or (self.routing.reinforces and self.rl.kl_coef > 0)

    def facts(self, problem_ids: Sequence[str] = ()) -> RunFacts:
        """Return what methods may depend on besides their own sections; `problem_ids` are the training problems'."""
        return RunFacts(
            seed=self.seed,
            total_steps=self.step.num_steps,
            problems_per_step=self.step.problems,
            problem_ids=problem_ids,
            teacher_frozen=self.teacher.weights == "frozen",
            strength=self.target.strength,
            cliff=self.cliff,
            c=self.cliff_c,
        )

    def strength(self, run: RunFacts) -> Strength:
        """Return what answers the lambda of each step: measured only where the target or the router caps it."""
        if self.target.capped or self.routing.reads_lambda:
            return Guard(run, always=self.target.capped)
        if self.target.asks_rewards:
            return Aligned(run)
        return Constant(run)

    def about(self) -> dict[str, Any]:
        """Say in words what teaches the student, for readers who have not seen a recipe.

        `exposure` completes "The teacher sees ..."; `controls` are sentences without a full stop, of what is not
        neutral.
        """
        weighs = "Problems weigh p (1 - p) by their pass rate p (PACED)" if self.loss.prompt_weight == "paced" else ""
        router = self.routing.describe()
        if not self.task.is_text:
            return self._about_flow()
        controls = [
            self.target.describe(),
            self.selection.describe(),
            self.gate.describe(),
            weighs,
            router if self.routing.distils else "",
            self.rl.describe() if self.routing.reinforces else "",
            self.curriculum.describe(),
            self.gradient.describe(),
            self.codes.describe() if self.codes is not None else "",
            self.env.describe(),
            self.rollout.engine.describe(),
        ]
        return {
            "exposure": self._shown() if self.routing.distils else router,
            "controls": [words for words in controls if words],
            "distils": self.routing.distils,
            "reinforces": self.routing.reinforces,
        }

    def _about_flow(self) -> dict[str, Any]:
        """Say the same of a flow, and what its samples are and when they count as right."""
        task = cast("Any", self.task)
        words = self.exposure.describe()
        for said, meant in _MEANT.items():
            words = words.replace(said, meant)
        curriculum = self.curriculum.describe()
        return {
            "exposure": words,
            "controls": [curriculum] if curriculum else [],
            "distils": True,
            "reinforces": False,
            "samples": task.looks,
            "right": task.right,
        }

    def _shown(self) -> str:
        """Complete "The teacher sees ..." where there is a teacher."""
        revealed = self.reveal.describe()
        if not revealed:
            return self.exposure.describe()
        return f"{revealed}, at most {self.exposure.describe()}" if self.differs("exposure") else revealed

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
