"""The nouns of the project: the `Config` base, problems, completions, measurements and observations.

Nothing here depends on anything else in the package, and nothing knows about tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from inspect import signature
from math import isfinite
from typing import Any, ClassVar, LiteralString, NamedTuple, Protocol, TypedDict, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError


class Config(BaseModel):
    """Base of every config section: frozen, strict about keys, finite numbers only, true and false no numbers.

    The string under a field is its documentation, its help and its line in `docs/config.md`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _numbers_are_plain(cls, given: Any) -> Any:
        """Refuse true and false where a number belongs (pydantic would read 1 and 0), and integers beyond 64 bits."""
        if not isinstance(given, Mapping):
            return given
        mistakes = [
            InitErrorDetails(type=PydanticCustomError("plain_number", mistake), loc=(name,), input=given[name])
            for name, field in cls.model_fields.items()
            if name in given and (mistake := _mistaken_number(given[name], field.annotation))
        ]
        if mistakes:
            raise ValidationError.from_exception_data(cls.__name__, mistakes)
        return given

    def differs(self, name: str) -> bool:
        """Tell whether a field has another value than its default, which is the neutral one in the tree's sections."""
        return bool(getattr(self, name) != type(self).model_fields[name].default)


_LARGEST = 2**63 - 1


def _mistaken_number(value: Any, annotation: Any) -> LiteralString | None:
    values = value if isinstance(value, list | tuple) else (value,)
    if any(isinstance(each, bool) for each in values) and _takes_numbers_only(annotation):
        return "Input should be a number, not true or false"
    if any(isinstance(each, int) and abs(each) > _LARGEST for each in values):
        return "Input should be a number of at most 64 bits"
    return None


def _takes_numbers_only(annotation: Any) -> bool:
    """Tell whether an annotation names int or float, and bool nowhere."""
    named = set(_leaves(annotation))
    return bool(named & {int, float}) and bool not in named


def _leaves(annotation: Any) -> Iterator[type]:
    if isinstance(annotation, type):
        yield annotation
    for part in get_args(annotation):
        yield from _leaves(part)


class Method(Config):
    """A choice that a recipe makes by `kind`; the base of every part's methods.

    `declares` names what each method of the part must say of itself: its capabilities, which the rest of the program
    reads instead of asking for its type. TypeError, as soon as its class is made, for a method that lacks one, or whose
    `build` does not take `build_takes`.
    """

    declares: ClassVar[tuple[str, ...]] = ("describe",)
    build_takes: ClassVar[tuple[str, ...]] = ("run",)
    """What `build` is called with."""

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        missing = [name for name in cls.declares if not hasattr(cls, name) and name not in cls.model_fields]
        if "kind" in cls.model_fields and missing:
            base = next(parent.__name__ for parent in cls.__mro__[1:] if "declares" in vars(parent))
            raise TypeError(f"method {cls.__name__} does not declare {', '.join(missing)}: see {base}")
        if "kind" in cls.model_fields and not _takes(getattr(cls, "build", None), len(cls.build_takes)):
            raise TypeError(f"method {cls.__name__} must define build(self, {', '.join(cls.build_takes)})")
        if "kind" in cls.model_fields and not _takes(getattr(cls, "describe", None), 0):
            raise TypeError(f"method {cls.__name__} must define describe(self)")


def _takes(build: object, count: int) -> bool:
    """Whether a method, where there is one, can be called with so many arguments behind `self`."""
    if not callable(build):
        return True
    given = [*signature(build).parameters.values()][1:]
    positional = [each for each in given if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    needed = sum(each.default is each.empty for each in positional)
    return needed <= count and (count <= len(positional) or any(each.kind is each.VAR_POSITIONAL for each in given))


class UserError(ValueError):
    """A mistake that the user can mend: says what was given, what was expected, and the remedy (exit code 2)."""


class Elsewhere(Exception):  # noqa: N818 (it is not this process's error)
    """Another process of the run failed, and tells the user."""


class NonFiniteError(UserError):
    """A number that must be finite is not: says where it first appeared, and the remedy."""


def one_line(text: str) -> str:
    """Return the text on one line: what is not printable as its escape."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, cut to a readable length; its class where it says nothing."""
    text = str(error).strip()
    return one_line(text.splitlines()[0][:200]) if text else type(error).__name__


def shown(value: object, longest: int = 200) -> str:
    """Return a value as Python writes it, on one line and cut to a readable length."""
    try:
        text = one_line(repr(value))
    except (ValueError, RecursionError):  # too many digits, or too deep
        return "too large to show"
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


class Message(TypedDict):
    """One chat message as chat templates take it."""

    role: str
    content: str


class ExpertTurn(NamedTuple):
    """One turn of an expert in an environment."""

    reply: str
    """What the expert said."""
    text: str
    """The turn as a hint shows it, with the white space behind it."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A problem and its reference solution.

    `answer` is the final answer that graders compare with; None means that the problem cannot be graded. Where the
    problem is a task in an environment, `expert` is a trajectory that reaches its goal: the texts of its turns make up
    the solution, and the answer is the goal in words.
    `level` names a difficulty for reports and per-level figures; empty where a data set has none.
    `extra` holds further columns for reward functions; no part of what makes two problems equal.
    """

    id: str
    problem: str
    solution: str
    answer: str | None = None
    level: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    expert: tuple[ExpertTurn, ...] = field(default=(), compare=False, repr=False)


def reward_columns(problems: Sequence[Problem], among: Sequence[Problem] = ()) -> dict[str, list[Any]]:
    """Return what reward functions read besides prompts and completions, one entry a problem.

    A further column that a problem lacks is None there. `among`: those that are graded elsewhere at the same time,
    whose columns are given as well.
    """
    extra = dict.fromkeys(name for problem in among or problems for name in problem.extra)
    columns: dict[str, list[Any]] = {name: [problem.extra.get(name) for problem in problems] for name in extra}
    return columns | {
        "answer": [problem.answer for problem in problems],
        "solution": [problem.solution for problem in problems],
        "id": [problem.id for problem in problems],
    }


class StopReason(StrEnum):
    """Why a completion ended."""

    EOS = "eos"
    LENGTH = "length"


class Ending(StrEnum):
    """Why an attempt ended. What the environment failed at is not graded, and trains nothing."""

    OVER = "over"
    """The environment ended it."""
    LIMIT = "limit"
    """The limit of turns was reached."""
    LENGTH = "length"
    """A reply was cut off at the length limit: graded as wrong."""
    CONTEXT = "context"
    """Another turn would not have fitted the model's context: graded as wrong."""
    ERROR = "error"
    """The environment raised an exception, or its process ended."""
    HANG = "hang"
    """The environment did not answer within its time limit."""
    NOT_TEXT = "not_text"
    """The environment said something that is no text."""
    BAD_REWARD = "bad_reward"
    """The environment's reward is no finite number."""

    @property
    def failed(self) -> bool:
        """Whether the environment is to blame."""
        return self in (Ending.ERROR, Ending.HANG, Ending.NOT_TEXT, Ending.BAD_REWARD)


@dataclass(frozen=True, slots=True)
class Turn:
    """One sampled completion, and one training row. Ids and log-probabilities are stored once, never re-tokenised.

    `prompt_ids` of a later turn begin with the prompt and completion ids of the turn before, as sampled.
    `logprobs` are nats under the tempered, untruncated distribution; `completion_ids` include the closing EOS
    where `stop` is EOS. `weights_version` counts the steps of training behind the weights that sampled it.
    """

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    stop: StopReason
    weights_version: int


@dataclass(frozen=True, slots=True)
class Trajectory:
    """The turns of one attempt at a problem. `reward` is the whole attempt's; None means "not gradable", never 0."""

    turns: tuple[Turn, ...]
    reward: float | None = None
    rewards: Mapping[str, float | None] = field(default_factory=dict, hash=False)
    """What each of several rewards gave, by name, in the recipe's order; empty where there is one."""
    opening: str = ""
    """What the environment said behind the recipe's prompt, before the first turn."""
    ended: Ending = Ending.OVER
    invalid: int = 0
    """Replies that the environment could not take for an action."""
    said: tuple[str, ...] = ()
    """What the environment answered to each turn: one less where the last one ended the attempt."""

    @property
    def verdict(self) -> float | None:
        """The reward that says whether the attempt is correct: the first of several, without its weight."""
        return next(iter(self.rewards.values())) if self.rewards else self.reward

    @property
    def final(self) -> Turn:
        """The turn that ends the attempt: what is graded, and where an attempt is cut off."""
        return self.turns[-1]

    @property
    def truncated(self) -> bool:
        """Whether a completion hit its length limit, or the conversation the model's context: it ends the attempt."""
        return self.final.stop is StopReason.LENGTH or self.ended is Ending.CONTEXT

    def told(self, turn: Turn) -> tuple[int, ...]:
        """Return what stands between the prompt of the first turn and a later one's reply, in ids."""
        return turn.prompt_ids[len(self.turns[0].prompt_ids) :]

    def observation(self, place: int) -> str:
        """Return what the student read just before turn `place`, from 0, besides the recipe's prompt."""
        return self.said[place - 1] if place else self.opening.removeprefix("\n")

    @property
    def num_tokens(self) -> int:
        """Sampled tokens of all turns."""
        return sum(len(turn.completion_ids) for turn in self.turns)


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
class Measurement:
    """A number, or a table of them, that a policy wants taken with the model, without gradient.

    `kind` names an entry of the measurement table in `train/measure.py`; `ratio` is the exposure at which it is
    taken, where that matters. The same measurement asked for by several policies is taken once.
    """

    kind: str
    ratio: float | None = None

    @property
    def key(self) -> str:
        """The name under which it is logged: `probe_nll`, `gt_solution@0.5`."""
        return self.kind if self.ratio is None else f"{self.kind}@{self.ratio!r}"


class ContractPoint(NamedTuple):
    """What is measured of one contract class at one ratio."""

    p: float
    """The teacher's probability of its own modal token, from the mean logit over the positions."""
    b: float
    """The base's probability of the same tokens."""
    hits: int
    """Number of positions."""


Reading = float | Mapping[str, float] | Mapping[str, ContractPoint]
"""What a measurement gives: a number, numbers by problem id, or points by contract class."""


@dataclass(frozen=True, slots=True)
class Observation:
    """What happened up to and including update `step`: `step` updates are done, the weights are theta_step.

    `stats` are statistics of the last update (its batch was sampled and scored with theta_(step-1)): keys of the
    metric table such as `loss/distil`, `mismatch/top1`, `student/confidence`, `reward/mean`, `route/distil_groups`.
    It is empty at step 0. `measured` holds the requested measurements of theta_step; one that could not be taken is
    absent.
    """

    step: int
    stats: Mapping[str, float] = field(default_factory=dict)
    measured: Mapping[Measurement, Reading] = field(default_factory=dict)

    def number(self, measurement: Measurement) -> float | None:
        """Return a measured number; None where it is missing or not finite."""
        value = self.measured.get(measurement)
        return float(value) if isinstance(value, float | int) and isfinite(value) else None

    def table(self, measurement: Measurement) -> Mapping[str, Any]:
        """Return a measured table; an empty one where it is missing."""
        value = self.measured.get(measurement)
        return value if isinstance(value, Mapping) else {}


class Policy(Protocol):
    """The four verbs, and the requests, of all that steers a run: controllers, revealers, routers, curricula, ...

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
