"""Pytest plugin of a mutation run: one thread, cheap test files first, a time limit, a note of how each mutant ended.

`run.py` loads it by `PYTEST_ADDOPTS`; no other run of pytest does. The working folder is the mutated copy.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections import defaultdict
from collections.abc import Generator
from pathlib import Path

import pytest
import torch

NOTES = Path("notes.jsonl").absolute()
DURATIONS = Path("mutmut-stats.json").absolute()
# Limit of one test in seconds of processor time, which a busy machine does not use up: SLACK + TIMES * what it takes.
SLACK, TIMES = 20, 5


def current() -> str | None:
    """Return the mutant that this process tests, or None while the tool prepares."""
    name = os.environ.get("MUTANT_UNDER_TEST", "")
    return name if "__mutmut_" in name else None


class Worker:
    """Orders the tests of one mutant and writes down which test killed it and how long that took."""

    def __init__(self) -> None:
        self.start = time.monotonic()
        self.failed: str | None = None
        self.seconds: dict[str, float] = {}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Put the cheapest files first, tests of a file side by side: module fixtures are made once."""
        if current() is None:
            return
        self.seconds = json.loads(DURATIONS.read_text())["duration_by_test"]
        of_file: dict[Path, float] = defaultdict(float)
        for item in items:
            of_file[item.path] += self.seconds.get(item.nodeid, 0.0)
        items.sort(key=lambda item: (of_file[item.path], str(item.path)))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        """End the process by SIGPROF when a test of a mutant goes on for ever."""
        if current() is None:
            return (yield)
        signal.setitimer(signal.ITIMER_PROF, SLACK + TIMES * self.seconds.get(item.nodeid, 0.0))
        try:
            return (yield)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and self.failed is None:
            self.failed = report.nodeid

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        seconds = round(time.monotonic() - self.start, 2)
        if current() is None and self.failed is None:
            return
        note = {"mutant": current() or "", "exit": int(exitstatus), "test": self.failed, "seconds": seconds}
        with NOTES.open("a") as stream:  # one short line: appends of two workers do not mix
            stream.write(json.dumps(note) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)  # a process that owns a pool of threads hangs after a fork
    if current() is not None:  # what the tool sets in the process that forks is none of a test's business
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    config.pluginmanager.register(Worker())
