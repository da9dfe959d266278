"""What is asked of a vLLM server's /v1/completions, and what of its answers is believed: whole ones alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from atesd.rollout.sampler import ROUNDING, SamplingConfig
from atesd.types import StopReason


class HalfAnswer(Exception):  # noqa: N818 (it is asked again)
    """An answer that lacks something, or is one to another question; says what."""


@dataclass(frozen=True, slots=True)
class Order:
    """Completions that are asked for together: as many as `places`, of one prompt.

    The attempts at a problem thus reach the server as one request: their common prompt is computed once, and read from
    its prefix cache by the others.
    """

    prompt: tuple[int, ...]
    places: tuple[int, ...]
    """Where they belong in what was asked for."""
    seed: int
    """From 0 to 2^62: vLLM gives completion i of a request the seed plus i."""
    once: bool = False
    """Whether one completion serves all places: at temperature 0, where vLLM gives no more of a prompt."""

    @property
    def count(self) -> int:
        """How many completions are asked for."""
        return 1 if self.once else len(self.places)

    def body(self, model: str, sampling: SamplingConfig, eos_ids: Sequence[int]) -> dict[str, Any]:
        """Return the request. Every setting is named: the server must not take one from a model's generation config."""
        return {
            "model": model,
            "prompt": list(self.prompt),
            "n": self.count,
            "seed": self.seed,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": 0.0,
            "min_tokens": 0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "ignore_eos": True,  # the server's end tokens may be others than ours
            "stop_token_ids": list(eos_ids),
            "logprobs": 0,  # of the sampled token alone
            "return_token_ids": True,
            "stream": False,
        }


@dataclass(frozen=True, slots=True)
class Completion:
    """One completion, with the end token that closes it."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    stop: StopReason


def completions_of(
    answer: Any, order: Order, model: str, sampling: SamplingConfig, eos_ids: Sequence[int]
) -> list[Completion]:
    """Return an answer's completions in the order of the request. HalfAnswer unless all of them are there, whole.

    That is: of the model asked for, of the prompt asked for, one a place, each with ids, one log-probability an id, and
    an end that its ids bear out.
    """
    if not isinstance(answer, Mapping):
        raise HalfAnswer("it is no JSON object")
    if answer.get("model") != model:
        raise HalfAnswer(f"it is of model {answer.get('model')!r}, asked was {model!r}")
    choices = answer.get("choices")
    if not isinstance(choices, list) or not all(isinstance(choice, Mapping) for choice in choices):
        raise HalfAnswer("it has no choices")
    wanted = order.count
    by_index = {choice.get("index"): choice for choice in choices}
    if len(choices) != wanted or set(by_index) != set(range(wanted)):
        raise HalfAnswer(f"it has {len(choices)} of {wanted} choices")
    return [_completion(by_index[index], order, sampling.max_new_tokens, eos_ids) for index in range(wanted)]


def _completion(choice: Mapping[str, Any], order: Order, longest: int, eos_ids: Sequence[int]) -> Completion:
    ids = choice.get("token_ids")
    if not (isinstance(ids, list) and ids and all(type(each) is int and each >= 0 for each in ids)):
        raise HalfAnswer("a choice has no token_ids (vLLM gives them since 0.10.2)")
    if choice.get("prompt_token_ids") not in (None, list(order.prompt)):
        raise HalfAnswer("a choice has another prompt than was asked for")
    logprobs = sampled_logprobs(choice)
    if len(logprobs) != len(ids):
        raise HalfAnswer(f"a choice has {len(logprobs)} log-probabilities for {len(ids)} token ids")
    end = choice.get("finish_reason")
    closed = [place for place, each in enumerate(ids) if each in eos_ids]
    is_closed = closed == [len(ids) - 1]
    is_full = len(ids) == longest and (is_closed or not closed)  # older servers say "length" of both
    is_whole = is_closed if end == "stop" else end == "length" and is_full
    if not is_whole or len(ids) > longest:
        raise HalfAnswer(
            f"a choice of {len(ids)} tokens, at most {longest} asked for, ended by {end!r} with "
            f"{len(closed)} end tokens in it"
        )
    return Completion(tuple(ids), tuple(logprobs), StopReason.EOS if is_closed else StopReason.LENGTH)


def sampled_logprobs(choice: Mapping[str, Any]) -> list[float]:
    """Return the log-probabilities of a choice's tokens. HalfAnswer unless all are finite and at most 0."""
    given = choice.get("logprobs")
    found = given.get("token_logprobs") if isinstance(given, Mapping) else None
    if not isinstance(found, list) or not all(isinstance(each, int | float) for each in found):
        raise HalfAnswer("a choice has no log-probabilities")
    if not all(math.isfinite(each) and each <= ROUNDING for each in found):
        raise HalfAnswer("a choice has log-probabilities that are none")
    return [min(0.0, float(each)) for each in found]
