from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from atesd.rollout.driver import Driver
from atesd.rollout.sampler import SamplingConfig
from atesd.types import Group, Problem, StopReason, UserError

from support.rollouts import fake_driver

PROBLEMS = [Problem("a", "one", "say 1", answer="1"), Problem("b", "two", "say 2", answer=None)]


def exact(prompts: list[str], completions: list[str], *, answer: list[str | None], **_: Any) -> list[float | None]:
    return [
        None if gold is None else float(text == f"say {gold}") for text, gold in zip(completions, answer, strict=True)
    ]


def sampling(group_size: int = 1, max_new_tokens: int = 99) -> SamplingConfig:
    return SamplingConfig(group_size=group_size, max_new_tokens=max_new_tokens)


def rewards(groups: list[Group]) -> list[list[float | None]]:
    return [[trajectory.reward for trajectory in group.trajectories] for group in groups]


def test_groups_keep_the_order_of_problems_and_one_request_holds_all() -> None:
    driver, sampler = fake_driver(lambda prompt, place: f"{place} after {prompt.split()[0]}", exact)
    groups = driver.rollout(PROBLEMS, sampling(3), seed=5)
    assert [group.problem.id for group in groups] == ["a", "b"]
    texts = [[trajectory.turns[0].text[0] for trajectory in group.trajectories] for group in groups]
    assert texts == [["0", "1", "2"], ["3", "4", "5"]]
    assert (sampler.requests, sampler.seeds) == ([6], [5])


def test_each_problem_is_asked_with_its_own_student_prompt() -> None:
    driver, _ = fake_driver(lambda prompt, place: prompt, exact)
    for group in driver.rollout(PROBLEMS, sampling(2), seed=0):
        expected = f"<|im_start|>user\n{group.problem.problem}<|im_end|>\n<|im_start|>assistant\n"
        for trajectory in group.trajectories:
            assert driver.renderer.prompt_text(trajectory.turns[0].prompt_ids) == expected


def test_rewards_come_from_one_call_with_a_column_for_each_field() -> None:
    calls: list[dict[str, Any]] = []

    def reward(**columns: Any) -> list[float | None]:
        calls.append(columns)
        return [0.0, 1.0, None, 0.5]

    driver, _ = fake_driver(lambda prompt, place: f"r{place}", reward)
    groups = driver.rollout(PROBLEMS, sampling(2), seed=0)
    assert rewards(groups) == [[0.0, 1.0], [None, 0.5]]
    assert calls == [
        {
            "prompts": ["one", "one", "two", "two"],
            "completions": ["r0", "r1", "r2", "r3"],
            "answer": ["1", "1", None, None],
            "solution": ["say 1", "say 1", "say 2", "say 2"],
            "id": ["a", "a", "b", "b"],
        }
    ]


def test_a_completion_cut_off_grades_as_wrong_where_it_can_be_graded() -> None:
    """ "say 1" is five bytes; with the end token six, so a limit of five cuts it off although the text is right."""
    driver, _ = fake_driver(lambda prompt, place: "say 1", exact)
    whole, cut = (driver.rollout(PROBLEMS, sampling(1, limit), seed=0) for limit in (6, 5))
    assert rewards(whole) == [[1.0], [None]]
    assert rewards(cut) == [[0.0], [None]]
    assert [group.trajectories[0].turns[0].stop for group in cut] == [StopReason.LENGTH] * 2


@pytest.mark.parametrize(
    ("returned", "message"),
    [([1.0], "returned 1 rewards for 2 completions"), ([1.0, float("nan")], "returned nan")],
)
def test_a_reward_function_that_returns_nonsense_is_named(returned: list[float], message: str) -> None:
    driver, _ = fake_driver(lambda prompt, place: "x", lambda **columns: returned)
    with pytest.raises(UserError, match=message):
        driver.rollout(PROBLEMS, sampling(1), seed=0)


def reference_driver() -> Driver:
    driver, _ = fake_driver(lambda prompt, place: pytest.fail("references are not sampled"), exact)
    return driver


def test_references_stand_in_for_samples() -> None:
    driver = reference_driver()
    groups = driver.reference(PROBLEMS, 99)
    assert rewards(groups) == [[1.0], [None]]
    (turn,) = groups[0].trajectories[0].turns
    assert driver.renderer.prompt_text(turn.completion_ids) == "say 1<|im_end|>"
    assert turn.completion_ids[-1] == driver.renderer.eos_ids[0]
    assert turn.prompt_ids == tuple(driver.renderer.student_ids(driver.student_messages(PROBLEMS[0])))
    assert (turn.logprobs, turn.stop, turn.text) == ((), StopReason.EOS, "say 1")


def test_a_reference_longer_than_the_limit_is_cut_and_says_so() -> None:
    groups = reference_driver().reference(PROBLEMS, 3)
    (turn,) = groups[0].trajectories[0].turns
    assert len(turn.completion_ids) == 3
    assert turn.stop is StopReason.LENGTH
    assert rewards(groups) == [[0.0], [None]]


def test_rewards_of_other_libraries_become_plain_numbers() -> None:
    """NumPy's are no JSON, and equal torch scalars are different members of a set."""
    driver, _ = fake_driver(
        lambda prompt, place: "say 1", lambda **_: [np.float32(0.5), np.float32(0.5), torch.tensor(1.0), None]
    )
    found = rewards(driver.rollout(PROBLEMS, sampling(2), seed=0))
    assert found == [[0.5, 0.5], [1.0, None]]
    assert all(type(reward) is float for group in found for reward in group if reward is not None)


def test_a_reward_that_is_no_number_is_named() -> None:
    driver, _ = fake_driver(lambda prompt, place: "say 1", lambda **_: ["good", 1.0])
    with pytest.raises(UserError, match="returned 'good': return a number, or None"):
        driver.rollout(PROBLEMS, sampling(), seed=0)
