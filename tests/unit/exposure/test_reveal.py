from __future__ import annotations

from itertools import pairwise
from math import nan
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atesd.exposure.reveal import reveal, segmentation_warning, split_segments
from atesd.types import UserError

LATEX = (
    "We have $f(x) = x^2. 5$ and $g = 3.14$. Then e.g. \\[ a = 1. \\text{ Now } b = 2 \\] holds! "
    "He pays $5. Then $6 more. So the answer is \\boxed{\\frac{1}{2}}."
)
TEXT = st.text(alphabet=st.sampled_from("ab1 .!?$\\[]()\n\r\t\u3002{}é"), max_size=60)
UNITS = ("auto", "line", "sentence", "paragraph", "token")
ORDERS = ("prefix", "suffix", "random_segments")


def test_sentences_are_not_cut_inside_formulas_decimals_or_abbreviations() -> None:
    assert split_segments(LATEX) == [
        "We have $f(x) = x^2. 5$ and $g = 3.14$. ",
        "Then e.g. \\[ a = 1. \\text{ Now } b = 2 \\] holds! ",
        "He pays $5. ",
        "Then $6 more. ",
        "So the answer is \\boxed{\\frac{1}{2}}.",
    ]


@pytest.mark.parametrize(
    ("text", "segments"),
    [
        ("It is $$x = 3.$$ Next.", ["It is $$x = 3.$$ ", "Next."]),
        ('"Yes." (See x.) Done', ['"Yes." ', "(See x.) ", "Done"]),
        ("1. Add.\n 2. Halve. b", ["1. Add.\n ", "2. Halve. ", "b"]),
        ("A\n\nSo. C", ["A\n\n", "So. ", "C"]),
        ("\\begin{align}a. b\\end{align} c. d", ["\\begin{align}a. b\\end{align} c. ", "d"]),
        ("Wait... what?! Ok", ["Wait... ", "what?! ", "Ok"]),
        ("costs $5. It was -$6 then. Ok $x$", ["costs $5. ", "It was -$6 then. ", "Ok $x$"]),
        ("costs \\$5. Then", ["costs \\$5. ", "Then"]),
        ("\u4ed6\u8bf4\u3002\u597d", ["\u4ed6\u8bf4\u3002", "\u597d"]),
    ],
)
def test_sentence_ends(text: str, segments: list[str]) -> None:
    assert split_segments(text, "sentence") == segments


def test_lines_carry_the_empty_lines_after_them_and_keep_their_indentation() -> None:
    assert split_segments("\n a;\n\n \n  b;\nc\n \n", "line") == ["\n a;\n\n \n", "  b;\n", "c\n \n"]
    assert split_segments("a\r\nb\r\n", "line") == ["a\r\n", "b\r\n"]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_every_line_end_is_one_break(end: str) -> None:
    def cut(text: str, unit: str) -> list[str]:
        return split_segments(text.replace("\n", end), unit)  # type: ignore[arg-type]

    def ended(*segments: str) -> list[str]:
        return [segment.replace("\n", end) for segment in segments]

    assert cut("a\nb\n", "line") == ended("a\n", "b\n")
    assert cut("a;\n\n \n  b;\nc\n", "line") == ended("a;\n\n \n", "  b;\n", "c\n")
    assert cut("a b\nc\n \n\nd", "paragraph") == ended("a b\nc\n \n\n", "d")
    assert cut("a b\nc\nd", "paragraph") == ended("a b\nc\nd")
    assert cut("A\n\nSo. C\nd", "sentence") == ended("A\n\n", "So. ", "C\nd")
    assert cut("1. Add.\n 2. Halve. b", "sentence") == ended("1. Add.\n ", "2. Halve. ", "b")
    assert cut("If $x. \ny$ so. $a. \n\nb$ c", "sentence") == ended("If $x. \ny$ so. ", "$a. \n\n", "b$ c")
    assert cut("It is. b\nSo. d", "auto") == ended("It is. b\n", "So. d")
    assert reveal("a\nb\nc\n".replace("\n", end), 0.67).text == f"a{end}b{end}"


def test_line_ends_of_all_kinds_in_one_text() -> None:
    assert split_segments("a\rb\r\nc\n\rd\r\r\ne", "line") == ["a\r", "b\r\n", "c\n\r", "d\r\r\n", "e"]
    assert split_segments("a\n\rb\r\r\nc\r\nd", "paragraph") == ["a\n\r", "b\r\r\n", "c\r\nd"]


@settings(deadline=None)
@given(
    TEXT.filter(lambda text: text.strip() and "\r" not in text), st.sampled_from(UNITS), st.sampled_from(["\r\n", "\r"])
)
def test_segments_do_not_depend_on_the_kind_of_line_ends(text: str, unit: Any, end: str) -> None:
    assert split_segments(text.replace("\n", end), unit) == [
        segment.replace("\n", end) for segment in split_segments(text, unit)
    ]


def test_paragraphs_and_words() -> None:
    assert split_segments("a b\nc\n \n\nd", "paragraph") == ["a b\nc\n \n\n", "d"]
    assert split_segments("  a b\n c ", "token") == ["  a ", "b\n ", "c "]


def test_auto_takes_lines_only_where_there_are_several() -> None:
    assert split_segments("It is. b\nSo. d", "auto") == ["It is. b\n", "So. d"]
    assert split_segments("It is. b\n\n", "auto") == ["It is. ", "b\n\n"]


@pytest.mark.parametrize(
    "hostile",
    [
        "." * 300_000,
        "\\[ $a. " * 5_000,
        "\n " * 100_000 + "a",
        "\r" * 200_000 + "a",
        "$\r\n" * 9_000,
        "\\begin{a}" * 8_000,
    ],
)
def test_hostile_text_is_cut_in_reasonable_time(hostile: str) -> None:
    # A quadratic scan of these would take minutes.
    assert "".join(split_segments("x " + hostile, "sentence")) == "x " + hostile


@settings(deadline=None)
@given(TEXT, st.sampled_from(UNITS))
def test_segments_join_to_the_solution_and_each_has_visible_text(text: str, unit: str) -> None:
    if not text.strip():
        with pytest.raises(UserError, match="empty"):
            split_segments(text, unit)  # type: ignore[arg-type]
        return
    segments = split_segments(text, unit)  # type: ignore[arg-type]
    assert "".join(segments) == text
    assert all(segment.strip() for segment in segments)


@settings(deadline=None)
@given(TEXT.filter(str.strip), st.sampled_from(UNITS), st.sampled_from(ORDERS), st.floats(0, 1), st.floats(0, 1))
def test_a_smaller_ratio_shows_a_subset(text: str, unit: str, order: str, first: float, second: float) -> None:
    low, high = sorted((first, second))
    cut: dict[str, Any] = {"unit": unit, "order": order}
    less, more = reveal(text, low, **cut, seed_key="p"), reveal(text, high, **cut, seed_key="p")
    hidden_less, hidden_more = characters(less.hidden_spans), characters(more.hidden_spans)
    assert hidden_more <= hidden_less
    assert less.text == "".join(letter for index, letter in enumerate(text) if index not in hidden_less)
    if order == "prefix":
        assert more.text.startswith(less.text)
    if order == "suffix":
        assert more.text.endswith(less.text)
    assert reveal(text, 1.0, **cut).text == text
    assert reveal(text, 0.0, **cut).text == ""


def characters(spans: tuple[tuple[int, int], ...]) -> set[int]:
    return {index for start, end in spans for index in range(start, end)}


def test_number_shown_is_the_floor_without_float_surprises() -> None:
    hundred = "".join(f"{index};\n" for index in range(100))
    # .29 * 100 = 28.999999999999996 in floats
    assert reveal(hundred, 0.29).shown == 29
    assert reveal(hundred, 0.289).shown == 28
    assert reveal(hundred, 0.289).ratio == 0.289
    assert reveal(hundred, 0.999).text == hundred[: -len("99;\n")]
    assert not reveal(hundred, 0.999).complete
    assert [reveal("a\nb\nc\n", ratio).shown for ratio in (0, 0.33, 0.34, 0.67, 1)] == [0, 0, 1, 2, 3]


def test_orders_show_segments_at_their_own_places() -> None:
    text = "a\nb\nc\nd\n"
    assert reveal(text, 0.5, order="suffix").text == "c\nd\n"
    assert reveal(text, 0.5, order="suffix").hidden_spans == ((0, 4),)
    shown = [reveal(text, index / 4, order="random_segments", seed_key="7").text for index in range(5)]
    assert [sorted(lines.split()) for lines in shown] == [lines.split() for lines in shown]
    assert all(set(less.split()) < set(more.split()) for less, more in pairwise(shown))


def test_random_order_is_fixed_by_the_key_and_differs_between_keys() -> None:
    text = "".join(f"{index}\n" for index in range(12))
    cut: dict[str, Any] = {"order": "random_segments"}
    by_key = [reveal(text, 0.5, **cut, seed_key=str(key)).text for key in range(5)]
    assert by_key == [reveal(text, 0.5, **cut, seed_key=str(key)).text for key in range(5)]
    assert len(set(by_key)) == 5


def test_marker_stands_once_for_each_hidden_run() -> None:
    text = "a\nb\nc\nd"
    assert reveal(text, 0.5, hidden_marker="[...]").text == "a\nb\n[...]"
    assert reveal(text, 0.5, hidden_marker="[...]", order="suffix").text == "[...]\nc\nd"
    assert reveal(text, 0.0, hidden_marker="[...]").text == "[...]"
    assert reveal(text, 1.0, hidden_marker="[...]").text == text


@pytest.mark.parametrize("ratio", [-0.01, 1.01, nan])
def test_ratio_outside_the_unit_interval_is_refused(ratio: float) -> None:
    with pytest.raises(UserError, match=r"outside \[0, 1\]"):
        reveal("a", ratio)


def test_empty_solution_and_unknown_unit_are_refused() -> None:
    with pytest.raises(UserError, match="empty"):
        reveal(" \n", 0.5)
    with pytest.raises(UserError, match=r"step.*unknown.*line"):
        split_segments("a", "step")  # type: ignore[arg-type]


def test_warning_names_the_coarsest_unit_that_cuts_finely_enough() -> None:
    prose = ["One. Two. Three. Four."] * 3
    assert segmentation_warning(prose, "auto") is None
    warning = segmentation_warning([*prose, "a\nb\nc"], "line")
    assert warning is not None
    assert warning.startswith("3 of 4 solutions make one segment with unit 'line'")
    assert "choose unit 'sentence' (median 4 segments)" in warning
    words = segmentation_warning(["x = 1 + 2 so 3"], "auto")
    assert words is not None
    assert "choose unit 'token'" in words
    assert (segmentation_warning(["2"], "token") or "").endswith("hides them wholly; give longer ones")


def test_warning_needs_more_than_half_and_ignores_empty_solutions() -> None:
    assert segmentation_warning(["a", "a\nb", ""], "line") is None
    assert segmentation_warning([], "line") is None
