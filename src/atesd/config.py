"""The recipe's tree: `RunConfig`, what does not go together in it, and what follows from all of it.

Sections stand beside what they configure, or in `sections.py`; choices by `kind` in `kinds.py`. `recipe.py` reads TOML
and overrides into the tree. Checks ask methods what they declare of themselves, never which ones they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
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

# Ranges that no sensible recipe leaves: beyond them logits, targets and losses overflow.
_SENSIBLE = {
    "loss.temperature_student": (1e-3, 1e3),
    "loss.temperature_teacher": (1e-3, 1e3),
    "target.lambda_x": (1e-6, 100.0),
    "target.scale": (1e-6, 100.0),
    "target.bound": (1e-6, 1e6),
    "gate.beta": (0.0, 1e6),
    "rl.kl_coef": (0.0, 1e6),
    "rl.dual_clip": (1.0, 1e6),
    "rl.eps_high": (0.0, 1e6),
    "rl.importance_clip": (1.0, 1e6),
    "loss.divergence.importance_clip": (1.0, 1e6),
}
# What of `loss` only the distillation loss reads.
_OF_DISTILLATION = ("divergence", "top_k", "tail", "clip", "clip_tau", "temperature_teacher")


# What a flow task reads of a recipe, besides the sections that it reads as a whole; and what no text task reads.
_OF_FLOWS = {
    "step": ("num_steps", "problems"),
    "eval": ("every", "k", "problems"),
    "probe": ("credit_problems", "log_every"),
    "save": ("every", "keep"),
}
_MEANT = {  # what exposure is, where the reference is no solution in words
    "the whole solution (OPSD)": "the whole condition",
    "the final answer only": "nothing but what it is always told",
    "of the solution": "of the condition",
}
_READ_BY_FLOWS = ("seed", "task", "exposure", "teacher", "curriculum", "optim", "flow", "track", "threads", "arms")


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


class RunConfig(Config):
    """One run: everything that a number depends on."""

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

    @model_validator(mode="after")
    def _numbers_stay_finite(self) -> Self:
        """Refuse settings of losses that can only end in numbers beyond float32."""
        for place, (low, high) in _SENSIBLE.items():
            value = reduce(lambda section, name: getattr(section, name, None), place.split("."), cast("Any", self))
            if value is not None and not low <= value <= high:
                raise ValueError(f"{place} = {value:g} leads beyond the range of float32: choose {low:g} to {high:g}")
        return self

    @model_validator(mode="after")
    def _sections_are_read(self) -> Self:
        """Refuse what only a language model, or only a flow, would read."""
        kind = f'task.kind = "{self.task.kind}"'
        if self.task.is_text:
            if self._is_set("flow"):
                raise ValueError(f"{kind} is answered in words, so flow would have no effect: remove it")
            return self
        ignored = [name for name in type(self).model_fields if name not in {*_READ_BY_FLOWS, *_OF_FLOWS}]
        found = [name for name in ignored if self._is_set(name)]
        for section, read in _OF_FLOWS.items():
            part = getattr(self, section)
            found += [
                f"{section}.{name}"
                for name in type(part).model_fields
                if name not in read and self._differs(part, name)
            ]
        if found:
            raise ValueError(f"{kind} has no language model, so {found[0]} would have no effect: remove it")
        return self

    @model_validator(mode="after")
    def _warm_up_ends(self) -> Self:
        updates = self.step.num_steps * self.step.updates_per_batch
        if self.optim.warmup_steps > updates:
            raise ValueError(
                f"optim.warmup_steps = {self.optim.warmup_steps} outlasts the run's {updates} updates, so that "
                "optim.lr is never reached: lower it, or raise step.num_steps"
            )
        return self

    @model_validator(mode="after")
    def _contract_has_text(self) -> Self:
        empty = [name for name, pattern in self.cliff.contract.items() if not pattern.strip()]
        if empty:
            raise ValueError(
                f"cliff.contract.{empty[0]} is an empty pattern, which no token is part of: write the forced text, or "
                "remove it"
            )
        return self

    @model_validator(mode="after")
    def _training_samples(self) -> Self:
        if self.rollout.temperature == 0:
            raise ValueError("rollout.temperature = 0 cannot be trained with, as it divides the logits: raise it")
        return self

    @model_validator(mode="after")
    def _rewards_differ(self) -> Self:
        if self.reward is None:
            return self
        if self.env.grades:
            raise ValueError(
                f'env.kind = "{self.env.kind}" grades attempts itself, so [reward] would have no effect: leave it out'
            )
        rewards = self.reward if isinstance(self.reward, tuple) else (self.reward,)
        if not any(reward.weight for reward in rewards):
            raise ValueError("reward has no entry with a weight, so every total is 0: give one, or leave reward out")
        names = [reward.called for reward in rewards]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"two rewards are called {twice!r}, under which they are logged: give one a name")
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
        measured = self.routing.reads_lambda or self.exposure.reads_lambda
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
        return f"{revealed}, at most {self.exposure.describe()}" if self._is_set("exposure") else revealed

    def _is_set(self, name: str) -> bool:
        """Tell whether a section is another than the default, which is the neutral one."""
        return self._differs(self, name)

    @staticmethod
    def _differs(section: Config, name: str) -> bool:
        """Tell whether a field has another value than its default."""
        return bool(getattr(section, name) != type(section).model_fields[name].default)

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
        router = f'routing.kind = "{self.routing.kind}"'
        if self.routing.reinforces and self.rollout.group_size < 2:
            raise ValueError(
                f"{router} compares completions of a group, but rollout.group_size is {self.rollout.group_size}: "
                "set it to at least 2 (8 is usual)"
            )
        if self.routing.reinforces and self.loss.temperature_student not in (None, self.rollout.temperature):
            raise ValueError(
                f"{router} needs the probabilities that were sampled from: remove "
                f"loss.temperature_student = {self.loss.temperature_student} or set it to rollout.temperature"
            )
        if self.rl.teacher_credit is not None and not self.routing.teaches_reinforced:
            raise ValueError(
                f"rl.teacher_credit asks the teacher about reinforced completions, which {router} does not show it: "
                'set routing = {kind = "both", coef = 0}, or remove rl.teacher_credit'
            )
        if self.routing.asks_teacher and not self.rollout.engine.samples_in_place:
            raise ValueError(
                f"routing.teacher_share needs completions of the teacher, and "
                f'rollout.engine.kind = "{self.rollout.engine.kind}" samples from the student alone: set '
                'rollout.engine.kind = "hf", or remove routing.teacher_share'
            )
        if self.routing.shared and self.routing.reinforces and self.rl.aggregate != self.loss.aggregate:
            raise ValueError(
                f'{router} divides both losses by one count, but rl.aggregate = "{self.rl.aggregate}" and '
                f'loss.aggregate = "{self.loss.aggregate}" count differently: set them alike'
            )
        if not self.routing.distils:
            idle = [name for name in ("gate", "selection", "target") if self._is_set(name)]
            idle += ["loss.prompt_weight"] * (self.loss.prompt_weight != "none")
            idle += [f"loss.{name}" for name in _OF_DISTILLATION if self._differs(self.loss, name)]
            idle += ["exposure"] * self.exposure.measured
            idle += ["reveal"] * (self.reveal.reads_rollout or self.reveal.masks)
            if idle:
                raise ValueError(f"{router} distils nothing: remove {idle[0]}, which has no effect")
        return self

    @model_validator(mode="after")
    def _codes_fit(self) -> Self:
        if self.codes is None:
            return self
        if self.routing.reinforces or not self.routing.distils:
            raise ValueError(
                f'[codes] are chosen by how near they are to the teacher, and routing.kind = "{self.routing.kind}" '
                'trains groups otherwise: set routing = {kind = "distil"}, or remove codes'
            )
        if self.model.gradient_checkpointing:
            raise ValueError(
                "[codes] steer a pass as it is made, and model.gradient_checkpointing = true makes it once more later, "
                "without them: remove either"
            )
        if not self.rollout.engine.samples_in_place:
            raise ValueError(
                f'[codes] steer samples too, and rollout.engine.kind = "{self.rollout.engine.kind}" samples from a '
                'copy of the weights, without them: set rollout.engine.kind = "hf", or remove codes'
            )
        return self

    @model_validator(mode="after")
    def _nothing_watches_compiled_layers(self) -> Self:
        watching = [
            name
            for name, watches in (
                ("[codes]", self.codes is not None),
                (f'reveal.kind = "{self.reveal.kind}"', self.reveal.masks),
                (f'gradient.kind = "{self.gradient.kind}"', self.gradient.kind != "none"),
            )
            if watches
        ]
        if self.model.compile and watching:
            raise ValueError(
                f"model.compile = true compiles layers as they are, and {watching[0]} reads or changes what they make: "
                "remove either"
            )
        return self

    @model_validator(mode="after")
    def _ahead_fits(self) -> Self:
        if not self.rollout.ahead:
            return self
        ahead = f"rollout.ahead = {self.rollout.ahead}"
        if not self.rollout.engine.samples_ahead:
            raise ValueError(
                f'{ahead} samples while the trainer updates, and rollout.engine.kind = "{self.rollout.engine.kind}" '
                'can only do one after the other: set rollout.engine.kind = "vllm", or rollout.ahead = 0'
            )
        if self.env.limit > 1 or self.env.grades:
            raise ValueError(
                f'{ahead} asks for single replies, and env.kind = "{self.env.kind}" answers them: set rollout.ahead = 0'
            )
        if self.routing.source == "reference":
            raise ValueError(
                f'{ahead} has no effect, as routing.kind = "{self.routing.kind}" samples nothing: remove it'
            )
        own = self.loss.temperature_student not in (None, self.rollout.temperature)
        if own and self.loss.divergence.kind == "sampled":
            raise ValueError(
                f"{ahead} needs the probabilities that were sampled from to weigh sampled tokens: remove "
                f"loss.temperature_student = {self.loss.temperature_student} or set it to rollout.temperature"
            )
        return self

    @model_validator(mode="after")
    def _weights_fit(self) -> Self:
        if self.loss.prompt_weight == "none":
            return self
        paced = f'loss.prompt_weight = "{self.loss.prompt_weight}"'
        if self.routing.distils_uniform:
            raise ValueError(
                f'{paced} gives weight 0 to problems of equal rewards, and router "{self.routing.kind}" distils what '
                "has no other use: remove either"
            )
        if self.rollout.group_size < 2:
            raise ValueError(
                f"{paced} needs pass rates, but rollout.group_size is {self.rollout.group_size}, so every weight would "
                "be 0: set it to at least 2"
            )
        return self

    @model_validator(mode="after")
    def _target_fits(self) -> Self:
        if self.target.strength <= 1:
            for name, method in (("routing", self.routing), ("exposure", self.exposure)):
                if method.reads_lambda:
                    raise ValueError(
                        f'{name}.kind = "{method.kind}" weighs how far the target is extrapolated, but here it is not: '
                        'set target = {kind = "extrapolate", lambda_x = 1.25}'
                    )
        if self.target.capped and self.routing.reads_lambda:
            raise ValueError(
                f'routing.kind = "{self.routing.kind}" caps lambda itself where it must: remove target.guard'
            )
        if self.target.asks_rewards and (self.routing.reads_lambda or self.exposure.reads_lambda):
            name, method = ("routing", self.routing) if self.routing.reads_lambda else ("exposure", self.exposure)
            raise ValueError(
                f'{name}.kind = "{method.kind}" weighs how far the target is extrapolated, which target.aligned = true '
                "moves: remove target.aligned"
            )
        return self

    @model_validator(mode="after")
    def _loss_is_listened_to(self) -> Self:
        if self.gate.reads_divergence:
            return self
        gate = f'gate.kind = "{self.gate.kind}" looks at the sampled token alone here, not at the divergence'
        remedy = 'or set gate.target = "divergence"'
        if self._is_set("target"):
            raise ValueError(
                f'{gate}, and has the same gradient whatever the target, so target.kind = "{self.target.kind}" would '
                f'have no effect: set target.kind = "plain", {remedy}'
            )
        ignored = [name for name in ("clip", "top_k") if getattr(self.loss, name) not in ("none", None)]
        ignored += ["divergence"] * (self.loss.divergence.kind == "sampled")
        if ignored:
            raise ValueError(f"{gate}, so loss.{ignored[0]} would have no effect: remove it, {remedy}")
        return self

    @model_validator(mode="after")
    def _exposure_fits(self) -> Self:
        exposure = f'exposure.kind = "{self.exposure.kind}"'
        if self.prompt.hint == "none" and self.exposure.measured:
            raise ValueError(
                f'prompt.hint = "none" shows nothing at any ratio, so {exposure} steers nothing: '
                'set exposure = {kind = "fixed"}'
            )
        if self.exposure.reads_rewards and self.rollout.group_size < 2:
            raise ValueError(
                f"{exposure} tells problems apart by their pass rates, but with rollout.group_size = 1 these know two "
                f"difficulties, right and wrong: raise the group size, or {self.exposure.without_rewards}"
            )
        if self.exposure.reads_rewards and self.routing.distils_failures_only:
            raise ValueError(
                f'{exposure} tells problems apart by their pass rates, and routing.kind = "{self.routing.kind}", which '
                f"distils failed groups alone, leaves one bin: {self.exposure.without_rewards}"
            )
        return self

    @model_validator(mode="after")
    def _masks_fit(self) -> Self:
        if not self.reveal.masks:
            return self
        reveal = f'reveal.kind = "{self.reveal.kind}"'
        if self.routing.asks_teacher:
            raise ValueError(
                f"routing.teacher_share needs completions of the teacher, from whom {reveal} hides tokens only where "
                "it scores: remove routing.teacher_share"
            )
        if self.exposure.reads_hidden:
            raise ValueError(
                f'{reveal} hides tokens, not segments that could be asked for: set exposure.gt_target = "solution"'
            )
        return self

    @model_validator(mode="after")
    def _reveal_fits(self) -> Self:
        reveal = f'reveal.kind = "{self.reveal.kind}"'
        if self.prompt.hint == "none" and (self.reveal.reads_rollout or self.reveal.masks):
            raise ValueError(
                f'prompt.hint = "none" shows nothing at any ratio, so {reveal} has no effect: remove reveal.kind'
            )
        if not self.reveal.reads_rollout:
            return self
        if self.prompt.hint == "wrong_problem":
            raise ValueError(
                f'{reveal} compares with the own solution, but prompt.hint = "wrong_problem" shows another: '
                'set reveal.kind = "segments"'
            )
        if self.routing.reads_lambda or self.target.capped:
            raise ValueError(
                f"{reveal} settles the exposure only after the rollout, but lambda* needs it before: "
                'set reveal.kind = "segments", or remove target.guard and the cliff router'
            )
        return self
