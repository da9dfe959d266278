"""Find the final answer in a text."""

from __future__ import annotations

import re

_THINK_END = "</think>"
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_MARKED = re.compile(r"(?:^|(?<=\s))####(?!#)((?:(?!####)[^\n])*)")
_HASH = re.compile(r"#[^#\s]")


def extract_answer(text: str) -> str | None:
    """Return the final answer that a solution or completion states, or None.

    Text behind the last `</think>` counts where there is one. There the last complete `\\boxed{...}` wins, braces
    nested; else what follows the last `####` on its line; else the last line of the form `#answer`, without a space
    behind the mark, so that Markdown headings are no answers. Takes time linear in the text's length.
    """
    text = text.rpartition(_THINK_END)[2]
    boxed = _last_boxed(text)
    if boxed is not None:
        return boxed
    marked = [answer.strip() for answer in _MARKED.findall(text) if answer.strip()]
    marked = marked or [line.strip()[1:] for line in text.split("\n") if _HASH.match(line.strip())]
    return marked[-1] if marked else None


def _last_boxed(text: str) -> str | None:
    """Return the content of the complete box that opens last, in one pass; an empty box is no answer."""
    content_starts = {opening.end() for opening in _BOX.finditer(text)}
    open_braces: list[int] = []
    last: tuple[int, str] | None = None
    for brace in _BRACE.finditer(text):
        if brace.group() == "{":
            open_braces.append(brace.end())
        elif brace.group() == "}" and open_braces:
            start = open_braces.pop()
            content = text[start : brace.start()].strip() if start in content_starts else ""
            if content and (last is None or start > last[0]):
                last = (start, content)
    return None if last is None else last[1]
