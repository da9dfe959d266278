"""Reward functions of one's own: time limit, errors, what they return."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atesd.facts import RunFacts
from atesd.rewards.kinds import PythonConfig
from atesd.rewards.own import OwnReward
from atesd.types import UserError

COLUMNS = {"prompts": ["p", "q"], "completions": ["abc", "abcd"], "answer": ["1", None], "id": ["1", "2"]}


def own(function: Callable[..., Any], timeout_s: float = 60.0) -> list[float | None]:
    return OwnReward("mine.py:score", function, timeout_s)(**COLUMNS)


def on_a_thread(function: Callable[[], Any]) -> Any:
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(function())
        except UserError as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    return found[0]


def test_it_is_loaded_from_a_file_or_a_module(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("def short(prompts, completions, **columns):\n    return [len(c) < 4 for c in completions]\n")
    assert PythonConfig(function=f"{path}:short").build(RunFacts())(**COLUMNS) == [1.0, 0.0]
    columns = {**COLUMNS, "completions": [r"\boxed{1}", r"\boxed{2}"]}
    assert PythonConfig(function="atesd.rewards.exact:exact_reward").build(RunFacts())(**columns) == [1.0, None]


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("undefined", "NameError: name 'undefined' is not defined"),
        ("{}['missing']", "KeyError: 'missing'"),
        ("raise RuntimeError('first\\nsecond')", "RuntimeError: first"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("import library_that_is_not_there", "ModuleNotFoundError: No module named 'library_that_is_not_there'"),
        ("def score(", "SyntaxError: '(' was never closed (broken.py, line 1)"),
    ],
)
def test_a_module_that_cannot_be_imported_is_named_in_one_line(
    code: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "broken.py"
    path.write_text(code)
    (tmp_path / "broken_reward_module.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    for source in (str(path), "broken_reward_module"):
        says = why.replace("broken.py", Path(source).with_suffix(".py").name)
        with pytest.raises(UserError) as caught:
            PythonConfig(function=f"{source}:score").build(RunFacts())
        assert str(caught.value) == (
            f"reward.function = '{source}:score': {source} cannot be imported ({says}): mend its module"
        )
    assert not {"atesd_reward_broken", "broken_reward_module"} & set(sys.modules), "half a module is left"


def test_what_it_edits_is_its_own() -> None:
    """Another reward reads the same lists, and their length says how many rewards there must be."""

    def score(prompts: list[str], completions: list[str], answer: list[str]) -> list[float]:
        prompts.clear()
        answer[0] = "edited"
        completions.pop()
        return [1.0] * len(completions)

    prompts, completions, answer = ["p", "p"], ["a", "b"], ["1", "2"]
    with pytest.raises(UserError, match="returned 1 rewards for 2 completions"):
        OwnReward("mine.py:score", score, 60.0)(prompts, completions, answer=answer)
    assert (prompts, completions, answer) == (["p", "p"], ["a", "b"], ["1", "2"])


def test_it_gets_what_trl_gives_and_its_result_comes_as_plain_floats() -> None:
    seen: dict[str, Any] = {}

    def score(**given: Any) -> Any:
        seen.update(given)
        return np.array([1, -2.5])

    rewards = own(score)
    assert rewards == [1.0, -2.5]
    assert [type(reward) for reward in rewards] == [float, float]
    assert seen == COLUMNS
    assert own(lambda **_: (1e6, None)) == [1e6, None]


def spin(**_: Any) -> None:
    while True:
        pass


def sleep(**_: Any) -> None:
    time.sleep(3600)


def stubborn(**_: Any) -> None:
    deadline = time.monotonic() + 0.5
    while True:
        try:
            time.sleep(3600)
        except BaseException:
            if time.monotonic() > deadline:
                raise


@pytest.mark.parametrize("hang", [spin, sleep, stubborn])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_one_that_hangs_ends_the_run_with_its_name(hang: Callable[..., Any], elsewhere: bool) -> None:
    if elsewhere and hang is spin:
        pytest.skip("it would spin until the tests end")
    message = (
        "reward.function = 'mine.py:score' took more than 0.2 s for 2 completions: "
        "mend what it waits for, or raise reward.timeout_s"
    )
    before, begin = signal.getsignal(signal.SIGVTALRM), time.monotonic()
    if elsewhere:
        assert str(on_a_thread(lambda: own(hang, 0.2))) == message
    else:
        with pytest.raises(UserError) as caught:
            own(hang, 0.2)
        assert str(caught.value) == message
    assert time.monotonic() - begin < 30
    assert signal.getsignal(signal.SIGVTALRM) is before


def test_the_recipe_sets_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("import time\ndef score(**_):\n    time.sleep(3600)\n")
    assert PythonConfig(function="m:f").timeout_s == 600
    with pytest.raises(UserError, match=r"took more than 0\.1 s"):
        PythonConfig(function=f"{path}:score", timeout_s=0.1).build(RunFacts())(**COLUMNS)


def test_a_signal_that_comes_late_hits_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind the call, the signal's default action would end the process; the call is over when it is sent."""
    strays: list[int] = []
    begun, left, sent = threading.Event(), threading.Event(), threading.Event()
    kill, join = signal.pthread_kill, threading.Thread.join

    def kill_late(thread: int, number: int) -> None:
        begun.set()
        assert left.wait(120)
        kill(thread, number)
        sent.set()

    def joined(thread: threading.Thread, timeout: float | None = None) -> None:
        left.set()
        join(thread, timeout)

    def score(**_: Any) -> list[float]:
        assert begun.wait(120)
        return [1.0, 0.0]

    monkeypatch.setattr(signal, "pthread_kill", kill_late)
    monkeypatch.setattr(threading.Thread, "join", joined)
    before = signal.signal(signal.SIGVTALRM, lambda number, _: strays.append(number))
    try:
        assert own(score, timeout_s=0.1) == [1.0, 0.0]
        left.set()
        assert sent.wait(120)
    finally:
        signal.signal(signal.SIGVTALRM, before)
    assert strays == []


def test_time_that_is_over_before_the_call_begins_ends_the_call_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on a busy machine, where a thread that has started another goes on much later."""
    start, kill, sent = threading.Thread.start, signal.pthread_kill, threading.Event()

    def signalled(thread: int, number: int) -> None:
        kill(thread, number)
        sent.set()

    def started(thread: threading.Thread) -> None:
        start(thread)
        assert sent.wait(120)

    monkeypatch.setattr(signal, "pthread_kill", signalled)
    monkeypatch.setattr(threading.Thread, "start", started)
    before, running = signal.getsignal(signal.SIGVTALRM), {*threading.enumerate()}
    with pytest.raises(UserError, match=r"took more than 0\.1 s"):
        own(sleep, 0.1)
    assert signal.getsignal(signal.SIGVTALRM) is before
    assert not {*threading.enumerate()} - running, "nobody is left who sends signals"


def test_it_may_use_signals_as_verifiers_do() -> None:
    """Which work on the main thread only: `math_verify.verify` limits its time with an alarm."""

    def score(**_: Any) -> list[float]:
        before = signal.signal(signal.SIGALRM, lambda *_: None)
        signal.alarm(5)
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        return [1.0, 0.0]

    assert own(score) == [1.0, 0.0]
    assert on_a_thread(lambda: own(lambda **_: [1.0, 0.0])) == [1.0, 0.0]


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (KeyError("id"), "KeyError: 'id'"),
        (ValueError("first\nsecond"), "ValueError: first"),
        (RuntimeError(), "RuntimeError"),
        (SystemExit(0), "SystemExit: 0"),
    ],
)
def test_one_that_raises_is_named_with_the_error(error: BaseException, shown: str, elsewhere: bool) -> None:
    def score(**_: Any) -> None:
        raise error

    def call() -> UserError:
        with pytest.raises(UserError) as caught:
            own(score)
        return caught.value

    raised = on_a_thread(call) if elsewhere else call()
    remedy = "mend it, or let it return None for a completion that it cannot grade"
    assert str(raised) == f"reward.function = 'mine.py:score' raised {shown}: {remedy}"
    assert raised.__cause__ is error
    assert error.__traceback__ is not None


@pytest.mark.parametrize(
    ("returned", "shown"),
    [
        (None, "returned None: return a list"),
        (1.0, "returned 1.0: return a list"),
        (np.array(1.0), r"returned array\(1\.\): return a list"),
        ("11", "returned '11': return a list"),
        ({0: 1.0, 1: 2.0}, r"returned \{0: 1\.0, 1: 2\.0\}: return a list"),
        ({1.0, 2.0}, r"returned \{1\.0, 2\.0\}: return a list"),
        ((n for n in (1, 2)), "returned <generator object .*: return a list"),
        ([1.0], "returned 1 rewards for 2 completions: return one a completion"),
        ([1.0, 0.0, 0.0], "returned 3 rewards for 2 completions: return one a completion"),
        ([1.0, "1.0"], "returned '1.0' for a completion: return a finite number of at most 1e"),
        ([1.0, 1j], "returned 1j for a completion"),
        ([1.0, [1.0]], r"returned \[1\.0\] for a completion"),
        (np.ones((2, 2)), r"returned array\(\[1\., 1\.\]\) for a completion"),
        ([1.0, float("nan")], "returned nan for a completion"),
        ([-float("inf"), 1.0], "returned -inf for a completion"),
        ([1.0, 1e308], r"returned 1e\+308 for a completion"),
        ([1.0, 10**400], "returned 10000.* for a completion"),
        ([-1.1e6, 1.0], r"returned -1100000\.0 for a completion"),
        ([None, None], "returned None for all 2 completions, though there are gold answers"),
    ],
)
def test_what_is_no_list_of_rewards_is_refused_in_one_line(returned: Any, shown: str) -> None:
    with pytest.raises(UserError, match=rf"^reward\.function = 'mine\.py:score' {shown}") as caught:
        own(lambda **_: returned)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_none_for_every_completion_is_right_without_gold_answers_or_behind_a_grade() -> None:
    results = iter([[None, None], [1.0, None], [None, None]])
    reward = OwnReward("mine.py:score", lambda **_: next(results), 60.0)
    assert reward(**{**COLUMNS, "answer": [None, None]}) == [None, None]
    assert reward(**COLUMNS) == [1.0, None]
    assert reward(**COLUMNS) == [None, None]
