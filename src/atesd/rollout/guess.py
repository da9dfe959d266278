"""Guesses at completions: the reference solution, of which several tokens are read at once where they are drawn anyway.

B rows, R tokens of the longest reference, P guessed tokens of a pass, P1 = P + 1 positions of it, V vocabulary.

A pass reads a row's last token and P guessed ones. Behind each a token is drawn, by the number that belongs to its
position, and what is drawn behind a token that was itself guessed wrong is thrown away. So the samples are those of one
token at a time, whatever is guessed: only rounding may tell them apart. Reading several positions costs little more
than reading one while the weights, not the arithmetic, are what takes time.

Copying from a reference: LLMA, arXiv 2304.04487. Ours: 1. what is drawn decides, not what is most probable; 2. a wrong
token is taken for a replacement of the guessed one, unless the last two tokens stand together elsewhere; 3. the length
of a guess follows from how often guesses were right.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from atesd.transfer import sent

_NOTHING = -1
"""In place of a token: no guess."""
_FREE = 64
"""Positions of a pass whose arithmetic takes as long as reading the weights and launching operations, at most."""
_READING, _LAUNCHING = 8, 10_000_000
"""The same of float32 on a CPU: positions for reading, and weights of a layer one position of which takes as long to
compute as its operations take to launch."""
_MEMORY = 0.8
"""How much a look counts at the next one, in the share of right guesses."""
LARGEST_LOGITS = 2**25
"""Most logits of a pass that guesses: some half a GiB with what is made of them."""


def free_positions(weights: int, *, is_precise: bool) -> int:
    """Return the positions of a pass whose arithmetic takes as long as all else; `weights` are those of a layer.

    In float32 on a CPU (`is_precise`) a large layer's are soon dearer than reading it; a small one is all launching.
    """
    return min(_FREE, _READING + _LAUNCHING // weights) if is_precise else _FREE


class Guesses:
    """Where each row stands in its reference, what is guessed next, and how often that was right."""

    def __init__(self, references: Sequence[Sequence[int]], most: int, logits_BV: Tensor, free: int) -> None:
        device, width = logits_BV.device, max(map(len, references)) + 1
        texts = [[*reference, *[_NOTHING] * (width - len(reference))] for reference in references]
        self._text_BR = sent(torch.tensor(texts), device)
        self._place_B = torch.zeros(len(texts), dtype=torch.long, device=device)
        self._last_B = torch.full_like(self._place_B, _NOTHING)
        self._guessed_BP = self._text_BR[:, :1]
        self._count = 0  # of the guessed tokens, those that the pass reads: the first pass reads prompts
        self._tally = torch.zeros(2, dtype=torch.long, device=device)
        self._pace = Pace(most, logits_BV.shape[-1], free)

    def take(self, drawn_BP1: Tensor, ended_B: Tensor) -> Tensor:
        """Return how many guessed tokens of each row, [B], were drawn: one more token of it is sound.

        Right guesses are tallied; where none was read, it is what would have been.
        """
        found_B = _leading(drawn_BP1, self._guessed_BP)
        asked_B = (found_B + 1).clamp(max=self._guessed_BP.shape[1])
        self._tally = self._tally + torch.stack((found_B, asked_B)).masked_fill(ended_B, 0).sum(1)
        right_B = found_B.clamp(max=self._count)
        sound_BP2 = torch.cat((self._last_B[:, None], drawn_BP1), dim=1)
        before_B, self._last_B = (sound_BP2.gather(1, (right_B + more)[:, None])[:, 0] for more in (0, 1))
        self._place_B = self._nearest(before_B, self._place_B + right_B + 1)
        return right_B

    def next(self) -> Tensor:
        """Return the tokens that the next pass tries, [B, P]: ids of the vocabulary, P by the pace."""
        self._count = self._pace.count(len(self._text_BR))
        ahead_P = torch.arange(max(1, self._count), device=self._text_BR.device)
        places_BP = (self._place_B[:, None] + ahead_P).clamp(max=self._text_BR.shape[1] - 1)
        self._guessed_BP = self._text_BR.gather(1, places_BP)
        return self._guessed_BP[:, : self._count].clamp(min=0)

    def tallied(self) -> Tensor:
        """Return how many guesses were right since the last call, and how many stood behind right ones only, [2]."""
        tally, self._tally = self._tally, torch.zeros_like(self._tally)
        return tally

    def hear(self, right: int, asked: int) -> None:
        """Take in what was tallied, by the numbers."""
        self._pace.hear(right, asked)

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these."""
        self._text_BR, self._place_B, self._last_B = self._text_BR[rows], self._place_B[rows], self._last_B[rows]

    def _nearest(self, before_B: Tensor, place_B: Tensor) -> Tensor:
        """Return the place behind the last two tokens in the reference, the nearest; `place` if they are not in it."""
        text_BR = self._text_BR
        is_pair_BR = (text_BR[:, :-1] == before_B[:, None]) & (text_BR[:, 1:] == self._last_B[:, None])
        behind_R = torch.arange(2, text_BR.shape[1] + 1, device=place_B.device)
        away_BR = (behind_R - place_B[:, None]).abs().masked_fill(~is_pair_BR, torch.iinfo(torch.long).max)
        return torch.where(is_pair_BR.any(1), behind_R[away_BR.argmin(1)], place_B)


class Pace:
    """How many tokens to guess: as many as make a pass worth most for its time."""

    def __init__(self, most: int, vocabulary: int, free: int) -> None:
        self._most = most
        self._free = free
        self._positions = LARGEST_LOGITS // vocabulary
        self._right, self._asked = 0.5, 1.0

    def hear(self, right: int, asked: int) -> None:
        """Learn how many guesses were right, of those that stood behind right ones only."""
        self._right = _MEMORY * self._right + right
        self._asked = _MEMORY * self._asked + asked

    def count(self, rows: int) -> int:
        """Return P, which maximises (1 + q + ... + q^P) / (free + rows (P + 1)), q the share of right guesses.

        The numerator is how many tokens a row gains, the denominator how long the pass takes.
        """
        share = self._right / self._asked
        most = max(0, min(self._most, self._positions // rows - 1))
        return max(
            range(most + 1),
            key=lambda count: sum(share**power for power in range(count + 1)) / (self._free + rows * (count + 1)),
        )


def _leading(drawn_BP1: Tensor, guessed_BP: Tensor) -> Tensor:
    """Return how many guesses, [B], from the first on are what was drawn in their places."""
    is_right_BP = drawn_BP1[:, : guessed_BP.shape[1]] == guessed_BP
    return is_right_BP.long().cumprod(1).sum(1)
