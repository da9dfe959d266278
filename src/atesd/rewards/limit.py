"""Run code that is not ours for a limited time."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
_SIGNAL = signal.SIGVTALRM  # nobody uses it; verifiers set and clear SIGALRM themselves


class OutOfTime(BaseException):
    """The time is over. No `Exception`, so that the code's own `except Exception` lets it pass."""


def within(timeout_s: float, call: Callable[[], T]) -> T:
    """Return what `call` returns or raise what it raises; OutOfTime where it takes longer.

    On the main thread it runs there, because signals, which many graders limit their own time with, work nowhere else,
    and a signal interrupts it, sleep and network included. On another thread it is left behind in a thread of its own.
    Neither ends code in C that never returns to the interpreter.
    """
    on_main = threading.current_thread() is threading.main_thread()
    return _interrupted(timeout_s, call) if on_main else _left_behind(timeout_s, call)


def _interrupted(timeout_s: float, call: Callable[[], T]) -> T:
    over, main_id = threading.Event(), threading.get_ident()
    is_inside = False

    def stop(*_: object) -> None:
        if is_inside:  # else the `finally` below would be cut short: a handler left behind, and signals without an end
            raise OutOfTime

    def watch() -> None:
        wait_s = _wait_s(timeout_s)
        while not over.wait(wait_s):
            signal.pthread_kill(main_id, _SIGNAL)
            wait_s = 1.0  # again and again, for a bare `except:` swallows one

    before = signal.signal(_SIGNAL, stop)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        is_inside = True
        return call()
    finally:
        is_inside = False
        over.set()
        watcher.join()  # a late signal must find `stop`, for the default action ends the process
        signal.signal(_SIGNAL, before)


def _left_behind(timeout_s: float, call: Callable[[], T]) -> T:
    returned: list[T] = []
    raised: list[BaseException] = []

    def run() -> None:
        try:
            returned.append(call())
        except BaseException as error:  # raised again below, where somebody hears it
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(_wait_s(timeout_s))
    if raised:
        raise raised[0]
    if not returned:
        raise OutOfTime
    return returned[0]


def _wait_s(timeout_s: float) -> float:
    return min(timeout_s, threading.TIMEOUT_MAX)
