"""Messages to ids and back: the only place that knows chat templates."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, cast

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from atesd.rollout.verbatim import Verbatim
from atesd.types import Message, UserError, first_line

KEPT = 4096
"""Prompts whose ids are kept: students read the same ones again, teachers where the same part is visible."""
AT_ONCE = 64
"""Prompts rendered in one call: more save little, and a tokenizer holds about 100 bytes a token meanwhile."""


class Renderer:
    """Renders both roles' prompts. Sampled ids never pass through here on their way to the loss.

    What a message says is text, even where it spells a control token (see `verbatim.py`); UserError where the tokenizer
    cannot keep it so.
    A system message that the chat template does not show is put before the user's text.
    `enable_thinking_*` reach the chat template only where set; `teacher_prefill` follows the teacher's header.
    `eos_ids` are the ids that end a completion, the tokenizer's own first. A tokenizer without a pad token pads with
    that one: masks go by length, so the choice has no effect. UserError if the tokenizer has no end token, or if a
    thinking flag is set that its chat template ignores.
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
        self._student_options = self._thinking("student", enable_thinking_student)
        self._teacher_options = self._thinking("teacher", enable_thinking_teacher)
        self._prefill = teacher_prefill
        eos, pad = self._tokenizer.eos_token_id, self._tokenizer.pad_token_id
        if eos is None:
            raise UserError("the tokenizer has no end token, so completions could never end: set its eos_token")
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys([int(eos), *extra_eos_ids]))
        self.pad_id = int(eos if pad is None else pad)
        self._folds = self._loses_system()
        turn, header = self._turn_and_header()
        self._verbatim = Verbatim(self._tokenizer, turn=turn, header=header)
        shortest = min((len(text) for text in self._tokenizer.get_added_vocab()), default=2)
        self._tokens_a_byte = 1 if shortest > 1 else 2
        self._kept: OrderedDict[object, array[int]] = OrderedDict()

    def student_ids(self, messages: Sequence[Message]) -> list[int]:
        """Return the student's prompt, ending at the assistant header."""
        return self.student_batch([messages])[0]

    def teacher_ids(self, messages: Sequence[Message]) -> list[int]:
        """Return the teacher's prompt, ending at the assistant header or the prefill."""
        return self.teacher_batch([messages])[0]

    def student_batch(self, prompts: Sequence[Sequence[Message]]) -> list[list[int]]:
        """Return `student_ids` of several prompts, far cheaper than one by one; equal prompts share a list."""
        return self._ids(prompts, self._student_options)

    def teacher_batch(self, prompts: Sequence[Sequence[Message]]) -> list[list[int]]:
        """Return `teacher_ids` of several prompts, far cheaper than one by one."""
        prefill = self._encoded(self._prefill)
        return [ids + prefill for ids in self._ids(prompts, self._teacher_options)]

    def student_text(self, messages: Sequence[Message]) -> str:
        """Return the text that the student's prompt has the ids of."""
        return self._text(self._folded(messages), self._student_options)

    def teacher_text(self, messages: Sequence[Message]) -> str:
        """Return the text that the teacher's prompt has the ids of."""
        return self._text(self._folded(messages), self._teacher_options) + self._prefill

    def most_tokens(self, text: str) -> int:
        """Return a number of tokens that a text does not exceed, without asking the tokenizer: a token a byte.

        It may write a letter in compatible ones first: U+FDFA becomes 18 letters of 33 bytes, more than any other does.
        And it may put a space in front of a text and behind an added token, which mostly has several letters.
        """
        plain = len(text.encode("ascii", "ignore"))
        return self._tokens_a_byte * (plain + 33 * (len(text) - plain)) + 2

    def continuation_ids(self, messages: Sequence[Message]) -> list[int]:
        """Return what follows a finished reply up to the student's next header: the rest of its closing, the messages.

        Taken from the template's text around a stand-in reply, whose end token the sampled reply already has. Deviation
        from templates that rewrite history, such as those that drop earlier thinking: it stays as it was sampled.
        UserError where the template does not close a reply with the end token, or refuses the messages.
        """
        stand_in = "A stand-in reply."
        said, marks = self._hidden(messages)
        conversation = [_user("?"), Message(role="assistant", content=stand_in), *said]
        try:
            _, found, rest = self._text(conversation, self._student_options).partition(stand_in)
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise UserError(
                f"the chat template refuses what the environment says, messages by {roles} ({first_line(error)}): let "
                "it say one message by the user"
            ) from error
        end = self._tokenizer.eos_token
        if not found or not rest.startswith(end):
            raise UserError(
                f"the chat template does not close a reply with the end token {end!r}, so a conversation cannot go on "
                "as it was sampled: use a model whose template does, or an environment of one turn"
            )
        if not marks:  # read behind the end token, for some tokenizers put a space before the beginning of a text
            return self._encoded(rest)[1:]
        self._check_cuts([*conversation[:2], *messages], self._student_options)
        return self._verbatim.encode_rendered(rest[len(end) :], marks)

    def rewrites_history(self) -> bool:
        """Tell whether the chat template changes a reply once the conversation goes on, as thinking models' do."""
        thought = "<think>\nA thought.\n</think>\n\nA reply."
        talk = [_user("?"), Message(role="assistant", content=thought), _user("And?")]
        return thought not in self._text(talk, self._student_options)

    def text_ids(self, text: str) -> list[int]:
        """Return the ids of a text of data, without special tokens."""
        return self._verbatim.encode(text)

    def solution_ids(self, text: str, limit: int | None = None) -> list[int]:
        """Return a reference solution as the assistant would write it, cut to `limit` tokens."""
        return self.text_ids(text)[:limit]

    def controls(self, text: str) -> list[str]:
        """Return the control tokens that a text spells; they stay text."""
        return self._verbatim.controls(text)

    def flaw(self, text: str) -> str | None:
        """Say why a text of data cannot be read as text; None where it can."""
        if not self.controls(text):
            return None
        try:
            self.text_ids(text)
            self.student_ids([_user(text)])
        except UserError as error:
            return str(error)
        return None

    def unknown(self, text: str) -> list[str]:
        """Return the pieces of a text that the tokenizer reads as its unknown token, in their order."""
        sign, token = self._tokenizer.unk_token_id, self._tokenizer.unk_token
        if sign is None or self.controls(text):
            return []
        if not self._tokenizer.is_fast:  # which keeps no places
            return [token] if sign in self.text_ids(text) else []
        read = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return [
            text[start:end]
            for id_, (start, end) in zip(read.input_ids, read.offset_mapping, strict=True)
            if id_ == sign
        ]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of a completion without special tokens."""
        return self._decode(ids, skip_special_tokens=True)

    def prompt_text(self, ids: Sequence[int]) -> str:
        """Return a prompt exactly as the model reads it, special tokens included."""
        return self._decode(ids, skip_special_tokens=False)

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

    def _decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        # Without the clean-up that some tokenizers ask for: it would move spaces that the model wrote.
        return cast(
            "str",
            self._tokenizer.decode(
                list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
            ),
        )

    def _loses_system(self) -> bool:
        """Tell whether the chat template refuses a system message, or leaves it out."""
        if not self._tokenizer.chat_template:
            return False
        said = "You keep words."
        try:
            return said not in self._text([Message(role="system", content=said), _user("?")], {})
        except TemplateError:
            return True

    def _folded(self, messages: Sequence[Message]) -> Sequence[Message]:
        """Put a system message that the template would lose before the user's text."""
        if not self._folds or len(messages) < 2 or messages[0]["role"] != "system":
            return messages
        system, first, *rest = messages
        return [Message(role=first["role"], content=f"{system['content']}\n\n{first['content']}"), *rest]

    def _ids(self, prompts: Sequence[Sequence[Message]], options: dict[str, bool]) -> list[list[int]]:
        """Return the ids of prompts, rendering those that are not kept in one batch; equal ones share a list."""
        chosen = tuple(options.items())
        keys = [(tuple((each["role"], each["content"]) for each in messages), chosen) for messages in prompts]
        new = {key: messages for key, messages in zip(keys, prompts, strict=True) if key not in self._kept}
        self._kept.update(zip(new, self._arrays_of_ids(list(new.values()), options), strict=True))
        ids = {key: self._kept[key].tolist() for key in keys}
        for key in ids:
            self._kept.move_to_end(key)
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        return [ids[key] for key in keys]

    def _arrays_of_ids(self, prompts: Sequence[Sequence[Message]], options: dict[str, bool]) -> list[array[int]]:
        """Render prompts; only those that spell control tokens are put together by hand, one by one."""
        told = [self._folded(messages) for messages in prompts]
        spelling = [any(self.controls(each["content"]) for each in messages) for messages in told]
        plain = [messages for messages, spells in zip(told, spelling, strict=True) if not spells]
        rendered = iter(self._rendered_ids(plain, options))
        return [
            array("q", self._ids_by_hand(messages, options) if spells else next(rendered))
            for messages, spells in zip(told, spelling, strict=True)
        ]

    def _ids_by_hand(self, messages: Sequence[Message], options: dict[str, bool]) -> list[int]:
        hidden, marks = self._hidden(messages)
        self._check_cuts(messages, options)
        return self._verbatim.encode_rendered(self._text(hidden, options), marks)

    def _check_cuts(self, messages: Sequence[Message], options: dict[str, bool]) -> None:
        """UserError unless a prompt put together by hand is the tokenizer's own, tried without what is spelt."""
        hidden, marks = self._hidden(messages)
        self._verbatim.check(marks.values())
        cleared = {ord(mark): "x" for mark in marks}
        plain = [Message(role=each["role"], content=each["content"].translate(cleared)) for each in hidden]
        if self._verbatim.encode_rendered(self._text(plain, options), {}) != self._rendered_ids([plain], options)[0]:
            spelt = ", ".join(map(repr, marks.values()))
            raise UserError(
                f"a text spells {spelt}, a control token of this model, which its tokenizer cannot encode apart from "
                "its surroundings: take it out of the data"
            )

    def _hidden(self, messages: Sequence[Message]) -> tuple[list[Message], dict[str, str]]:
        """Return messages without the control tokens that they spell, and the marks in their place."""
        texts, marks = self._verbatim.hide([message["content"] for message in messages])
        hidden = [Message(role=each["role"], content=text) for each, text in zip(messages, texts, strict=True)]
        return hidden, marks

    def _encoded(self, text: str) -> list[int]:
        """Return the ids of a text of the template or of the recipe, whose control tokens count."""
        return cast("list[int]", self._tokenizer.encode(text, add_special_tokens=False)) if text else []

    def _turn_and_header(self) -> tuple[str, str]:
        """Return what the chat template writes for a user's turn, and after it before the reply."""
        if not self._tokenizer.chat_template:
            return "", ""
        turn = self._tokenizer.apply_chat_template([_user("?")], add_generation_prompt=False, tokenize=False)
        return turn, self._text([_user("?")], {}).removeprefix(turn)

    def _rendered_ids(self, prompts: Sequence[Sequence[Message]], options: dict[str, bool]) -> list[list[int]]:
        """Return the ids of prompts as the tokenizer has them, each the same as alone."""
        found: list[list[int]] = []
        for start in range(0, len(prompts), AT_ONCE):
            conversations = [list(messages) for messages in prompts[start : start + AT_ONCE]]
            found += self._tokenizer.apply_chat_template(
                conversations, add_generation_prompt=True, tokenize=True, return_dict=False, **options
            )
        return found

    def _text(self, messages: Sequence[Message], options: dict[str, bool]) -> str:
        rendered = self._tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=False, **options
        )
        return cast("str", rendered)

    def _thinking(self, role: str, value: bool | None) -> dict[str, bool]:
        """Return the template's option, if set. UserError where the template ignores it."""
        if value is None:
            return {}
        on, off = (self._rendered_ids([[_user("1 + 1 = ?")]], {"enable_thinking": flag}) for flag in (True, False))
        if on == off:
            raise UserError(
                f"prompt.enable_thinking_{role} is set, but the model's chat template does not know enable_thinking: "
                "leave the flag out, or take a model that can think or not"
            )
        return {"enable_thinking": value}


def _user(content: str) -> Message:
    return Message(role="user", content=content)
