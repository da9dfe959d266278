"""The target: the distribution that the student is pulled to, made of the log-probabilities of the teacher views.

A target is a pure function of the views' normalised log-probabilities at one token, over the whole vocabulary. It knows
no other token, so it works on tiles. One that mixes views costs one more pass, for its normaliser. It may also read the
student's own log-probabilities: as constants, through which no gradient goes.

    plain         log p_T                                                    OPSD, ATESD
    extrapolate   lambda log p_T - (lambda - 1) log p_B                      G-OPD 2602.12125, ListOPD 2605.08737
    anchor_mix    w log p_T + (1 - w) log p_A                                beta-OPSD 2607.28582
    residual      log p_T + s clip(log p_full - log p_T, -bound, bound)      AR-OPD 2606.10385
    paint         (1 - w) log p_T + w log p_S at a few tokens, else log p_T  PAINT 2604.26573 (paint.py)
    avsd          log q_G + gate max(0, log q_A - log q_G)                   AVSD 2605.20643 (avsd.py)

each up to a constant per token. p_T is the teacher at the exposure ratio in force, p_B the student's step-0 weights
without a hint, p_full and p_answer the teacher at ratios 1 and 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal, Protocol, Self

from pydantic import Field, model_validator
from torch import Tensor

from atesd.losses.stats import TokenStats
from atesd.types import Method, UserError, shown

View = Literal["teacher", "base", "full", "answer"]
"""`teacher`: its hint at the ratio in force. `full`, `answer`: at ratios 1 and 0. `base`: step-0 weights, no hint."""


class Target(Protocol):
    """What the step and the tiled divergence need of a target."""

    @property
    def views(self) -> tuple[View, ...]:
        """The views that it reads, in order; the first is `teacher`, of which all token statistics are taken."""
        ...

    @property
    def is_first_view(self) -> bool:
        """Whether the target is the first view as it is, and so needs no normaliser of its own."""
        ...

    @property
    def reads_student(self) -> bool:
        """Whether the student's own log-probabilities stand behind those of the views."""
        ...

    @property
    def strength(self) -> float:
        """How far it reaches beyond the teacher: 1 is the teacher itself."""
        ...

    def at(self, strength: float) -> Target:
        """Return the target of another strength; one that has none returns itself."""
        ...

    def log_target(self, log_views: Sequence[Tensor]) -> Tensor:
        """Return the log target up to a constant per token, [n, V], from the views' log-probabilities, each [n, V].

        Token by token; must not change its arguments.
        """
        ...

    def metrics(self, stats: TokenStats) -> Mapping[str, float]:
        """Return numbers of its own over all distilled tokens of an update, by keys of the metric table."""
        ...


def asked(target: Target, log_views: Sequence[Tensor]) -> Tensor:
    """Return a target's `log_target`. UserError unless it has a number an entry, and left what it read as it was.

    torch would spread a number a token over the vocabulary, which is no target at all.
    """
    before = [view._version for view in log_views]
    returned = target.log_target(log_views)
    verb = f"{type(target).__name__}.log_target"
    if not isinstance(returned, Tensor) or returned.shape != log_views[0].shape:
        what = f"shape {tuple(returned.shape)}" if isinstance(returned, Tensor) else shown(returned, 60)
        raise UserError(
            f"{verb} returned {what} for views of shape {tuple(log_views[0].shape)}: return one log-probability an "
            "entry of the vocabulary, for each token"
        )
    if before != [view._version for view in log_views]:
        raise UserError(f"{verb} changed a view in place, which others read, too: change a copy")
    return returned


class TargetMethod(Method):
    """Base of targets' sections, and what the rest of the program needs to know of any target."""

    declares: ClassVar[tuple[str, ...]] = ("views", "is_first_view", "strength", "at", "log_target", "describe")

    reads_student: ClassVar[bool] = False

    @property
    def capped(self) -> bool:
        """Whether lambda is held, at every step, to the cap that lambda* sets: the field `guard`."""
        return False

    @property
    def asks_rewards(self) -> bool:
        """Whether lambda is 1 unless graded rollouts speak for more: the field `aligned`."""
        return False

    def metrics(self, stats: TokenStats) -> Mapping[str, float]:  # noqa: ARG002
        """Nothing of its own."""
        return {}


class Unscaled(TargetMethod):
    """A target without a strength."""

    strength: ClassVar[float] = 1.0

    def at(self, strength: float) -> Self:  # noqa: ARG002
        """Return the target itself."""
        return self


class Plain(Unscaled):
    """One view, as it is: OPSD and ATESD."""

    kind: Literal["plain"] = "plain"

    views: ClassVar[tuple[View, ...]] = ("teacher",)
    is_first_view: ClassVar[bool] = True

    def describe(self) -> str:
        """Nothing to say."""
        return ""

    def log_target(self, log_views: Sequence[Tensor]) -> Tensor:
        """Return the log-probabilities of the only view."""
        return log_views[0]


class Extrapolate(TargetMethod):
    """Reward extrapolation: lambda log p_T - (lambda - 1) log p_B (G-OPD 2602.12125, 2605.08737).

    lambda 1 is the plain target, bit for bit and at its cost; below 1 it interpolates. G-OPD applies lambda to the
    sampled token (`loss.divergence.kind = "sampled"`, reproduced without the constant per token); the full-vocabulary
    form is ours.
    """

    kind: Literal["extrapolate"] = "extrapolate"
    lambda_x: Annotated[float, Field(gt=0)] = 1.25
    """lambda: 1 is the teacher, more goes beyond it. G-OPD's best is 1.25; 1.5 was unstable there."""
    guard: bool = False
    """Cap lambda at 1 + kappa (lambda* - 1), with lambda* measured as the section `cliff` says."""
    aligned: bool = False
    """Reach beyond the teacher only while that would raise the reward of graded rollouts (ours, alignment.py)."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.aligned and (self.guard or self.lambda_x <= 1):
            raise ValueError(
                "target.aligned = true decides when the target reaches beyond the teacher: set target.lambda_x above "
                "1, such as 1.25, and leave target.guard out"
            )
        if self.guard and self.lambda_x <= 1:
            raise ValueError(
                "target.guard = true caps how far the target is extrapolated, but here it is not: "
                "set target.lambda_x above 1, such as 1.25, or remove target.guard"
            )
        return self

    @property
    def capped(self) -> bool:
        """By `guard`."""
        return self.guard

    @property
    def asks_rewards(self) -> bool:
        """By `aligned`."""
        return self.aligned

    @property
    def views(self) -> tuple[View, ...]:
        """The base is read only where it matters."""
        return ("teacher",) if self.is_first_view else ("teacher", "base")

    @property
    def is_first_view(self) -> bool:
        """Whether nothing is extrapolated."""
        return self.lambda_x == 1

    @property
    def strength(self) -> float:
        """lambda."""
        return self.lambda_x

    def describe(self) -> str:
        """Name lambda, and its cap."""
        if self.is_first_view:
            return ""
        where = "goes beyond the teacher" if self.lambda_x > 1 else "stays between the step-0 weights and the teacher"
        return f"The target {where}: λ {self.lambda_x:g}" + self._condition()

    def _condition(self) -> str:
        if self.aligned:
            return ", while that would raise the reward of graded rollouts"
        return ", capped by the measured λ*" if self.guard else ""

    def at(self, strength: float) -> Extrapolate:
        """Return the same target with another lambda."""
        return self if strength == self.lambda_x else self.model_copy(update={"lambda_x": strength})

    def log_target(self, log_views: Sequence[Tensor]) -> Tensor:
        """Return lambda log p_T - (lambda - 1) log p_B."""
        if self.is_first_view:
            return log_views[0]
        teacher, base = log_views
        return self.lambda_x * teacher - (self.lambda_x - 1) * base


class AnchorMix(Unscaled):
    """softmax((1 - w) z_anchor + w z_T): a geometric mean with an anchor (beta-OPSD 2607.28582, second-hand).

    With the anchor `base` it is `extrapolate` at lambda = w. Ours: the choice of anchors; w directly, as the paper's
    map from beta to w is disputed.
    """

    kind: Literal["anchor_mix"] = "anchor_mix"
    weight: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """w: the teacher's share."""
    anchor: Literal["base", "answer"] = "base"
    """The student's step-0 weights without a hint, or the teacher who sees the answer alone."""

    is_first_view: ClassVar[bool] = False

    @property
    def views(self) -> tuple[View, ...]:
        """Teacher and anchor."""
        return ("teacher", self.anchor)

    def describe(self) -> str:
        """Name share and anchor."""
        anchor = {"base": "the step-0 weights without a hint", "answer": "a teacher who sees the answer alone"}
        return f"The target mixes {100 * self.weight:.3g} % of the teacher with {anchor[self.anchor]}"

    def log_target(self, log_views: Sequence[Tensor]) -> Tensor:
        """Return w log p_T + (1 - w) log p_A."""
        teacher, anchor = log_views
        return self.weight * teacher + (1 - self.weight) * anchor


class Residual(Unscaled):
    """log p_T + scale clip(log p_full - log p_T, -bound, bound): what full exposure would add (AR-OPD 2606.10385)."""

    kind: Literal["residual"] = "residual"
    scale: Annotated[float, Field(gt=0)] = 0.6
    """Share of the residual that is added."""
    bound: Annotated[float, Field(gt=0)] = 5.0
    """Largest residual of an entry, in nats."""

    views: ClassVar[tuple[View, ...]] = ("teacher", "full")
    is_first_view: ClassVar[bool] = False

    def describe(self) -> str:
        """Name scale and bound."""
        added = f"{100 * self.scale:.3g} % of what full exposure would add"
        return f"The target adds {added}, at most {self.bound:g} nats a token"

    def log_target(self, log_views: Sequence[Tensor]) -> Tensor:
        """Return the teacher plus the clipped residual."""
        teacher, full = log_views
        return teacher + self.scale * (full - teacher).clamp(-self.bound, self.bound)
