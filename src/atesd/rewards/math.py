"""Grade mathematical answers, LaTeX or plain, with math-verify.

Hostile answers (`9**9**9**9`) can hold the verifier inside C code for ever, where no alarm and no thread can reach it.
So it runs in a process of its own, one request a line, which is killed and replaced when a request misses its
deadline. This holds off the main thread too. Nothing is ever evaluated as Python.
"""

from __future__ import annotations

import atexit
import json
import os
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

_START_S = 120.0
_LONGEST = 2_000


class MathReward:
    """Compares final answers by meaning: `1/2`, `\\frac{1}{2}` and `0.5` are the same.

    Score 1 or 0; None where there is no gold answer. A completion without an answer, with one of more than 2,000
    characters, or with one that the verifier cannot finish within the time limit scores 0 and the last is counted in
    `timeouts`. Answers that are equal as text need no verifier.
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
        return 1.0 if same_text(given, gold) else float(self._verify(given, gold))

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


class _Worker:
    """A verifier process: reads requests as JSON lines, answers `true` or `false`."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "atesd.rewards.math"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])},
        )
        atexit.register(self.kill)
        self._read(_START_S)

    def ask(self, given: str, gold: str, timeout_s: float) -> bool:
        """Return the verdict; TimeoutError if it does not come in time, or the process dies over the request."""
        request = json.dumps([given, gold]) + "\n"
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
    """Answer requests until standard input closes. The parent keeps the time."""
    import logging
    import resource

    from math_verify import parse, verify

    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_AS, (4 * 2**30, 4 * 2**30))
    print("ready", flush=True)
    for line in sys.stdin:
        given, gold = json.loads(line)
        try:
            sides = [parse(f"\\boxed{{{side}}}", parsing_timeout=None) for side in (gold, given)]
            same = bool(verify(*sides, timeout_seconds=None))
        except Exception:  # hostile text can raise anything; all of it means "not the same"
            same = False
        print(json.dumps(same), flush=True)


if __name__ == "__main__":
    _serve()
