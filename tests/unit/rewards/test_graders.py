"""Graders: equality as text, equality of meaning, hostile answers, threads."""

from __future__ import annotations

import os
import resource
import signal
import threading
from collections.abc import Iterator

import pytest

from atesd.facts import RunFacts
from atesd.rewards import math
from atesd.rewards.exact import exact_reward
from atesd.rewards.kinds import ExactConfig, MathConfig, PythonConfig
from atesd.rewards.math import MathReward, _Worker
from atesd.types import UserError


@pytest.fixture(scope="module")
def grader() -> Iterator[MathReward]:
    reward = MathReward(timeout_s=2.0)
    yield reward
    reward._drop()


def grade(reward: MathReward, completion: str, gold: str | None) -> float | None:
    return reward(prompts=["p"], completions=[completion], answer=[gold])[0]


def used_by_children_s() -> float:
    """Return the processor time of the processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_exact_ignores_space_case_and_a_full_stop_and_nothing_else() -> None:
    completions = [r"\boxed{ Yes. }", r"\boxed{yes}", r"\boxed{7.0}", "nothing", r"\boxed{1}"]
    golds = ["yes", "YES", "7", "7", None]
    assert exact_reward(["p"] * 5, completions, answer=golds, id=list("abcde")) == [1.0, 1.0, 0.0, 0.0, None]


def test_exact_ignores_space_beside_signs_and_none_between_words() -> None:
    completions = [r"\boxed{( 1 ,2 )}", r"\boxed{- 5 .}", r"\boxed{12}", r"\boxed{ab}"]
    assert exact_reward(["p"] * 4, completions, answer=["(1, 2)", "-5", "1 2", "a b"]) == [1.0, 1.0, 0.0, 0.0]


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
        (r"\boxed{6\,000}", "6000", 1.0),  # groups of three digits are one number, not a product
        (r"\boxed{6 000}", "6000", 1.0),
        (r"\boxed{6\,000}", "0", 0.0),
        (r"\boxed{2 000 000}", "0", 0.0),
        (r"\boxed{2~000~000}", "2000000", 1.0),
        (r"\boxed{12{,}345}", "12345", 1.0),
        (r"\boxed{5000}", r"5\;000", 1.0),
        (r"\boxed{1 200.5}", "1200.5", 1.0),
        (r"\boxed{6 00}", "600", 0.0),  # no group of three
        (r"\boxed{3 1/2}", r"\frac{7}{2}", 1.0),
        (r"\boxed{-3 1/2}", "-3.5", 1.0),
        (r"\boxed{3 1/2}", "1.5", 0.0),
        ("\\boxed{3\u00bd}", "3.5", 1.0),
        ("\\boxed{\u00bd}", "0.5", 1.0),
        ("\\boxed{\uff14\uff12}", "42", 1.0),
        (r"\boxed{1.2e3}", "1200", 1.0),
        (r"\boxed{2e}", r"2e", 1.0),
        (r"\boxed{5,}", "5", 1.0),
        (r"\boxed{on}", "no", 0.0),  # the same product of letters
        (r"\boxed{\text{No}}", "no", 1.0),
        (r"\boxed{y x}", "x y", 1.0),  # single letters are variables
        (r"\boxed{4, the final answer is 3. I hope}", "3", 0.0),  # nothing is picked out of prose
        (r"\boxed{4, the final answer is $3$. I hope}", "3", 0.0),
        (r"\boxed{\unknown 3}", "3", 0.0),  # nor out of what is no LaTeX
        (r"\boxed{\unknown the answer is $3$}", "3", 0.0),
        ("\\boxed{90\u00b0}", r"90^\circ", 1.0),  # signs outside of ASCII mean what LaTeX spells
        ("\\boxed{90}", "90\u00b0", 1.0),
        ("\\boxed{\u20ac18}", "18", 1.0),
        ("\\boxed{\u20135}", "-5", 1.0),
        ("\\boxed{2\u221a12}", r"4\sqrt{3}", 1.0),
        ("\\boxed{\u221a(x+1)}", r"\sqrt{x+1}", 1.0),
        ("\\boxed{x\u00b2+1}", "x^2+1", 1.0),
        ("\\boxed{3\u00d710\u207b\u00b3}", "0.003", 1.0),
        ("\\boxed{(-\u221e, 3]}", r"(-\infty,3]", 1.0),
        ("\\boxed{2\u00b73}", "6", 1.0),
        ("\\boxed{\u200b5}", "5", 1.0),
        (r"\boxed{\varnothing}", r"\emptyset", 1.0),
        ("#### **42**", "42", 1.0),
        (r"\boxed{100,200,300}", "100, 200, 300", 1.0),  # a list, whatever stands behind its commas
        (r"\boxed{100,200,301}", "100, 200, 300", 0.0),
        (r"\boxed{6.63\times10^{-34}}", r"1.1\times10^{-34}", 0.0),  # small numbers have digits, too
        (r"\boxed{6.63e-34}", r"6.63\times10^{-34}", 1.0),
        (r"\boxed{0.000001234}", "0.000001", 0.0),
        (r"\boxed{0.0000005}", r"\frac{1}{2500000}", 0.0),
        (r"\boxed{0.000833}", r"\frac{1}{1200}", 1.0),
        (r"\boxed{0.05\%}", "0.0005", 1.0),
    ],
)
def test_meaning(grader: MathReward, given: str, gold: str | None, score: float | None) -> None:
    assert grade(grader, given, gold) == score


def test_a_bomb_costs_its_time_limit_and_the_next_answer_is_graded(grader: MathReward) -> None:
    """Of processor time: how long that takes is the machine's load."""
    before, begin = grader.timeouts, used_by_children_s()
    assert grade(grader, r"\boxed{9^{9^{9^{9}}}}", "3") == 0.0
    assert used_by_children_s() - begin < 30.0
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
    thread.join(timeout=300)
    assert found == [0.0, 1.0]


def test_a_worker_that_died_is_replaced_and_costs_no_grade(grader: MathReward) -> None:
    assert grade(grader, r"\boxed{0.25}", "1/4") == 1.0
    assert grader._worker is not None
    os.kill(grader._worker.process.pid, signal.SIGKILL)
    os.waitid(os.P_PID, grader._worker.process.pid, os.WEXITED | os.WNOWAIT)
    assert grade(grader, r"\boxed{0.25}", "1/4") == 1.0


def stop(worker: _Worker) -> None:
    """Let a verifier get no processor, and wait until it has stopped."""
    os.kill(worker.process.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, worker.process.pid, os.WSTOPPED | os.WNOWAIT)


def test_a_worker_that_stands_still_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    reward = MathReward()
    assert grade(reward, r"\boxed{0.25}", "1/4") == 1.0
    assert reward._worker is not None
    stop(reward._worker)
    with monkeypatch.context() as patch:
        patch.setattr(math, "_STILL_S", 0.3)
        patch.setattr(math, "_STILL_FACTOR", 0.0)
        assert grade(reward, r"\boxed{0.25}", "1/4") == 0.0
    assert reward.timeouts == 1
    assert grade(reward, r"\boxed{0.25}", "1/4") == 1.0


def test_a_worker_that_gets_no_processor_for_longer_than_the_limit_costs_no_grade() -> None:
    reward = MathReward(timeout_s=0.2)
    assert grade(reward, r"\boxed{0.25}", "1/4") == 1.0
    assert reward._worker is not None
    pid = reward._worker.process.pid
    stop(reward._worker)
    threading.Timer(1.0, os.kill, (pid, signal.SIGCONT)).start()
    assert grade(reward, r"\boxed{0.25}", "1/4") == 1.0
    assert reward.timeouts == 0


def test_a_worker_is_out_of_reach_of_ctrl_c_and_ends_itself_at_the_limit() -> None:
    worker = _Worker()
    assert os.getsid(worker.process.pid) != os.getsid(0)
    for limit_s in (0.1, 1e-9):  # a timer of less than a microsecond would be none
        worker = _Worker()
        with pytest.raises(TimeoutError):
            worker.ask("9^{9^{9^{9}}}", "3", limit_s)
        assert worker.process.wait() == -signal.SIGPROF
    assert _Worker().ask("0.5", "1/2", 1e300) is True


def test_an_interrupted_grade_does_not_answer_the_next_request(
    grader: MathReward, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interrupt comes while the reply to a question that was asked is waited for; it would be `no`."""
    assert grade(grader, r"\boxed{0.25}", "1/4") == 1.0
    worker = grader._worker
    assert worker is not None
    main, asked, read = threading.get_ident(), threading.Event(), _Worker._read

    def reading(self: _Worker, wall_s: float) -> bytes:
        asked.set()
        return read(self, wall_s)

    def interrupt() -> None:
        assert asked.wait(60)
        signal.pthread_kill(main, signal.SIGINT)

    monkeypatch.setattr(_Worker, "_read", reading)
    stop(worker)
    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        grade(grader, r"\boxed{0.25}", "1/5")
    thread.join()
    worker.process.send_signal(signal.SIGCONT)
    assert grade(grader, r"\boxed{0.25}", "1/4") == 1.0
    assert grade(grader, r"\boxed{0.25}", "1/5") == 0.0


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="only Linux binds processes to a core")
def test_six_cold_graders_on_one_core_cost_no_reward() -> None:
    """Start-up alone takes each of them seconds there; a comparison 0.01 s of processor time."""
    found: list[float | None] = []
    cores = os.sched_getaffinity(0)

    def work() -> None:
        os.sched_setaffinity(0, {min(cores)})  # of this thread, and of the process that it starts
        found.append(grade(MathReward(timeout_s=0.05), r"\boxed{0.5}", "1/2"))

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [1.0] * 6


def test_equal_texts_need_no_verifier_process() -> None:
    reward = MathReward()
    assert grade(reward, r"\boxed{42}", "42") == 1.0
    assert reward._worker is None


def test_kinds_build_their_graders() -> None:
    assert ExactConfig().build(RunFacts()) is exact_reward
    built = MathConfig(timeout_s=1.5).build(RunFacts())
    assert isinstance(built, MathReward)
    assert built._timeout_s == 1.5


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("exact_reward", "names no function"),
        ("no.such.module:f", r"cannot be imported \(ModuleNotFoundError: No module named 'no'\): mend the path$"),
        ("no/such/file.py:f", r"cannot be imported \(FileNotFoundError: .*\): mend the path$"),
        ("atesd.rewards.exact:nothing", "has no function 'nothing'"),
    ],
)
def test_a_function_that_cannot_be_found_is_named(place: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        PythonConfig(function=place).build(RunFacts())
