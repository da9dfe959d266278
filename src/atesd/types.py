"""The nouns of the project: the `Config` base, problems, completions, measurements and observations.

Nothing here depends on anything else in the package, and nothing knows about tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol, TypedDict

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from torch import Tensor


class Config(BaseModel):
    """Base of every config section: frozen, strict about keys, finite numbers only.

    The string under a field is its documentation, its help and its line in `docs/config.md`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class UserError(ValueError):
    """A mistake that the user can mend: says what was given, what was expected, and the remedy (exit code 2)."""


class Message(TypedDict):
    """One chat message as chat templates take it."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Problem:
    """A problem and its reference solution.

    `answer` is the final answer that graders compare with; None means that the problem cannot be graded.
    `level` names a difficulty for reports and per-level figures; empty where a data set has none.
    """

    id: str
    problem: str
    solution: str
    answer: str | None = None
    level: str = ""


class StopReason(StrEnum):
    """Why a completion ended."""

    EOS = "eos"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class Turn:
    """One sampled completion. Ids and log-probabilities are stored once and never re-tokenised.

    `logprobs` are nats under the tempered, untruncated distribution; `completion_ids` include the closing EOS
    where `stop` is EOS. `weights_version` counts the optimizer steps behind the weights that sampled it.
    """

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    stop: StopReason
    weights_version: int


@dataclass(frozen=True, slots=True)
class Trajectory:
    """The turns of one attempt at a problem. `reward` None means "not gradable", never 0."""

    turns: tuple[Turn, ...]
    reward: float | None = None


@dataclass(frozen=True, slots=True)
class Group:
    """The attempts at one problem in one step."""

    problem: Problem
    trajectories: tuple[Trajectory, ...]

    @property
    def rewards(self) -> list[float]:
        """Rewards of the gradable attempts."""
        return [attempt.reward for attempt in self.trajectories if attempt.reward is not None]


@dataclass(frozen=True, slots=True)
class TokenStats:
    """Detached statistics of N scored completion tokens, each [N] in float32; what gates and logs read.

    All come from the unclipped, unextrapolated pair of student and first teacher view. Entropies and divergences in
    nats; `top1_agree`, `clip_frac`, `clipped_mass`, `reversed` in [0, 1].
    """

    divergence: Tensor
    """Unclipped divergence D_t."""
    student_logprob: Tensor
    """log p_S(y_t) of the sampled token."""
    teacher_logprob: Tensor
    """log p_T(y_t) of the sampled token; Delta_t = teacher_logprob - student_logprob."""
    student_entropy: Tensor
    teacher_entropy: Tensor
    student_max_prob: Tensor
    top1_agree: Tensor
    clip_frac: Tensor
    """Share of the position's vocabulary entries (pointwise) or 0/1 for the token (token; importance weight of the
    sampled-token loss) that the clip holds."""
    clipped_mass: Tensor
    """Teacher probability on clipped entries."""
    reverse_kl: Tensor
    """KL(student || teacher), whatever divergence is configured."""
    reversed: Tensor
    """1 where the clipped derivative on the teacher's top entry is positive: descent pushes it down."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """A number that a controller, router or curriculum wants taken with the model, without gradient.

    `kind` names a function of the measurement table in `train/probe.py`; `ratio` is the exposure at which it is
    taken, where that matters. The same measurement asked for by several policies is taken once.
    """

    kind: str
    ratio: float | None = None

    @property
    def key(self) -> str:
        """The name under which the number is handed to `observe` and logged: `probe_nll`, `gt_solution@0.5`."""
        return self.kind if self.ratio is None else f"{self.kind}@{self.ratio!r}"


@dataclass(frozen=True, slots=True)
class Observation:
    """What happened up to and including update `step`: `step` updates are done, the weights are theta_step.

    `stats` are statistics of the last update (its batch was sampled and scored with theta_(step-1)): keys of the
    metric table such as `loss/distil`, `mismatch/top1`, `student/confidence`, `reward/mean`, `route/distil_groups`.
    It is empty at step 0. `measured` holds the requested measurements of theta_step by `Measurement.key`; a
    measurement that could not be taken is absent. `by_problem` holds measurements of single training problems: kind,
    then problem id.
    """

    step: int
    stats: Mapping[str, float] = field(default_factory=dict)
    measured: Mapping[str, float] = field(default_factory=dict)
    by_problem: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


class Policy(Protocol):
    """The four verbs, and the requests, of everything stateful that steers a run: controllers, routers, curricula.

    State is JSON-able and complete: a policy restored from it continues exactly, its random generator included.
    """

    def wants(self, step: int) -> Sequence[Measurement]:
        """Name the measurements to take of theta_step (before update `step`)."""
        ...

    def observe(self, observation: Observation) -> None:
        """Take in one observation; called once per step, first with step 0 before any update."""
        ...

    def metrics(self) -> Mapping[str, float]:
        """Return numbers for the log of the step just observed, by keys of the metric table."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the whole state as JSON-able values."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        ...


class Stateless:
    """The four verbs for a policy that keeps no state and wants no measurement."""

    def wants(self, step: int) -> Sequence[Measurement]:  # noqa: ARG002
        return ()

    def observe(self, observation: Observation) -> None:
        pass

    def metrics(self) -> Mapping[str, float]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass
