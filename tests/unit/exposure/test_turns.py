"""Reveals in turns: floor(ratio m) of m turns, prefixes of each other, the goal kept in the hint."""

from __future__ import annotations

from itertools import pairwise
from math import floor

import pytest

from atesd.exposure.prompt import PromptConfig, hint_text
from atesd.exposure.turns import Turns
from atesd.types import ExpertTurn, Problem, UserError

PROBLEM = Problem(
    "p", "house", "> a\n> b\n> c", "the goal", expert=tuple(ExpertTurn(x, f"> {x}\n"[: 4 - (x == "c")]) for x in "abc")
)


@pytest.mark.parametrize(
    ("ratio", "shown"), [(0.0, 0), (0.33, 0), (1 / 3, 1), (0.5, 1), (2 / 3, 2), (0.99, 2), (1.0, 3)]
)
def test_the_first_turns_are_shown(ratio: float, shown: int) -> None:
    reveal = Turns().reveal(PROBLEM, ratio)
    assert (reveal.text, reveal.shown, reveal.total) == ("> a\n> b\n> c"[: 4 * shown], shown, 3)
    hidden = "".join(PROBLEM.solution[low:high] for low, high in reveal.hidden_spans)
    assert reveal.text + hidden == PROBLEM.solution


def test_more_is_a_prefix_of_less_and_the_float_step_is_met() -> None:
    """floor(.29 * 100) is 28 in floats: the reveal counts 29 turns there."""
    many = Problem("m", "x", "abcd" * 25, "g", expert=tuple(ExpertTurn(x, x) for x in "abcd" * 25))
    assert floor(0.29 * 100) == 28
    assert Turns().reveal(many, 0.29).shown == 29
    texts = [Turns().reveal(many, step / 40).text for step in range(41)]
    assert all(longer.startswith(shorter) for shorter, longer in pairwise(texts))


def test_the_goal_stays_in_the_hint() -> None:
    prompt = PromptConfig(answer="\nGoal: {answer}")
    hints = [hint_text(PROBLEM, Turns().reveal(PROBLEM, ratio), prompt) for ratio in (0.0, 0.5, 1.0)]
    assert hints == ["Goal: the goal", "> a\nGoal: the goal", "> a\n> b\n> c"]


def test_a_problem_without_an_expert_is_refused_with_the_remedy() -> None:
    with pytest.raises(UserError, match="problem 'q' has no expert: take a task in an environment"):
        Turns().reveal(Problem("q", "1+1", "2", "2"), 0.5)
