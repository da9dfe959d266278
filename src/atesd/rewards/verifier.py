"""The verifier process of `math.py`: a script that is started by its path, isolated, and imports nothing of `atesd`.

It reads requests `[given, gold, seconds]` as JSON lines and answers `true` or `false`. Before that it writes one line:
an empty JSON string when it is ready, else the reason why it is not. `seconds` limits the processor time of a request:
the timer's default action ends the process, even inside C code and with nobody left to end it. So does end of input.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import sys
from contextlib import suppress
from typing import Any

_MEMORY = 4 * 2**30
_SELF_TEST = [
    (r"\frac{1}{2}", "0.5", True),
    (r"\{1,2\}", r"\{2,1\}", True),
    ("(1,2]", "(1,2)", False),
    ("x^2+1", "1+x^2", True),
]


def main(fallback: list[str]) -> None:
    """Serve until standard input closes. `fallback` is where to look for packages that the environment lacks."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not be taken for a reply
    failure, math_verify = "", None
    try:
        math_verify = _library(fallback)
        _limit_memory()
        if any(_same(math_verify, given, gold) is not same for given, gold, same in _SELF_TEST):  # warms up, too
            failure = f"{math_verify.__file__} gives wrong answers"
    except Exception as error:  # the parent reports whatever it is
        failure = f"{type(error).__name__}: {error}"
    print(json.dumps(failure), file=replies, flush=True)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
    for line in sys.stdin:
        given, gold, seconds = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, min(max(seconds, 1e-3), 1e6))  # less than a microsecond is no limit
        same = _same(math_verify, given, gold)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(same), file=replies, flush=True)


def _library(fallback: list[str]) -> Any:
    try:
        import math_verify
    except ImportError:
        sys.path += fallback
        import math_verify
    logging.disable(logging.CRITICAL)
    return math_verify


def _limit_memory() -> None:
    with suppress(ValueError, OSError):  # macOS refuses
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))


def _same(math_verify: Any, given: str, gold: str) -> bool:
    """Compare two answers as the LaTeX that they are: no number is looked for in prose, and nothing is evaluated."""
    latex = [math_verify.LatexExtractionConfig(boxed_match_priority=0)]
    try:
        sides = [
            math_verify.parse(f"\\boxed{{{side}}}", latex, extraction_mode="first_match", parsing_timeout=None)
            for side in (gold, given)
        ]
        return bool(math_verify.verify(*sides, timeout_seconds=None))
    except Exception:  # hostile text can raise anything; all of it means "not the same"
        return False


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
