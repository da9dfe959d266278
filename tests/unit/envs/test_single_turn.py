from __future__ import annotations

from collections.abc import Sequence

from atesd.envs.single_turn import SingleTurn
from atesd.types import Problem, StopReason, Turn


def test_every_problem_is_asked_group_size_times_in_one_call() -> None:
    calls: list[list[str]] = []

    def sample(problems: Sequence[Problem]) -> list[Turn]:
        calls.append([problem.id for problem in problems])
        return [Turn((1,), (2,), (0.0,), f"reply {n}", StopReason.EOS, 0) for n in range(len(problems))]

    problems = [Problem("a", "one", "1"), Problem("b", "two", "2")]
    groups = SingleTurn().play(problems, 2, sample)
    assert calls == [["a", "a", "b", "b"]]
    assert [group.problem for group in groups] == problems
    replies = [[trajectory.turns[0].text for trajectory in group.trajectories] for group in groups]
    assert replies == [["reply 0", "reply 1"], ["reply 2", "reply 3"]]
    assert [trajectory.reward for group in groups for trajectory in group.trajectories] == [None] * 4
