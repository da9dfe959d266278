from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from atesd.exposure.prompt import PromptConfig, donors, hint_text, states_answer, student_messages, teacher_messages
from atesd.exposure.segments import Segments
from atesd.types import Message, Problem, UserError

# OPSD v3, spelled once more, byte by byte.
STUDENT = b"Problem: What is 1/2?\n\nPlease reason step by step, and put your final answer within \\boxed{}."
TEACHER = (
    b"Problem: What is 1/2?\n"
    b"\n"
    b"Here is a reference solution to this problem:\n"
    b"=== Reference Solution Begin ===\n"
    b"Halve it. It is {problem} \\boxed{0.5}.\n"
    b"=== Reference Solution End ===\n"
    b"\n"
    b"\n"
    b"After reading the reference solution above, make sure you truly understand the reasoning behind each step "
    b"\xe2\x80\x94 do not copy or paraphrase it. Now, using your own words and independent reasoning, derive the same "
    b"final answer to the problem above. Think step by step, explore different approaches, and don't be afraid to "
    b"backtrack or reconsider if something doesn't work out:\n"
    b"\n"
    b"Please reason step by step, and put your final answer within \\boxed{}."
)
HALF = Problem("half", "What is 1/2?", "Halve it. It is {problem} \\boxed{0.5}.", "0.5")
CHAIN = Problem("chain", "3*4+1", "3*4=2;\n2+1=3;\n#3.\n", "3")
OPSD = PromptConfig()
PICO = PromptConfig(student="{problem}", teacher="{problem}\n{hint}", answer="\n#{answer}")
PREFIX = Segments()


def hint_of(problem: Problem, ratio: float, prompt: PromptConfig, reveal: Segments = PREFIX) -> str:
    return hint_text(problem, reveal.reveal(problem, ratio), prompt)


def messages_of(problem: Problem, ratio: float, prompt: PromptConfig) -> list[Message]:
    return teacher_messages(problem, hint_of(problem, ratio, prompt), prompt)


def test_full_exposure_is_opsd_byte_for_byte() -> None:
    (student,) = student_messages(HALF, OPSD)
    (teacher,) = messages_of(HALF, 1.0, OPSD)
    assert (student["role"], teacher["role"]) == ("user", "user")
    assert student["content"].encode() == STUDENT
    assert teacher["content"].encode() == TEACHER


@pytest.mark.parametrize("order", ["prefix", "suffix", "random_segments"])
def test_full_exposure_is_the_solution_itself_in_every_order_and_without_an_answer(order: str) -> None:
    odd = Problem("odd", "P", "\n a.\n\n b \n\n", "7")
    for problem in (odd, Problem("none", "P", odd.solution)):
        reveal = Segments(order=order, hidden_marker="[...]")  # type: ignore[arg-type]
        assert hint_of(problem, 1.0, OPSD, reveal) == odd.solution


def test_partial_exposure_keeps_the_answer() -> None:
    assert hint_of(HALF, 0.5, OPSD) == "Halve it.\n\nFinal answer: \\boxed{0.5}"
    assert hint_of(HALF, 0.0, OPSD) == "Final answer: \\boxed{0.5}"
    assert hint_of(HALF, 0.5, OPSD, Segments(order="suffix")) == "It is {problem} \\boxed{0.5}."


def test_line_templates_join_to_whole_lines_at_every_ratio() -> None:
    expected = {0.0: "#3", 0.34: "3*4=2;\n#3", 0.67: "3*4=2;\n2+1=3;\n#3", 1.0: "3*4=2;\n2+1=3;\n#3.\n"}
    assert {ratio: hint_of(CHAIN, ratio, PICO) for ratio in expected} == expected
    (message,) = messages_of(CHAIN, 0.0, PICO)
    assert message["content"] == "3*4+1\n#3"
    assert hint_of(CHAIN, 0.34, PICO, Segments(order="suffix")) == "#3."
    assert hint_of(CHAIN, 0.34, PICO, Segments(hidden_marker="...")) == "3*4=2;\n...\n#3"


def test_without_an_answer_nothing_is_appended() -> None:
    unknown = Problem("u", "P", "a\nb\n")
    assert hint_of(unknown, 0.5, OPSD) == "a"
    assert hint_of(unknown, 0.0, OPSD) == ""
    assert hint_of(CHAIN, 0.5, PromptConfig(answer="")) == "3*4=2;"


@pytest.mark.parametrize(
    ("visible", "text", "answer", "stated"),
    [
        ("so #7.", "\n#7", "7", True),
        ("so #72", "\n#7", "7", False),
        ("so #7.5", "\n#7", "7", False),
        ("so #7/2", "\n#7", "7", False),
        ("so #7, then", "\n#7", "7", True),
        ("it is\\boxed{7}cm", "\n\nFinal answer: \\boxed{7}", "7", True),
        ("it is \\boxed{ 7 }", "\n\nFinal answer: \\boxed{7}", "7", True),
        ("it is \\boxed{72}", "\n\nFinal answer: \\boxed{7}", "7", False),
        ("it is \\boxed{\\frac{1}{2}}", " \\boxed{\\frac{1}{2}}", "\\frac{1}{2}", True),
        ("x = 7", "\n\nFinal answer: \\boxed{7}", "7", False),
        ("3-7 = x", " -7", "-7", False),
        ("x = -7", " -7", "-7", True),
        ("1.7 and 1,7 and a7", " 7", "7", False),
        ("", "\n#7", "7", False),
        ("a+b*", " a+b", "a+b", True),
        ("aab", " a+b", "a+b", False),
    ],
)
def test_an_answer_is_stated_only_where_it_stands_alone(visible: str, text: str, answer: str, stated: bool) -> None:
    assert states_answer(visible, text, answer) is stated


@given(st.text(max_size=20), st.text(min_size=1, max_size=20).filter(str.strip), st.text(min_size=1, max_size=5))
def test_values_are_filled_literally_in_one_pass(problem: str, solution: str, answer: str) -> None:
    prompt = PromptConfig(teacher="{hint}|{problem}|{foo}{}\\1", answer="@{{answer}}@", student="{problem}{hunt}")
    tricky = Problem("t", problem + "{hint}", solution + "{problem}{hint}\\g<0>", answer + "{problem}")
    (full,) = messages_of(tricky, 1.0, prompt)
    assert full["content"] == f"{tricky.solution}|{tricky.problem}|{{foo}}{{}}\\1"
    assert hint_of(tricky, 0.0, prompt) == f"@{{{tricky.answer}}}@"
    assert student_messages(tricky, prompt)[0]["content"] == tricky.problem + "{hunt}"


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"student": "no"}, r"'student' lacks.*\{problem\}"),
        ({"teacher": "{problem}"}, r"'teacher' lacks.*\{hint\}"),
        ({"teacher": "{hint}"}, r"'teacher' lacks.*\{problem\}"),
        ({"answer": "Answer:"}, r"'answer' lacks.*\{answer\}"),
        ({"hint_none": "think"}, r"'hint_none' lacks.*\{problem\}"),
        ({"student": "{problem}{hint}"}, r"only the teacher may see"),
    ],
)
def test_templates_without_their_placeholders_are_refused(fields: dict[str, str], match: str) -> None:
    with pytest.raises(ValidationError, match=match):
        PromptConfig(**fields)  # type: ignore[arg-type]


def test_teacher_without_hint_reads_the_students_prompt() -> None:
    blind = PromptConfig(hint="none", student="S {problem}")
    for hint in ("some words", "", None):
        assert teacher_messages(HALF, hint, blind) == student_messages(HALF, blind)
    assert hint_of(HALF, 0.5, blind) == ""
    own = PromptConfig(hint="none", hint_none="T {problem}")
    assert teacher_messages(HALF, "some words", own)[0]["content"] == "T What is 1/2?"


def test_no_hint_is_another_prompt_than_an_empty_one() -> None:
    assert teacher_messages(HALF, None, OPSD) == student_messages(HALF, OPSD)
    assert teacher_messages(HALF, None, PromptConfig(hint_none="T {problem}"))[0]["content"] == "T What is 1/2?"
    (empty,) = teacher_messages(HALF, "", OPSD)
    assert "=== Reference Solution Begin ===\n\n=== Reference Solution End ===" in empty["content"]


def test_wrong_problem_shows_the_donors_solution_and_answer() -> None:
    wrong = PromptConfig(hint="wrong_problem")
    (message,) = teacher_messages(HALF, hint_of(CHAIN, 0.34, wrong), wrong)
    assert message["content"].startswith("Problem: What is 1/2?\n")
    assert "\n3*4=2;\n\nFinal answer: \\boxed{3}\n===" in message["content"]
    assert "0.5" not in message["content"]


@given(st.integers(2, 30), st.integers(0, 5))
def test_donors_are_a_derangement_that_ignores_the_order_of_problems(count: int, seed: int) -> None:
    problems = [Problem(str(index), "p", "s") for index in range(count)]
    chosen = donors(problems, seed)
    assert all(chosen[problem.id].id != problem.id for problem in problems)
    assert sorted(donor.id for donor in chosen.values()) == sorted(problem.id for problem in problems)
    assert chosen == donors(problems[::-1], seed)


def test_donors_need_two_different_problems() -> None:
    with pytest.raises(UserError, match="at least 2"):
        donors([HALF], 0)
    with pytest.raises(UserError, match="different ids"):
        donors([HALF, HALF], 0)


@pytest.mark.parametrize(
    ("field", "template", "meant"),
    [
        ("teacher", "{problem}{hnt}{hint}", "{hnt}, which nothing is filled in for: did you mean {hint}?"),
        ("teacher", "{problem} {hint} {HINT}", "{HINT}, which nothing is filled in for: did you mean {hint}?"),
        ("student", "{problem} {problems}", "did you mean {problem}?"),
        ("answer", "#{answer} {anwser}", "did you mean {answer}?"),
    ],
)
def test_a_misspelt_placeholder_is_no_text(field: str, template: str, meant: str) -> None:
    with pytest.raises(ValidationError) as found:
        PromptConfig.model_validate({field: template})
    assert meant in str(found.value)


def test_other_braces_are_text() -> None:
    text = "{problem} {hint} {point} {answer} {{hint}} \\boxed{hints} \\text{problems} {} {a b}"
    assert PromptConfig(teacher=text).teacher == text
