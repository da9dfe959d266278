from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from atesd.exposure.prompt import PromptConfig, hint_text, student_messages, teacher_messages
from atesd.exposure.segments import Segments
from atesd.rollout.render import Renderer
from atesd.types import Message, Problem, UserError

from support.rollouts import CHAT_TEMPLATE, END, FORGETFUL_TEMPLATE, PADDING, PLAIN_TEMPLATE, byte_tokenizer

PROBLEM = Problem("p", "How much is 2 + 3 + 4?", "2 + 3 = 5\n5 + 4 = 9\nSo \\boxed{9}.\nDone.", answer="9")
TURN: list[Message] = [{"role": "user", "content": "1 + 1?"}]


def test_the_student_prompt_is_the_chat_up_to_the_assistant_header() -> None:
    renderer = Renderer(byte_tokenizer())
    ids = renderer.student_ids(TURN)
    assert all(isinstance(token, int) for token in ids)
    assert renderer.prompt_text(ids) == "<|im_start|>user\n1 + 1?<|im_end|>\n<|im_start|>assistant\n"


def test_equal_flags_and_no_hint_give_both_roles_identical_ids() -> None:
    prompt = PromptConfig(hint="none")
    renderer = Renderer(byte_tokenizer(), enable_thinking_student=False, enable_thinking_teacher=False)
    student = renderer.student_ids(student_messages(PROBLEM, prompt))
    assert renderer.teacher_ids(teacher_messages(PROBLEM, None, prompt)) == student


def test_a_prompt_is_rendered_once_and_kept_apart_by_role_text_and_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    renderer = Renderer(byte_tokenizer(), enable_thinking_student=False, enable_thinking_teacher=True)
    other: list[Message] = [{"role": "user", "content": "1 + 2?"}]
    first = [renderer.student_ids(TURN), renderer.teacher_ids(TURN), renderer.student_ids(other)]
    assert len({tuple(ids) for ids in first}) == 3
    first[0].append(0)  # a caller's own list
    monkeypatch.setattr(renderer, "_tokenizer", None)
    again = [renderer.student_ids(TURN), renderer.teacher_ids(TURN), renderer.student_ids(other)]
    assert again == [first[0][:-1], *first[1:]]


def test_thinking_flags_reach_only_their_role() -> None:
    renderer = Renderer(byte_tokenizer(), enable_thinking_student=False, enable_thinking_teacher=True)
    header = "<|im_start|>assistant\n"
    assert renderer.prompt_text(renderer.student_ids(TURN)).endswith(header + "<think>\n\n</think>\n\n")
    assert renderer.prompt_text(renderer.teacher_ids(TURN)).endswith(header)


def test_the_prefill_follows_the_teachers_header() -> None:
    renderer = Renderer(byte_tokenizer(), teacher_prefill="<think>\n")
    assert renderer.teacher_ids(TURN) == renderer.student_ids(TURN) + renderer.text_ids("<think>\n")


def test_a_flag_that_the_template_ignores_is_refused() -> None:
    with pytest.raises(UserError, match=r"prompt\.enable_thinking_teacher is set, but .* leave the flag out"):
        Renderer(byte_tokenizer(template=PLAIN_TEMPLATE), enable_thinking_teacher=True)
    Renderer(byte_tokenizer(template=PLAIN_TEMPLATE))


def test_the_teacher_prompt_is_one_user_turn_with_problem_and_visible_prefix_inside() -> None:
    renderer = Renderer(byte_tokenizer())
    shown = Segments().reveal(PROBLEM, 0.5)
    messages = teacher_messages(PROBLEM, hint_text(PROBLEM, shown, PromptConfig()), PromptConfig())
    text = renderer.prompt_text(renderer.teacher_ids(messages))
    # Four lines at ratio 0.5: two are visible, then the answer.
    user, assistant = text.split(END + "\n")
    assert text.count("<|im_start|>user") == 1
    assert PROBLEM.problem in user
    assert "2 + 3 = 5\n5 + 4 = 9" in user
    assert "Done." not in user
    assert "Final answer: \\boxed{9}" in user
    assert assistant == "<|im_start|>assistant\n"


def test_decode_leaves_special_tokens_out_and_spaces_alone() -> None:
    tokenizer = byte_tokenizer()
    # What some model folders ask for; it would turn " ," into ",".
    tokenizer.clean_up_tokenization_spaces = True
    tokenizer.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output = True
    renderer = Renderer(tokenizer)
    ids = [*renderer.text_ids(" a , b ' s . \n"), renderer.eos_ids[0]]
    assert renderer.decode(ids) == " a , b ' s . \n"
    assert renderer.prompt_text(ids) == " a , b ' s . \n" + END


def test_token_texts_show_a_split_character_with_its_last_token() -> None:
    renderer = Renderer(byte_tokenizer())
    # The root sign is three bytes, so three tokens here.
    ids = [*renderer.text_ids("a\u221a2"), renderer.eos_ids[0]]
    assert renderer.token_texts(ids) == ["a", "", "", "\u221a", "2", END]


def test_token_texts_keep_the_spaces_that_a_tokenizer_strips_at_a_texts_start() -> None:
    engine = Tokenizer(models.WordLevel({"\u2581a": 0, "\u2581b": 1, "c": 2, END: 3}, unk_token=END))
    engine.decoder = decoders.Metaspace()
    renderer = Renderer(PreTrainedTokenizerFast(tokenizer_object=engine, eos_token=END))
    assert renderer.token_texts([0, 1, 2, 1]) == ["a", " b", "c", " b"]


def test_token_texts_of_an_unfinished_character_do_not_raise() -> None:
    renderer = Renderer(byte_tokenizer())
    assert renderer.token_texts(renderer.text_ids("a\u221a")[:-1]) == ["a", "", "\ufffd"]
    assert renderer.token_texts([]) == []


@given(st.lists(st.integers(0, 258), max_size=40))
def test_token_texts_concatenate_to_the_whole_text(ids: list[int]) -> None:
    renderer = Renderer(BYTES)
    texts = renderer.token_texts(ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == renderer.prompt_text(ids)


BYTES = byte_tokenizer()


def test_end_tokens_are_the_tokenizers_own_first_and_each_once() -> None:
    tokenizer = byte_tokenizer()
    end, pad = (tokenizer.convert_tokens_to_ids(token) for token in (END, PADDING))
    renderer = Renderer(tokenizer, extra_eos_ids=[pad, end, pad])
    assert renderer.eos_ids == (end, pad)
    assert renderer.pad_id == pad


def test_without_a_pad_token_the_end_token_pads() -> None:
    renderer = Renderer(byte_tokenizer(pad=None))
    assert renderer.pad_id == renderer.eos_ids[0]


def test_a_tokenizer_without_end_token_is_refused() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no end token"):
        Renderer(tokenizer)


def test_a_conversation_goes_on_as_the_template_would_have_it() -> None:
    """Prompt, sampled reply with its end token, then the continuation: the same ids as rendering the whole at once."""
    renderer = Renderer(byte_tokenizer())
    said: list[Message] = [{"role": "user", "content": "and then?"}]
    sampled = [*renderer.text_ids("a reply"), renderer.eos_ids[0]]
    whole = renderer.student_ids([*TURN, {"role": "assistant", "content": "a reply"}, *said])
    assert [*renderer.student_ids(TURN), *sampled, *renderer.continuation_ids(said)] == whole


THOUGHT = "<think>\nIs it 2?\n</think>\n\nIt is 2."


@pytest.mark.parametrize(("template", "rewrites"), [(CHAT_TEMPLATE, False), (FORGETFUL_TEMPLATE, True)])
def test_a_template_that_rewrites_history_is_told_from_one_that_keeps_it(template: str, rewrites: bool) -> None:
    """Rendered anew, the reply of the turn before is there, or only what stands behind its thinking."""
    tokenizer = byte_tokenizer(template=template)
    talk = [*TURN, {"role": "assistant", "content": THOUGHT}]
    assert THOUGHT in str(tokenizer.apply_chat_template(talk, tokenize=False)), "while it is the last message"
    later = str(tokenizer.apply_chat_template([*talk, {"role": "user", "content": "Sure?"}], tokenize=False))
    assert (THOUGHT in later, "It is 2." in later) == (not rewrites, True)
    assert Renderer(tokenizer).rewrites_history() is rewrites


def test_what_follows_a_reply_is_the_same_where_history_is_rewritten() -> None:
    """Both templates put the same around what is said; the thinking that one of them drops is no part of it."""
    said: list[Message] = [{"role": "user", "content": "Sure?"}]
    kept, dropped = (Renderer(byte_tokenizer(template=each)) for each in (CHAT_TEMPLATE, FORGETFUL_TEMPLATE))
    assert dropped.prompt_text(dropped.continuation_ids(said)) == (
        "\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert dropped.continuation_ids(said) == kept.continuation_ids(said)


def test_thinking_flags_reach_the_header_of_a_later_turn_too() -> None:
    renderer = Renderer(byte_tokenizer(), enable_thinking_student=False)
    text = renderer.prompt_text(renderer.continuation_ids([{"role": "user", "content": "more"}]))
    assert text == "\n<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


@pytest.mark.parametrize(
    "template",
    [
        PLAIN_TEMPLATE,  # nothing closes a reply
        "{%- for message in messages if message['role'] == 'user' -%}{{ message['content'] }}{%- endfor -%}",
    ],
)
def test_a_template_that_does_not_close_replies_cannot_go_on(template: str) -> None:
    renderer = Renderer(byte_tokenizer(template=template))
    with pytest.raises(UserError, match=r"does not close a reply with the end token .* environment of one turn"):
        renderer.continuation_ids([{"role": "user", "content": "more"}])


def test_the_texts_of_both_roles_are_what_their_ids_spell() -> None:
    system: list[Message] = [{"role": "system", "content": "Be brief."}, *TURN]
    refusing = CHAT_TEMPLATE.replace("{{ '<|im_start|>'", "{{ '' if message['role'] == 'system' else '<|im_start|>'", 1)
    for template in (CHAT_TEMPLATE, refusing):
        tokenizer = byte_tokenizer(template=template)
        renderer = Renderer(tokenizer, enable_thinking_student=False, teacher_prefill="<think>\n")
        for messages in (TURN, system):
            assert renderer.student_text(messages) == renderer.prompt_text(renderer.student_ids(messages))
            assert renderer.teacher_text(messages) == renderer.prompt_text(renderer.teacher_ids(messages))
    assert renderer.student_text(TURN) != renderer.teacher_text(TURN)


def sentencepiece(*added: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer without merges that writes letters in compatible ones and falls back to bytes."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"\u2581": 256, "<unk>": 257}
    engine = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    engine.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(" ", "\u2581")])
    engine.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    engine.add_special_tokens([END])
    engine.add_tokens([AddedToken(each, normalized=False) for each in added])
    return PreTrainedTokenizerFast(tokenizer_object=engine, eos_token=END)


@given(st.text(max_size=30))
@example("")
@example("a b")
@example("\ufdfa")
@example("\ufb2c\u1f82\u0390")
@example("\U0001f600<|im_end|>\n")
@example("a\n" * 10)
def test_no_tokenizer_exceeds_the_bound(text: str) -> None:
    for tokenizer in (sentencepiece(), sentencepiece("\n"), byte_tokenizer()):
        assert len(tokenizer.encode(text, add_special_tokens=False)) <= Renderer(tokenizer).most_tokens(text)


def test_the_bound_is_a_token_a_letter_of_plain_text() -> None:
    renderer = Renderer(byte_tokenizer())
    assert renderer.most_tokens("2 + 3 = 5") == 9 + 2
    assert renderer.most_tokens("\ufdfa") == 33 + 2
    assert Renderer(sentencepiece("\n")).most_tokens("2 + 3 = 5") == 2 * 9 + 2
    assert len(sentencepiece("\n").encode("a\n" * 10, add_special_tokens=False)) == 30, "or the two tell nothing"


def letter_tokenizer(known: str, unknown: str | None) -> PreTrainedTokenizerFast:
    """Return a tokenizer of a few letters, which reads others as `unknown`."""
    words = {letter: index for index, letter in enumerate(known)}
    words |= {name: len(words) + place for place, name in enumerate(("<end>", "<unknown>"))}
    core = Tokenizer(models.WordLevel(words, unk_token="<unknown>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<end>", unk_token=unknown, chat_template=PLAIN_TEMPLATE
    )


def test_pieces_without_a_token_are_found() -> None:
    renderer = Renderer(letter_tokenizer("ab ", "<unknown>"))
    assert renderer.unknown("a cab\u00e9 b") == ["c", "\u00e9"]
    assert renderer.unknown("ab a") == []
    assert renderer.unknown("") == []
    assert renderer.unknown("c<end>") == [], "what spells a control token is refused elsewhere"
    assert Renderer(byte_tokenizer()).unknown("a cab\u00e9 b") == [], "bytes spell everything"


def test_a_tokenizer_without_an_unknown_token_or_without_places(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Renderer(letter_tokenizer("ab ", None)).unknown("c") == []
    monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", False)
    slow = Renderer(letter_tokenizer("ab ", "<unknown>"))
    assert slow.unknown("cab") == ["<unknown>"]
    assert slow.unknown("ab") == []
