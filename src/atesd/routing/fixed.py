"""Which loss trains a group: routes of groups and the loss components behind each route.

A router answers two questions and shares the four verbs of `types.Policy`: `strength` (how far the target of this step
may be extrapolated) and, after the rewards are known, `route` (what each group is trained by). Its `source` says where
completions come from: sampled from the student, or the reference solutions themselves.

    distil    every group is distilled                                        OPSD, ATESD
    rl        every group is reinforced                                       GRPO
    both      both losses on every group: L_rl + coef L_distil                SDAR
    hdpo      groups without any success are distilled, the others reinforced after HDPO 2603.23871
    retire    `both`, until the mismatch stops shrinking, then `rl`           after RetireOPD 2609.20784
    cliff     distil while the wanted lambda is safe, else reinforce          ours
    sft       cross-entropy on the references

Where a group cannot be graded at all it cannot be reinforced: `rl`, and `retire` without its teacher, skip it, the
others distil it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from math import isfinite
from typing import Annotated, Any, ClassVar, Literal, Protocol

from pydantic import Field

from atesd.cliff import CliffConfig, CliffMeter
from atesd.types import Config, Group, Measurement, Observation, Policy, Stateless

Source = Literal["student", "reference"]


class Route(StrEnum):
    """What happens to a group."""

    DISTIL = "distil"
    RL = "rl"
    BOTH = "both"
    NLL = "nll"
    SKIP = "skip"

    @property
    def components(self) -> tuple[str, ...]:
        """Loss components that the group's completions feed."""
        return {Route.BOTH: ("distil", "rl"), Route.SKIP: ()}.get(self, (self.value,))


class Router(Policy, Protocol):
    """Chooses the route of every group of a step."""

    source: Source
    reads_exposure: bool
    """Whether routes depend on the exposure: then a hold window goes on through steps without distillation."""

    def strength(self, wanted: float, ratio: float) -> float:
        """Return the lambda to distil with in this step; `wanted` is the target's, `ratio` the largest exposure."""
        ...

    def route(self, groups: Sequence[Group]) -> list[Route]:
        """Return one route a group, in order; called once a step, after `strength`."""
        ...


class FixedRouter(Stateless):
    """A router that asks no measurement and remembers nothing."""

    source: Source = "student"
    reads_exposure: bool = False

    def strength(self, wanted: float, ratio: float) -> float:  # noqa: ARG002
        """Return the wanted strength."""
        return wanted

    def route(self, groups: Sequence[Group]) -> list[Route]:
        """Return one route a group."""
        return [self.of(group) for group in groups]

    def of(self, group: Group) -> Route:  # noqa: ARG002
        """Distil the group: OPSD and ATESD."""
        return Route.DISTIL


class Supervised(FixedRouter):
    """Train on the reference solutions by cross-entropy, without sampling: the sceptic's baseline.

    Loss: mean over tokens of -log p_S(y*_t | x, y*_<t) at temperature 1, the closing EOS included.
    """

    source: Source = "reference"

    def of(self, group: Group) -> Route:  # noqa: ARG002
        """Train on the reference."""
        return Route.NLL


class Reinforce(FixedRouter):
    """Reinforce every gradable group."""

    def of(self, group: Group) -> Route:
        """Reinforce; skip what cannot be graded."""
        return Route.RL if group.rewards else Route.SKIP


class Both(FixedRouter):
    """Reinforce and distil every group; distil alone what cannot be graded."""

    def of(self, group: Group) -> Route:
        """Return both where there are rewards."""
        return Route.BOTH if group.rewards else Route.DISTIL


class Hdpo(FixedRouter):
    """Distil the groups that have nothing to reinforce."""

    def of(self, group: Group) -> Route:
        """Reinforce where an attempt has a reward above 0."""
        return Route.RL if any(reward > 0 for reward in group.rewards) else Route.DISTIL


class Retire(FixedRouter):
    """Both losses until the mismatch, averaged, has not fallen below its least value for `patience` steps."""

    def __init__(self, config: RetireConfig) -> None:
        self._config = config
        self._average: float | None = None
        self._least: float | None = None
        self._stale = 0
        self._retired_at: int | None = None

    def of(self, group: Group) -> Route:
        """Return both before the teacher's retirement, reinforcement after it."""
        if self._retired_at is None:
            return Route.BOTH if group.rewards else Route.DISTIL
        return Route.RL if group.rewards else Route.SKIP

    def observe(self, observation: Observation) -> None:
        """Follow `mismatch/top1`."""
        mismatch = observation.stats.get("mismatch/top1")
        if self._retired_at is not None or mismatch is None:
            return
        decay = self._config.decay
        self._average = mismatch if self._average is None else decay * self._average + (1 - decay) * mismatch
        if self._least is None or self._average < self._least - self._config.min_fall:
            self._least, self._stale = self._average, 0
        else:
            self._stale += 1
        if self._stale >= self._config.patience:
            self._retired_at = observation.step

    def metrics(self) -> Mapping[str, float]:
        """Say whether the teacher still teaches."""
        numbers = {"route/retired": float(self._retired_at is not None)}
        return numbers if self._average is None else numbers | {"route/mismatch_ema": self._average}

    def state_dict(self) -> dict[str, Any]:
        """Return everything."""
        return {
            "average": self._average,
            "least": self._least,
            "stale": self._stale,
            "retired_at": self._retired_at,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._average, self._least = state["average"], state["least"]
        self._stale, self._retired_at = state["stale"], state["retired_at"]


class CliffRouter(FixedRouter):
    """Distil at the wanted lambda while it is at most lambda*, else reinforce.

    In a reinforcing step a group without reward variance has no gradient: it is distilled at the guarded
    lambda_eff = 1 + kappa (lambda* - 1), or skipped. The mode changes when lambda* has passed the wanted lambda by the
    hysteresis, and stays at least `min_stay` steps. Without a known contract class lambda* is infinite.
    """

    reads_exposure: bool = True

    def __init__(self, config: CliffRouterConfig, cliff: CliffConfig, c: float) -> None:
        self._config = config
        self._cliff = cliff
        self._meter = CliffMeter(cliff, c)
        self._reinforcing = False
        self._stayed = 0
        self._ratio = 1.0
        self._strength: float | None = None

    def strength(self, wanted: float, ratio: float) -> float:
        """Settle the step's mode and return the lambda of its distilled groups."""
        least = self._meter.threshold(ratio)
        if self._stayed >= self._cliff.min_stay or self._strength is None:
            margin = 0.0 if self._strength is None else self._cliff.hysteresis
            changed = wanted <= least - margin if self._reinforcing else wanted > least + margin
            if changed:
                self._reinforcing, self._stayed = not self._reinforcing, 0
        self._stayed += 1
        self._ratio = ratio
        self._strength = guarded(wanted, least, self._cliff.kappa) if self._reinforcing else wanted
        return self._strength

    def of(self, group: Group) -> Route:
        """Return the step's route, or what is left for a group without reward variance."""
        if not self._reinforcing:
            return Route.DISTIL
        if len(set(group.rewards)) > 1:
            return Route.RL
        return Route.DISTIL if self._config.uniform == "distil" or not group.rewards else Route.SKIP

    def wants(self, step: int) -> Sequence[Measurement]:
        """Ask for the contract on its cadence."""
        return self._meter.wants(step)

    def observe(self, observation: Observation) -> None:
        """Take in the contract."""
        self._meter.observe(observation)

    def metrics(self) -> Mapping[str, float]:
        """Return lambda*, the lambda in force and the mode."""
        numbers = self._meter.metrics(self._ratio) | {"cliff/reinforcing": float(self._reinforcing)}
        return numbers if self._strength is None else numbers | {"cliff/lambda": self._strength}

    def state_dict(self) -> dict[str, Any]:
        """Return everything."""
        return {
            "meter": self._meter.state_dict(),
            "reinforcing": self._reinforcing,
            "stayed": self._stayed,
            "ratio": self._ratio,
            "strength": self._strength,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._meter.load_state_dict(state["meter"])
        self._reinforcing, self._stayed = state["reinforcing"], state["stayed"]
        self._ratio, self._strength = state["ratio"], state["strength"]


class Guarded:
    """Any router, with lambda capped: lambda_eff = min(wanted, 1 + kappa (lambda* - 1))."""

    def __init__(self, router: Router, cliff: CliffConfig, c: float) -> None:
        self.source: Source = router.source
        self.reads_exposure = router.reads_exposure
        self._router = router
        self._kappa = cliff.kappa
        self._meter = CliffMeter(cliff, c)
        self._ratio = 1.0
        self._strength: float | None = None

    def strength(self, wanted: float, ratio: float) -> float:
        """Return the capped lambda."""
        self._ratio = ratio
        self._strength = guarded(self._router.strength(wanted, ratio), self._meter.threshold(ratio), self._kappa)
        return self._strength

    def route(self, groups: Sequence[Group]) -> list[Route]:
        """Leave routes as they are."""
        return self._router.route(groups)

    def wants(self, step: int) -> Sequence[Measurement]:
        """Ask for the contract besides."""
        return [*self._router.wants(step), *self._meter.wants(step)]

    def observe(self, observation: Observation) -> None:
        """Hand on."""
        self._router.observe(observation)
        self._meter.observe(observation)

    def metrics(self) -> Mapping[str, float]:
        """Return lambda* and the lambda in force besides."""
        numbers = {**self._router.metrics(), **self._meter.metrics(self._ratio)}
        return numbers if self._strength is None else numbers | {"cliff/lambda": self._strength}

    def state_dict(self) -> dict[str, Any]:
        """Return both states."""
        return {
            "router": self._router.state_dict(),
            "meter": self._meter.state_dict(),
            "ratio": self._ratio,
            "strength": self._strength,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._router.load_state_dict(state["router"])
        self._meter.load_state_dict(state["meter"])
        self._ratio, self._strength = state["ratio"], state["strength"]


def guarded(wanted: float, least: float, kappa: float) -> float:
    """Return min(wanted, 1 + kappa (lambda* - 1))."""
    return min(wanted, 1.0 + kappa * (least - 1.0)) if isfinite(least) else wanted


class _RoutingConfig(Config):
    """What the step needs to know of any router."""

    reinforces: ClassVar[bool] = False
    """Whether groups may be reinforced: needs groups of at least two and untruncated sampling."""
    distils: ClassVar[bool] = True
    """Whether groups may be distilled."""
    shared: ClassVar[bool] = False
    """Whether each group is in one component, and all components share one denominator."""

    router: ClassVar[type[FixedRouter]] = FixedRouter
    """What `build` returns where the router has no settings of its own."""

    @property
    def coefs(self) -> dict[str, float]:
        """Factor of each component where it is not 1."""
        return {}

    def build(self, cliff: CliffConfig, c: float) -> Router:  # noqa: ARG002
        """Return the router; `cliff` and `c` say how lambda* is measured."""
        return self.router()


class DistilConfig(_RoutingConfig):
    """Distil every group."""

    kind: Literal["distil"] = "distil"


class ReinforceConfig(_RoutingConfig):
    """Reinforce every group by the section `rl`, without a teacher: GRPO and its kin."""

    kind: Literal["rl"] = "rl"

    router: ClassVar[type[FixedRouter]] = Reinforce
    reinforces: ClassVar[bool] = True
    distils: ClassVar[bool] = False


class BothConfig(_RoutingConfig):
    """L_rl + coef L_distil on every group, each with its own denominator; SDAR with `gate.kind = "sdar"`."""

    kind: Literal["both"] = "both"
    coef: Annotated[float, Field(ge=0)] = 0.01
    """Factor of the distillation loss (lambda_sdar); 0 is reinforcement alone. SDAR: .01."""

    router: ClassVar[type[FixedRouter]] = Both
    reinforces: ClassVar[bool] = True

    @property
    def coefs(self) -> dict[str, float]:
        """The distillation loss is scaled."""
        return {"distil": self.coef}


class HdpoConfig(_RoutingConfig):
    """Distil groups without any success, reinforce the others.

    After HDPO (2603.23871). Deviations: 1. the student's own failed completions are distilled, not filtered rollouts of
    the teacher; 2. at weight 1, over the tokens of all groups.
    """

    kind: Literal["hdpo"] = "hdpo"

    router: ClassVar[type[FixedRouter]] = Hdpo
    reinforces: ClassVar[bool] = True
    shared: ClassVar[bool] = True


class RetireConfig(_RoutingConfig):
    """Both losses, and reinforcement alone once the mismatch has stopped shrinking.

    After RetireOPD (2609.20784), second-hand. Deviation: its second condition, a set share of the teacher's success, is
    left out, as it needs rollouts of the teacher.
    """

    kind: Literal["retire"] = "retire"
    coef: Annotated[float, Field(ge=0)] = 1.0
    """Factor of the distillation loss while it lasts."""
    patience: Annotated[int, Field(ge=1)] = 20
    """Steps without a new least mismatch before the teacher retires."""
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the mismatch's moving average."""
    min_fall: Annotated[float, Field(ge=0)] = 0.0
    """How much lower a new least mismatch must be."""

    reinforces: ClassVar[bool] = True

    @property
    def coefs(self) -> dict[str, float]:
        """The distillation loss is scaled."""
        return {"distil": self.coef}

    def build(self, cliff: CliffConfig, c: float) -> Router:  # noqa: ARG002
        """Return the router."""
        return Retire(self)


class CliffRouterConfig(_RoutingConfig):
    """Distil while the target's lambda is at most lambda*, reinforce where it is not; measured by `cliff`."""

    kind: Literal["cliff"] = "cliff"
    uniform: Literal["distil", "skip"] = "distil"
    """What a reinforcing step does with groups of equal rewards: distil at the guarded lambda, or skip."""

    reinforces: ClassVar[bool] = True
    shared: ClassVar[bool] = True

    def build(self, cliff: CliffConfig, c: float) -> Router:
        """Return the router."""
        return CliffRouter(self, cliff, c)


class SupervisedConfig(_RoutingConfig):
    """Supervised fine-tuning on the same solutions with the same number of updates and problems."""

    kind: Literal["sft"] = "sft"

    router: ClassVar[type[FixedRouter]] = Supervised
    distils: ClassVar[bool] = False


RoutingConfig = Annotated[
    DistilConfig | ReinforceConfig | BothConfig | HdpoConfig | RetireConfig | CliffRouterConfig | SupervisedConfig,
    Field(discriminator="kind"),
]
