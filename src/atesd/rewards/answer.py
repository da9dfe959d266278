"""Find the final answer in a text."""

from __future__ import annotations

import re

_THINK_END = "</think>"
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_MARKED_LINE = re.compile(r"^[ \t]*#(?:###)?[ \t]*([^#\n].*?)[ \t]*$", re.MULTILINE)


def extract_answer(text: str) -> str | None:
    """Return the final answer that a solution or completion states, or None.

    Text behind the last `</think>` counts where there is one. There the last complete `\\boxed{...}` wins, braces
    nested; otherwise the last line of the form `#### answer` or `#answer`.
    """
    text = text.rpartition(_THINK_END)[2]
    boxed = _last_boxed(text)
    if boxed is not None:
        return boxed
    marked = _MARKED_LINE.findall(text)
    return marked[-1] if marked else None


def _last_boxed(text: str) -> str | None:
    """Return the content of the last box whose braces close; an empty box is no answer."""
    for opening in reversed(list(_BOX.finditer(text))):
        end = _closing_brace(text, opening.end())
        if end is not None and text[opening.end() : end].strip():
            return text[opening.end() : end].strip()
    return None


def _closing_brace(text: str, start: int) -> int | None:
    """Return where the brace that was opened before `start` closes; escaped braces do not count."""
    depth, place = 1, start
    while place < len(text):
        if text[place] == "\\":
            place += 2
            continue
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return place
        place += 1
    return None
