"""Sampling in a loop of our own: the next token from the best candidates, and rows that have ended leave the batch.

B rows, T sampled positions, C candidates in falling order, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from atesd.rollout.llama import Decoder
from atesd.rollout.sampler import SamplingConfig
from atesd.rollout.weights import why_no_distribution
from atesd.types import NonFiniteError

Completion = tuple[list[int], list[float]]
"""Sampled ids and their log-probabilities."""
Complete = Callable[[Sequence[Sequence[int]]], list[Completion]]

# Rows are dropped once no more than this share of the batch goes on: the cache is then copied.
_STILL_GOING = 0.85
# Candidates beyond `top_k`, which show whether others are as probable as the last of them.
_MARGIN = 12
_FIRST_CANDIDATES = 64


@contextmanager
def decoding(model: Any, sampling: SamplingConfig, *, eos_ids: Collection[int], seed: int) -> Iterator[Complete]:
    """Yield what completes one batch of prompts after the other, on the weights as they stand now.

    The draws come from one generator of their own, a number for every prompt and position: they are the same whichever
    rows have ended. A completion ends with the first of `eos_ids`. NonFiniteError where the logits leave no
    distribution.
    """
    generator = torch.Generator().manual_seed(seed)
    decoder = Decoder(model)

    def complete(prompts: Sequence[Sequence[int]]) -> list[Completion]:
        uniform_TB = torch.rand(sampling.max_new_tokens, len(prompts), generator=generator).to(model.device)
        completions: list[Completion] = [([], []) for _ in prompts]
        rows = list(range(len(prompts)))  # the prompt of each row
        is_open = [True] * len(prompts)
        logits_BV, cache = decoder.read(prompts, sampling.max_new_tokens)
        for place, uniform_B in enumerate(uniform_TB):
            tokens_B, logprobs_B = _pick(model, logits_BV, sampling, uniform_B[rows])
            for row, token, logprob in zip(rows, tokens_B.tolist(), logprobs_B.tolist(), strict=True):
                if is_open[row]:
                    completions[row][0].append(token)
                    completions[row][1].append(logprob)
                    is_open[row] = token not in eos_ids
            going = [slot for slot, row in enumerate(rows) if is_open[row]]
            if not going or place + 1 == sampling.max_new_tokens:
                break
            if len(going) <= _STILL_GOING * len(rows):
                slots = torch.tensor(going, device=tokens_B.device)
                cache.keep(slots)
                tokens_B, rows = tokens_B[slots], [rows[slot] for slot in going]
            logits_BV = decoder.step(tokens_B, cache)
        return completions

    yield complete


def _pick(model: Any, logits_BV: Tensor, sampling: SamplingConfig, uniform_B: Tensor) -> tuple[Tensor, Tensor]:
    """Return tokens [B] and their log-probabilities [B] under the tempered, untruncated distribution."""
    temperature = sampling.temperature or 1.0
    raw_BV = logits_BV.float()
    scores_BV = raw_BV / temperature
    peak_B1 = scores_BV.amax(-1, keepdim=True)
    weights_BV = (scores_BV - peak_B1).exp_()
    mass_B1 = weights_BV.sum(-1, keepdim=True)
    # One NaN or +inf makes a whole row NaN; entries of probability 0 are allowed.
    if not bool(mass_B1.isfinite().all()):
        raise NonFiniteError(why_no_distribution(model, raw_BV, temperature))
    tokens_B1 = (
        draw(weights_BV, sampling, uniform_B[:, None]) if sampling.temperature else raw_BV.argmax(-1, keepdim=True)
    )
    logprobs_B1 = scores_BV.gather(-1, tokens_B1) - peak_B1 - mass_B1.log()
    return tokens_B1[:, 0], logprobs_B1[:, 0]


def draw(weights_BV: Tensor, sampling: SamplingConfig, uniform_B1: Tensor) -> Tensor:
    """Draw a token [B, 1] a row by inverting the distribution function of what top-k and then top-p leave.

    `weights` are probabilities up to a factor. As in transformers, tokens as probable as the last of the `top_k` stay,
    and top-p keeps the fewest best tokens whose share of what top-k leaves reaches it.
    """
    if 0 < sampling.top_k < weights_BV.shape[-1]:
        best_BC, ids_BC = _top_k(weights_BV, sampling.top_k)
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


def _top_k(weights_BV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return weights and ids of the best `count` and of those equal to the last of them; others have weight 0."""

    def has_all(best_BC: Tensor) -> Tensor:
        return (best_BC[:, -1] < best_BC[:, count - 1]) | (best_BC[:, -1] == 0)

    best_BC, ids_BC = _best(weights_BV, count + _MARGIN, has_all)
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
