"""Environments of libraries, in worker processes with a time limit for every answer.

A worker plays many episodes, one question at a time. One that does not answer in time is ended: the episode that it was
asked about has hung, and its others are played again in a new worker, with the same seeds and replies, when they are
next asked; each of those answers has the whole limit again. So does a worker that ends by itself: then that episode has
failed.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from time import monotonic
from typing import Annotated, Any, ClassVar, Protocol

from pydantic import Field

from atesd.envs.base import EpisodeError, GradingMethod, opened
from atesd.facts import RunFacts
from atesd.types import Ending, Message, Problem, UserError, shown

_START_S = 120.0  # a worker imports its library at its first question


class Session(Protocol):
    """What plays one episode inside a worker. `invalid`, where it has one, counts replies that were no action."""

    def reset(self, row: Mapping[str, Any], seed: int) -> str:
        """Begin, and return what is said first; `row` holds the problem's columns."""
        ...

    def step(self, reply: str) -> str | None:
        """Take a reply and return what is said; None where the episode is over."""
        ...

    def reward(self) -> float | None:
        """Return the reward."""
        ...


class RemoteMethod(GradingMethod):
    """Base of sections whose episodes run in worker processes."""

    limit: Annotated[int, Field(ge=1)] = 20
    """Most turns."""
    timeout_s: Annotated[float, Field(gt=0)] = 10.0
    """Seconds for one answer of the environment; an attempt whose environment takes longer is not graded."""
    workers: Annotated[int, Field(ge=1, le=256)] = 2
    """Processes that play episodes."""

    declares: ClassVar[tuple[str, ...]] = ("limit", "grades", "describe", "build", "session", "library")
    session: ClassVar[str]
    """Where the session is: `module:class`."""
    library: ClassVar[tuple[str, str]] = ("", "")
    """Module that sessions import, and the extra that installs it."""

    def settings(self) -> dict[str, Any]:
        """Return what a session is made with."""
        return {}

    def build(self, run: RunFacts) -> Remote:  # noqa: ARG002
        """Return the environment. UserError where its library is not installed."""
        module, extra = self.library
        if module and find_spec(module) is None:
            raise UserError(f"env needs the library {module}: pip install 'atesd[{extra}]'")
        return Remote(self)


class Remote:
    """Opens episodes in worker processes, which end with it."""

    def __init__(self, section: RemoteMethod) -> None:
        self.limit = section.limit
        self.grades = section.grades
        self.invalid_penalty = section.invalid_penalty
        self._section = section
        self._workers = [Worker(section.session, section.settings(), section.timeout_s) for _ in range(section.workers)]
        self._opened = 0
        weakref.finalize(self, _end_all, self._workers)

    def episode(self, problem: Problem, seed: int) -> RemoteEpisode:
        """Open an episode. A problem with a seed of its own is played with it, so that a group plays the same game.

        UserError where a column that the environment needs is missing, or one cannot be passed on to a worker.
        """
        if self._section.needs and self._section.needs not in problem.extra:
            raise UserError(
                f"this environment plays problems with a {self._section.needs!r}, which {problem.id!r} has not: take "
                "the task that makes them (docs/agents.md)"
            )
        row = {**problem.extra, "id": problem.id, "problem": problem.problem, "answer": problem.answer}
        _check_json(problem, row)
        own_seed = _seed(problem, seed)
        self._opened += 1
        worker = self._workers[self._opened % len(self._workers)]
        return RemoteEpisode(self, worker, self._opened, row, own_seed)


class RemoteEpisode:
    """One attempt, played elsewhere."""

    def __init__(self, home: Remote, worker: Worker, number: int, row: Mapping[str, Any], seed: int) -> None:
        self._home = home  # whose end is the worker's
        self._worker = worker
        self.number = number
        self.opening = {"row": dict(row), "seed": seed % 2**31}
        self.replies: list[str] = []
        self.invalid = 0
        self._begun = False

    def begin(self, reply: str | None) -> None:
        """Ask without waiting."""
        self._begun = True
        self._worker.ask(self, "reset" if reply is None else "step", self.opening if reply is None else reply)

    def reset(self, prompt: Sequence[Message]) -> Sequence[Message]:
        """Return the prompt, and what is said behind it."""
        if not self._begun:
            self.begin(None)
        said = self._answer()
        return opened(prompt, said or "")

    def step(self, reply: str) -> Sequence[Message]:
        """Take a reply."""
        if not self._begun:
            self.begin(reply)
        said = self._answer()
        self.replies.append(reply)
        return () if said is None else (Message(role="user", content=said),)

    def reward(self) -> float | None:
        """Ask for the reward."""
        self._worker.ask(self, "reward", None)
        given: float | None = self._worker.answer(self).get("given")
        return given

    def close(self) -> None:
        """Let the worker forget it."""
        self._worker.forget(self)

    def _answer(self) -> str | None:
        self._begun = False
        reply = self._worker.answer(self)
        if "not_text" in reply:
            raise EpisodeError(Ending.NOT_TEXT, reply["not_text"])
        self.invalid = reply.get("invalid", 0)
        said: str | None = reply.get("given")
        return said


class Worker:
    """A process and the questions that wait for it, in their order; one is on its way at a time.

    Nothing waits for a pipe without the time limit, which begins anew with every piece that goes or comes.
    """

    def __init__(self, session: str, settings: Mapping[str, Any], timeout_s: float) -> None:
        self._first_line = json.dumps([session, dict(settings)])
        self._timeout_s = timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._known: set[int] = set()
        """Episodes that this process plays."""
        self._waiting: deque[tuple[RemoteEpisode, str, Any]] = deque()
        self._asked: tuple[RemoteEpisode, str, Any] | None = None
        self._lines: deque[str] = deque()
        """What is still to be sent for it, one line an answer: what is played again, then the question itself."""
        self._unwritten = b""
        self._buffer = b""
        self._has_answered = False
        self._deadline = 0.0
        self._answers: dict[int, dict[str, Any]] = {}

    def ask(self, episode: RemoteEpisode, ask: str, given: Any) -> None:
        """Queue a question, and send it where nothing is on its way."""
        self._waiting.append((episode, ask, given))
        self._send()

    def answer(self, episode: RemoteEpisode) -> dict[str, Any]:
        """Wait for an episode's answer. EpisodeError where it hangs or fails; UserError where the recipe is wrong."""
        while episode.number not in self._answers:
            self._receive()
            self._send()
        reply = self._answers.pop(episode.number)
        if "wrong" in reply:
            raise UserError(reply["wrong"])
        if "ending" in reply:
            raise EpisodeError(Ending(reply["ending"]), reply["failed"])
        if "failed" in reply:
            raise EpisodeError(Ending.ERROR, reply["failed"])
        return reply

    def forget(self, episode: RemoteEpisode) -> None:
        """Drop an episode's questions and answers, and close it where it is open."""
        self._waiting = deque(each for each in self._waiting if each[0] is not episode)
        while self._asked is not None and self._asked[0] is episode:
            self._receive()
        self._answers.pop(episode.number, None)
        if episode.number in self._known:
            self._known.discard(episode.number)
            self.ask(episode, "close", None)

    def end(self) -> None:
        """End the process; its episodes are played again when they are asked."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    pipe.close()
        self._process, self._known, self._asked, self._lines = None, set(), None, deque()
        self._unwritten = self._buffer = b""

    def _send(self) -> None:
        """Begin with the next question, behind all that its episode was asked before where the process is new to it."""
        if self._asked is not None or not self._waiting:
            return
        episode, ask, given = self._waiting.popleft()
        if ask == "close" and self._process is None:
            return
        lines = self._lines_of(episode, ask, given)
        if self._process is None:
            self._start()
        if ask != "close":
            self._known.add(episode.number)
        self._asked, self._lines = (episode, ask, given), lines
        self._send_line()

    def _lines_of(self, episode: RemoteEpisode, ask: str, given: Any) -> deque[str]:
        """Return a question, behind all that its episode was asked before where this process does not know it."""
        asked = [(ask, given)]
        if ask not in ("reset", "close") and episode.number not in self._known:
            asked = [("reset", episode.opening), *(("step", reply) for reply in episode.replies), *asked]
        return deque(json.dumps([episode.number, *each]) for each in asked)

    def _start(self) -> None:
        """Start a process."""
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "atesd.envs.worker"],  # nothing is imported from the working directory
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONHASHSEED": "0"},
            start_new_session=True,
        )
        assert self._process.stdin is not None
        os.set_blocking(self._process.stdin.fileno(), False)
        self._has_answered = False
        self._unwritten = f"{self._first_line}\n".encode()

    def _send_line(self) -> None:
        """Send the next line, whose answer has a time limit of its own."""
        self._unwritten += f"{self._lines.popleft()}\n".encode()
        self._wait_anew()
        self._write()

    def _wait_anew(self) -> None:
        self._deadline = monotonic() + self._timeout_s + (0.0 if self._has_answered else _START_S)

    def _write(self) -> None:
        """Write what the pipe takes at once; `_receive` goes on with the rest."""
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            written = os.write(self._process.stdin.fileno(), self._unwritten)
        except BlockingIOError:
            return
        except OSError:
            self._lost(Ending.ERROR, "its process has ended")
            return
        self._unwritten = self._unwritten[written:]
        self._wait_anew()

    def _receive(self) -> None:
        """Wait until a piece of the question goes, a piece of its answer comes, or its time is over."""
        if self._asked is None:
            return
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        to_write = [self._process.stdin] if self._unwritten else []
        left = max(0.0, self._deadline - monotonic())
        readable, writable, _ = select.select([self._process.stdout], to_write, [], left)
        if writable:
            self._write()
        elif readable:
            self._read(self._process.stdout.fileno())
        else:
            self._lost(Ending.HANG, f"it did not answer within {self._timeout_s:g} s (env.timeout_s)")

    def _read(self, pipe: int) -> None:
        piece = os.read(pipe, 2**16)
        if not piece:
            self._lost(Ending.ERROR, "its process has ended")
            return
        self._wait_anew()
        *whole, self._buffer = (self._buffer + piece).split(b"\n")
        for line in whole:
            self._has_answered = True
            if self._lines:  # the episode has had this answer
                self._send_line()
            else:
                self._take(json.loads(line))

    def _take(self, reply: dict[str, Any]) -> None:
        assert self._asked is not None
        episode, ask, _ = self._asked
        self._asked = None
        if ask != "close":
            self._answers[episode.number] = reply

    def _lost(self, ending: Ending, why: str) -> None:
        """End the process that failed at a question."""
        assert self._asked is not None
        episode, ask, _ = self._asked
        self.end()
        if ask != "close":
            self._answers[episode.number] = {"ending": str(ending), "failed": why}


def _end_all(workers: Sequence[Worker]) -> None:
    for worker in workers:
        worker.end()


def _check_json(problem: Problem, row: Mapping[str, Any]) -> None:
    """UserError where a column is no JSON: workers read nothing else."""
    for name, given in row.items():
        try:
            json.dumps(given)
        except (TypeError, ValueError, RecursionError) as error:
            raise UserError(
                f"env: column {shown(name, 60)} of problem {shown(problem.id, 60)} is {shown(given, 60)}, which is no "
                "JSON and cannot be passed on to the environment's process: write it as text or numbers, or list only "
                "the further columns that you need in task.columns.extra"
            ) from error


def _seed(problem: Problem, otherwise: int) -> int:
    """Return a problem's own seed. UserError where its column of that name is no number."""
    if "seed" not in problem.extra:
        return otherwise
    given = problem.extra["seed"]
    try:
        return int(given)
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(
            f"env: column 'seed' of problem {shown(problem.id, 60)} is {shown(given, 60)}, but episodes are played "
            "from it: write a whole number, rename the column, or leave it out of task.columns.extra"
        ) from error
