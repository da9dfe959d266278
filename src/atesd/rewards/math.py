"""Grade mathematical answers, LaTeX or plain, with math-verify.

Hostile answers (`9**9**9**9`) can hold the verifier inside C code for ever, where no signal handler and no thread
can interrupt it. So it runs in a process of its own, one request a line, which is killed and replaced when a request
misses its deadline. This holds off the main thread too. The process stands in a session of its own, so that Ctrl-C does
not spoil a grade, and an alarm ends it where it hangs and its parent has died. Nothing is ever evaluated as Python.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import select
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import IO, Any, cast

from atesd.rewards.answer import extract_answer
from atesd.rewards.exact import same_text
from atesd.types import UserError

_START_S = 120.0
_LONGEST = 2_000
_TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm)\{([^{}]*)\}")
_WORDS = re.compile(r"[^\W\d_]{2,}(?:[\s-]+[^\W\d_]+)*\.?")


class MathReward:
    """Compares final answers by meaning: `1/2`, `\\frac{1}{2}` and `0.5` are the same.

    Score 1 or 0; None where there is no gold answer. A completion without an answer, with one of more than 2,000
    characters, or with one that the verifier cannot finish within the time limit scores 0 and the last is counted in
    `timeouts`. Answers that are equal as text need no verifier, and two answers in words are only compared as text: to
    the verifier `no` and `on` are the same product of letters.
    """

    def __init__(self, timeout_s: float = 5.0) -> None:
        self.timeouts = 0
        self._timeout_s = timeout_s
        self._worker: _Worker | None = None
        self._lock = Lock()

    def __call__(
        self,
        prompts: Sequence[str],  # noqa: ARG002 (TRL's signature)
        completions: Sequence[str],
        *,
        answer: Sequence[str | None],
        **_: Any,
    ) -> list[float | None]:
        """Grade a batch, in TRL's signature."""
        with self._lock:
            return [self._grade(completion, gold) for completion, gold in zip(completions, answer, strict=True)]

    def _grade(self, completion: str, gold: str | None) -> float | None:
        if gold is None:
            return None
        given = extract_answer(completion)
        if given is None or len(given) > _LONGEST:
            return 0.0
        given, gold = _unwrap(given), _unwrap(gold)
        if same_text(given, gold):
            return 1.0
        if _WORDS.fullmatch(given) and _WORDS.fullmatch(gold):
            return 0.0
        return float(self._verify(given, gold))

    def _verify(self, given: str, gold: str) -> bool:
        if self._worker is None:
            self._worker = _Worker()
        try:
            return self._worker.ask(given, gold, self._timeout_s)
        except TimeoutError:
            self.timeouts += 1
            self._worker.kill()
            self._worker = None
            return False


def _unwrap(answer: str) -> str:
    """Take off a `\\text{...}` around a whole answer."""
    wrapped = _TEXT.fullmatch(answer.strip())
    return wrapped[1] if wrapped else answer


class _Worker:
    """A verifier process: reads requests as JSON lines, answers `true` or `false`."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "atesd.rewards.math"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])},
        )
        atexit.register(self.kill)
        try:
            self._read(_START_S)
        except TimeoutError as error:
            self.kill()
            raise UserError(
                'the answer verifier does not start: check that `python -c "import math_verify"` works, '
                'or set reward.kind = "exact"'
            ) from error

    def ask(self, given: str, gold: str, timeout_s: float) -> bool:
        """Return the verdict; TimeoutError if it does not come in time, or the process dies over the request."""
        request = json.dumps([given, gold, timeout_s]) + "\n"
        try:
            stdin = cast("IO[bytes]", self._process.stdin)
            stdin.write(request.encode())
            stdin.flush()
        except BrokenPipeError as error:
            raise TimeoutError from error
        return self._read(timeout_s) == b"true\n"

    def kill(self) -> None:
        """End the process and close its pipes."""
        atexit.unregister(self.kill)
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()

    def _read(self, timeout_s: float) -> bytes:
        """Read one line, which the worker writes at once, within a deadline."""
        stdout = cast("IO[bytes]", self._process.stdout)
        ready, _, _ = select.select([stdout], [], [], timeout_s)
        line = stdout.readline() if ready else b""
        if not line:
            raise TimeoutError
        return line


def _serve() -> None:
    """Answer requests until standard input closes. The parent keeps the time; the alarm, whose default action ends a
    process even inside C code, is for a parent that died."""
    import logging
    import resource
    import signal

    from math_verify import parse, verify

    logging.disable(logging.CRITICAL)
    with suppress(ValueError, OSError):  # macOS refuses
        resource.setrlimit(resource.RLIMIT_AS, (4 * 2**30, 4 * 2**30))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    print("ready", flush=True)
    for line in sys.stdin:
        given, gold, timeout_s = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, 2 * timeout_s + 1)
        try:
            sides = [parse(f"\\boxed{{{side}}}", parsing_timeout=None) for side in (gold, given)]
            same = bool(verify(*sides, timeout_seconds=None))
        except Exception:  # hostile text can raise anything; all of it means "not the same"
            same = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(same), flush=True)


if __name__ == "__main__":
    _serve()
