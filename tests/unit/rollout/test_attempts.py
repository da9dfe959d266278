"""Attempts of several turns: token-exact, and an environment that fails ends that attempt alone, counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from atesd.envs.base import EpisodeError, opened
from atesd.rollout.sampler import SamplingConfig
from atesd.train.record import ending_metrics
from atesd.types import Ending, ExpertTurn, Message, Problem, Trajectory, UserError

from support.rollouts import FORGETFUL_TEMPLATE, fake_driver

GOOD, BAD = Problem("good", "go", "x"), Problem("bad", "go bad", "x")
SAMPLING = SamplingConfig(max_new_tokens=40)


class Echo:
    """Says the place of the turn; ends after three; `trouble` happens at the second."""

    limit, grades = 5, True

    def __init__(self, trouble: Callable[[], Any] | None = None, at: str = "step") -> None:
        self.trouble, self.at = trouble, at

    def episode(self, problem: Problem, seed: int) -> Any:
        return EchoEpisode(self.trouble if problem is BAD else None, self.at)


class EchoEpisode:
    def __init__(self, trouble: Callable[[], Any] | None, at: str) -> None:
        self.trouble, self.at, self.turn, self.closed, self.invalid = trouble, at, 0, 0, 0

    def _at(self, place: str, otherwise: Any) -> Any:
        return self.trouble() if self.trouble and self.at == place else otherwise

    def reset(self, prompt: Sequence[Message]) -> Any:
        return self._at("reset", opened(prompt, "0"))

    def step(self, reply: str) -> Any:
        self.turn += 1
        self.invalid += reply == "no"
        said = [] if self.turn == 3 else [Message(role="user", content=str(self.turn))]
        return self._at("step", said) if self.turn == 2 else said

    def reward(self) -> Any:
        return self._at("reward", 0.5)


def raising(error: BaseException) -> Callable[[], Any]:
    def trouble() -> Any:
        raise error

    return trouble


def attempts(environment: Any, problems: Sequence[Problem] = (GOOD, BAD), **changes: Any) -> list[Trajectory]:
    driver, _ = fake_driver(lambda prompt, place: "ok", lambda **_: pytest.fail("graded twice"), environment)
    groups = replace(driver, **changes).rollout(problems, SAMPLING, seed=0)
    return [group.trajectories[0] for group in groups]


def test_the_conversation_is_token_exact_and_its_opening_is_kept() -> None:
    driver, _ = fake_driver(lambda prompt, place: "ok", lambda **_: [], Echo())
    ((attempt,),) = [group.trajectories for group in driver.rollout([GOOD], SAMPLING, seed=0)]
    render = driver.renderer.prompt_text
    first = "<|im_start|>user\ngo\n0<|im_end|>\n<|im_start|>assistant\n"
    assert attempt.opening == "\n0"
    assert render(attempt.turns[0].prompt_ids) == first
    for before, turn, place in zip(attempt.turns, attempt.turns[1:], (1, 2), strict=False):
        sampled = before.prompt_ids + before.completion_ids
        assert turn.prompt_ids[: len(sampled)] == sampled
        assert render(turn.prompt_ids[len(sampled) :]) == (
            f"\n<|im_start|>user\n{place}<|im_end|>\n<|im_start|>assistant\n"
        )
        assert attempt.turns[0].prompt_ids + attempt.told(turn) == turn.prompt_ids
    assert (len(attempt.turns), attempt.ended, attempt.reward) == (3, Ending.OVER, 0.5)


def test_a_template_that_drops_thinking_leaves_what_was_sampled_in_place() -> None:
    thought = "<think>\nhm\n</think>\n\nok"
    driver, _ = fake_driver(lambda prompt, place: thought, lambda **_: [], Echo(), FORGETFUL_TEMPLATE)
    ((attempt,),) = [group.trajectories for group in driver.rollout([GOOD], SAMPLING, seed=0)]
    last = driver.renderer.prompt_text(attempt.final.prompt_ids)
    assert last.count(thought) == 2, "once in each of the turns before"
    for before, turn in zip(attempt.turns, attempt.turns[1:], strict=False):
        sampled = before.prompt_ids + before.completion_ids
        assert turn.prompt_ids[: len(sampled)] == sampled


TROUBLES = [
    (raising(RuntimeError("broken\nwire")), "step", Ending.ERROR, "it raised RuntimeError: broken"),
    (raising(EpisodeError(Ending.HANG, "too slow")), "step", Ending.HANG, "too slow"),
    (lambda: 7, "step", Ending.NOT_TEXT, "it says 7, which is no list of messages"),
    (lambda: "text", "step", Ending.NOT_TEXT, "it says 'text', which is no list"),
    (lambda: [{"role": "user", "content": b"x"}], "step", Ending.NOT_TEXT, "it says .* which is no message of text"),
    (lambda: [{"role": "user", "content": "\udcff"}], "step", Ending.NOT_TEXT, "it says .* half of a surrogate"),
    (lambda: [3], "reset", Ending.NOT_TEXT, "it says 3, which is no message"),
    (lambda: [], "reset", Ending.NOT_TEXT, "it says nothing at the reset"),
    (
        lambda: [Message(role="user", content="else")],
        "reset",
        Ending.NOT_TEXT,
        "its reset does not begin with the recipe's",
    ),
    (raising(KeyError("x")), "reset", Ending.ERROR, "it raised KeyError: 'x'"),
    (raising(SystemExit(3)), "step", Ending.ERROR, "it raised SystemExit: 3"),
    (lambda: float("inf"), "reward", Ending.BAD_REWARD, "its reward is inf"),
    (lambda: float("nan"), "reward", Ending.BAD_REWARD, "its reward is nan"),
    (lambda: "1.0x", "reward", Ending.BAD_REWARD, r"its reward is '1\.0x'"),
    (lambda: 1e12, "reward", Ending.BAD_REWARD, "its reward is 1"),
]


@pytest.mark.parametrize(("trouble", "at", "ending", "why"), TROUBLES)
def test_an_environment_that_fails_ends_that_attempt_alone(
    trouble: Callable[[], Any], at: str, ending: Ending, why: str
) -> None:
    with pytest.warns(UserWarning, match=f"failed in 1 of 2 attempts; in the first {why}"):
        good, bad = attempts(Echo(trouble, at))
    assert (good.reward, good.ended, len(good.turns)) == (0.5, Ending.OVER, 3)
    assert (bad.reward, bad.ended) == (None, ending)
    assert len(bad.turns) == {"reset": 1, "step": 2, "reward": 3}[at], "never without a turn"


def test_an_episode_that_cannot_be_opened_ends_its_attempt_alone() -> None:
    class Shut(Echo):
        def episode(self, problem: Problem, seed: int) -> Any:
            if problem is BAD:
                raise OSError("no server")
            return super().episode(problem, seed)

    with pytest.warns(UserWarning, match="failed in 1 of 2 attempts; in the first it raised OSError: no server"):
        good, bad = attempts(Shut())
    assert (good.reward, bad.reward, bad.ended) == (0.5, None, Ending.ERROR)


@pytest.mark.parametrize("count", ["two", None, -1])
def test_a_number_of_invalid_replies_that_is_none_ends_its_attempt_alone(count: Any) -> None:
    class Miscounting(Echo):
        def episode(self, problem: Problem, seed: int) -> Any:
            episode = super().episode(problem, seed)
            if problem is BAD:
                episode.step = lambda reply: setattr(episode, "invalid", count) or []
            return episode

    with pytest.warns(UserWarning, match=f"in the first its number of invalid replies is {count!r}"):
        good, bad = attempts(Miscounting())
    assert (good.invalid, bad.invalid, bad.reward, bad.ended) == (0, 0, None, Ending.ERROR)


class Graderless(Echo):
    """Leaves grading to a reward function."""

    grades = False


@pytest.mark.parametrize("composed", [False, True])
def test_a_reward_function_does_not_grade_what_the_environment_failed_in(composed: bool) -> None:
    class Parts:
        def parts(self, completions: Sequence[str], **_: Any) -> dict[str, list[float | None]]:
            return {"whole": [1.0] * len(completions)}

        def total(self, parts: dict[str, list[float | None]]) -> list[float | None]:
            return parts["whole"]

    reward: Any = Parts() if composed else lambda completions, **_: [1.0] * len(completions)
    driver, _ = fake_driver(lambda prompt, place: "ok", reward, Graderless(raising(RuntimeError("broken"))))
    with pytest.warns(UserWarning, match="failed in 1 of 2 attempts"):
        (good,), (bad,) = [group.trajectories for group in driver.rollout([GOOD, BAD], SAMPLING, seed=0)]
    assert (good.reward, bad.reward, bad.ended) == (1.0, None, Ending.ERROR)
    if composed:
        assert (good.rewards, bad.rewards) == ({"whole": 1.0}, {"whole": None})


def test_that_nothing_can_be_graded_is_said_behind_other_warnings() -> None:
    reward: Any = lambda completions, **_: [None] * len(completions)  # noqa: E731
    driver, _ = fake_driver(lambda prompt, place: "ok", reward, Graderless(raising(RuntimeError("broken"))))
    failed, ungraded = "failed in 1 of 2 attempts", "no completion could be graded"
    with pytest.warns(UserWarning, match=failed), pytest.warns(UserWarning, match=ungraded):
        driver.rollout([GOOD, BAD], SAMPLING, seed=0)


def test_an_environment_that_always_fails_ends_the_run_in_one_line() -> None:
    with pytest.raises(UserError, match="failed in 2 of 2 attempts; in the first it raised ValueError: no") as caught:
        attempts(Echo(raising(ValueError("no"))), (BAD, BAD))
    assert "\n" not in str(caught.value)


def test_a_mistake_of_the_recipe_is_no_failure_of_an_attempt() -> None:
    with pytest.raises(UserError, match="wrong recipe"):
        attempts(Echo(raising(UserError("wrong recipe"))))


def test_the_limit_the_length_and_the_context_end_attempts() -> None:
    class Two(Echo):
        limit = 2

    (limited, _) = attempts(Two())
    assert (limited.ended, len(limited.turns), limited.reward) == (Ending.LIMIT, 2, 0.5)
    driver, _ = fake_driver(lambda prompt, place: "x" * 50, lambda **_: [], Echo())
    (group,) = driver.rollout([GOOD], SAMPLING, seed=0)
    cut = group.trajectories[0]
    assert (cut.ended, len(cut.turns), cut.reward) == (Ending.LENGTH, 1, 0.0)


def test_a_turn_without_room_is_not_begun_and_grades_as_wrong() -> None:
    """The second turn's prompt and a full reply are to need one token more than there is."""
    whole = attempts(Echo(), (GOOD,))[0]
    needed = len(whole.turns[1].prompt_ids) + SAMPLING.max_new_tokens
    fits = attempts(Echo(), (GOOD,), room=needed)[0]
    assert (len(fits.turns), fits.ended) == (2, Ending.CONTEXT)
    lacks = attempts(Echo(), (GOOD,), room=needed - 1)[0]
    assert (len(lacks.turns), lacks.ended, lacks.reward, lacks.truncated) == (1, Ending.CONTEXT, 0.0, True)
    for room, reserved, turns in ((needed + 3, 3, 2), (needed + 2, 3, 1)):
        (found,) = attempts(Echo(), (GOOD,), room=room, reserved=reserved)
        assert len(found.turns) == turns, "a teacher's longer prompt is to fit as well"


def test_replays_play_the_experts_replies() -> None:
    driver, _ = fake_driver(lambda prompt, place: pytest.fail("nothing is sampled"), lambda **_: [], Echo())
    three = Problem("e", "go", "abc", expert=tuple(ExpertTurn(x, x) for x in "abc"))
    short = Problem("s", "go", "ab", expert=tuple(ExpertTurn(x, x) for x in "ab"))
    with pytest.warns(UserWarning, match="the expert of problem 'e' does not reach the goal"):
        whole, cut = [group.trajectories[0] for group in driver.replay([three, short])]
    assert [turn.text for turn in whole.turns] == ["a", "b", "c"]
    assert [turn.completion_ids[-1] for turn in whole.turns] == [driver.renderer.eos_ids[0]] * 3
    assert (whole.ended, whole.reward) == (Ending.OVER, 0.5)
    assert (cut.ended, len(cut.turns)) == (Ending.LIMIT, 2)


def test_what_is_counted() -> None:
    driver, _ = fake_driver(lambda prompt, place: "no" if place == 0 else "ok", lambda **_: [], Echo())
    found = [group.trajectories[0] for group in driver.rollout([GOOD, GOOD], SAMPLING, seed=0)]
    assert ending_metrics(found) == {"env/ended/over": 2.0, "env/invalid": 3.0}
    single = [replace(each, turns=each.turns[:1]) for each in found]
    assert ending_metrics(single) == {}, "a single turn is no conversation"


class Talkative(Echo):
    """Says a long text first to the bad problem."""

    def episode(self, problem: Problem, seed: int) -> Any:
        episode = EchoEpisode(None, "")
        if problem is BAD:
            episode.reset = lambda prompt: opened(prompt, "a" * 200)  # type: ignore[method-assign]
        return episode


def test_what_an_environment_says_first_must_fit_the_context_with_a_reply() -> None:
    """A byte is a token, and so is a control token: 1 + 5 ("user" and the line's end), 6 ("go bad"), 1 + 200, 1 + 1,
    and 1 + 10 ("assistant" and the line's end) are 226 tokens; with a reply of 40 they need 266, a second turn more."""
    good, bad = attempts(Talkative(), room=266)
    assert (bad.ended, len(bad.turns[0].prompt_ids)) == (Ending.CONTEXT, 226)
    with pytest.warns(UserWarning, match="in the first what it says first makes a prompt of 226 tokens"):
        good, bad = attempts(Talkative(), room=265)
    with pytest.warns(UserWarning, match="context of 270, of which a teacher's hint takes 5"):
        attempts(Talkative(), room=270, reserved=5)
    assert (good.ended, good.reward) == (Ending.OVER, 0.5)
    assert (bad.ended, bad.reward, len(bad.turns)) == (Ending.ERROR, None, 1)
    assert (bad.opening, len(bad.turns[0].prompt_ids)) == ("", 25), "without the 200 and the new line"


def test_experts_that_do_not_reach_the_goal_are_named_once() -> None:
    experts = [replace(problem, expert=(ExpertTurn("ok", "ok"),) * 2) for problem in (GOOD, BAD)]
    driver, _ = fake_driver(lambda prompt, place: "ok", lambda **_: [], Echo())
    with pytest.warns(UserWarning, match="the expert of problem 'good' does not reach the goal"):
        driver.replay(experts)
    driver.replay(experts)  # a second warning would be an error here
