"""Replies that are no action: counted, answered by the environment, and, where the recipe says so, paid for."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from atesd.envs.doors import Doors
from atesd.evaluate.runner import sample as sampled
from atesd.evaluate.runner import summarise
from atesd.rollout.sampler import SamplingConfig
from atesd.routing.route import Route
from atesd.tasks.synthetic import doors
from atesd.train.record import batch_metrics
from atesd.types import Ending, Group, Problem, Trajectory

from support.rollouts import fake_driver

SAMPLING = SamplingConfig(max_new_tokens=8)
ROW = doors.problem_of("ab#")
(_, _, KEY_A), (_, _, KEY_B) = ROW.extra["doors"]
A, B = str(KEY_A), str(KEY_B)


def played(replies: list[str], penalty: float = 0.0, limit: int = 5, **changes: Any) -> Trajectory:
    """Play replies at the doors a and b, one a turn."""
    said = iter(replies)
    environment = Doors(limit=limit, invalid_penalty=penalty)
    driver, _ = fake_driver(lambda *_: next(said), lambda **_: pytest.fail("the environment grades"), environment)
    (group,) = driver.rollout([changes.get("problem", ROW)], SAMPLING, seed=0)
    return group.trajectories[0]


@pytest.mark.parametrize(("replies", "penalty", "invalid", "reward"), [
    (["*", A, "*", B], 0.1, 0, 1.0),
    (["xx", A, "?", B], 0.1, 2, 0.8),  # 1 - 2 * .1
    (["xx", A, "?", B], 0.0, 2, 1.0),
    (["xx", "", "1x", "*", "**"], 0.25, 4, -1.0),  # the goal is not reached: 0 - 4 * .25
    (["x", "123456789"], 0.5, 1, -0.5),  # the second reply is cut off: no action was given, so none is counted
])  # fmt: skip
def test_every_reply_that_is_no_action_costs_the_penalty(
    replies: list[str], penalty: float, invalid: int, reward: float
) -> None:
    attempt = played(replies, penalty)
    assert (attempt.invalid, attempt.reward) == (invalid, pytest.approx(reward, abs=1e-12))
    success = 1.0 if replies[-1] == B else 0.0
    assert attempt.verdict == success, "success is what the environment says"
    parts = {"env": success, "invalid": pytest.approx(-penalty * invalid)} if penalty else {}
    assert dict(attempt.rewards) == parts


def test_a_wrong_key_is_an_action_and_the_door_stays_shut() -> None:
    wrong = str((KEY_A + 1) % 10)
    attempt = played([wrong, "x", A, B], 1.0)
    assert (attempt.invalid, attempt.reward) == (1, 0.0)
    assert attempt.said == ("a-", "a-", "b"), "a wrong key and no action at all leave the student where it was"


class Broken:
    """Fails at its first turn."""

    limit, grades, invalid_penalty = 3, True, 0.5

    def episode(self, problem: Problem, seed: int) -> Any:
        return _BrokenEpisode(problem.id == "broken")


class _BrokenEpisode:
    def __init__(self, broken: bool) -> None:
        self.broken, self.invalid = broken, 0

    def reset(self, prompt: Any) -> Any:
        return prompt

    def step(self, reply: str) -> Any:
        self.invalid += 1
        if self.broken:
            raise RuntimeError("broken")
        return ()

    def reward(self) -> float:
        return 1.0


def test_what_cannot_be_graded_stays_so_and_the_log_has_both_parts() -> None:
    driver, _ = fake_driver(lambda *_: "ok", lambda **_: [], Broken())
    with pytest.warns(UserWarning, match="failed in 1 of 2 attempts"):
        groups = driver.rollout([Problem("broken", "p", "x"), Problem("fine", "q", "x")], SAMPLING, seed=0)
    failed, fine = (group.trajectories[0] for group in groups)
    assert (failed.ended, failed.reward, failed.rewards) == (Ending.ERROR, None, {"env": None, "invalid": None})
    assert (fine.reward, fine.rewards) == (0.5, {"env": 1.0, "invalid": -0.5})
    metrics = batch_metrics(groups, [Route.RL] * 2, [], lambda *_: {})
    logged = {key: metrics[key] for key in metrics if key.startswith("reward/") and "_" not in key}
    assert logged == {
        "reward/ungradable": 1.0,
        "reward/mean": 0.5,
        "reward/std": 0.0,
        "reward/env/mean": 1.0,
        "reward/env/ungradable": 1.0,
        "reward/invalid/mean": -0.5,
        "reward/invalid/ungradable": 1.0,
    }
    assert metrics["env/invalid"] == 2.0, "of all attempts, failed ones included"


def test_an_episode_that_fails_at_its_end_is_counted_and_not_graded() -> None:
    class Stuck(Broken):
        def episode(self, problem: Problem, seed: int) -> Any:
            episode = _BrokenEpisode(False)
            if problem.id == "broken":
                episode.close = lambda: 1 / 0  # type: ignore[assignment, method-assign, return-value]
            return episode

    driver, _ = fake_driver(lambda *_: "ok", lambda **_: [], Stuck())
    with pytest.warns(UserWarning, match="in the first it raised ZeroDivisionError"):
        groups = driver.rollout([Problem("broken", "p", "x"), Problem("fine", "q", "x")], SAMPLING, seed=0)
    assert [group.trajectories[0].reward for group in groups] == [None, 0.5]
    assert groups[0].trajectories[0].ended is Ending.ERROR


def test_evaluation_counts_success_without_the_penalty() -> None:
    """One attempt of two reaches the goal, with one reply that was none: success .5, mean of .5 such replies."""
    script = iter(["x", "*", A, "*", "*", "*", B, "*", "*"])
    driver, _ = fake_driver(lambda *_: next(script), lambda **_: [], Doors(limit=5, invalid_penalty=0.3))
    tables = sampled([ROW], driver, SamplingConfig(max_new_tokens=8, group_size=2), seed=0, traits=lambda *_: {})
    metrics = summarise("doors", tables).metrics
    assert metrics["eval/doors/avg@2"] == 0.5
    assert metrics["eval/doors/invalid_mean"] == 0.5
    assert [row["rewards"]["invalid"] for row in tables[0]] == [-0.3, 0.0]


@pytest.mark.parametrize("penalty", [-0.1, float("inf"), "much", True])
def test_a_penalty_is_a_number_of_at_least_0(penalty: Any) -> None:
    with pytest.raises(ValidationError, match="invalid_penalty"):
        Doors.model_validate({"invalid_penalty": penalty})


def test_the_default_leaves_attempts_as_they_are() -> None:
    assert Doors().invalid_penalty == 0.0
    assert Group(ROW, (played(["x", A, B]),)).rewards == [1.0]
