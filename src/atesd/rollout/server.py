"""Questions to a vLLM server over HTTP, asked again while it is away."""

from __future__ import annotations

import math
import os
import threading
import warnings
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from time import monotonic, sleep
from typing import Any

import httpx2

from atesd.types import UserError, one_line

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.25, 10.0
_AWAY = (408, 425, 429)
"""Client errors that pass, as all server errors may."""


class Refused(Exception):  # noqa: N818 (whether it is an error, the caller knows)
    """The server understood a question and said no, in `words`."""

    def __init__(self, status: int, words: str) -> None:
        super().__init__(f"{status}: {words}")
        self.status = status
        self.words = words


class Server:
    """A server at an address. Threads may share it.

    A question that meets no server, a broken connection, a timeout or an error of the server's own is asked again after
    pauses that double, until `wait_s` seconds have passed since it first failed. `failures` counts what failed: where
    it has grown, the server may be another one than before. The key that vLLM takes as `--api-key` is read from
    VLLM_API_KEY.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float,
        wait_s: float,
        connections: int,
        pause: Callable[[float], object] = sleep,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self.url = url
        self.failures = 0
        self._wait_s = wait_s
        self._pause = pause
        self._clock = clock
        self._lock = threading.Lock()
        self._warned = False
        self._has_answered = False
        self._client = _client(url, timeout_s, connections)
        self._direct = _client(url, timeout_s, 1)
        """For all that is asked without an `over`: it is not to wait until a completion has come."""

    def get(self, path: str) -> Any:
        """Return what a GET answers. Refused, or UserError, as `post`."""
        return self._ask("GET", path, None)

    def post(
        self,
        path: str,
        body: Mapping[str, Any],
        *,
        refuses: Collection[int] = (),
        over: threading.Event | None = None,
    ) -> Any:
        """Return what a POST of JSON answers: its JSON, or its text where it is none.

        Refused where the server says no, which on some paths it also does by a status that `refuses` names; UserError
        where it stays away, and where it fails once after `over` was set: then nobody waits for the answer.
        """
        return self._ask("POST", path, body, refuses, over)

    def mention(self, path: str, body: Mapping[str, Any]) -> None:
        """Post something once, whatever comes of it: on the way out."""
        with suppress(httpx2.HTTPError, RuntimeError):  # a client that is closed raises the latter
            self._direct.post(path, json=body, timeout=5.0)

    def close(self) -> None:
        """Close all connections."""
        self._client.close()
        self._direct.close()

    def _ask(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
        refuses: Collection[int] = (),
        over: threading.Event | None = None,
    ) -> Any:
        since, delay = math.nan, _FIRST_PAUSE_S
        client = self._direct if over is None else self._client
        while True:
            try:
                answer = self._answer(client.request(method, path, json=body), refuses)
            except httpx2.TransportError as error:
                why = _named(error)
            except _Away as error:
                why = str(error)
            else:
                self._has_answered = True
                return answer
            now = self._clock()
            since = now if math.isnan(since) else since
            self._failed(why)
            if now - since + delay > self._wait_s or (over is not None and over.is_set()):
                raise UserError(
                    f"the vLLM server at {self.url} did not answer for {self._wait_s:g} s ({why}): {self._remedy}"
                )
            self._pause(delay)
            delay = min(2 * delay, _LONGEST_PAUSE_S)

    @property
    def _remedy(self) -> str:
        if self._has_answered:
            return "start it again and continue with atesd train --resume, or raise rollout.engine.wait_s"
        return "start it (docs/vllm.md), correct rollout.engine.url, or raise rollout.engine.wait_s"

    def _failed(self, why: str) -> None:
        """Count a failure, and say so once."""
        with self._lock:
            self.failures += 1
            is_first, self._warned = not self._warned, True
        if is_first:
            warnings.warn(
                f"the vLLM server at {self.url} does not answer ({why}): it is asked again for up to "
                f"{self._wait_s:g} s, now and whenever that happens",
                stacklevel=4,
            )

    @staticmethod
    def _answer(response: httpx2.Response, refuses: Collection[int]) -> Any:
        is_away = response.status_code >= 500 or response.status_code in _AWAY
        if is_away and (response.status_code not in refuses or _DEAD in _words(response)):
            raise _Away(f"status {response.status_code}: {_words(response)}")
        if response.status_code >= 300:
            raise Refused(response.status_code, _words(response))
        if not response.headers.get("content-type", "").startswith("application/json"):
            return response.text
        try:
            return response.json()
        except ValueError as error:
            raise _Away("its JSON is broken") from error


def _client(url: str, timeout_s: float, connections: int) -> httpx2.Client:
    key = os.environ.get("VLLM_API_KEY")
    return httpx2.Client(
        base_url=url,
        headers={"Authorization": f"Bearer {key}"} if key else {},
        timeout=httpx2.Timeout(timeout_s, connect=min(timeout_s, 10.0), pool=None),
        limits=httpx2.Limits(max_connections=connections, max_keepalive_connections=connections),
    )


class _Away(Exception):  # noqa: N818
    """An answer that only a server in trouble gives."""


_DEAD = "EngineCore"  # vLLM's engine process has died, and the server is about to


def _named(error: Exception) -> str:
    words = one_line(str(error))[:100]
    return f"{type(error).__name__}{words and ': '}{words}"


def _words(response: httpx2.Response) -> str:
    """Return what a refusal says, on one line."""
    try:
        said = response.json()
    except ValueError:
        said = response.text
    for key in ("error", "message", "detail"):
        if isinstance(said, Mapping) and key in said:
            said = said[key]
    return one_line(str(said))[:300]
