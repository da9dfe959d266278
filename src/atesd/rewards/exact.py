"""Grade by equality of normalised text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from atesd.rewards.answer import extract_answer

_AROUND_SIGNS = re.compile(r" (?!\w)|(?<!\w) ")


def exact_reward(
    prompts: Sequence[str],  # noqa: ARG001 (TRL's signature)
    completions: Sequence[str],
    *,
    answer: Sequence[str | None],
    **_: Any,
) -> list[float | None]:
    """Return 1 where the completion's final answer equals the gold one, else 0; None without a gold answer."""
    return [
        None if gold is None else float(same_text(extract_answer(completion), gold))
        for completion, gold in zip(completions, answer, strict=True)
    ]


def same_text(given: str | None, gold: str) -> bool:
    """Compare answers but for white space, case and a closing full stop."""
    return given is not None and _normal(given) == _normal(gold)


def _normal(text: str) -> str:
    return _AROUND_SIGNS.sub("", " ".join(text.split())).rstrip(".").casefold()
