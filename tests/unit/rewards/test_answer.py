"""Answer extraction on ordinary and hostile texts."""

from __future__ import annotations

import time

import pytest

from atesd.rewards.answer import extract_answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{7}.", "7"),
        (r"\boxed{1} no, \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\text{a \boxed{3} b}}", "3"),  # the innermost complete box opens last
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\fbox{5}", "5"),
        (r"\boxed {6}", "6"),
        (r"\boxed{4} and \boxed{unclosed", "4"),
        (r"\boxed{} then nothing", None),
        (r"\boxed{   }\n#### 3".replace(r"\n", "\n"), "3"),
        ("work\n#### 1,234", "1,234"),
        ("a\n#### 1\nb\n#### 2  ", "2"),
        ("a3*4=7\n#7", "7"),
        ("a3*4=7\n  #7 \r\n", "7"),
        ("# Heading\nwords", None),
        ("#### 5\n#hashtag", "5"),
        ("it is 5 #### 5", "5"),
        ("#### 5 #### 6", "6"),
        ("#### 5\n####", "5"),
        ("##### a heading of five", None),
        ("c####5", None),
        (r"\\boxed{8}", "8"),
        (r"\boxed{a\}b}", r"a\}b"),
        ("} \\boxed{3} }", "3"),
        ("## a heading of two", None),
        ("###", None),
        ("", None),
        ("no answer here", None),
        (r"<think>\boxed{1}</think> \boxed{2}", "2"),
        (r"<think>\boxed{1}</think> nothing", None),
        (r"<think>still thinking \boxed{1}", "1"),
        (r"text \boxed{9} #### 3", "9"),
    ],
)
def test_extract(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    "unit", ["{", r"\boxed{", "#", "#### ", "#### 1", " \t", "# ", "\\", "}", "\n#", r"\boxed{}", "<think>", "</think>"]
)
def test_hostile_texts_take_linear_time(unit: str) -> None:
    text = unit * (400_000 // len(unit))  # quadratic scanning of 400 kB takes minutes, linear scanning milliseconds
    begin = time.monotonic()
    extract_answer(text + "x")
    assert time.monotonic() - begin < 5.0
