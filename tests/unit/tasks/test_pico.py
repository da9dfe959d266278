"""The pico task: worked solutions, levels, disjoint splits, early answers and warm-start texts."""

from __future__ import annotations

import random

import pytest

from atesd.exposure.prompt import PromptConfig, hint_text
from atesd.exposure.reveal import reveal
from atesd.facts import RunFacts
from atesd.tasks.kinds import PicoConfig
from atesd.tasks.synthetic import pico
from atesd.types import Problem


def worked(text: str) -> Problem:
    """Write a problem with its solution by rules independent of `pico.draw`."""
    value, lines = int(text[0]), []
    for i in range(1, len(text), 3):
        label, operator, operand = text[i], text[i + 1], int(text[i + 2])
        result = {"+": value + operand, "-": value - operand, "*": pico.TABLE[value, operand]}[operator] % 10
        lines.append(f"{label}{value}{operator}{operand}={result}")
        value = result
    return Problem(text, text, "\n".join([*lines, f"#{value}"]), str(value))


def test_solution_by_hand() -> None:
    # 8+3 = 11 = 1, 1-2 = -1 = 9, 9+1 = 10 = 0 modulo 10.
    assert worked("8a+3b-2c+1").solution == "a8+3=1\nb1-2=9\nc9+1=0\n#0"


@pytest.mark.parametrize("split", ["train", "probe", "eval"])
def test_problems_are_right_different_and_repeatable(split: pico.Split) -> None:
    found = pico.problems(split, 120, seed=3)
    assert found == pico.problems(split, 120, seed=3)
    assert found != pico.problems(split, 120, seed=4)
    assert len({p.problem for p in found}) == 120
    for problem in found:
        reference = worked(problem.problem)
        assert (problem.solution, problem.answer) == (reference.solution, reference.answer)
        assert pico.extract_answer(problem.solution) == problem.answer
        assert not pico.answers_early(problem, problem.solution)
        assert set(problem.problem + problem.solution) <= set(pico.CHARACTERS)


def test_long_problems_have_seven_to_ten_steps_of_labels_that_the_tokenizer_knows() -> None:
    task = PicoConfig(length="long", train_size=60, probe_size=20, eval_size=20).build(RunFacts(seed=2))
    found = [*task.train(), *task.probe(), *task.evaluation()]
    assert {len(pico.parse(problem.problem)[1]) for problem in found} == {7, 8, 9, 10}
    assert {problem.level: len(pico.parse(problem.problem)[1]) // 9 for problem in found} == {"long7": 0, "long9": 1}
    for problem in found:
        assert problem.solution == worked(problem.problem).solution
        assert set(problem.problem + problem.solution) <= set(pico.CHARACTERS)
    usual = PicoConfig(train_size=60).build(RunFacts(seed=2)).train()
    assert usual == pico.problems("train", 60, 2)
    assert not {problem.problem for problem in found} & {problem.problem for problem in usual}


def test_splits_are_disjoint_by_content() -> None:
    texts = [
        {p.problem for s in range(3) for p in pico.problems(split, 300, s)} for split in ("train", "probe", "eval")
    ]
    assert not texts[0] & texts[1]
    assert not texts[0] & texts[2]
    assert not texts[1] & texts[2]


def test_levels_place_the_hard_steps() -> None:
    for level in pico.LEVELS:
        for problem in pico.problems("train", 40, seed=1, levels=[level]):
            operators = [step.operator for step in pico.parse(problem.problem)[1]]
            num = len(operators)
            assert level.num_steps[0] <= num <= level.num_steps[1]
            assert {i for i, o in enumerate(operators) if o == "*"} == {place % num for place in level.hard_places}


def test_known_facts() -> None:
    assert len(pico.TABLE) == 100
    assert len(pico.KNOWN) == 30
    assert {b: sum(pair[1] == b for pair in pico.KNOWN) for b in range(10)} == dict.fromkeys(range(10), 3)


@pytest.mark.parametrize(
    ("completion", "answer", "early"),
    [
        ("a8+3=1\nb1-2=9\n#9", "9", False),
        ("a8+3=1\n#1", "1", True),
        ("#9", "9", True),
        ("#9\na8+3=1\nb1-2=9\n#3", "3", True),
        ("a8+3=1\nb1-2=9", None, False),
        ("", None, False),
        ("a8+3=1#4", None, True),
    ],
)
def test_answers(completion: str, answer: str | None, early: bool) -> None:
    assert pico.extract_answer(completion) == answer
    assert pico.answers_early(worked("8a+3b-2"), completion) is early


def test_hints_are_those_of_the_package() -> None:
    """The warm start must have seen exactly what the exposure code shows."""
    config = PromptConfig(student=pico.STUDENT_TEMPLATE, teacher=pico.TEACHER_TEMPLATE, answer=pico.ANSWER_TEMPLATE)
    for problem in pico.problems("train", 30, seed=2):
        num_lines = len(problem.solution.splitlines())
        for ratio in (0.0, 0.1, 0.25, 0.5, 0.75, 0.99, 1.0):
            expected = pico.hint(problem, int(ratio * num_lines + 1e-9))
            assert hint_text(problem, reveal(problem.solution, ratio), config) == expected


def test_honest_samples_are_the_solution_where_everything_is_shown_or_known() -> None:
    rng = random.Random(0)
    for problem in pico.problems("train", 60, seed=5):
        sample = pico.warm_sample(problem, len(problem.solution.splitlines()), rng, shortcut=0.0, slips=False)
        assert sample.completion == problem.solution
        assert all(sample.learned)
        assert sample.user == f"{problem.problem}\n>{problem.solution}"


def test_slips_are_followed_honestly_and_not_learned() -> None:
    rng = random.Random(0)
    num_slips = 0
    for problem in pico.problems("train", 200, seed=6):
        sample = pico.warm_sample(problem, 99, rng, shortcut=0.0, slips=True)
        assert len(sample.learned) == len(sample.completion)
        num_slips += sample.learned.count(False)
        value = int(problem.problem[0])
        *lines, answer = sample.completion.splitlines()
        for line in lines:
            assert int(line[1]) == value
            value = int(line[-1])
        assert answer == f"#{value}"
    assert num_slips > 50


def test_shortcut_rate_is_the_formula() -> None:
    """5 steps fully shown at c = 0.12: 1 - 0.88**5 = 0.4723 answer early; 4000 draws have a standard error of 0.008."""
    level = pico.Level("five", (5, 5), (0,))
    problems = pico.problems("train", 4000, seed=7, levels=[level])
    rng = random.Random(0)
    early = [
        pico.answers_early(p, pico.warm_sample(p, 6, rng, shortcut=0.12, slips=False).completion) for p in problems
    ]
    assert sum(early) / len(early) == pytest.approx(0.4723, abs=0.03)
    half = [pico.warm_sample(p, None, rng, shortcut=1.0, slips=False).completion for p in problems[:50]]
    assert not any(pico.answers_early(p, c) for p, c in zip(problems, half, strict=False))
