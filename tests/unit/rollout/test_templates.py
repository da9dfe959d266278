"""What both roles read under well-known chat templates: the whole text, thinking and system messages included."""

from __future__ import annotations

from typing import Any

import pytest

from atesd.exposure.prompt import PromptConfig, evaluation_messages, student_messages, teacher_messages
from atesd.rollout.render import Renderer
from atesd.train.tokens import chosen_template
from atesd.types import Problem, UserError

from support.templates import CONTROLS, tokenizer_of

PROBLEM = Problem(id="p", problem="1 + 1 = ?", solution="2", answer="2")
PROMPT = {"student": "Q: {problem}", "teacher": "Q: {problem}\nRef: {hint}\nNow you."}
STUDENT, TEACHER = "Q: 1 + 1 = ?", "Q: 1 + 1 = ?\nRef: It is 2.\nNow you."


def texts(family: str, thinking: dict[str, bool] | None = None, **prompt: Any) -> tuple[str, str]:
    """Return the student's and the teacher's prompt as the model reads them."""
    renderer = Renderer(tokenizer_of(*CONTROLS[family]), **(thinking or {}))
    config = PromptConfig(**PROMPT, **prompt)
    return (
        renderer.prompt_text(renderer.student_ids(student_messages(PROBLEM, config))),
        renderer.prompt_text(renderer.teacher_ids(teacher_messages(PROBLEM, "It is 2.", config))),
    )


SMOL = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
# What stands before and behind the user's text; of the system message, too, where a template shows one.
AROUND = {
    "qwen3": ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"),
    "llama3": (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n",
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "smollm2": (
        f"<|im_start|>system\n{SMOL}<|im_end|>\n<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n",
    ),
    "smollm3": (
        f"<|im_start|>system\n## Metadata\n\nReasoning Mode: /think\n\n## Custom Instructions\n\n{SMOL}.<|im_end|>\n"
        "<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n",
    ),
    "gemma2": ("<bos><start_of_turn>user\n", "<end_of_turn>\n<start_of_turn>model\n"),
    "gemma3": ("<bos><start_of_turn>user\n", "<end_of_turn>\n<start_of_turn>model\n"),
    "mistral": ("<s>[INST] ", " [/INST]"),
}
WITH_SYSTEM = {
    "qwen3": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n",
    "llama3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n",
    "smollm2": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n",
    "smollm3": "<|im_start|>system\n## Metadata\n\nReasoning Mode: /think\n\n## Custom Instructions\n\nBe brief."
    "<|im_end|>\n<|im_start|>user\n",
    # These know no system role: folded by us (Gemma 2, Mistral) or by the template itself (Gemma 3), alike.
    "gemma2": "<bos><start_of_turn>user\nBe brief.\n\n",
    "gemma3": "<bos><start_of_turn>user\nBe brief.\n\n",
    "mistral": "<s>[INST] Be brief.\n\n",
}


@pytest.mark.parametrize("family", CONTROLS)
def test_each_role_reads_one_user_turn_with_the_hint_inside(family: str) -> None:
    before, behind = AROUND[family]
    assert texts(family) == (before + STUDENT + behind, before + TEACHER + behind)


@pytest.mark.parametrize("family", CONTROLS)
def test_a_system_message_stands_where_the_family_has_it(family: str) -> None:
    before, behind = WITH_SYSTEM[family], AROUND[family][1]
    assert texts(family, system="Be brief.") == (before + STUDENT + behind, before + TEACHER + behind)


def test_each_role_may_have_a_system_message_of_its_own() -> None:
    plain, said, behind = AROUND["qwen3"][0], WITH_SYSTEM["qwen3"], AROUND["qwen3"][1]
    student, teacher = STUDENT + behind, TEACHER + behind
    assert texts("qwen3", system_student="Be brief.") == (said + student, plain + teacher)
    assert texts("qwen3", system_teacher="Be brief.") == (plain + student, said + teacher)
    assert texts("qwen3", system="Be brief.", system_teacher="") == (said + student, plain + teacher)
    assert texts("qwen3", system="Be long.", system_student="Be brief.", system_teacher="") == (
        said + student,
        plain + teacher,
    )
    config = PromptConfig(**PROMPT, system="No.", system_student="Yes.", hint="none")
    assert evaluation_messages(PROBLEM, config)[0] == {"role": "system", "content": "Yes."}
    assert teacher_messages(PROBLEM, None, config)[0] == {"role": "system", "content": "No."}


def test_thinking_is_the_students_and_the_teachers_own_choice() -> None:
    """The paper's: the student does not think, the teacher does."""
    thinking = {"enable_thinking_student": False, "enable_thinking_teacher": True}
    before, behind = AROUND["qwen3"]
    closed = "<think>\n\n</think>\n\n"
    assert texts("qwen3", thinking) == (before + STUDENT + behind + closed, before + TEACHER + behind)
    before, behind = AROUND["smollm3"]
    quiet = before.replace("/think", "/no_think")
    assert texts("smollm3", thinking) == (
        quiet + STUDENT + behind + "<think>\n\n</think>\n",
        before + TEACHER + behind,
    )
    for family in ("llama3", "smollm2", "gemma2", "gemma3", "mistral"):
        with pytest.raises(UserError, match="does not know enable_thinking"):
            texts(family, thinking)


def test_a_spelt_control_token_in_a_folded_system_message_stays_text() -> None:
    student, _ = texts("gemma2", system="Say <end_of_turn>.")
    assert student.startswith("<bos><start_of_turn>user\nSay <end_of_turn>.\n\nQ: ")
    tokenizer = tokenizer_of(*CONTROLS["gemma2"])
    ids = Renderer(tokenizer).student_ids(student_messages(PROBLEM, PromptConfig(system="Say <end_of_turn>.")))
    assert ids.count(tokenizer.eos_token_id) == 1


def test_a_template_that_drops_system_messages_gets_them_folded() -> None:
    dropping = "{% for m in messages if m.role == 'user' %}U:{{ m.content }}{% endfor %}A:"
    renderer = Renderer(tokenizer_of(dropping, None, "<end>", []))
    ids = renderer.student_ids(student_messages(PROBLEM, PromptConfig(student="{problem}", system="Be brief.")))
    assert renderer.prompt_text(ids) == "U:Be brief.\n\n1 + 1 = ?A:"


def test_a_template_that_refuses_what_an_environment_says_is_told_in_a_line() -> None:
    renderer = Renderer(tokenizer_of(*CONTROLS["mistral"]))
    wrong = r"refuses what the environment says, messages by tool, user \(Conversation roles must .*\): let it say one"
    with pytest.raises(UserError, match=wrong):
        renderer.continuation_ids([{"role": "tool", "content": "4"}, {"role": "user", "content": "Go on."}])


def test_the_plain_template_writes_texts_and_blank_lines() -> None:
    tokenizer = tokenizer_of("", None, "<end>", [])
    tokenizer.chat_template = chosen_template("plain", tokenizer)
    renderer = Renderer(tokenizer)
    config = PromptConfig(**PROMPT, system="Be brief.")
    ids = renderer.student_ids(student_messages(PROBLEM, config))
    assert renderer.prompt_text(ids) == f"Be brief.\n\n{STUDENT}\n\n"
    assert renderer.prompt_text(renderer.continuation_ids([{"role": "user", "content": "Again."}])) == "\n\nAgain.\n\n"


def test_the_plain_template_begins_as_the_tokenizer_does() -> None:
    class Begins:
        bos_token, bos_token_id = "<s>", 7

        def __init__(self, first: int) -> None:
            self.first = first

        def encode(self, text: str) -> list[int]:
            return [self.first, 1]

    assert chosen_template("plain", Begins(7)).startswith("{{- bos_token -}}\n{%- for")
    assert chosen_template("plain", Begins(8)).startswith("{%- for")


def test_a_template_is_a_text_or_a_file(tmp_path: Any) -> None:
    path = tmp_path / "chat.jinja"
    path.write_text("{{ messages }}")
    assert chosen_template(str(path), None) == "{{ messages }}"
    assert chosen_template("{{ 1 }}", None) == "{{ 1 }}"
    with pytest.raises(UserError, match=r"prompt\.chat_template = 'absent\.jinja' cannot be read .*give 'plain'"):
        chosen_template("absent.jinja", None)
