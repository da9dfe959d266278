"""Every choice that a recipe makes by `kind`: one union a part, one method a line.

A new method of the package is a file of its own, its import, and its entry here. `Own` opens a part to classes that a
recipe names by import path (own.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag

from atesd.curriculum import CurriculumMethod, PerplexityConfig, RandomConfig
from atesd.envs.base import EnvMethod
from atesd.envs.doors import Doors
from atesd.envs.libraries import Gymnasium, TextArena, TrlEnvironment
from atesd.envs.single_turn import SingleTurn
from atesd.envs.textworld import TextWorld
from atesd.exposure.bandit import Bandit
from atesd.exposure.beta_controller import BetaConfig
from atesd.exposure.closed_form import ClosedForm
from atesd.exposure.controller import ExposureMethod
from atesd.exposure.difficulty import Difficulty
from atesd.exposure.dlr import Dlr
from atesd.exposure.influence import Influence
from atesd.exposure.overlap import Overlap
from atesd.exposure.paired import Paired
from atesd.exposure.retention import Retention
from atesd.exposure.revealer import RevealMethod
from atesd.exposure.schedules import Cosine, Fixed, Linear, Steps, Uniform
from atesd.exposure.segments import Segments
from atesd.exposure.skills import Skills
from atesd.exposure.turns import Turns
from atesd.gates.aligned import AlignedGate
from atesd.gates.gate import GateMethod, OpenGate
from atesd.gates.sdar import SdarGate
from atesd.gradients.longact import LongAct
from atesd.gradients.rule import AllGradients, GradientMethod
from atesd.losses.avsd import Avsd
from atesd.losses.paint import Paint
from atesd.losses.target import AnchorMix, Extrapolate, Plain, Residual, TargetMethod
from atesd.own import Own
from atesd.rewards.kinds import ExactConfig, MathConfig, PythonConfig, RewardMethod
from atesd.rollout.hf import HFEngine
from atesd.rollout.sampler import EngineMethod
from atesd.rollout.vllm import VllmEngine
from atesd.routing.aligned import Aligned
from atesd.routing.cliff import Cliff
from atesd.routing.fixed import Both, Distil, Hdpo, Reinforce, Supervised
from atesd.routing.retire import Retire
from atesd.routing.route import RoutingMethod
from atesd.selection import SelectAll, SelectionMethod, TipSelection
from atesd.tasks.base import TaskMethod
from atesd.tasks.benchmarks import BenchmarkConfig
from atesd.tasks.episodes import EpisodesConfig
from atesd.tasks.files import DatasetConfig, JsonlConfig
from atesd.tasks.flows import DigitsConfig, RingConfig
from atesd.tasks.gym import GymConfig
from atesd.tasks.kinds import DoorsConfig, PicoConfig
from atesd.tasks.textworld import TextWorldConfig


def reveal_kind(section: Any) -> str:
    """Return the kind of a `[reveal]` section, which may leave it out."""
    if isinstance(section, Mapping):
        return str(section.get("kind", "segments"))
    return str(getattr(section, "kind", "segments"))


TaskSection = Annotated[
    PicoConfig  # the embedded task
    | DoorsConfig  # the embedded task in several turns
    | TextWorldConfig  # TextWorld's games with their winning commands
    | EpisodesConfig  # numbered episodes of any environment
    | JsonlConfig  # your own problems
    | DatasetConfig  # Hugging Face data sets, Parquet, CSV
    | GymConfig  # reasoning-gym
    | BenchmarkConfig  # AIME, HMMT, MATH-500, AMC, Minerva, GSM8K
    | RingConfig  # points around a circle, made by a flow
    | DigitsConfig,  # small images of digits, made by a flow
    Field(discriminator="kind"),
    Own(TaskMethod),
]

RewardSection = Annotated[
    ExactConfig  # equal text
    | MathConfig  # equal meaning
    | PythonConfig,  # your own function
    Field(discriminator="kind"),
    Own(RewardMethod),
]

ExposureSection = Annotated[
    Fixed  # one ratio; OPSD at 1
    | Linear  # a straight line
    | Cosine  # half a cosine
    | Steps  # piecewise constant
    | Uniform  # drawn at random
    | BetaConfig  # ATESD's learned policy
    | Bandit  # a regression over all decisions
    | ClosedForm  # the largest ratio on the safe side of the cliff
    | Paired  # a little more against a little less
    | Difficulty  # a learned policy per difficulty
    | Influence  # what each ratio's gradient would do to the probe
    | Dlr,  # the best of several draws of a router: DLR
    Field(discriminator="kind"),
    Own(ExposureMethod),
]

RevealSection = Annotated[
    Annotated[Segments, Tag("segments")]  # that share of the segments
    | Annotated[Overlap, Tag("overlap")]  # at most up to where the rollout follows: PAINT
    | Annotated[Turns, Tag("turns")]  # that share of an expert's turns
    | Annotated[Skills, Tag("skills")]  # retrieved skills: SDAR
    | Annotated[Retention, Tag("retention")],  # tokens that attention reaches: Make Each Token Count
    Discriminator(reveal_kind),
    Own(RevealMethod),
]

TargetSection = Annotated[
    Plain  # the teacher
    | Extrapolate  # beyond the teacher: G-OPD
    | AnchorMix  # between teacher and anchor: beta-OPSD
    | Residual  # the teacher and a part of what full exposure would add: AR-OPD
    | Paint  # the teacher, nearer to the student at a few tokens: PAINT
    | Avsd,  # what three views agree on, and a part of the rest: AVSD
    Field(discriminator="kind"),
    Own(TargetMethod),
]

SelectionSection = Annotated[
    SelectAll  # every token
    | TipSelection,  # the informative ones: TIP
    Field(discriminator="kind"),
    Own(SelectionMethod),
]

GateSection = Annotated[
    OpenGate  # every token listens fully
    | SdarGate  # a sigmoid of the gap or of the entropy: SDAR
    | AlignedGate,  # where teacher and outcome agree
    Field(discriminator="kind"),
    Own(GateMethod),
]

RoutingSection = Annotated[
    Distil  # OPSD, ATESD
    | Reinforce  # GRPO and its kin
    | Both  # both losses: SDAR
    | Hdpo  # failed groups are distilled: HDPO
    | Retire  # both, until the mismatch stops shrinking: RetireOPD
    | Cliff  # distil while lambda is safe
    | Aligned  # distil where that raises the reward
    | Supervised,  # cross-entropy on the references
    Field(discriminator="kind"),
    Own(RoutingMethod),
]

CurriculumSection = Annotated[
    RandomConfig  # shuffled
    | PerplexityConfig,  # sorted: SU-01
    Field(discriminator="kind"),
    Own(CurriculumMethod),
]

GradientSection = Annotated[
    AllGradients  # every gradient as it is
    | LongAct,  # rows of query and key projections with large activations: LongAct
    Field(discriminator="kind"),
    Own(GradientMethod),
]

EnvSection = Annotated[
    SingleTurn  # one prompt, one completion
    | Doors  # the embedded environment
    | TextWorld  # games that TextWorld builds
    | TextArena  # TextArena's games for one player
    | Gymnasium  # text environments of Gymnasium
    | TrlEnvironment,  # classes for TRL's environment_factory
    Field(discriminator="kind"),
    Own(EnvMethod),
]

EngineSection = Annotated[
    HFEngine  # in the training process, on the weights that train
    | VllmEngine,  # a vLLM server
    Field(discriminator="kind"),
    Own(EngineMethod),
]
