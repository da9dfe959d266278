"""Graders: equality as text, equality of meaning, hostile answers, threads."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from atesd.facts import RunFacts
from atesd.rewards.exact import exact_reward
from atesd.rewards.kinds import ExactConfig, MathConfig, PythonConfig
from atesd.rewards.math import MathReward, _Worker
from atesd.types import UserError


@pytest.fixture(scope="module")
def grader() -> Iterator[MathReward]:
    reward = MathReward(timeout_s=2.0)
    yield reward
    if reward._worker is not None:
        reward._worker.kill()


def grade(reward: MathReward, completion: str, gold: str | None) -> float | None:
    return reward(prompts=["p"], completions=[completion], answer=[gold])[0]


def test_exact_ignores_space_case_and_a_full_stop_and_nothing_else() -> None:
    completions = [r"\boxed{ Yes. }", r"\boxed{yes}", r"\boxed{7.0}", "nothing", r"\boxed{1}"]
    golds = ["yes", "YES", "7", "7", None]
    assert exact_reward(["p"] * 5, completions, answer=golds, id=list("abcde")) == [1.0, 1.0, 0.0, 0.0, None]


@pytest.mark.parametrize(
    ("given", "gold", "score"),
    [
        (r"\boxed{\frac{1}{2}}", "0.5", 1.0),
        (r"\boxed{1/2}", r"\frac{1}{2}", 1.0),
        (r"\boxed{x^2+1}", "1+x^2", 1.0),
        (r"\boxed{1,234}", "1234", 1.0),
        ("#### 10", "10", 1.0),
        (r"\boxed{11}", "10", 0.0),
        (r"\boxed{\sqrt{2}}", "1.5", 0.0),
        ("no answer", "3", 0.0),
        ("", "3", 0.0),
        (r"\boxed{3}", None, None),
        (r"\boxed{5\text{ cm}}", "5", 1.0),
        (r"\boxed{10\%}", "10", 1.0),
        (r"\boxed{(1,2)}", "(2,1)", 0.0),
        (r"\boxed{\{1,2\}}", r"\{2,1\}", 1.0),
        (r"\boxed{3}", r"\boxed{3}", 1.0),
        (r"\boxed{3.0}", "$3$", 1.0),
        (r"\boxed{on}", "no", 0.0),  # the same product of letters
        (r"\boxed{\text{No}}", "no", 1.0),
        (r"\boxed{y x}", "x y", 1.0),  # single letters are variables
    ],
)
def test_meaning(grader: MathReward, given: str, gold: str | None, score: float | None) -> None:
    assert grade(grader, given, gold) == score


def test_a_bomb_costs_its_time_limit_and_the_next_answer_is_graded(grader: MathReward) -> None:
    before, begin = grader.timeouts, time.monotonic()
    assert grade(grader, r"\boxed{9^{9^{9^{9}}}}", "3") == 0.0
    assert time.monotonic() - begin < 30.0
    assert grader.timeouts == before + 1
    assert grade(grader, r"\boxed{\frac{2}{4}}", "0.5") == 1.0


@pytest.mark.parametrize("bomb", ["9" * 10_000, "(" * 5_000, r"\frac" * 1_500, "__import__('os').system('true')"])
def test_other_hostile_answers_score_0(grader: MathReward, bomb: str) -> None:
    assert grade(grader, f"\\boxed{{{bomb}}}", "3") == 0.0


def test_the_time_limit_holds_off_the_main_thread(grader: MathReward) -> None:
    found: list[float | None] = []

    def work() -> None:
        found.append(grade(grader, r"\boxed{9^{9^{9^{9}}}}", "3"))
        found.append(grade(grader, r"\boxed{0.50}", "1/2"))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(timeout=60)
    assert found == [0.0, 1.0]


def test_a_worker_that_died_is_replaced(grader: MathReward) -> None:
    assert grade(grader, r"\boxed{0.25}", "1/4") == 1.0
    assert grader._worker is not None
    os.kill(grader._worker._process.pid, signal.SIGKILL)
    grader._worker._process.wait()
    assert grade(grader, r"\boxed{0.25}", "1/4") == 0.0
    assert grade(grader, r"\boxed{0.25}", "1/4") == 1.0


def test_the_worker_is_out_of_reach_of_ctrl_c_and_ends_itself_if_its_parent_cannot_end_it() -> None:
    worker = _Worker()
    assert os.getsid(worker._process.pid) != os.getsid(0)
    with pytest.raises(TimeoutError):
        worker.ask("9^{9^{9^{9}}}", "3", 0.1)
    assert worker._process.wait(timeout=30) == -signal.SIGALRM  # its alarm comes after 2 * 0.1 + 1 s
    worker.kill()


def test_a_verifier_that_does_not_start_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/bin/true")
    with pytest.raises(UserError, match=r'the answer verifier does not start: .* or set reward\.kind = "exact"'):
        grade(MathReward(), r"\boxed{0.25}", "1/4")


def test_equal_texts_need_no_verifier_process() -> None:
    reward = MathReward()
    assert grade(reward, r"\boxed{42}", "42") == 1.0
    assert reward._worker is None


def test_kinds_build_their_graders() -> None:
    assert ExactConfig().build(RunFacts()) is exact_reward
    built = MathConfig(timeout_s=1.5).build(RunFacts())
    assert isinstance(built, MathReward)
    assert built._timeout_s == 1.5


def test_a_reward_function_of_ones_own_is_loaded_from_a_file_or_a_module(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "def short(prompts, completions, **columns):\n    return [float(len(c) < 4) for c in completions]\n"
    )
    own = PythonConfig(function=f"{path}:short").build(RunFacts())
    assert own(prompts=["p", "p"], completions=["abc", "abcd"], answer=["1", "1"]) == [1.0, 0.0]
    assert PythonConfig(function="atesd.rewards.exact:exact_reward").build(RunFacts()) is exact_reward


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("exact_reward", "names no function"),
        ("no.such.module:f", "cannot be imported"),
        ("no/such/file.py:f", "cannot be imported"),
        ("atesd.rewards.exact:nothing", "has no function 'nothing'"),
    ],
)
def test_a_function_that_cannot_be_found_is_named(place: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        PythonConfig(function=place).build(RunFacts())
