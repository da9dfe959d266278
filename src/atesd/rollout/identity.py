"""Whether a vLLM server serves the model that trains: name, vocabulary, length, and its very log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from atesd.rollout.adapters import model_cards
from atesd.rollout.answers import HalfAnswer, prompt_logprobs, sampled_logprobs
from atesd.rollout.server import Refused, Server
from atesd.types import UserError

TOLERANCE = 0.3
"""Nats by which the log-probabilities of a text may differ on average: in bfloat16 they do by some .02."""
_RARE_TOLERANCE = 2.0  # the same for one token that the model finds very improbable


@dataclass(frozen=True, slots=True)
class Expected:
    """What the base of the model that trains makes of a text: the numbers by which it is known again."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """Of each token of the text but the first."""
    last_logprob: float
    """Of the vocabulary's last token, behind the text."""
    vocabulary: int


@dataclass(frozen=True, slots=True)
class Served:
    """What a server serves."""

    name: str
    """Of the base model."""
    length: int | None
    """Most tokens of a prompt and its completion."""
    is_processed: bool
    """Whether its log-probabilities are of the distribution after temperature and cuts (`--logprobs-mode`)."""


def expected(model: nn.Module, ids: Sequence[int]) -> Expected:
    """Return the numbers of a model, its adapter switched off."""
    vocabulary = int(cast("Any", model).config.get_text_config().vocab_size)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext():
            logits_1LV = model(input_ids=torch.tensor([list(ids)], device=cast("Any", model).device)).logits
    finally:
        model.train(was_training)
    logprobs_LV = logits_1LV[0, :, :vocabulary].float().log_softmax(-1).cpu()
    read_L = logprobs_LV[:-1].gather(-1, torch.tensor(ids[1:])[:, None]).squeeze(-1)
    return Expected(tuple(ids), tuple(read_L.tolist()), float(logprobs_LV[-1, -1]), vocabulary)


def identify(server: Server, wanted: str | None, numbers: Expected) -> Served:
    """Return what a server serves. UserError unless it is the base of the model that trains.

    A token that is the only one allowed is the vocabulary's last: where it was allowed and the one behind it was not,
    the vocabularies are of one size. Its log-probability is that of the model, or 0 where cuts come first.
    """
    cards = model_cards(server)
    bases = {str(card["id"]): card for card in cards if not card.get("parent")}
    name = wanted or next(iter(bases), "")
    if name not in bases:
        raise UserError(
            f"the vLLM server at {server.url} serves {', '.join(bases) or 'nothing'}, not {wanted or 'a model'}: start "
            "it with the model that trains, or correct rollout.engine.model"
        )
    last = numbers.vocabulary - 1
    try:
        answer = _only(server, name, numbers.ids, last)
        is_larger = _takes(server, name, numbers.ids, last + 1)
    except Refused as refused:
        raise UserError(
            f"{_other(server, name)} (it refuses token {last}, the last of {numbers.vocabulary}: {refused.words})"
        ) from refused
    if is_larger:
        raise UserError(f"{_other(server, name)} (it has more tokens than {numbers.vocabulary})")
    try:
        choice = answer["choices"][0]
        found = prompt_logprobs(choice, numbers.ids)
        (last_logprob,) = sampled_logprobs(choice)
    except (HalfAnswer, LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"the vLLM server at {server.url} answers incompletely ({error}): it must be vLLM 0.10.2 or later, "
            'with --logprobs-mode "raw_logprobs" or "processed_logprobs"'
        ) from error
    gap = sum(abs(ours - its) for ours, its in zip(numbers.logprobs, found, strict=True)) / len(found)
    if not gap <= TOLERANCE:
        raise UserError(
            f"{_other(server, name)} (log-probabilities of the same text differ by {gap:.3g} nats on average, "
            f"{TOLERANCE:g} are allowed)"
        )
    is_processed = last_logprob == 0.0
    if not is_processed and not abs(last_logprob - numbers.last_logprob) <= _RARE_TOLERANCE:
        raise UserError(
            f"the vLLM server at {server.url} gives a token the log-probability {last_logprob:g}, the model that "
            f"trains gives it {numbers.last_logprob:g}: start it with --logprobs-mode raw_logprobs or "
            "processed_logprobs"
        )
    length = bases[name].get("max_model_len")
    return Served(name, int(length) if length else None, is_processed)


def _only(server: Server, name: str, ids: Sequence[int], token: int) -> Any:
    """Ask for a text's log-probabilities, and for one token behind it, which may be but one."""
    return server.post(
        "/v1/completions",
        {
            "model": name,
            "prompt": list(ids),
            "max_tokens": 1,
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "allowed_token_ids": [token],
            "logprobs": 0,
            "prompt_logprobs": 0,
            "return_token_ids": True,
        },
    )


def _takes(server: Server, name: str, ids: Sequence[int], token: int) -> bool:
    try:
        _only(server, name, ids, token)
    except Refused:
        return False
    return True


def _other(server: Server, name: str) -> str:
    return (
        f"the vLLM server at {server.url} serves {name}, which is not the base of the model that trains: start it with "
        "that model"
    )
