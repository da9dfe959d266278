"""Whether a vLLM server serves the model that trains: name, vocabulary, and its very log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from atesd.rollout.adapters import model_cards
from atesd.rollout.answers import HalfAnswer, Order, completions_of, sampled_logprobs
from atesd.rollout.sampler import SamplingConfig
from atesd.rollout.server import Refused, Server
from atesd.types import UserError

TOLERANCE = 0.3
"""Nats by which the log-probabilities of a text may differ on average: in bfloat16 they do by some .02."""
_RARE_TOLERANCE = 2.0  # the same for one token that the model finds very improbable
CHECKED = SamplingConfig(temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=16)
"""How the text is sampled whose log-probabilities are compared."""


@dataclass(frozen=True, slots=True)
class Base:
    """The base of the model that trains: what a server must serve."""

    model: nn.Module
    prompt: tuple[int, ...]
    """What the server is asked to continue."""

    @property
    def vocabulary(self) -> int:
        """How many tokens it has logits of."""
        return int(cast("Any", self.model).config.get_text_config().vocab_size)

    def logprobs(self, completion: Sequence[int]) -> list[float]:
        """Return the log-probabilities of a completion of the prompt, the adapter switched off."""
        model, ids = cast("Any", self.model), [*self.prompt, *completion]
        was_training = self.model.training
        model.eval()
        try:
            with torch.no_grad(), model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext():
                logits_LV = model(input_ids=torch.tensor([ids], device=model.device)).logits[0]
        finally:
            model.train(was_training)
        logprobs_LV = logits_LV[len(self.prompt) - 1 : -1, : self.vocabulary].float().log_softmax(-1).cpu()
        found: list[float] = logprobs_LV.gather(-1, torch.tensor(completion)[:, None]).squeeze(-1).tolist()
        return found


@dataclass(frozen=True, slots=True)
class Served:
    """What a server serves."""

    name: str
    """Of the base model."""
    length: int | None
    """Most tokens of a prompt and its completion."""
    is_processed: bool
    """Whether its log-probabilities are of the distribution after temperature and cuts (`--logprobs-mode`)."""


def identify(server: Server, wanted: str | None, base: Base, path: str | None = None) -> Served:
    """Return what a server serves. UserError unless it is the base of the model that trains, and, where it is given, of
    this path: models that were trained from one another a little are not told apart by their log-probabilities.

    The server continues a text, which the trainer then scores. (The log-probabilities of a prompt would need no
    sampling, but end a vLLM 0.32 on a CPU that has adapters.)
    """
    bases = {str(card["id"]): card for card in model_cards(server) if not card.get("parent")}
    name = wanted or next(iter(bases), "")
    if name not in bases:
        raise UserError(
            f"the vLLM server at {server.url} serves {', '.join(bases) or 'nothing'}, not {wanted or 'a model'}: start "
            "it with the model that trains, or correct rollout.engine.model"
        )
    length = bases[name].get("max_model_len")
    least = len(base.prompt) + CHECKED.max_new_tokens
    if length and int(length) < least:
        raise UserError(
            f"the vLLM server at {server.url} has a context of {length} tokens, and the text by which its model is "
            f"known takes {least}: start it with a larger --max-model-len"
        )
    try:
        of_last = _of_last_token(server, name, base)
        _compare(server, name, base)
    except Refused as refused:
        raise UserError(
            f"the vLLM server at {server.url} refuses to continue a text ({refused.words}): it must be vLLM 0.10.2 or "
            "later, and whatever stands before it must let /v1/completions through"
        ) from refused
    except (HalfAnswer, LookupError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"the vLLM server at {server.url} answers incompletely ({error}): it must be vLLM 0.10.2 or later, with "
            "--logprobs-mode raw_logprobs or processed_logprobs"
        ) from error
    (own,) = base.logprobs([base.vocabulary - 1])
    if of_last != 0.0 and not abs(of_last - own) <= _RARE_TOLERANCE:
        raise UserError(
            f"the vLLM server at {server.url} gives a token the log-probability {of_last:g}, the model that trains "
            f"gives it {own:g}: start it with --logprobs-mode raw_logprobs or processed_logprobs"
        )
    root = str(bases[name].get("root"))
    if path is not None and root != path and Path(root).absolute() != Path(path).absolute():
        raise UserError(
            f"the vLLM server at {server.url} serves {root}, and the model is that of {path}: start it with that "
            "folder, or name what it serves in rollout.engine.model if it is a copy"
        )
    return Served(name, int(length) if length else None, is_processed=of_last == 0.0)


def _of_last_token(server: Server, name: str, base: Base) -> float:
    """Compare the vocabularies' sizes, and return the log-probability of the last token where no other is allowed.

    The token behind it may not be allowed. What is returned is the model's number where it is a raw one, and 0 where
    cuts come first. HalfAnswer where the server gives none.
    """
    last = base.vocabulary - 1
    try:
        answer = _forced(server, name, base, last)
    except Refused as refused:
        raise UserError(
            f"{_other(server, name)} (it refuses token {last}, the last of {base.vocabulary}: {refused.words})"
        ) from refused
    try:
        _forced(server, name, base, last + 1)
    except Refused:
        pass
    else:
        raise UserError(f"{_other(server, name)} (it has more tokens than {base.vocabulary})")
    (found,) = sampled_logprobs(answer["choices"][0])
    return found


def _compare(server: Server, name: str, base: Base) -> None:
    """UserError unless server and trainer give a text like log-probabilities. HalfAnswer where it is none."""
    order = Order(base.prompt, (0,), seed=0)
    answer = server.post("/v1/completions", order.body(name, CHECKED, ()))
    (text,) = completions_of(answer, order, name, CHECKED, ())
    own = base.logprobs(text.ids)
    gap = sum(abs(ours - its) for ours, its in zip(own, text.logprobs, strict=True)) / len(own)
    if not gap <= TOLERANCE:
        raise UserError(
            f"{_other(server, name)} (log-probabilities of the same text differ by {gap:.3g} nats on average, "
            f"{TOLERANCE:g} are allowed)"
        )


def _forced(server: Server, name: str, base: Base, token: int) -> Any:
    """Ask for one token behind the prompt, which may be but one."""
    body = Order(base.prompt, (0,), seed=0).body(name, CHECKED, ())
    return server.post("/v1/completions", body | {"max_tokens": 1, "allowed_token_ids": [token]})


def _other(server: Server, name: str) -> str:
    return (
        f"the vLLM server at {server.url} serves {name}, which is not the base of the model that trains: start it with "
        "that model"
    )
