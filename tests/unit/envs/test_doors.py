"""The embedded environment: what is read at each turn, what is no action, and that its experts reach the goal."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from atesd.envs.base import missed
from atesd.envs.doors import Doors, Row
from atesd.tasks.synthetic import doors
from atesd.types import ExpertTurn, Message, Problem, UserError

PROMPT = [Message(role="user", content="ad#")]


def read(messages: Sequence[Message]) -> list[str]:
    return [message["content"] for message in messages]


def row() -> Row:
    """Door a with lock 4 and key 7, door d with lock 2 and key 1."""
    return Row([["a", 4, 7], ["d", 2, 1]])


def test_what_is_read_turn_by_turn() -> None:
    episode = row()
    assert read(episode.reset(PROMPT)) == ["ad#\na"]
    said = [read(episode.step(reply)) for reply in ("*", "3", "7", "1")]
    assert said == [["a4"], ["a-"], ["d"], []]
    assert (episode.reward(), episode.invalid) == (1.0, 0)


def test_a_key_opens_without_a_look_and_the_goal_alone_is_rewarded() -> None:
    episode = row()
    episode.reset(PROMPT)
    assert read(episode.step("7")) == ["d"]
    assert episode.reward() == 0.0
    assert episode.step("1") == ()
    assert episode.reward() == 1.0


@pytest.mark.parametrize(("reply", "invalid"), [("", 1), ("77", 1), ("a", 1), ("+", 1), ("3", 0), ("*", 0)])
def test_what_is_no_action_is_counted_and_leaves_the_door_shut(reply: str, invalid: int) -> None:
    episode = row()
    episode.reset(PROMPT)
    assert read(episode.step(reply))[0][0] == "a"
    assert episode.invalid == invalid


def test_problems_hold_what_the_world_says() -> None:
    for problem in doors.problems("train", 40, seed=3):
        names, locks = problem.problem.removesuffix("#"), doors.locks_of(problem.problem)
        assert len(set(names)) == len(names) == {"three": 3, "four": 4}[problem.level]
        rows = [[name, lock, doors.KEYS[name, lock]] for name, lock in zip(names, locks, strict=True)]
        assert problem.extra["doors"] == rows
        lines = [line for name, lock, key in rows for line in (f"{name}*", f"{name}{lock}{key}")]
        assert problem.solution == "\n".join(lines)
        assert "".join(turn.text for turn in problem.expert) == problem.solution
        assert [turn.reply for turn in problem.expert] == [line[-1] for line in lines]


def test_every_expert_reaches_the_goal_within_the_limit() -> None:
    environment = Doors()
    problems = [each for split in ("train", "probe", "eval") for each in doors.problems(split, 60, seed=1)]  # type: ignore[arg-type]
    assert [missed(environment, problem) for problem in problems] == [None] * 180


def test_an_expert_that_misses_the_goal_is_told_with_the_reason() -> None:
    good = doors.problem_of("adg#")
    rows = good.extra["doors"]
    wrong = str((int(good.expert[1].reply) + 1) % 10)

    def told(expert: tuple[ExpertTurn, ...], limit: int = 9) -> str | None:
        return missed(Doors(limit=limit), Problem("x", "adg#", "", "#", extra={"doors": rows}, expert=expert))

    assert told(good.expert[:-1]) == "the reward is 0.0 after 5 turns"
    assert told((good.expert[0], ExpertTurn(wrong, "a")), 9) == "the reward is 0.0 after 2 turns"
    assert told(good.expert, 4) == "the reward is 0.0 after 4 turns, and 2 turns of the expert are left over"
    assert told(good.expert, 6) is None


def test_a_problem_of_another_task_is_refused() -> None:
    with pytest.raises(UserError, match="plays problems with a 'doors', which 'p' has not"):
        Doors().episode(Problem("p", "1+1", "2", "2"), 0)


def test_warm_conversations_are_the_environments_own() -> None:
    """What a warm-start conversation reads is what the environment says to its replies; told keys are never missed."""
    rng = random.Random(0)
    for problem in doors.problems("train", 30, seed=2):
        for shown in (None, 0, 3, len(problem.expert)):
            turns = doors.warm_conversation(problem, shown, rng, 9, slips=False)
            episode = Doors().episode(problem, 0)
            heard = read(episode.reset([Message(role="user", content=turns[0].read.rpartition("\n")[0])]))
            for turn in turns:
                assert [turn.read] == heard
                heard = read(episode.step(turn.reply))
            if shown == len(problem.expert):
                assert (episode.reward(), episode.invalid) == (1.0, 0)
                assert all(turn.learned for turn in turns)


def test_the_planted_shortcut_skips_looks_by_the_square_of_what_was_shown() -> None:
    """Full hint, c = .9: a look with probability .1 a door; c = 0: always; 40 problems of 3.5 doors on average."""
    problems = doors.problems("train", 400, seed=5)

    def looks(shortcut: float, share: float) -> float:
        rng = random.Random(1)
        counts = [
            sum(turn.reply == "*" for turn in doors.warm_conversation(p, int(share * len(p.expert)), rng, 9,
                                                                     shortcut=shortcut, slips=False))
            for p in problems
        ]  # fmt: skip
        return sum(counts) / sum(len(problem.expert) / 2 for problem in problems)

    assert looks(0.0, 1.0) == 1.0
    assert looks(0.9, 1.0) == pytest.approx(0.1, abs=0.03)  # 1,400 doors: standard error .008
    assert looks(1.0, 1.0) == 0.0
