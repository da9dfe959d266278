"""Skills: retrieval by keyword, bound, chance or all; what a ratio shows of them; a bank that is missing or empty."""

from __future__ import annotations

from math import log, sqrt
from pathlib import Path

import pytest

from atesd.exposure.prompt import PromptConfig, hint_text
from atesd.exposure.skills import Retrieval, Skills
from atesd.facts import RunFacts
from atesd.types import ExpertTurn, Observation, Problem, StopReason, Trajectory, Turn, UserError

KITCHEN = Problem("k", "Take the pan to the kitchen", "> go\n> put", "done",
                  expert=(ExpertTurn("go", "> go\n"), ExpertTurn("put", "> put")))  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "doors.md").write_text("Doors: look for the key first.\n\nThen open the door.")
    (tmp_path / "kitchen.md").write_text("In a kitchen look at the stove.\n\nA pan goes there.\n\nBe quick.\n")
    (tmp_path / "empty.md").write_text("  \n")
    (tmp_path / "notes.txt").write_text("no skill, although it says kitchen pan take")
    return tmp_path


def retrieval(folder: Path, seed: int = 0, **settings: object) -> Retrieval:
    section = Skills.model_validate({"kind": "skills", "folder": str(folder), **settings})
    built = section.build(RunFacts(seed=seed))
    assert isinstance(built, Retrieval)
    return built


def attempt(reward: float | None) -> Trajectory:
    return Trajectory((Turn((1,), (2,), (0.0,), "x", StopReason.EOS, 0),), reward)


def test_keyword_takes_the_skill_that_shares_the_rarer_words(folder: Path) -> None:
    """'the' stands in both skills, 'kitchen' and 'pan' in one."""
    assert retrieval(folder).retrieve(KITCHEN) == ["kitchen"]
    assert retrieval(folder).retrieve(Problem("d", "A locked door and a key", "x")) == ["doors"]


def test_full_takes_all_and_random_follows_problem_and_seed(folder: Path) -> None:
    assert retrieval(folder, retriever="full").retrieve(KITCHEN) == ["doors", "kitchen"]
    problems = [Problem(str(number), "x", "y") for number in range(40)]
    drawn = [retrieval(folder, retriever="random").retrieve(problem) for problem in problems]
    assert drawn == [retrieval(folder, retriever="random").retrieve(problem) for problem in problems]
    assert drawn != [retrieval(folder, seed=1, retriever="random").retrieve(problem) for problem in problems]
    assert {name for (name,) in drawn} == {"doors", "kitchen"}


def test_the_ratio_counts_paragraphs(folder: Path) -> None:
    found = retrieval(folder)
    texts = [found.reveal(KITCHEN, ratio).text for ratio in (0.0, 0.34, 0.67, 1.0)]
    paragraphs = ["In a kitchen look at the stove.\n\n", "A pan goes there.\n\n", "Be quick."]
    assert texts == ["".join(paragraphs[:count]) for count in (0, 1, 2, 3)]


def test_a_whole_skill_is_never_replaced_by_the_solution(folder: Path) -> None:
    prompt = PromptConfig(answer="\nGoal: {answer}")
    hint = hint_text(KITCHEN, retrieval(folder).reveal(KITCHEN, 1.0), prompt)
    assert hint.startswith("In a kitchen")
    assert hint.endswith("Be quick.\nGoal: done")


def test_with_turns_the_skill_stays_and_the_ratio_counts_turns(folder: Path) -> None:
    found = retrieval(folder, turns=True)
    skill = "In a kitchen look at the stove.\n\nA pan goes there.\n\nBe quick."
    assert [found.reveal(KITCHEN, ratio).text for ratio in (0.0, 0.5, 1.0)] == [
        skill, f"{skill}\n\n> go", f"{skill}\n\n> go\n> put"]  # fmt: skip
    assert found.reveal(KITCHEN, 0.5).shown == 1


def test_ucb_tries_all_then_follows_the_bound_and_counts_each_attempt_once(folder: Path) -> None:
    """After doors 1 of 1 and kitchen 0 of 1 (N = 2): bounds 1 + s and 0 + s with s = sqrt(log 2)."""
    found = retrieval(folder, retriever="ucb", ucb=1.0)
    assert found.retrieve(KITCHEN) == ["doors"]
    seen = attempt(1.0)
    for each in (seen, attempt(0.0), None):  # measurements ask about any attempt, and show
        found.reveal(KITCHEN, 1.0, each)
    found.heard(KITCHEN, seen)
    found.observe(Observation(1))
    assert found.state_dict() == {"uses": {"doors": 1}, "earned": {"doors": 1.0}}
    assert found.retrieve(KITCHEN) == ["kitchen"]
    failed = [attempt(0.0) for _ in range(3)]
    for each in (*failed, attempt(None)):
        found.heard(KITCHEN, each)
    found.observe(Observation(2))
    assert found.state_dict()["uses"] == {"doors": 1, "kitchen": 3}
    # N = 4: doors 1 + sqrt(log 4 / 1) = 2.18, kitchen 0 + sqrt(log 4 / 3) = .68
    assert 1 + sqrt(log(4)) > sqrt(log(4) / 3)
    assert found.retrieve(KITCHEN) == ["doors"]
    again = retrieval(folder, retriever="ucb")
    again.load_state_dict(found.state_dict())
    assert again.retrieve(KITCHEN) == ["doors"]
    assert again.metrics() == {"skill/doors/uses": 1.0, "skill/kitchen/uses": 3.0}


def test_ucbs_constant_decides_how_much_is_explored(folder: Path) -> None:
    """doors 8 of 10, kitchen 1 of 2, N = 12: with c = 1 1.30 against 1.61, with c = .1 .85 against .61."""
    for c, chosen in ((1.0, "kitchen"), (0.1, "doors")):
        found = retrieval(folder, retriever="ucb", ucb=c)
        found.load_state_dict({"uses": {"doors": 10, "kitchen": 2}, "earned": {"doors": 8.0, "kitchen": 1.0}})
        assert found.retrieve(KITCHEN) == [chosen]


def test_a_bank_that_is_missing_or_empty_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no folder: name the folder"):
        retrieval(tmp_path / "none")
    (tmp_path / "blank.md").write_text("\n")
    with pytest.raises(UserError, match=r"holds no skill: put at least one \.md file"):
        retrieval(tmp_path)
    (tmp_path / "bad.md").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="cannot be read"):
        retrieval(tmp_path)
