from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from atesd.exposure.prompt import PromptConfig, donors, hint_text, states_answer, student_messages, teacher_messages
from atesd.exposure.reveal import RevealConfig
from atesd.types import Problem, UserError

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
PREFIX = RevealConfig()


def test_full_exposure_is_opsd_byte_for_byte() -> None:
    (student,) = student_messages(HALF, OPSD)
    (teacher,) = teacher_messages(HALF, 1.0, OPSD, PREFIX)
    assert (student["role"], teacher["role"]) == ("user", "user")
    assert student["content"].encode() == STUDENT
    assert teacher["content"].encode() == TEACHER


@pytest.mark.parametrize("order", ["prefix", "suffix", "random_segments"])
def test_full_exposure_is_the_solution_itself_in_every_order_and_without_an_answer(order: str) -> None:
    odd = Problem("odd", "P", "\n a.\n\n b \n\n", "7")
    for problem in (odd, Problem("none", "P", odd.solution)):
        reveal = RevealConfig(order=order, hidden_marker="[...]")  # type: ignore[arg-type]
        assert hint_text(problem, 1.0, OPSD, reveal) == odd.solution


def test_partial_exposure_keeps_the_answer() -> None:
    assert hint_text(HALF, 0.5, OPSD, PREFIX) == "Halve it.\n\nFinal answer: \\boxed{0.5}"
    assert hint_text(HALF, 0.0, OPSD, PREFIX) == "Final answer: \\boxed{0.5}"
    assert hint_text(HALF, 0.5, OPSD, RevealConfig(order="suffix")) == "It is {problem} \\boxed{0.5}."


def test_line_templates_join_to_whole_lines_at_every_ratio() -> None:
    expected = {0.0: "#3", 0.34: "3*4=2;\n#3", 0.67: "3*4=2;\n2+1=3;\n#3", 1.0: "3*4=2;\n2+1=3;\n#3.\n"}
    assert {ratio: hint_text(CHAIN, ratio, PICO, PREFIX) for ratio in expected} == expected
    (message,) = teacher_messages(CHAIN, 0.0, PICO, PREFIX)
    assert message["content"] == "3*4+1\n#3"
    assert hint_text(CHAIN, 0.34, PICO, RevealConfig(order="suffix")) == "#3."
    assert hint_text(CHAIN, 0.34, PICO, RevealConfig(hidden_marker="...")) == "3*4=2;\n...\n#3"


def test_without_an_answer_nothing_is_appended() -> None:
    unknown = Problem("u", "P", "a\nb\n")
    assert hint_text(unknown, 0.5, OPSD, PREFIX) == "a"
    assert hint_text(unknown, 0.0, OPSD, PREFIX) == ""
    assert hint_text(CHAIN, 0.5, PromptConfig(answer=""), PREFIX) == "3*4=2;"


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
    (full,) = teacher_messages(tricky, 1.0, prompt, PREFIX)
    assert full["content"] == f"{tricky.solution}|{tricky.problem}|{{foo}}{{}}\\1"
    assert hint_text(tricky, 0.0, prompt, PREFIX) == f"@{{{tricky.answer}}}@"
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
    assert teacher_messages(HALF, 0.5, blind, PREFIX) == student_messages(HALF, blind)
    assert hint_text(HALF, 0.5, blind, PREFIX) == ""
    own = PromptConfig(hint="none", hint_none="T {problem}")
    assert teacher_messages(HALF, 0.5, own, PREFIX)[0]["content"] == "T What is 1/2?"


def test_wrong_problem_shows_the_donors_solution_and_answer() -> None:
    wrong = PromptConfig(hint="wrong_problem")
    (message,) = teacher_messages(HALF, 0.34, wrong, PREFIX, donor=CHAIN)
    assert message["content"].startswith("Problem: What is 1/2?\n")
    assert "\n3*4=2;\n\nFinal answer: \\boxed{3}\n===" in message["content"]
    assert "0.5" not in message["content"]
    for donor in (None, HALF):
        with pytest.raises(UserError, match="needs a donor other than"):
            hint_text(HALF, 0.5, wrong, PREFIX, donor=donor)


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


def test_bad_ratio_is_refused_even_where_no_solution_is_shown() -> None:
    for prompt in (OPSD, PromptConfig(hint="none")):
        with pytest.raises(UserError, match="outside"):
            teacher_messages(HALF, 1.5, prompt, PREFIX)
