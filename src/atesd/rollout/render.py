"""Messages to ids and back: the only place that knows chat templates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from atesd.types import Message


class Renderer:
    """Renders both roles' prompts. Sampled ids never pass through here on their way to the loss.

    `enable_thinking_*` reach the chat template only where set; `teacher_prefill` follows the teacher's header.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        enable_thinking_student: bool | None = None,
        enable_thinking_teacher: bool | None = None,
        teacher_prefill: str = "",
        extra_eos_ids: Sequence[int] = (),
    ) -> None:
        self._tokenizer = cast("Any", tokenizer)
        self._student_options = _thinking(enable_thinking_student)
        self._teacher_options = _thinking(enable_thinking_teacher)
        self._prefill = teacher_prefill
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys([int(self._tokenizer.eos_token_id), *extra_eos_ids]))
        self.pad_id = int(self._tokenizer.pad_token_id)

    def student_ids(self, messages: Sequence[Message]) -> list[int]:
        """Return the student's prompt, ending at the assistant header."""
        return self._ids(messages, self._student_options)

    def teacher_ids(self, messages: Sequence[Message]) -> list[int]:
        """Return the teacher's prompt, ending at the assistant header or the prefill."""
        return self._ids(messages, self._teacher_options) + self.text_ids(self._prefill)

    def text_ids(self, text: str) -> list[int]:
        """Return the ids of plain text, without special tokens."""
        return cast("list[int]", self._tokenizer.encode(text, add_special_tokens=False)) if text else []

    def solution_ids(self, text: str, limit: int | None = None) -> list[int]:
        """Return a reference solution as the assistant would write it, cut to `limit` tokens."""
        return self.text_ids(text)[:limit]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of a completion without special tokens."""
        return cast("str", self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def prompt_text(self, ids: Sequence[int]) -> str:
        """Return a prompt exactly as the model reads it, special tokens included."""
        return cast("str", self._tokenizer.decode(list(ids), skip_special_tokens=False))

    def token_texts(self, ids: Sequence[int]) -> list[str]:
        """Return one text per id; their concatenation is the whole text.

        Pieces of a character that spans several tokens are shown with its last token.
        """
        texts: list[str] = []
        start = 0
        for end in range(1, len(ids) + 1):
            context = list(ids[max(0, start - 1) : start])
            text = self.prompt_text([*context, *ids[start:end]])[len(self.prompt_text(context)) :]
            if text.endswith("\ufffd") and end < len(ids):
                texts.append("")
                continue
            texts.append(text)
            start = end
        return texts

    def _ids(self, messages: Sequence[Message], options: dict[str, bool]) -> list[int]:
        rendered = self._tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=True, return_dict=False, **options
        )
        return cast("list[int]", rendered)


def _thinking(value: bool | None) -> dict[str, bool]:
    return {} if value is None else {"enable_thinking": value}
