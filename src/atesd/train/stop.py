"""How a run is asked to stop: by a signal, or by whoever holds its trainer."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from time import perf_counter
from types import FrameType

from atesd.signals import handled
from atesd.train.world import World

_ECHO_S = 3.0
"""A launcher hands on the signal that a terminal has given to its processes already."""


class Stop:
    """Whether a run was asked to end after the step that it is in."""

    def __init__(self) -> None:
        self.asked = False

    @contextmanager
    def on_signals(self, world: World) -> Iterator[None]:
        """Let the first SIGINT, SIGTERM or SIGHUP ask; a second one raises KeyboardInterrupt at once.

        SIGHUP is left alone where it is ignored, as under nohup; on other threads than the main one all are.
        """
        heard_at: float | None = None

        def ask(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
            nonlocal heard_at
            if heard_at is not None:
                if world.size > 1 and perf_counter() - heard_at < _ECHO_S:
                    return
                raise KeyboardInterrupt
            self.asked = True
            heard_at = perf_counter()
            if world.is_main:
                with suppress(OSError):  # a terminal that has hung up
                    print("stopping after this step to save; once more stops at once, without saving", file=sys.stderr)

        numbers = []
        if threading.current_thread() is threading.main_thread():
            is_left = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            numbers = [signal.SIGINT, signal.SIGTERM, *([] if is_left else [signal.SIGHUP])]
        with handled(numbers, ask):
            yield
