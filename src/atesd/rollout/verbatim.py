"""Data that spells control tokens stays text: `<|im_end|>` in a problem must not close the user's turn.

A tokenizer turns the spelling of a control token into the token itself, wherever it stands. Here a rendered prompt is
cut at the control tokens that the chat template wrote, as the tokenizer does it too, and what lies between them is
encoded as plain text. In data those spellings are hidden behind marks meanwhile.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, cast

from atesd.types import UserError

_FIRST_MARK = 0xF0000  # private use: no text has a meaning for it


class Verbatim:
    """Encodes data as text. `turn` and `header` are what the chat template writes around a message and before a reply.

    Control tokens are the tokenizer's special tokens and those added ones by which its template delimits turns; others,
    such as `<think>` of some models, are words like any other. UserError where the tokenizer cannot spell a control
    token as text, as where its letters have no token.
    """

    def __init__(self, tokenizer: Any, *, turn: str = "", header: str = "") -> None:
        self._tokenizer = tokenizer
        added = {str(token.content): (int(number), token) for number, token in tokenizer.added_tokens_decoder.items()}
        opening = _pattern(added).search(header)
        delimiters = {*_pattern(added).findall(turn), *([opening[0]] if opening else [])}
        self._ids = {
            text: number for text, (number, token) in added.items() if text and (token.special or text in delimiters)
        }
        self._pattern = _pattern(self._ids)

    def controls(self, text: str) -> list[str]:
        """Return the control tokens that a text spells, each once."""
        return list(dict.fromkeys(self._pattern.findall(text)))

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text of data. UserError as the class says."""
        found = self.controls(text)
        if not found:
            return cast("list[int]", self._tokenizer.encode(text, add_special_tokens=False)) if text else []
        self.check(found)
        return self._plain(text)

    def hide(self, texts: Sequence[str]) -> tuple[list[str], dict[str, str]]:
        """Put marks in place of the control tokens that texts spell; return what each mark stands for, too."""
        found = list(dict.fromkeys(control for text in texts for control in self.controls(text)))
        taken = set("".join(texts))
        free = (chr(code) for code in range(_FIRST_MARK, _FIRST_MARK + 0xFFFD) if chr(code) not in taken)
        marks = dict(zip(free, found, strict=False))
        mark_of = {control: mark for mark, control in marks.items()}
        return [self._pattern.sub(lambda match: mark_of[match[0]], text) for text in texts], marks

    def encode_rendered(self, rendered: str, marks: Mapping[str, str]) -> list[int]:
        """Return the ids of a rendered prompt: its own control tokens count, what `marks` stand for is text.

        UserError as the class says, or where the template lost a mark.
        """
        self.check(marks.values())
        lost = [control for mark, control in marks.items() if mark not in rendered]
        if lost:
            raise UserError(f"{_spells(lost)}, and its chat template rewrites the text: take it out of the data")
        ids: list[int] = []
        for place, piece in enumerate(self._cutter.split(rendered)):
            ids += [self._ids[piece]] if place % 2 else self._plain("".join(marks.get(each, each) for each in piece))
        return ids

    @cached_property
    def _cutter(self) -> re.Pattern[str]:
        return re.compile(f"({self._pattern.pattern})")

    def check(self, controls: Iterable[str]) -> None:
        """UserError unless the tokenizer can spell each of some control tokens as text."""
        for control in controls:
            ids = self._plain(control)
            if self._ids[control] in ids or self._tokenizer.decode(ids).strip() != control.strip():
                raise UserError(f"{_spells([control])}, and cannot be kept text: take it out of the data")

    def _plain(self, text: str) -> list[int]:
        """Encode as if there were no special tokens."""
        if not text:
            return []
        return cast("list[int]", self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))


def _pattern(tokens: Iterable[str]) -> re.Pattern[str]:
    """Match any of some tokens, longer ones first; nothing where there is none."""
    longest_first = sorted((token for token in tokens if token), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _spells(controls: Sequence[str]) -> str:
    return f"a text spells {', '.join(map(repr, controls))}, a control token of this model"
