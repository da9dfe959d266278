from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
import torch

from atesd.losses.policy import group_advantages
from atesd.rollout.driver import Driver
from atesd.rollout.render import Renderer
from atesd.rollout.sampler import SamplingConfig
from atesd.types import ExpertTurn, Group, Message, Problem, StopReason, UserError

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


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda turns: None, "None: return one atesd.types.Turn a prompt"),
        (lambda turns: [turn.text for turn in turns], r"\['say 1', 'say 1'\]: return one"),
        (lambda turns: turns[:1], "1 turns for 2 prompts: return one"),
        (lambda turns: turns[::-1], "a turn at place 0 whose prompt_ids are not the prompt there: return one"),
        (
            lambda turns: [replace(each, logprobs=(0.0,)) for each in turns],
            "1 logprobs for 6 completion_ids",
        ),
        (
            lambda turns: [replace(each, logprobs=(*each.logprobs[1:], 0.002)) for each in turns],
            r"the log-probability 0\.002 at place 0: give those of the sampled tokens, finite and at most 0",
        ),
        (
            lambda turns: [turns[0], replace(turns[1], logprobs=(float("nan"),) * 6)],
            "the log-probability nan at place 1: give",
        ),
        (
            lambda turns: [turns[0], replace(turns[1], logprobs=(float("-inf"),) * 6)],
            "the log-probability -inf at place 1: give",
        ),
        (
            lambda turns: [turns[0], replace(turns[1], completion_ids=(7, 259), logprobs=())],
            "ids from 7 to 259 at place 1, and the model knows 259 tokens, from 0: give ids of its own tokenizer",
        ),
        (lambda turns: [replace(each, completion_ids=(-1,), logprobs=()) for each in turns], "ids from -1 to -1"),
    ],
)
def test_a_sampler_that_answers_something_else_is_named(change: Any, says: str) -> None:
    driver, sampler = fake_driver(lambda prompt, place: "say 1", exact)

    class Odd:
        def sample(self, *given: Any, **known: Any) -> Any:
            return change(sampler.sample(*given, **known))

    with pytest.raises(UserError, match=rf"Odd\.sample returned {says}"):
        replace(driver, sampler=Odd(), vocabulary=259).rollout(PROBLEMS, sampling(), seed=0)  # type: ignore[arg-type]


def test_tokens_at_the_edge_of_the_vocabulary_and_rounded_log_probabilities_are_taken() -> None:
    driver, sampler = fake_driver(lambda prompt, place: "say 1", exact)
    sample = sampler.sample

    def edges(*given: Any, **known: Any) -> Any:
        return [replace(each, completion_ids=(0, 258), logprobs=(0.0, 0.0005)) for each in sample(*given, **known)]

    sampler.sample = edges  # type: ignore[method-assign]
    (group, _) = replace(driver, vocabulary=259).rollout(PROBLEMS, sampling(), seed=0)
    assert group.trajectories[0].final.completion_ids == (0, 258)


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


@pytest.mark.parametrize(("returned", "message"), [
    ([1.0], "returned 1 rewards for 2 completions: return one a completion"),
    (0.5, r"returned 0\.5 for 2 completions: return one a completion"),
    (None, "returned None for 2 completions"),
    ("10", "returned '10' for 2 completions"),
    ({"a": 1, "b": 0}, r"returned \{'a': 1, 'b': 0\} for 2 completions"),
    ((each for each in (0.0, 1.0)), "returned <generator .* for 2 completions"),
    (torch.tensor(1.0), r"returned tensor\(1\.\), which is no list"),
    (np.float64(1.0), r"returned np\.float64\(1\.0\) for 2"),
    ([1.0, float("nan")], "returned nan: return a finite number"),
    ([1.0, -float("inf")], "returned -inf: return a finite number"),
    ([1.0, 10**400], "returned inf: return a finite number"),
    ([1.0, Decimal("1e400")], "returned inf: return a finite number"),
    ([0.0, 1e308], r"returned 1e\+308, beyond 1e\+09, where advantages overflow: scale it"),
    ([0.0, -1.1e9], "beyond"),
    ([0.0, "1.0"], r"returned '1\.0': return a number, or None"),
    ([0.0, [1.0]], r"returned \[1\.0\]: return a number, or None"),
    (np.ones((2, 3)), r"returned array\(.*: return a number, or None"),
    (torch.ones(2, 3), r"returned tensor\(.*: return a number, or None"),
])  # fmt: skip
def test_a_reward_function_that_returns_nonsense_is_named(returned: object, message: str) -> None:
    driver, _ = fake_driver(lambda prompt, place: "x", lambda **columns: returned)  # type: ignore[arg-type, return-value]
    with pytest.raises(UserError, match=message) as caught:
        driver.rollout(PROBLEMS, sampling(1), seed=0)
    assert "\n" not in str(caught.value)


def test_the_largest_rewards_give_finite_advantages() -> None:
    driver, _ = fake_driver(lambda prompt, place: "x", lambda **columns: [1e9, -1e9])
    (group,) = driver.rollout(PROBLEMS[:1], sampling(2), seed=0)
    for scale, expected in (("std", 1.0), ("none", 1e9)):  # mean 0, standard deviation 1e9
        assert group_advantages(group.rewards, scale) == pytest.approx([expected, -expected])  # type: ignore[arg-type]


def test_that_nothing_can_be_graded_is_said_once_and_taken_for_no_grade() -> None:
    driver, _ = fake_driver(lambda prompt, place: "x", lambda completions, **_: [None] * len(completions))
    with pytest.warns(UserWarning, match="no completion could be graded: all 4 rewards of a round are None") as said:
        found = rewards(driver.rollout(PROBLEMS, sampling(2), seed=0))
    copied = replace(driver, student_messages=driver.student_messages)
    again = rewards(copied.rollout(PROBLEMS, sampling(2), seed=0))  # a second warning would be an error
    assert found == again == [[None, None], [None, None]]
    assert len(said) == 1


def test_some_ungraded_completions_are_no_news() -> None:
    driver, _ = fake_driver(lambda prompt, place: "x", lambda **_: [None, 0.0])
    driver.rollout(PROBLEMS, sampling(1), seed=0)
    assert driver.warned == []


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


class Countdown:
    """Asks again until the student has said `0`; rewards one over the number of turns, if it grades."""

    def __init__(self, limit: int = 9, grades: bool = True) -> None:
        self.limit, self.grades = limit, grades
        self.seeds: list[int] = []

    def episode(self, problem: Problem, seed: int) -> CountdownEpisode:
        self.seeds.append(seed)
        return CountdownEpisode()


class CountdownEpisode:
    def __init__(self) -> None:
        self.replies: list[str] = []

    def reset(self, prompt: Sequence[Message]) -> Sequence[Message]:
        return [*prompt[:-1], Message(role="user", content=prompt[-1]["content"] + " down!")]

    def step(self, reply: str) -> Sequence[Message]:
        self.replies.append(reply)
        return [] if reply == "0" else [Message(role="user", content=f"after {reply}?")]

    def reward(self) -> float | None:
        return 1 / len(self.replies) if self.replies[-1] == "0" else 0.0


def count_down(prompt: str, place: int) -> str:
    """Problem "one" counts 0; "two" counts 1, 0."""
    if "after 1?" in prompt or "one" in prompt:
        return "0"
    return "1"


def test_attempts_advance_together_and_leave_when_they_are_over() -> None:
    environment = Countdown()
    driver, sampler = fake_driver(count_down, exact, environment)
    groups = driver.rollout(PROBLEMS, sampling(2), seed=5)
    assert sampler.requests == [4, 2], "the second turn is asked of the two attempts that go on"
    assert sampler.seeds[0] == 5
    assert sampler.seeds[1] not in (0, 5), "later turns draw from a stream of their own"
    assert len(set(environment.seeds)) == 4
    assert [[len(attempt.turns) for attempt in group.trajectories] for group in groups] == [[1, 1], [2, 2]]
    assert rewards(groups) == [[1.0, 1.0], [0.5, 0.5]]


@pytest.mark.parametrize("of_teacher", [False, True])
def test_first_prompts_are_rendered_in_one_batch_and_each_attempt_has_its_own(
    of_teacher: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver, _ = fake_driver(count_down, exact, Countdown())
    driver = replace(driver, of_teacher=of_teacher)
    tokenizer, calls = driver.renderer._tokenizer, []
    apply = tokenizer.apply_chat_template

    def counting(asked: Any, **options: Any) -> Any:
        if options["tokenize"]:
            calls.append(len(asked))
        return apply(asked, **options)

    monkeypatch.setattr(tokenizer, "apply_chat_template", counting)
    groups = driver.rollout(PROBLEMS, sampling(2), seed=0)
    assert calls == [2], "equal prompts once"
    for group, name in zip(groups, ("one", "two"), strict=True):
        for attempt in group.trajectories:
            text = driver.renderer.prompt_text(attempt.turns[0].prompt_ids)
            assert text.startswith(f"<|im_start|>user\n{name} down!<|im_end|>")


def test_references_are_answers_to_prompts_rendered_in_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    driver, asked = reference_driver(), []
    batch = Renderer.student_batch
    monkeypatch.setattr(Renderer, "student_batch", lambda self, each: asked.append(len(each)) or batch(self, each))
    groups = driver.reference(PROBLEMS, 99)
    assert asked == [len(PROBLEMS)]
    texts = [driver.renderer.prompt_text(group.trajectories[0].turns[0].prompt_ids) for group in groups]
    assert texts == [f"<|im_start|>user\n{each}<|im_end|>\n<|im_start|>assistant\n" for each in ("one", "two")]


def test_a_later_prompt_is_what_was_sampled_and_then_what_the_environment_said() -> None:
    driver, _ = fake_driver(count_down, exact, Countdown())
    (attempt,) = driver.rollout(PROBLEMS[1:], sampling(), seed=0)[0].trajectories
    first, second = attempt.turns
    begun = (*first.prompt_ids, *first.completion_ids)
    assert second.prompt_ids[: len(begun)] == begun
    assert driver.renderer.prompt_text(second.prompt_ids) == (
        "<|im_start|>user\ntwo down!<|im_end|>\n<|im_start|>assistant\n1<|im_end|>\n"
        "<|im_start|>user\nafter 1?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert attempt.final is second
    assert attempt.num_tokens == 4, "a byte and an end token each"


def test_the_limit_of_turns_ends_an_attempt_after_its_last_reply_was_heard() -> None:
    driver, sampler = fake_driver(lambda prompt, place: "7", exact, Countdown(limit=3))
    (group,) = driver.rollout(PROBLEMS[:1], sampling(), seed=0)
    assert sampler.requests == [1, 1, 1]
    assert len(set(sampler.seeds)) == 3
    assert rewards([group]) == [[0.0]]


def test_a_reply_that_is_cut_off_ends_its_attempt_as_wrong_and_unheard() -> None:
    driver, sampler = fake_driver(lambda prompt, place: "0", lambda **_: [1.0], Countdown(grades=False))
    (group,) = driver.rollout(PROBLEMS[:1], sampling(1, 1), seed=0)
    assert sampler.requests == [1]
    assert group.trajectories[0].truncated
    assert rewards([group]) == [[0.0]]


def test_the_final_reply_is_graded_where_the_environment_does_not_grade() -> None:
    seen: list[list[str]] = []

    def reward(**columns: Any) -> list[float | None]:
        seen.append(columns["completions"])
        return [0.25] * len(columns["completions"])

    driver, _ = fake_driver(count_down, reward, Countdown(grades=False))
    assert rewards(driver.rollout(PROBLEMS, sampling(), seed=0)) == [[0.25], [0.25]]
    assert seen == [["0", "0"]]


def test_a_sampler_that_guesses_is_told_the_solution_of_each_attempt() -> None:
    """Closed by the end token, for every attempt; nothing where it cannot be read as text."""
    driver, sampler = fake_driver(lambda prompt, place: "x", exact)
    told: list[Any] = []
    sample, solution_ids = sampler.sample, driver.renderer.solution_ids

    def guessing(prompts: Any, sampling: Any, *, seed: int, references: Any) -> Any:
        told.append([list(each) for each in references])
        return sample(prompts, sampling, seed=seed)

    def readable(text: str) -> list[int]:
        if text == "say 2":
            raise UserError("no")
        return solution_ids(text)

    sampler.sample = guessing  # type: ignore[method-assign,assignment]
    driver.renderer.solution_ids = readable  # type: ignore[method-assign,assignment]
    expert = Problem("c", "three", "", answer="1", expert=(ExpertTurn("first", ""), ExpertTurn("second", "")))
    replace(driver, guesses=True).rollout([*PROBLEMS, expert], sampling(2), seed=5)
    end = driver.renderer.eos_ids[0]
    one, first, second = ([*driver.renderer.text_ids(text), end] for text in ("say 1", "first", "second"))
    assert told == [[one, one, [], [], first + second, first + second]]
    del sampler.sample  # type: ignore[method-assign]
    assert not driver.guesses
    driver.rollout(PROBLEMS, sampling(), seed=5)
