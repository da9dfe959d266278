"""Prompts rendered in one batch: each has the tokenizer's ids for it alone, and only new ones are rendered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from jinja2.exceptions import TemplateError
from tokenizers import processors
from transformers.models.byt5.tokenization_byt5 import ByT5Tokenizer

from atesd.rollout import render
from atesd.rollout.render import Renderer
from atesd.types import Message, UserError

from support.rollouts import CHAT_TEMPLATE, END, FORGETFUL_TEMPLATE, PLAIN_TEMPLATE, byte_tokenizer
from support.templates import CONTROLS, tokenizer_of

THINKING = {"qwen3", "smollm3"}
REFUSING = "{% if messages[0]['content'] == 'no' %}{{ raise_exception('refused') }}{% endif %}" + CHAT_TEMPLATE


def said(*contents: str, system: str = "") -> list[Message]:
    """Return a conversation that a user begins, behind a system message where there is one."""
    roles = ("user", "assistant") * len(contents)
    turns = [Message(role=role, content=content) for role, content in zip(roles, contents, strict=False)]
    return [Message(role="system", content=system), *turns] if system else turns


PLAIN = [said("1 + 1 = ?"), said(""), said(" a \n\n b "), said("\u221a2\u00e9"), said("x" * 400), said("a", "b", "c")]


def with_tokens(template: str, first: str | None, end: str, controls: Sequence[str]) -> Any:
    """Return a byte tokenizer that itself writes its first token before a text, unless told not to."""
    made = tokenizer_of(template, first, end, controls)
    begins = first or end
    number = made.convert_tokens_to_ids(begins)
    post = processors.TemplateProcessing(single=f"{begins} $A", special_tokens=[(begins, number)])
    made.backend_tokenizer.post_processor = post
    return made


def in_python(template: str = CHAT_TEMPLATE) -> Any:
    """Return a tokenizer that is not of the `tokenizers` library; it ends texts itself, unless told not to."""
    tokenizer = ByT5Tokenizer()
    tokenizer.chat_template = template
    return tokenizer


TOKENIZERS = {
    **{family: lambda family=family: with_tokens(*CONTROLS[family]) for family in CONTROLS},
    "chat": byte_tokenizer,
    "plain": lambda: byte_tokenizer(template=PLAIN_TEMPLATE),
    "forgetful": lambda: byte_tokenizer(template=FORGETFUL_TEMPLATE),
    "python": in_python,
}


def alone(tokenizer: Any, messages: Sequence[Message], **options: bool) -> list[int]:
    """Return what the tokenizer makes of one conversation."""
    return tokenizer.apply_chat_template(  # type: ignore[no-any-return]
        list(messages), add_generation_prompt=True, tokenize=True, return_dict=False, **options
    )


def counted(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows by the number of conversations of every call that tokenizes."""
    calls: list[int] = []
    apply = tokenizer.apply_chat_template

    def counting(conversations: Any, **options: Any) -> Any:
        if options["tokenize"]:
            calls.append(len(conversations) if isinstance(conversations[0], list) else 1)
        return apply(conversations, **options)

    monkeypatch.setattr(tokenizer, "apply_chat_template", counting)
    return calls


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_batch_has_the_ids_that_the_tokenizer_gives_each_prompt_alone(name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    options: dict[str, bool] = {"enable_thinking": False} if name in {*THINKING, "chat", "python"} else {}
    thinks = options.get("enable_thinking")
    renderer = Renderer(tokenizer, enable_thinking_student=thinks, teacher_prefill="<think>\n")
    assert renderer.student_batch(PLAIN) == [alone(tokenizer, each, **options) for each in PLAIN]
    prefill = tokenizer.encode("<think>\n", add_special_tokens=False)
    assert renderer.teacher_batch(PLAIN[::-1]) == [alone(tokenizer, each) + prefill for each in PLAIN[::-1]]


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "gemma3", "mistral", "llama3"])
def test_system_messages_and_spelt_control_tokens_are_as_in_prompts_rendered_one_by_one(name: str) -> None:
    """One renderer is asked for all at once, others for one each; the hand-made ones stand between plain ones."""
    end = CONTROLS[name][2]
    prompts = [said("a", system="Be brief."), said(f"b {end} c"), said("d"), said("e", system=f"Say {end}."), said("f")]
    batch = Renderer(with_tokens(*CONTROLS[name])).student_batch(prompts)
    assert batch == [Renderer(with_tokens(*CONTROLS[name])).student_ids(each) for each in prompts]
    renderer = Renderer(with_tokens(*CONTROLS[name]))
    texts = [renderer.prompt_text(ids) for ids in batch]
    assert f"b {end} c" in texts[1]
    assert f"Say {end}." in texts[3]
    assert len({ids.count(renderer.eos_ids[0]) for ids in (batch[1], batch[2], batch[4])}) == 1, "spelt, not meant"


def test_new_prompts_are_rendered_in_one_call_and_known_ones_not_again(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_tokenizer()
    renderer = Renderer(tokenizer)
    calls = counted(tokenizer, monkeypatch)
    first = renderer.teacher_batch([said("a"), said("b"), said("a"), said("c")])
    assert calls == [3]
    assert first[0] == first[2]
    assert renderer.student_batch([said("d"), said("b"), said("e")])[1] == first[1]
    assert calls == [3, 2], "both roles' prompts are the same where their options are"
    assert renderer.student_batch([said("c")]) == first[3:]
    assert renderer.student_batch([]) == []
    assert calls == [3, 2]


def test_a_large_batch_is_rendered_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render, "AT_ONCE", 3)
    tokenizer = byte_tokenizer()
    renderer = Renderer(tokenizer)
    calls = counted(tokenizer, monkeypatch)
    prompts = [said(str(number)) for number in range(7)]
    texts = map(renderer.prompt_text, renderer.student_batch(prompts))
    assert calls == [3, 3, 1]
    assert [text[len("<|im_start|>user\n")] for text in texts] == list("0123456")


def test_the_prompts_that_were_asked_for_last_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render, "KEPT", 3)
    tokenizer = byte_tokenizer()
    renderer = Renderer(tokenizer)
    calls = counted(tokenizer, monkeypatch)
    whole = renderer.student_batch([said(each) for each in "abcde"])
    assert (calls, len(renderer._kept)) == ([5], 3)
    renderer.student_ids(said("c"))  # now c is the newest of c, d, e
    renderer.student_ids(said("f"))
    assert calls == [5, 1]
    assert renderer.student_batch([said("c"), said("e")]) == [whole[2], whole[4]]
    assert calls == [5, 1]
    assert renderer.student_ids(said("d")) == whole[3]
    assert (calls, len(renderer._kept)) == ([5, 1, 1], 3)


def test_a_prompt_that_the_template_refuses_is_refused_in_a_batch_and_leaves_the_others_right() -> None:
    tokenizer = byte_tokenizer(template=REFUSING)
    renderer = Renderer(tokenizer)
    prompts = [said("yes"), said("no"), said("maybe")]
    for _ in range(2):
        with pytest.raises(TemplateError, match="refused"):
            renderer.student_batch(prompts)
    for each in (prompts[2], prompts[0]):
        assert renderer.student_ids(each) == alone(tokenizer, each)


def test_a_text_that_cannot_stay_text_is_named_in_a_batch_as_alone() -> None:
    template = CHAT_TEMPLATE.replace("+ message['content'] +", "+ message['content'].replace('\\U000F0000', '') +")
    assert template != CHAT_TEMPLATE
    prompts = [said("a"), said(f"b{END}"), said("c")]
    found = []
    for asked in (prompts, prompts[1:2]):
        with pytest.raises(UserError, match="a control token of this model, and its chat template rewrites") as error:
            Renderer(byte_tokenizer(template=template)).student_batch(asked)
        found.append(str(error.value))
    assert found[0] == found[1]
