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
_SMALL, _THREE_DIGITS = 1e-3, 5e-4
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
        if not math_verify.verify(*sides, timeout_seconds=None):
            return False
        return "%" in gold + given or not _are_apart(*(side[0] for side in sides))
    except Exception:  # hostile text can raise anything; all of it means "not the same"
        return False


def _are_apart(*sides: Any) -> bool:
    """Tell whether two small numbers differ within their first three digits.

    The library rounds to six decimals and takes a difference below 1e-15 for none, whatever the numbers' size.
    """
    numbers = [side.evalf() for side in sides if getattr(side, "is_number", False)]
    sizes = [abs(number) for number in numbers]
    if len(numbers) < len(sides) or not all(0 < size < _SMALL for size in sizes):
        return False
    return bool(abs(numbers[0] - numbers[1]) > _THREE_DIGITS * max(sizes))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
