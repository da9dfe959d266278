"""Runs of a comparison, forked from one process that has loaded the libraries: loading takes most of ten seconds.

That process, the nursery, is one of its own (`python -m atesd.cli.nursery`), so that no thread of the comparison's
display is there when it forks. It imports, starts no thread and touches no model. Each run is a fork of it: in a
session of its own, with its own log, as if `atesd train` had been typed. On Linux alone, and not where an accelerator
is used, whose state does not outlive a fork; elsewhere, and whenever the nursery is gone, runs start from nothing.

Both sides speak JSON over a pair of sockets that keeps messages whole. To the nursery: `["fork", number, words]` with
the files of log and lock, `["signal", number, signal]`. From it: `["ready"]`, `["forked", number, pid]`,
`["ended", number, exit code]`.
"""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
_POLL_S = 0.1
_LONGEST = 2**20


class Process(Protocol):
    """What a comparison does with a run's process; `subprocess.Popen` does it, too."""

    @property
    def returncode(self) -> int | None:
        """The exit code, negative for a signal, as far as `poll` has seen it."""

    def poll(self) -> int | None:
        """Return the exit code; None while the process runs."""

    def send_signal(self, sig: int, /) -> None:
        """Send a signal; ProcessLookupError or nothing where the process is gone."""


class Forked:
    """A run that the nursery forks."""

    def __init__(self, nursery: Nursery, number: int) -> None:
        self._nursery = nursery
        self._number = number
        self.pid: int | None = None
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Return the exit code; where the nursery took it along, -9 once the process is gone."""
        if not self._nursery.look() and self.returncode is None and not self._lives():
            self.returncode = -signal.SIGKILL
        return self.returncode

    def send_signal(self, sig: int, /) -> None:
        """Send a signal, through the nursery, which knows whether the process still lives and comes to it in order."""
        if not self._nursery.send("signal", self._number, int(sig)) and self.pid is not None:
            os.kill(self.pid, sig)

    def _lives(self) -> bool:
        try:
            stat = Path(f"/proc/{self.pid}/stat").read_text(encoding="utf-8")
        except (FileNotFoundError, ProcessLookupError):
            return False
        return stat.rpartition(")")[2].split()[0] not in {"Z", "X"}


class Nursery:
    """The comparison's side. `look` takes in what was reported; `is_loading` until the first run can be forked."""

    def __init__(self, command: Sequence[str] = (sys.executable, "-m", "atesd.cli.nursery")) -> None:
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [*command, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=os.environ | ONE_THREAD,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
        self._runs: list[Forked] = []
        self._is_ready = self._is_gone = False

    @property
    def is_loading(self) -> bool:
        """Whether it is neither ready nor gone."""
        self.look()
        return not (self._is_ready or self._is_gone)

    def look(self) -> bool:
        """Take in what was reported; return whether the nursery is still there."""
        while not self._is_gone:
            try:
                message = self._channel.recv(_LONGEST, socket.MSG_DONTWAIT)
            except BlockingIOError:
                break
            except ConnectionError:
                message = b""
            if message:
                self._take(*json.loads(message))
            else:
                self._is_gone = True
        return not self._is_gone

    def _take(self, what: str, number: int = 0, value: int = 0) -> None:
        if what == "ready":
            self._is_ready = True
        elif what == "forked":
            self._runs[number].pid = value
        else:
            self._runs[number].returncode = value

    def fork(self, words: Sequence[str], log: int, lock: int) -> Forked | None:
        """Ask for a run of `atesd train WORDS`; None where the nursery is gone."""
        run = Forked(self, len(self._runs))
        if not self.send("fork", len(self._runs), list(words), files=(log, lock)):
            return None
        self._runs.append(run)
        return run

    def send(self, *message: Any, files: Sequence[int] = ()) -> bool:
        """Send a message; return whether somebody was there to take it."""
        try:
            socket.send_fds(self._channel, [json.dumps(message).encode()], files)
        except OSError:
            return False
        return True

    def close(self) -> None:
        """End the nursery; its runs go on."""
        self._channel.close()
        self._is_gone = True
        self._process.terminate()
        self._process.wait()


def spawn(words: Sequence[str], log: int, lock: int) -> Process:
    """Start a run of `atesd train WORDS` from nothing."""
    # A session of its own: the terminal's Ctrl-C reaches only the comparison, which passes it on once.
    return subprocess.Popen(
        [sys.executable, "-m", "atesd.cli.main", "train", *words],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=os.environ | ONE_THREAD,
        pass_fds=(lock,),
        start_new_session=True,
    )


def serve(channel: socket.socket) -> list[str] | None:
    """Fork what is asked for until nobody asks. Returns in each run, with its words; in the nursery, at last, None."""
    running: dict[int, int] = {}  # the number of a run by its process id
    with suppress(ConnectionError):
        _report(channel, "ready")
        while True:
            if select.select([channel], [], [], _POLL_S)[0]:
                message, files, _, _ = socket.recv_fds(channel, _LONGEST, 2)
                if not message:
                    break
                what, number, value = json.loads(message)
                if what == "signal":
                    _pass_on(running, number, value)
                else:
                    pid = os.fork()
                    if pid == 0:
                        channel.close()
                        _become_run(*files)
                        return list(value)
                    for file in files:
                        os.close(file)
                    running[pid] = number
                    _report(channel, "forked", number, pid)
            for pid, code in _ended(running):
                _report(channel, "ended", running.pop(pid), code)
    return None


def _report(channel: socket.socket, *message: Any) -> None:
    channel.send(json.dumps(message).encode())


def _pass_on(running: Mapping[int, int], number: int, sig: int) -> None:
    for pid, other in running.items():  # a process that ended keeps its id until `_ended` has seen it
        if other == number:
            os.kill(pid, sig)


def _ended(running: Mapping[int, int]) -> Iterator[tuple[int, int]]:
    for pid in list(running):
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            yield pid, os.waitstatus_to_exitcode(status)


def _become_run(log: int, lock: int) -> None:  # noqa: ARG001 (the lock is held by being open)
    """Take the place that `spawn` gives a process."""
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDONLY)
    for file, place in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(file, place)
    os.close(nothing)
    os.close(log)


def _load() -> bool:
    """Import what a run needs. Return whether it is safe to fork: no other thread may hold a lock just then."""
    from atesd.train.model import preload

    for name in ("cli.train", "recipe", "trainers"):
        import_module(f"atesd.{name}")
    preload()
    gc.freeze()
    return len(list(Path("/proc/self/task").iterdir())) == 1


def main() -> None:
    """Be the nursery; in each fork, be the run."""
    channel = socket.socket(fileno=int(sys.argv[1]))
    words = serve(channel) if _load() else None
    if words is not None:
        from atesd.cli.main import main as command

        sys.argv = ["atesd", "train", *words]
        command()


if __name__ == "__main__":
    main()
