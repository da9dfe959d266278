"""What teacher and base make of tokens of forced form: the measurement behind lambda* (cliff.py).

Positions are those of forced form in hint-free probe completions; the token asked about is the one that the teacher
finds most probable there. P positions, H hidden size, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from atesd.cliff import CLAMP, CliffConfig
from atesd.losses.divergence import Scored
from atesd.rollout.render import Renderer
from atesd.train.batch import Passage
from atesd.train.probe import Probe, Told
from atesd.train.rows import turns_of
from atesd.train.scorer import Scorer
from atesd.train.teacher import Teachers
from atesd.transfer import sent
from atesd.types import ContractPoint, StopReason, Turn


class _Marked(NamedTuple):
    """A probe completion with the places of its tokens of forced form and their classes."""

    told: Told
    places: list[tuple[int, str]]


class Contract:
    """Measures p and b of every contract class."""

    def __init__(
        self, config: CliffConfig, *, probe: Probe, scorer: Scorer, teachers: Teachers, renderer: Renderer
    ) -> None:
        self._config = config
        self._probe = probe
        self._scorer = scorer
        self._teachers = teachers
        self._renderer = renderer

    def points(self, ratios: Sequence[float]) -> list[dict[str, ContractPoint]]:
        """Return p, b and hits of every class at each ratio; nothing where no completion has a token of forced form."""
        marked = [
            _Marked(told, contract_places(self._renderer, turn, self._config))
            for told, turn in zip(self._probe.turns_of_samples(), self._turns(), strict=True)
        ]
        names = [name for each in marked for _, name in each.places]
        if not names:
            return [{} for _ in ratios]
        with self._teachers.of("base").in_place():
            base = self._states(marked, [each.told.student for each in marked])
        return [self._at(ratio, marked, names, base) for ratio in ratios]

    def _at(
        self, ratio: float, marked: Sequence[_Marked], names: Sequence[str], base: Tensor
    ) -> dict[str, ContractPoint]:
        with self._teachers.own.in_place():
            states = self._states(marked, [self._probe.hinted(each.told, ratio) for each in marked])
            modal = self._most_probable(states)
            p = self._logits(states, modal)
        with self._teachers.of("base").in_place():
            b = self._logits(base, modal)
        return {name: _point(p, b, [other == name for other in names]) for name in sorted(set(names))}

    def _turns(self) -> list[Turn]:
        """Return the turns of the hint-free probe completions."""
        return [turn for _, _, turn in turns_of(self._probe.samples())]

    def _states(self, marked: Sequence[_Marked], passages: Sequence[Passage]) -> Tensor:
        """Return the hidden states [P, H] at the contract positions of passages."""
        found = self._scorer.each(passages, lambda chosen: self._scorer.hidden(chosen).hidden_NH)
        places = [torch.tensor([place for place, _ in each.places], dtype=torch.long) for each in marked]
        return torch.cat(
            [states.index_select(0, sent(each, states.device)) for states, each in zip(found, places, strict=True)]
        )

    def _most_probable(self, states: Tensor) -> Tensor:
        """Return the most probable token of each state under the head in place, some states at a time."""
        weight, bias, *_ = self._scorer.head()  # a scale or cap keeps the order
        found = []
        for start in range(0, len(states), 64):
            part = states[start : start + 64]
            logits = (part @ weight.T).float()
            found.append((logits if bias is None else logits + bias).argmax(-1))
        return torch.cat(found)

    def _logits(self, states: Tensor, tokens: Tensor) -> Tensor:
        """Return the clamped logit of each position's token under the head in place, in float64, on the CPU."""
        scored = Scored(states, *self._scorer.head())
        logprob = self._scorer.log_likelihood_of(scored, tokens, self._scorer.teacher_temperature)
        return logprob.detach().float().double().exp().clamp(CLAMP, 1 - CLAMP).logit().cpu()


def contract_places(renderer: Renderer, turn: Turn, config: CliffConfig) -> list[tuple[int, str]]:
    """Return the places of a completion's tokens that overlap a match of a contract class, and of its end token."""
    texts = renderer.token_texts(turn.completion_ids)
    ends = np.cumsum([len(text) for text in texts])
    whole = "".join(texts)
    places = []
    for name, pattern in config.contract.items():
        for match in re.finditer(pattern, whole):
            start, end = match.span(1 if match.re.groups else 0)
            places += [
                (place, name)
                for place, (text, stop) in enumerate(zip(texts, ends, strict=True))
                if stop - len(text) < end and stop > start
            ]
    if config.eos and turn.stop is StopReason.EOS:
        places.append((len(texts) - 1, "eos"))
    return sorted(set(places))


def _point(p: Tensor, b: Tensor, chosen: Sequence[bool]) -> ContractPoint:
    """Average logits over a class's positions."""
    mask = torch.tensor(chosen)
    return ContractPoint(float(p[mask].mean().sigmoid()), float(b[mask].mean().sigmoid()), int(mask.sum()))
