"""Gold checks, disjointness, traits, and the pico task."""

from __future__ import annotations

from typing import Any

import pytest

from atesd.facts import RunFacts
from atesd.rewards.exact import exact_reward
from atesd.tasks.base import check_disjoint, check_gold, cites_hint, corrupt
from atesd.tasks.kinds import PicoConfig
from atesd.types import Problem, UserError


def problem(identity: str, text: str = "q", solution: str = "#### 1", answer: str | None = "1") -> Problem:
    return Problem(identity, text, solution, answer)


@pytest.mark.parametrize(
    ("answer", "other"), [("7", "8"), ("x=19", "x=20"), (r"\frac{1}{2}", r"\frac{2}{2}"), ("no", "not no")]
)
def test_corrupting_changes_the_answer(answer: str, other: str) -> None:
    assert corrupt(answer) == other


@pytest.mark.parametrize("digits", [601, 4300, 5000])
def test_a_number_that_is_too_long_to_be_read_is_corrupted_too(digits: int) -> None:
    nines = "9" * digits
    assert corrupt(f"x = {nines}") == f"x = {nines[:-1]}0"


def test_gold_passes_and_corrupted_fails() -> None:
    report = check_gold(
        [problem("a"), problem("b", solution="words", answer="2"), problem("c", answer=None)], exact_reward
    )
    assert (report.total, report.gradable, report.passed) == (3, 2, True)


def test_a_solution_that_contradicts_its_answer_is_found() -> None:
    report = check_gold([problem("a", solution="#### 5", answer="1")], exact_reward)
    assert report.gold_wrong == ["a"]
    assert not report.passed


def test_a_grader_that_accepts_everything_is_found() -> None:
    def lenient(completions: list[str], **_: Any) -> list[float | None]:
        return [1.0] * len(completions)

    assert check_gold([problem("a")], lenient).corrupted_right == ["a"]


def test_sets_must_be_disjoint_by_content() -> None:
    check_disjoint({"train": [problem("a", "one")], "probe": [problem("b", "two")]})
    with pytest.raises(UserError, match=r"'b' \(probe\) has the same text as 'a' \(train\)"):
        check_disjoint({"train": [problem("a", "x  y")], "probe": [problem("b", "x y ")]})
    with pytest.raises(UserError, match="same text"):
        check_disjoint({"train": [problem("a"), problem("b")]})
    with pytest.raises(UserError) as told:
        check_disjoint({"train": [problem(f"t{n}", str(n)) for n in range(12)],
                        "probe": [problem(f"p{n}", str(n)) for n in range(12)]})  # fmt: skip
    lines = str(told.value).split("\n")
    assert lines[0] == "problem 'p0' (probe) has the same text as 't0' (train): remove one of them"
    assert (len(lines), lines[-1]) == (11, "and 2 more")


@pytest.mark.parametrize(
    ("text", "cites"),
    [
        ("According to the solution, x = 3", True),
        ("The reference solution says so", True),
        ("as in the provided solution", True),
        ("Use the hint.", True),
        ("The solution of x + 1 = 2 is 1", False),
        ("This hints at 3", False),
    ],
)
def test_citing_a_hint(text: str, cites: bool) -> None:
    assert cites_hint(text) is cites


def test_pico_draws_new_problems_for_every_seed_unless_told_otherwise() -> None:
    config = PicoConfig(train_size=12, probe_size=3, eval_size=6)
    one, two = config.build(RunFacts(seed=1)), config.build(RunFacts(seed=2))
    assert one.train() != two.train()
    assert one.evaluation() != two.evaluation()
    assert one.probe() == two.probe()
    assert one.train() == config.build(RunFacts(seed=1)).train()
    fixed = PicoConfig(train_size=12, data_seed=4)
    assert fixed.build(RunFacts(seed=1)).train() == fixed.build(RunFacts(seed=2)).train()
    check_disjoint({"train": one.train(), "probe": one.probe(), "evaluation": one.evaluation()})
    wrong = one.train()[0].solution.splitlines()[0] + "\n#" + (one.train()[0].answer or "")
    assert one.traits(one.train()[0], wrong) == {"answers_early": True}
