"""What is written of a completion: the parts of a hint of which tokens are hidden."""

from __future__ import annotations

import pytest

from atesd.train.record import shades


@pytest.mark.parametrize(
    ("hint", "texts", "expected"),
    [
        ("ab c #1", ["ab", " c"], [("ab", 0.5), (" c", 0.25), (" #1", 1.0)]),
        ("ab", [">a", "b"], [("a", 0.5), ("b", 0.25)]),
        ("ab", ["\na", "b\n"], [("a", 0.5), ("b", 0.25)]),
        ("a=3", ["(a=", "3)."], [("a=", 0.5), ("3", 0.25)]),
        ("so ab", ["ab", ""], [("so ", 1.0), ("ab", 0.5)]),
        ("ab", ["x", "y"], []),
        ("ab", [" ", ""], []),
        ("", ["a", "b"], []),
    ],
)
def test_a_hint_is_cut_into_its_tokens(hint: str, texts: list[str], expected: list[tuple[str, float]]) -> None:
    found = shades(hint, texts, [0.5, 0.25])
    assert found == expected
    assert not found or "".join(text for text, _ in found) == hint


def test_shares_are_rounded() -> None:
    assert shades("ab", ["ab"], [1 / 3]) == [("ab", 0.333)]
