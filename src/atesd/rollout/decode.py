"""Sampling in a loop of our own: the next token from the best candidates, and rows that have ended leave the batch.

B rows, P positions of a pass, N = B P, T sampled positions, C candidates in falling order, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from atesd.codes.steer import Codes
from atesd.rollout.guess import Guesses
from atesd.rollout.llama import Decoder
from atesd.rollout.sampler import SamplingConfig
from atesd.rollout.weights import why_no_distribution
from atesd.transfer import sent
from atesd.types import NonFiniteError

Completion = tuple[list[int], list[float]]
"""Sampled ids and their log-probabilities."""
Complete = Callable[[Sequence[Sequence[int]], Sequence[int] | None, Sequence[Sequence[int]]], list[Completion]]
"""Completes prompts, or those at some places among them with what is drawn when all are; reference solutions of all
prompts, where they are known, may be used to guess, and change no sample."""

# Rows are dropped once no more than this share of the batch goes on: the cache is then copied.
_STILL_GOING = 0.85
# Candidates beyond `top_k`, which show whether others are as probable as the last of them.
_MARGIN = 12
# Positions between two looks at which rows have ended, 1 elsewhere: the CPU prepares that many while a GPU works.
_LOOK_EVERY = {"cuda": 8}
_FIRST_CANDIDATES = 64


@contextmanager
def decoding(
    model: Any,
    sampling: SamplingConfig,
    *,
    eos_ids: Collection[int],
    seed: int,
    codes: Codes | None = None,
    guess: int = 0,
) -> Iterator[Complete]:
    """Yield what completes one batch of prompts after the other, on the weights as they stand now.

    The draws come from one generator of their own, a number for every prompt and position: they are the same whichever
    rows have ended and whatever is guessed, up to `guess` tokens of a reference at once. A completion ends with the
    first of `eos_ids`; `codes` steer it, and nothing is guessed under them. NonFiniteError where the logits leave no
    distribution.
    """
    yield _Loop(model, sampling, eos_ids, seed, codes, guess).complete


class _Loop:
    """The weights, the draws and the settings of some calls."""

    def __init__(
        self,
        model: Any,
        sampling: SamplingConfig,
        eos_ids: Collection[int],
        seed: int,
        codes: Codes | None,
        guess: int,
    ) -> None:
        self._model = model
        self._sampling = sampling
        self._generator = torch.Generator().manual_seed(seed)
        self._decoder = Decoder(model, codes)
        self._eos_ids = set(eos_ids)
        self._ends = sent(torch.tensor(list(eos_ids)), model.device)
        self._look_every = _LOOK_EVERY.get(model.device.type, 1)
        self._guess = guess if codes is None else 0

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        part: Sequence[int] | None = None,
        references: Sequence[Sequence[int]] = (),
    ) -> list[Completion]:
        """Complete one batch of prompts."""
        uniform_TB = torch.rand(self._sampling.max_new_tokens, len(prompts), generator=self._generator)
        if part is not None:
            prompts, uniform_TB = [prompts[place] for place in part], uniform_TB[:, list(part)]
            references = references and [references[place] for place in part]
        if not prompts:
            return []
        if not self._guess or not any(references):
            references = ()
        uniform_BT = sent(uniform_TB.T.contiguous(), self._model.device)
        found = self._walk(prompts, references, uniform_BT, []) if self._look_every > 1 else None
        if found is None:
            found = self._walk(prompts, references, uniform_BT, None)
            assert found is not None, "a walk that reads has all candidates"
        return found

    def _walk(
        self,
        prompts: Sequence[Sequence[int]],
        references: Sequence[Sequence[int]],
        uniform_BT: Tensor,
        unread: list[Tensor] | None,
    ) -> list[Completion] | None:
        """Sample all positions. With `unread` nothing is read between two looks; None if candidates were too few."""
        device, longest, ahead = uniform_BT.device, uniform_BT.shape[1], self._guess if references else 0
        logits_BV, cache = self._decoder.read(prompts, longest + ahead, is_ragged=ahead > 0)
        guesses = Guesses(references, ahead, logits_BV, self._decoder.free) if ahead else None
        page = _Page(len(prompts), longest + ahead + 1, device)
        rows_B = torch.arange(len(prompts), device=device)  # the prompt of each row
        done_B, ended_B = torch.zeros_like(rows_B), torch.zeros_like(rows_B, dtype=torch.bool)
        logits_BPV = logits_BV[:, None]
        for passes in range(1, longest + 1):
            places_BP = done_B[:, None] + torch.arange(logits_BPV.shape[1], device=device)
            uniform_BP = uniform_BT[rows_B[:, None], places_BP.clamp(max=longest - 1)]
            tokens_BP, logprobs_BP, is_sound = _pick(logits_BPV, self._sampling, uniform_BP, unread)
            page.write(rows_B, places_BP, tokens_BP, logprobs_BP)
            right_B = torch.zeros_like(rows_B) if guesses is None else guesses.take(tokens_BP, ended_B)
            is_end_BP = torch.isin(tokens_BP, self._ends) & (places_BP <= (done_B + right_B)[:, None])
            last_B = tokens_BP.gather(1, right_B[:, None])[:, 0]
            done_B = (done_B + right_B + 1).clamp(max=longest).where(~ended_B, done_B)
            ended_B = ended_B | is_end_BP.any(1) | (done_B == longest)
            if passes == longest or passes % self._look_every == 0:  # the only time that anything is waited for
                flags = torch.stack((is_sound, *(unread or ())))
                tally = done_B[:0] if guesses is None else torch.stack((done_B.max(), *guesses.tallied()))
                seen = torch.cat((ended_B, is_sound[None], flags.all()[None], tally)).tolist()
                has_ended, (is_sound_now, had_all, *tallied) = seen[: len(rows_B)], seen[len(rows_B) :]
                if not is_sound_now:
                    logits_NV = logits_BPV.flatten(0, 1).float()
                    raise NonFiniteError(why_no_distribution(self._model, logits_NV, self._sampling.temperature or 1.0))
                if not had_all:
                    return None
                if unread:
                    unread.clear()
                going = [slot for slot, done in enumerate(has_ended) if not done]
                if not going:
                    break
                if guesses is not None:
                    cache.filled = cache.width + tallied[0] - 1  # the last token of a row is not in it yet
                    guesses.hear(*tallied[1:])
                if len(going) <= _STILL_GOING * len(has_ended):
                    slots = sent(torch.tensor(going), device)
                    rows_B, last_B, done_B, ended_B = rows_B[slots], last_B[slots], done_B[slots], ended_B[slots]
                    cache.keep(slots)
                    if guesses is not None:
                        guesses.keep(slots)
            if guesses is None:
                logits_BPV = self._decoder.step(last_B, cache)[:, None]
            else:
                logits_BPV = self._decoder.try_on(torch.cat((last_B[:, None], guesses.next()), 1), done_B - 1, cache)
        return page.completions(longest, self._eos_ids)


class _Page:
    """Tokens and log-probabilities of all prompts, by place; what is written behind a row's end is of no meaning."""

    def __init__(self, rows: int, width: int, device: torch.device) -> None:
        self._tokens_BT = torch.zeros(rows, width, dtype=torch.int32, device=device)
        self._logprobs_BT = torch.zeros(rows, width, device=device)

    def write(self, rows_B: Tensor, places_BP: Tensor, tokens_BP: Tensor, logprobs_BP: Tensor) -> None:
        """Write what was sampled, perhaps over what was tried."""
        self._tokens_BT[rows_B[:, None], places_BP] = tokens_BP.to(torch.int32)
        self._logprobs_BT[rows_B[:, None], places_BP] = logprobs_BP

    def completions(self, longest: int, eos_ids: Collection[int]) -> list[Completion]:
        """Return all rows, each up to its first end token; read in one transfer, log-probabilities as their bits."""
        both = torch.stack((self._tokens_BT, self._logprobs_BT.view(torch.int32)))[..., :longest].cpu()
        found = []
        for tokens, logprobs in zip(both[0].tolist(), both[1].view(torch.float32).tolist(), strict=True):
            end = next((place + 1 for place, token in enumerate(tokens) if token in eos_ids), longest)
            found.append((tokens[:end], logprobs[:end]))
        return found


def _pick(
    logits_BPV: Tensor, sampling: SamplingConfig, uniform_BP: Tensor, unread: list[Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens [B, P], their log-probabilities [B, P] under the tempered, untruncated distribution, and if all is
    sound.

    Where it is not, tokens mean nothing, but are of the vocabulary.
    """
    scores_NV = logits_BPV.flatten(0, 1).float()
    if sampling.temperature not in (0.0, 1.0):
        scores_NV = scores_NV / sampling.temperature
    peak_N1 = scores_NV.amax(-1, keepdim=True)
    weights_NV = (scores_NV - peak_N1).exp_()
    mass_N1 = weights_NV.sum(-1, keepdim=True)
    if sampling.temperature:
        uniform_N1 = uniform_BP.reshape(-1, 1)
        tokens_N1 = draw(weights_NV, sampling, uniform_N1, unread).clamp_(max=scores_NV.shape[-1] - 1)
    else:
        tokens_N1 = scores_NV.argmax(-1, keepdim=True)
    logprobs_N1 = scores_NV.gather(-1, tokens_N1) - peak_N1 - mass_N1.log()
    # One NaN or +inf makes a whole row NaN; entries of probability 0 are allowed.
    return tokens_N1.view_as(uniform_BP), logprobs_N1.view_as(uniform_BP), mass_N1.isfinite().all()


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
