"""What samples completions: the settings and the protocol of every rollout engine."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Protocol, TypeVar

from pydantic import AfterValidator, Field
from torch import Tensor, nn

from atesd.types import Config, Method, Turn, UserError, shown

T = TypeVar("T")

ROUNDING = 1e-3  # nats that a log-probability may lie above 0


def _warm(temperature: float) -> float:
    if 0 < temperature < 1e-3:
        raise ValueError(f"{temperature:g} is too small: at least .001, or 0 for the most probable token")
    return temperature


Temperature = Annotated[float, Field(ge=0, le=1e3), AfterValidator(_warm)]
"""0, or from .001 to 1000: with less, logits divided by it leave the range of float32."""


class SamplingConfig(Config):
    """How completions are sampled. Defaults: OPSD's released recipe."""

    temperature: Temperature = 1.1
    """Divides the logits: from .001 to 1000; 0 takes the most probable token (evaluation only)."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Sample from the smallest set of tokens with this mass; 1 switches the cut off."""
    top_k: Annotated[int, Field(ge=0)] = 20
    """Sample from this many most probable tokens; 0 switches the cut off."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 1024
    """Longest completion; one that reaches it without an end token counts as truncated and grades as wrong."""
    group_size: Annotated[int, Field(ge=1)] = 1
    """Completions a problem and step."""
    batch_tokens: Annotated[int, Field(ge=1)] = 262_144
    """Padded positions (prompt and completion) that one engine call may hold: what bounds the memory of its cache."""


@dataclass(frozen=True, slots=True)
class Weights:
    """The student's weights after `version` steps, for engines that hold a copy of them."""

    version: int
    is_adapter: bool
    """Whether only adapters train: then `tensors` are theirs, for an engine that has loaded the base model itself."""
    tensors: Callable[[], Mapping[str, Tensor]]
    """Returns the weights that train, by the name that the model's own `state_dict` gives them."""


class EngineMethod(Method):
    """Base of engines' sections: `build(model, renderer)` returns a `Sampler`."""

    declares: ClassVar[tuple[str, ...]] = ("describe", "build")
    build_takes: ClassVar[tuple[str, ...]] = ("model", "renderer")

    samples_in_place: ClassVar[bool] = False
    """Whether it samples from whatever weights are in the model, so that the teacher can write completions too."""

    samples_parts: ClassVar[bool] = False
    """Whether `sample` takes `part`, the places of the prompts to complete as they would be among all: so that each of
    several processes samples its own."""

    guesses: ClassVar[bool] = False
    """Whether `sample` takes `references`, the ids of what each completion might be; they may save time, and change no
    sample."""

    meets: ClassVar[bool] = False
    """Whether `build` takes `team`: the processes of the run, where these are several."""

    samples_ahead: ClassVar[bool] = False
    """Whether its sampler has `submit`, and samples while the trainer computes (`AheadSampler`)."""

    def path(self, model: nn.Module, length: int) -> str:  # noqa: ARG002
        """Say by which way completions of `length` tokens are sampled, where the model decides; for env.json."""
        return ""

    def refuse_training(self, sampler: Sampler, sampling: SamplingConfig) -> None:
        """UserError where completions of the sampler that it built cannot be trained on with these settings."""

    def room(self, sampler: Sampler) -> int | None:  # noqa: ARG002
        """Return how many tokens of prompt and completion the sampler that it built takes; None for the model's own."""
        return None


def refuse_beyond(room: int | None, prompt: int, completion: int) -> None:
    """UserError where an engine with room for so many tokens does not hold a prompt and a completion."""
    if room is not None and prompt + completion > room:
        raise UserError(
            f"a prompt of {prompt} tokens plus a completion of up to {completion} (max_new_tokens) exceeds the "
            f"engine's context of {room}: start it with a larger one (vLLM: --max-model-len), lower max_new_tokens or "
            "leave out the longest problems"
        )


class Sampler(Protocol):
    """An engine that samples from the student's weights."""

    def sample(self, prompts: Sequence[Sequence[int]], sampling: SamplingConfig, *, seed: int) -> list[Turn]:
        """Sample one completion a prompt, in order; the same weights, prompts and seed give the same completions."""
        ...

    def sync(self, weights: Weights) -> None:
        """Take over the student's weights; later samples carry their version."""
        ...


def refuse_odd_turns(
    sampler: Sampler, turns: object, prompts: Sequence[Sequence[int]], vocabulary: int | None = None
) -> None:
    """UserError unless a sampler gave one turn a prompt, in order: others would be graded and trained as if it had.

    `vocabulary`: how many tokens the model knows, where that is known; its embedding fails by others.
    """
    what = f"{type(sampler).__name__}.sample returned"
    remedy = "return one atesd.types.Turn a prompt, in the order of the prompts"
    if not isinstance(turns, Sequence) or not all(isinstance(turn, Turn) for turn in turns):
        raise UserError(f"{what} {shown(turns, 60)}: {remedy}")
    if len(turns) != len(prompts):
        raise UserError(f"{what} {len(turns)} turns for {len(prompts)} prompts: {remedy}")
    for place, (turn, prompt) in enumerate(zip(turns, prompts, strict=True)):
        if tuple(turn.prompt_ids) != tuple(prompt):
            raise UserError(f"{what} a turn at place {place} whose prompt_ids are not the prompt there: {remedy}")
        if turn.logprobs and len(turn.logprobs) != len(turn.completion_ids):
            raise UserError(
                f"{what} {len(turn.logprobs)} logprobs for {len(turn.completion_ids)} completion_ids at place {place}: "
                "give each token its own, or none at all"
            )
        odd = next((each for each in turn.logprobs if not (math.isfinite(each) and each <= ROUNDING)), None)
        if odd is not None:
            raise UserError(
                f"{what} the log-probability {odd:g} at place {place}: give those of the sampled tokens, finite and at "
                "most 0, or none at all"
            )
        known = range(2**63 if vocabulary is None else vocabulary)
        if any(
            each not in known for each in (min(turn.completion_ids, default=0), max(turn.completion_ids, default=0))
        ):
            raise UserError(
                f"{what} ids from {min(turn.completion_ids)} to {max(turn.completion_ids)} at place {place}, and the "
                f"model knows {vocabulary} tokens, from 0: give ids of its own tokenizer"
            )


def _nothing() -> None:
    pass


@dataclass(frozen=True, slots=True)
class Submitted:
    """Completions that are under way."""

    result: Callable[[], list[Turn]]
    """Waits for them, and returns them as `Sampler.sample` does. Called once, by the thread that trains."""
    drop: Callable[[], None] = _nothing
    """Gives them up without waiting."""
    seconds: Callable[[], float] = lambda: 0.0
    """How long they were under way so far."""


class AheadSampler(Sampler, Protocol):
    """A sampler that need not be waited for."""

    def submit(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingConfig,
        *,
        seed: int,
        part: Sequence[int] | None = None,
    ) -> Submitted:
        """Ask for what `sample` would return now, whatever is synced before it is there; `part` as in an engine that
        `samples_parts`.
        """
        ...


class Team(Protocol):
    """The processes of a run, as far as an engine needs to know them."""

    rank: int
    size: int

    def collect(self, mine: T) -> list[T]:
        """Return one object of every process, by its number; all must call it."""
        ...


class Alone:
    """A team of one."""

    rank = 0
    size = 1

    def collect(self, mine: T) -> list[T]:
        """Return the one object."""
        return [mine]
