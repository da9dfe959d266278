"""Grade mathematical answers, LaTeX or plain, with math-verify.

Trusted: the Python that runs and the packages installed for it. Not trusted: completions, gold answers, and the folder
in which `atesd` was started. So the verifier is a process of its own, `verifier.py`, isolated from `PYTHON*` variables;
only where its environment lacks math-verify does it search this process's import path too, less the working directory
and the folder of the started script. Requests and replies are lines of JSON; nothing is evaluated as Python, and an
answer is read whole as LaTeX, so that no number is picked out of prose or broken markup.

An answer's limit is processor time of the verifier, and its start-up no part of it: a busy machine costs no reward.
Hostile answers (`9**9**9**9`) hold C code for ever, where no handler and no thread helps: a timer of the system ends
the process. It stands in a session of its own, so that Ctrl-C spoils no grade, and ends with its grader or its parent.
"""

from __future__ import annotations

import json
import re
import select
import subprocess
import sys
import unicodedata
from collections.abc import Sequence
from contextlib import suppress
from os.path import samestat
from pathlib import Path
from threading import Lock
from typing import IO, Any, cast
from weakref import finalize

from atesd.rewards.answer import extract_answer
from atesd.rewards.exact import same_text
from atesd.types import UserError

_VERIFIER = Path(__file__).resolve().with_name("verifier.py")
_STARTED_IN = Path().stat()
_START_S = 300.0
# A process that neither answers nor uses its processor time has been stopped, or swaps.
_STILL_S, _STILL_FACTOR, _LONGEST_S = 60.0, 20.0, 1e6
_LONGEST = 2_000
_TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm)\{([^{}]*)\}")
_WORDS = re.compile(r"[^\W\d_]{2,}(?:[\s-]+[^\W\d_]+)*\.?")
# What the verifier would read as a product, or not at all.
_GROUPS = re.compile(r"(?<![\d.,])\d{1,3}(?:(?:\\[,;:! ]|~|\{,\}|[ \u00a0\u2009\u202f])\d{3})+(?![\d])")
_SIGN_BETWEEN = re.compile(r"\D+")
_MIXED = re.compile(r"(-?)(\d+)[ ]+(\d+)/(\d+)")
_POWER = re.compile(r"([-+]?\d+(?:\.\d+)?)[eE]([-+]?\d+)")
_BOLD = re.compile(r"\*\*([^*]+)\*\*")
_ROOT = re.compile(r"\u221a\s*(?:\(([^()]*)\)|(\d+(?:\.\d+)?|[A-Za-z]))")
_RAISED = re.compile(r"[\u207a\u207b]?[\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+")
_SIGNS = str.maketrans(
    {
        "\u00b0": r"^\circ ",
        "\u00b7": r"\cdot ",
        "\u22c5": r"\cdot ",
        "\u221e": r"\infty ",
        "\u2013": "-",  # an en dash; the verifier reads the minus sign itself
        **dict.fromkeys("\u00a3\u00a5\u20ac"),  # money: a unit, as the dollar
        **dict.fromkeys("\u200b\u200e\u200f\u2060\ufeff"),  # of no width
    }
)


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
        given, gold = _spelt(_unwrap(given)), _spelt(_unwrap(gold))
        if same_text(given, gold):
            return 1.0
        if _WORDS.fullmatch(given) and _WORDS.fullmatch(gold):
            return 0.0
        return float(self._verify(given, gold))

    def _verify(self, given: str, gold: str) -> bool:
        if self._worker is None or not self._worker.alive:
            self._drop()
            self._worker = _Worker()
        try:
            return self._worker.ask(given, gold, self._timeout_s)
        except TimeoutError:
            self.timeouts += 1
            self._drop()
            return False
        except BaseException:  # an interrupt: the reply to come would be taken for that to the next request
            self._drop()
            raise

    def _drop(self) -> None:
        if self._worker is not None:
            self._worker.end()
        self._worker = None


def _unwrap(answer: str) -> str:
    """Take off a `\\text{...}` around a whole answer."""
    wrapped = _TEXT.fullmatch(answer.strip())
    return wrapped[1] if wrapped else answer


def _spelt(answer: str) -> str:
    """Write numbers as the verifier reads them.

    `6\\,000` and `6 000` are 6000, `3 1/2` is 3 + 1/2, as with a fraction of one letter, `1.2e3` is a power of ten,
    digits of full width are plain ones, signs outside of ASCII become LaTeX, and a comma at the end says nothing.
    """
    answer = "".join(_vulgar(each) for each in answer).translate(_SIGNS).replace(r"\varnothing", r"\emptyset")
    answer = _ROOT.sub(lambda found: rf"\sqrt{{{found[1] or found[2]}}}", answer)
    answer = _RAISED.sub(lambda found: f"^{{{unicodedata.normalize('NFKC', found[0])}}}", answer)
    answer = answer.strip().rstrip(",;").rstrip()
    if bold := _BOLD.fullmatch(answer):
        answer = bold[1].strip()
    answer = _GROUPS.sub(lambda found: _SIGN_BETWEEN.sub("", found[0]), answer)
    if mixed := _MIXED.fullmatch(answer):
        sign, whole, above, below = mixed.groups()
        return rf"{sign}({whole} + \frac{{{above}}}{{{below}}})"
    if power := _POWER.fullmatch(answer):
        return rf"{power[1]} \cdot 10^{{{power[2]}}}"
    return answer


def _vulgar(letter: str) -> str:
    """Return a fraction of one letter as ` 1/2`, a digit of full width as a plain one, and all else as it is."""
    plain = unicodedata.normalize("NFKC", letter)
    if "\u2044" in plain:
        return f" {plain.replace(chr(0x2044), '/')}"
    return plain if plain.isascii() and plain.isdigit() and unicodedata.east_asian_width(letter) == "F" else letter


class _Worker:
    """A verifier process. `end` ends it; so do its garbage collection, the interpreter's exit, its parent's death."""

    def __init__(self) -> None:
        command = [sys.executable, "-I", str(_VERIFIER), json.dumps(_fallback_path())]
        try:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                cwd="/",
            )
        except OSError as error:
            raise _no_start(str(error)) from error
        self.end = finalize(self, _end, self.process)
        try:
            failure = str(json.loads(self._read(_START_S)))
        except (TimeoutError, ValueError) as error:
            failure = str(error)
        if failure:
            self.end()
            raise _no_start(failure)

    @property
    def alive(self) -> bool:
        """Whether it can take a request: not where it died, nor in a fork of the process that started it."""
        return self.process.poll() is None

    def ask(self, given: str, gold: str, timeout_s: float) -> bool:
        """Return the verdict. TimeoutError where the process ends itself over the request, or stands still."""
        stdin = cast("IO[bytes]", self.process.stdin)
        with suppress(BrokenPipeError):  # reading then finds the end
            stdin.write(json.dumps([given, gold, timeout_s]).encode() + b"\n")
            stdin.flush()
        return self._read(_STILL_S + _STILL_FACTOR * timeout_s) == b"true\n"

    def _read(self, wall_s: float) -> bytes:
        """Read one line, which the process writes at once. TimeoutError where none comes."""
        stdout = cast("IO[bytes]", self.process.stdout)
        poller = select.poll()
        poller.register(stdout, select.POLLIN)
        if not poller.poll(min(wall_s, _LONGEST_S) * 1000):
            raise TimeoutError(f"no sign of life for {wall_s:g} s")
        line = stdout.readline()
        if not line:
            raise TimeoutError(f"it ended with code {self.process.wait()}")
        return line


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(BrokenPipeError):
                pipe.close()


def _no_start(reason: str) -> UserError:
    return UserError(
        f"the answer verifier does not start ({reason}): `{sys.executable} -m pip install math-verify` repairs it, "
        'or set reward.kind = "exact"'
    )


def _fallback_path() -> list[str]:
    """Return this process's import path but for the working directory and the folder of the started script."""
    untrusted = [_STARTED_IN, Path().stat()]
    script = getattr(sys.modules["__main__"], "__file__", None)
    if script is not None and Path(script).exists():
        untrusted.append(Path(script).resolve().parent.stat())
    folders = [Path(entry) for entry in sys.path if Path(entry).is_absolute() and Path(entry).is_dir()]
    return [str(folder) for folder in folders if not any(samestat(folder.stat(), place) for place in untrusted)]
