"""Worked solutions of our own: sums written out line by line."""

from __future__ import annotations

import pytest

from atesd.facts import RunFacts
from atesd.rewards.answer import extract_answer
from atesd.tasks.base import check_disjoint, check_gold, content_of
from atesd.tasks.gym import GymConfig
from atesd.tasks.worked import chain_sum
from atesd.types import UserError

SUMS = {"min_terms": 4, "max_terms": 4, "min_digits": 1, "max_digits": 2}


@pytest.mark.parametrize(("expression", "solution"), [
    ("8 - 15 + 4", "8 - 15 = -7\n-7 + 4 = -3\n#### -3"),
    ("15 - 43 - 75 - 72", "15 - 43 = -28\n-28 - 75 = -103\n-103 - 72 = -175\n#### -175"),
    ("5 + -3 - -9", "5 + -3 = 2\n2 - -9 = 11\n#### 11"),  # with allow_negation
    ("7", "#### 7"),
])  # fmt: skip
def test_a_sum_is_written_from_left_to_right(expression: str, solution: str) -> None:
    assert chain_sum({"expression": expression}) == solution


def test_an_operator_that_is_none_of_a_sum_is_refused() -> None:
    with pytest.raises(UserError, match=r"operator '\*' in '2 \* 3', known are \+ and -"):
        chain_sum({"expression": "2 * 3"})


def test_written_sums_end_in_the_answer_of_reasoning_gym() -> None:
    task = GymConfig(dataset="chain_sum", options=SUMS, train_size=40, probe_size=4, eval_size=6).build(RunFacts())
    problems = task.train()
    assert [extract_answer(problem.solution) for problem in problems] == [problem.answer for problem in problems]
    assert {len(problem.solution.splitlines()) for problem in problems} == {4}
    check_disjoint({"train": problems, "probe": task.probe(), "evaluation": task.evaluation()})
    assert check_gold(problems[:6], task.default_reward.build(RunFacts())).passed


def test_a_metadata_field_becomes_the_level() -> None:
    config = GymConfig(dataset="chain_sum", options=SUMS, train_size=20, probe_size=0, eval_size=0)
    leveled = config.model_copy(update={"level_field": "num_digits"}).build(RunFacts()).train()
    assert {problem.level for problem in leveled} == {"1", "2"}
    longest = {level: max(len(p.problem) for p in leveled if p.level == level) for level in "12"}
    assert longest["1"] < longest["2"]
    assert {problem.level for problem in config.build(RunFacts()).train()} == {""}
    wrong = config.model_copy(update={"level_field": "colour"}).build(RunFacts())
    with pytest.raises(UserError, match=r"no metadata field 'colour' \(fields: .*num_digits"):
        wrong.train()


def test_neighbouring_data_seeds_draw_other_problems() -> None:
    # reasoning-gym draws entry i by seed + i: seeds 0 and 1 as they are would share 49 of 50.
    config = GymConfig(dataset="chain_sum", options=SUMS, train_size=50, probe_size=0, eval_size=0)
    first, second = (
        {content_of(p) for p in config.model_copy(update={"data_seed": seed}).build(RunFacts()).train()}
        for seed in (0, 1)
    )
    assert len(first & second) <= 2
