"""Sampling in a loop of our own: the next token from the best candidates, and rows that have ended leave the batch.

B rows, T sampled positions, C candidates in falling order, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from atesd.codes.steer import Codes
from atesd.rollout.llama import Decoder
from atesd.rollout.sampler import SamplingConfig
from atesd.rollout.weights import why_no_distribution
from atesd.transfer import sent
from atesd.types import NonFiniteError

Completion = tuple[list[int], list[float]]
"""Sampled ids and their log-probabilities."""
Complete = Callable[[Sequence[Sequence[int]], Sequence[int] | None], list[Completion]]
"""Completes prompts, or those at some places among them with what is drawn when all are."""

# Rows are dropped once no more than this share of the batch goes on: the cache is then copied.
_STILL_GOING = 0.85
# Candidates beyond `top_k`, which show whether others are as probable as the last of them.
_MARGIN = 12
# Positions between two looks at which rows have ended, 1 elsewhere: the CPU prepares that many while a GPU works.
_LOOK_EVERY = {"cuda": 8}
_FIRST_CANDIDATES = 64


@contextmanager
def decoding(
    model: Any, sampling: SamplingConfig, *, eos_ids: Collection[int], seed: int, codes: Codes | None = None
) -> Iterator[Complete]:
    """Yield what completes one batch of prompts after the other, on the weights as they stand now.

    The draws come from one generator of their own, a number for every prompt and position: they are the same whichever
    rows have ended. A completion ends with the first of `eos_ids`; `codes` steer it. NonFiniteError where the logits
    leave no distribution.
    """
    generator = torch.Generator().manual_seed(seed)
    decoder = Decoder(model, codes)
    ends = sent(torch.tensor(list(eos_ids)), model.device)
    look_every = _LOOK_EVERY.get(model.device.type, 1)

    def complete(prompts: Sequence[Sequence[int]], part: Sequence[int] | None = None) -> list[Completion]:
        uniform_TB = torch.rand(sampling.max_new_tokens, len(prompts), generator=generator)
        if part is not None:
            prompts, uniform_TB = [prompts[place] for place in part], uniform_TB[:, list(part)]
        if not prompts:
            return []
        uniform_TB = sent(uniform_TB, model.device)
        found = walk(prompts, uniform_TB, []) if look_every > 1 else None
        if found is None:
            found = walk(prompts, uniform_TB, None)
            assert found is not None, "a walk that reads has all candidates"
        return found

    def walk(
        prompts: Sequence[Sequence[int]], uniform_TB: Tensor, unread: list[Tensor] | None
    ) -> list[Completion] | None:
        """Sample all positions. With `unread` nothing is read between two looks; None if candidates were too few."""
        logits_BV, cache = decoder.read(prompts, sampling.max_new_tokens)
        rows = list(range(len(prompts)))  # the prompt of each row, here and there
        rows_B = torch.arange(len(prompts), device=model.device)
        ended_B = torch.zeros_like(rows_B, dtype=torch.bool)
        sampled: list[tuple[list[int], Tensor, Tensor]] = []
        for place, uniform_B in enumerate(uniform_TB):
            tokens_B, logprobs_B, is_sound = _pick(logits_BV, sampling, uniform_B[rows_B], unread)
            sampled.append((rows, tokens_B, logprobs_B))
            ended_B = ended_B | torch.isin(tokens_B, ends)
            is_last = place + 1 == sampling.max_new_tokens
            if is_last or (place + 1) % look_every == 0:  # the only time that anything is waited for
                flags = torch.stack((is_sound, *(unread or ())))
                *has_ended, is_sound_now, had_all = torch.cat((ended_B, is_sound[None], flags.all()[None])).tolist()
                if not is_sound_now:
                    raise NonFiniteError(why_no_distribution(model, logits_BV.float(), sampling.temperature or 1.0))
                if not had_all:
                    return None
                if unread:
                    unread.clear()
                going = [slot for slot, done in enumerate(has_ended) if not done]
                if not going or is_last:
                    break
                if len(going) <= _STILL_GOING * len(has_ended):
                    slots = sent(torch.tensor(going), model.device)
                    rows = [rows[slot] for slot in going]
                    cache.keep(slots)
                    rows_B, tokens_B, ended_B = rows_B[slots], tokens_B[slots], ended_B[slots]
            logits_BV = decoder.step(tokens_B, cache)
        return _by_row(sampled, len(prompts), set(eos_ids))

    yield complete


def _by_row(
    sampled: Sequence[tuple[list[int], Tensor, Tensor]], count: int, eos_ids: Collection[int]
) -> list[Completion]:
    """Sort tokens and log-probabilities of all positions by prompt, each up to its first end token.

    Both come in one transfer, the log-probabilities as the bits of their float32.
    """
    completions: list[Completion] = [([], []) for _ in range(count)]
    rows, tokens_of, logprobs_of = zip(*sampled, strict=True)
    both = torch.stack((torch.cat(tokens_of).to(torch.int32), torch.cat(logprobs_of).view(torch.int32))).cpu()
    columns = (row for each in rows for row in each), both[0].tolist(), both[1].view(torch.float32).tolist()
    for row, token, logprob in zip(*columns, strict=True):
        tokens, logprobs = completions[row]
        if not tokens or tokens[-1] not in eos_ids:
            tokens.append(token)
            logprobs.append(logprob)
    return completions


def _pick(
    logits_BV: Tensor, sampling: SamplingConfig, uniform_B: Tensor, unread: list[Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens [B], their log-probabilities [B] under the tempered, untruncated distribution, and if all is sound.

    Where it is not, tokens mean nothing, but are of the vocabulary.
    """
    scores_BV = logits_BV.float()
    if sampling.temperature not in (0.0, 1.0):
        scores_BV = scores_BV / sampling.temperature
    peak_B1 = scores_BV.amax(-1, keepdim=True)
    weights_BV = (scores_BV - peak_B1).exp_()
    mass_B1 = weights_BV.sum(-1, keepdim=True)
    if sampling.temperature:
        tokens_B1 = draw(weights_BV, sampling, uniform_B[:, None], unread).clamp_(max=scores_BV.shape[-1] - 1)
    else:
        tokens_B1 = scores_BV.argmax(-1, keepdim=True)
    logprobs_B1 = scores_BV.gather(-1, tokens_B1) - peak_B1 - mass_B1.log()
    # One NaN or +inf makes a whole row NaN; entries of probability 0 are allowed.
    return tokens_B1[:, 0], logprobs_B1[:, 0], mass_B1.isfinite().all()


def draw(
    weights_BV: Tensor, sampling: SamplingConfig, uniform_B1: Tensor, unread: list[Tensor] | None = None
) -> Tensor:
    """Draw a token [B, 1] a row by inverting the distribution function of what top-k and then top-p leave.

    `weights` are probabilities up to a factor. As in transformers, tokens as probable as the last of the `top_k` stay,
    and top-p keeps the fewest best tokens whose share of what top-k leaves reaches it.

    With `unread` top-k trusts that few tokens are as probable as its last one, and adds whether that was so.
    """
    if 0 < sampling.top_k < weights_BV.shape[-1]:
        best_BC, ids_BC = _top_k(weights_BV, sampling.top_k, unread)
        whole_B1 = best_BC.sum(-1, keepdim=True)
    elif sampling.top_p < 1:
        whole_B1 = weights_BV.sum(-1, keepdim=True)
        needed_B1 = sampling.top_p * whole_B1
        best_BC, ids_BC = _best(
            weights_BV, _FIRST_CANDIDATES, lambda best_BC: best_BC.sum(-1, keepdim=True) >= needed_B1
        )
    else:
        return _invert(weights_BV, uniform_B1)
    if sampling.top_p < 1:
        before_BC = best_BC.cumsum(-1) - best_BC
        best_BC = best_BC.masked_fill(before_BC >= sampling.top_p * whole_B1, 0.0)
    return ids_BC.gather(-1, _invert(best_BC, uniform_B1))


def _top_k(weights_BV: Tensor, count: int, unread: list[Tensor] | None) -> tuple[Tensor, Tensor]:
    """Return weights and ids of the best `count` and of those equal to the last of them; others have weight 0."""

    def has_all(best_BC: Tensor) -> Tensor:
        return (best_BC[:, -1] < best_BC[:, count - 1]) | (best_BC[:, -1] == 0)

    width = count + _MARGIN
    if unread is None or width >= weights_BV.shape[-1]:
        best_BC, ids_BC = _best(weights_BV, width, has_all)
    else:
        best_BC, ids_BC = weights_BV.topk(width)
        unread.append(has_all(best_BC).all())
    return best_BC.masked_fill(best_BC < best_BC[:, count - 1 : count], 0.0), ids_BC


def _best(weights_BV: Tensor, width: int, has_all: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Return the best `width` weights and ids in falling order, or as many more as a row needs to have all."""
    limit = weights_BV.shape[-1]
    while width < limit:
        best_BC, ids_BC = weights_BV.topk(width)
        if bool(has_all(best_BC).all()):
            return best_BC, ids_BC
        width *= 4
    best_BC, ids_BC = weights_BV.sort(descending=True)
    return best_BC, ids_BC


def _invert(weights_BC: Tensor, uniform_B1: Tensor) -> Tensor:
    """Return the first index [B, 1] whose cumulative weight exceeds `uniform` of the whole: never one of weight 0."""
    cumulative_BC = weights_BC.cumsum(-1)
    whole_B1 = cumulative_BC[:, -1:]
    # torch.rand stays 2**-24 below 1, so that the product rounds to less than the whole.
    return torch.searchsorted(cumulative_BC, uniform_B1 * whole_B1, right=True)
