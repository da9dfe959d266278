"""Rollouts shared out among processes: whole groups, those that one process alone would have, turn by turn."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest

from atesd.envs.base import opened
from atesd.recipe import build_config
from atesd.rewards.own import OwnReward
from atesd.rewards.weighted import WeightedReward
from atesd.rollout.driver import Driver
from atesd.rollout.sampler import SamplingConfig, Submitted
from atesd.seeds import derive_seed
from atesd.train.model import load
from atesd.train.setup import sampling_side
from atesd.train.share import shared
from atesd.train.world import World
from atesd.types import ExpertTurn, Problem, UserError

from support.rollouts import FakeSampler, fake_driver
from support.threads import ThreadWorld, in_threads

PICO: dict[str, Any] = {
    "threads": 1,
    "task": {"kind": "pico", "train_size": 5, "probe_size": 1, "eval_size": 1},
    "prompt": {"student": "{problem}", "teacher": "{problem}\n>{hint}", "answer": "\n#{answer}"},
}


@pytest.fixture(scope="module")
def side() -> tuple[Driver, list[Any]]:
    config = build_config(PICO)
    model, tokenizer = load(config.model, 0, None)
    driver, _, task = sampling_side(config, model, tokenizer)
    return driver, list(task.train())


# In one call, in several, and in calls that hold less than a group.
@pytest.mark.parametrize("batch_tokens", [262_144, 300, 60])
@pytest.mark.parametrize("decode", ["auto", "generate"])
def test_processes_sample_and_grade_whole_groups_as_one_does(
    batch_tokens: int, decode: str, side: tuple[Driver, list[Any]]
) -> None:
    driver, problems = side
    engine = build_config(PICO | {"rollout": {"engine": {"kind": "hf", "decode": decode}}}).rollout.engine
    sampler = engine.build(driver.sampler._whole, driver.renderer)  # type: ignore[attr-defined]
    original, turnstile = sampler.sample, threading.Lock()  # `generate` borrows the random state of all threads
    told: list[tuple[Any, Any]] = []

    def sample(*given: Any, **named: Any) -> Any:
        told.append((named.get("part"), [list(each) for each in named["references"]]))
        with turnstile:
            return original(*given, **named)

    sampler.sample = sample
    graded: list[list[str]] = []

    def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        graded.append(prompts)
        return [float(len(completion)) for completion in completions]

    whole = Driver(sampler, driver.renderer, driver.environment, driver.student_messages, reward, guesses=True)
    sampling = SamplingConfig(temperature=1.0, max_new_tokens=12, group_size=3, batch_tokens=batch_tokens)
    expected = whole.rollout(problems, sampling, seed=7)
    del graded[:]
    for groups in in_threads(2, lambda world: shared(whole, world).rollout(problems, sampling, seed=7)):
        assert [group.problem for group in groups] == problems
        assert [[attempt.final.completion_ids for attempt in group.trajectories] for group in groups] == [
            [attempt.final.completion_ids for attempt in group.trajectories] for group in expected
        ]
        assert [group.rewards for group in groups] == [group.rewards for group in expected]
    shares = [[each.problem for each in problems[rank::2] for _ in range(3)] for rank in range(2)]
    assert sorted(graded) == sorted(shares)
    (_, known), *shared_out = told
    assert all(known)
    for part, references in shared_out:
        assert references == [each if place in part else [] for place, each in enumerate(known)]


def test_a_process_without_a_problem_samples_nothing() -> None:
    driver, sampler = fake_driver(lambda prompt, place: "yes", lambda prompts, **columns: [1.0] * len(prompts))
    for one in (driver, replace(driver, environment=Counting())):
        del sampler.requests[:]
        found = in_threads(2, lambda world, one=one: shared(one, world).rollout(PROBLEMS[:1], SamplingConfig(), seed=0))
        assert found[0] == found[1] == one.rollout(PROBLEMS[:1], SamplingConfig(), seed=0)
        assert [len(group.trajectories) for group in found[1]] == [1]


def test_one_process_keeps_its_driver(side: tuple[Driver, list[Any]]) -> None:
    assert shared(side[0], World()) is side[0]


def test_what_cannot_be_graded_is_told_of_the_whole_round() -> None:
    def half(prompts: list[str], **columns: Any) -> list[float | None]:
        return [1.0 if prompt in ("b", "d") else None for prompt in prompts]

    driver, _ = fake_driver(lambda prompt, place: "yes", half)  # one of two processes can grade nothing
    for groups in in_threads(2, lambda world: shared(driver, world).rollout(PROBLEMS, SamplingConfig(), seed=0)):
        assert [list(group.rewards) for group in groups] == [[], [1.0], [], [1.0], []]
    driver, _ = fake_driver(lambda prompt, place: "yes", nothing)
    with pytest.warns(UserWarning, match="no completion could be graded: all 5 rewards"):
        in_threads(2, lambda world: shared(driver, world).rollout(PROBLEMS, SamplingConfig(), seed=0))


def alone_and_by_two(reward: Any, problems: list[Problem]) -> list[list[list[float | None]]]:
    """Return the rewards of one process, and of each of two, or the one line in which all end."""
    driver, _ = fake_driver(lambda prompt, place: "yes", reward)
    rounds = [driver.rollout(problems, SamplingConfig(), seed=0)]
    rounds += in_threads(2, lambda world: shared(driver, world).rollout(problems, SamplingConfig(), seed=0))
    return [[[each.reward for each in group.trajectories] for group in groups] for groups in rounds]


def test_a_reward_function_is_judged_by_whole_rounds() -> None:
    """One of two processes gets none of the problems that it can grade; where nobody does, all are told of all."""

    def first(prompts: list[str], **columns: Any) -> list[float | None]:
        return [1.0 if prompt == "a" else None for prompt in prompts]

    known = [replace(problem, answer="x") for problem in PROBLEMS]
    own = OwnReward("mine.py:first", first, 60.0)
    for reward in (own, WeightedReward({"own": own}, {"own": 0.5})):
        alone, *shared_out = alone_and_by_two(reward, known)
        assert [given for (given,) in alone][1:] == [None] * 4
        assert shared_out == [alone] * 2
    driver, _ = fake_driver(lambda prompt, place: "yes", OwnReward("mine.py:nothing", nothing, 60.0))
    driver.warned.append("ungradable")  # which is told of references before they are judged
    for ask in (
        lambda one: one.rollout(known, SamplingConfig(), seed=0),
        lambda one: one.reference(known, 99),
    ):
        with pytest.raises(UserError, match=r"mine\.py:nothing' returned None for all 5 completions, though"):
            in_threads(2, lambda world, ask=ask: ask(shared(driver, world)))
    two = OwnReward("mine.py:first", first, 60.0).by_shares()  # a grade of the round before is not forgotten
    two.judge([None, 1.0], ["x", "x"])
    two.judge([None, None], ["x", "x"])
    OwnReward("mine.py:first", first, 60.0, is_part=True).by_shares().judge([None], ["x"])  # others may grade it


def test_a_reward_function_is_not_asked_about_nothing() -> None:
    def longest(completions: list[str], **columns: Any) -> list[float | None]:
        most = max(map(len, completions))
        return [len(each) / most for each in completions]

    assert alone_and_by_two(longest, PROBLEMS[:1]) == [[[1.0]]] * 3


def test_a_reward_function_reads_the_columns_that_problems_of_other_processes_have() -> None:
    def tests(tests: list[str | None], **columns: Any) -> list[float | None]:
        return [None if each is None else 1.0 for each in tests]

    problems = [replace(PROBLEMS[0], extra={"tests": "x"}), *PROBLEMS[1:3]]
    assert alone_and_by_two(tests, problems) == [[[1.0], [None], [None]]] * 3


class Counting:
    """An episode says its seed, counts what it is told, and is over after 1 to 4 turns, as its seed says."""

    limit, grades = 6, True

    def __init__(self, trouble: str = "") -> None:
        self.trouble = trouble
        self.seeds: list[int] = []

    def episode(self, problem: Problem, seed: int) -> Any:
        self.seeds.append(seed)
        return CountingEpisode(seed, problem.id in self.trouble)


class CountingEpisode:
    def __init__(self, seed: int, fails: bool) -> None:
        self.seed, self.fails, self.told, self.invalid = seed, fails, 0, 0
        self.left = 1 + seed % 4

    def reset(self, prompt: Any) -> Any:
        return opened(prompt, str(self.seed % 97))

    def step(self, reply: str) -> Any:
        if self.fails:
            raise RuntimeError("no more doors")
        self.told += len(reply)
        self.left -= 1
        return [] if not self.left else [{"role": "user", "content": str(self.told)}]

    def reward(self) -> float:
        return float(self.told)


PROBLEMS = [Problem(name, name, "x") for name in "abcde"]
TWICE = SamplingConfig(max_new_tokens=40, group_size=2)


def talking(environment: Any) -> tuple[Driver, FakeSampler]:
    """The reply says how long the prompt was, and the place among the attempts that go on."""
    driver, sampler = fake_driver(lambda prompt, place: f"{len(prompt)} {place}", nothing)
    return replace(driver, environment=environment), sampler


@pytest.mark.parametrize("size", [2, 3, 7])
def test_several_turns_are_played_as_one_process_plays_them(size: int) -> None:
    driver, sampler = talking(Counting())
    expected = driver.rollout(PROBLEMS, TWICE, seed=10)
    lengths = [[len(attempt.turns) for attempt in group.trajectories] for group in expected]
    assert {1, 2, 3} <= {length for group in lengths for length in group}
    over = [max((max(group) for group in lengths[rank::2]), default=0) for rank in range(2)]
    assert over[0] != over[1], "a process is over before another"
    calls, seeds = list(sampler.requests), list(sampler.seeds)
    environments = [Counting() for _ in range(size)]
    del sampler.requests[:], sampler.seeds[:]

    def played(world: ThreadWorld) -> Any:
        mine = replace(driver, environment=environments[world.rank])
        return shared(mine, world).rollout(PROBLEMS, TWICE, seed=10), world.met

    found = in_threads(size, played)
    for groups, met in found:
        assert groups == expected
        assert met == found[0][1] == len(calls) + 2, "once a turn, once when all is over, once for the groups"
    assert sorted(sampler.requests) == sorted(calls * size)
    assert sorted(sampler.seeds) == sorted(seeds * size)
    every = [derive_seed(10, "episode", place) for place in range(10)]
    for rank, each in enumerate(environments):
        assert each.seeds == [every[2 * place + number] for place in range(5)[rank::size] for number in range(2)]


def test_an_environment_that_fails_in_every_attempt_of_one_process_is_counted() -> None:
    """Problems a, c and e are process 0's: six of ten attempts."""
    driver, _ = talking(Counting("ace"))
    words = "the environment failed in 6 of 10 attempts; in the first it raised RuntimeError: no more doors"
    with pytest.warns(UserWarning, match=words) as said:
        found = in_threads(2, lambda world: shared(replace(driver, warned=[]), world).rollout(PROBLEMS, TWICE, seed=10))
    assert len(said) == 2, "each says it once"
    with pytest.warns(UserWarning, match=words):
        assert found == [talking(Counting("ace"))[0].rollout(PROBLEMS, TWICE, seed=10)] * 2
    assert [bool(group.rewards) for group in found[0]] == [False, True, False, True, False]


def test_an_environment_that_fails_in_every_attempt_of_all_ends_the_run() -> None:
    driver, _ = talking(Counting("abcde"))

    def line(world: ThreadWorld) -> str:
        with pytest.raises(UserError) as error:
            shared(driver, world).rollout(PROBLEMS, TWICE, seed=10)
        return str(error.value)

    found = in_threads(2, line)
    assert found[0] == found[1]
    assert found[0].startswith("the environment failed in 10 of 10 attempts; in the first it raised RuntimeError")


def test_experts_are_replayed_by_every_process_alike() -> None:
    driver, _ = talking(Counting())
    problem = replace(PROBLEMS[0], expert=(ExpertTurn("1", "1"), ExpertTurn("22", "22")))

    def replayed(world: ThreadWorld) -> Any:
        one = shared(replace(driver, warned=["experts"]), world)
        return one.replay([problem]), world.met

    expected = replace(driver, warned=["experts"]).replay([problem])
    assert in_threads(2, replayed) == [(expected, 0)] * 2


def test_single_turns_are_asked_for_ahead_as_one_process_asks() -> None:
    driver, sampler = fake_driver(lambda prompt, place: f"{len(prompt)} {place}", nothing)
    submitted = {}

    def submit(*given: Any, seed: int, part: Any = None) -> Submitted:
        submitted[len(part)] = seed
        return Submitted(lambda: sampler.sample(*given, seed=seed, part=part))

    sampler.submit = submit  # type: ignore[attr-defined]

    def asked(world: ThreadWorld) -> Any:
        under_way = shared(replace(driver, warned=["ungradable"]), world).ahead(PROBLEMS, TWICE, seed=10)
        return under_way.groups()

    expected = replace(driver, warned=["ungradable"]).rollout(PROBLEMS, TWICE, seed=10)
    assert in_threads(2, asked) == [expected] * 2
    assert submitted == {6: 10, 4: 10}
    driver = replace(driver, vocabulary=40)

    def refused(world: ThreadWorld | None) -> str:
        with pytest.raises(UserError) as error:
            (driver if world is None else shared(driver, world)).ahead(PROBLEMS, TWICE, seed=10).groups()
        return str(error.value)

    assert all("and the model knows 40 tokens" in line for line in in_threads(2, refused))
    sampler.submit = lambda *given, seed: Submitted(lambda: sampler.sample(*given, seed=seed))  # type: ignore[attr-defined]
    assert "and the model knows 40 tokens" in refused(None)


def nothing(completions: list[str], **columns: Any) -> list[None]:
    return [None] * len(completions)
