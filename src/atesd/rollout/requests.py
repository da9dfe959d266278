"""Orders under way at a vLLM server, in threads that touch nothing but it: neither the model nor its tokenizer."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import suppress
from queue import Empty, SimpleQueue
from time import perf_counter, sleep

from atesd.rollout.answers import Completion, HalfAnswer, Order, completions_of
from atesd.rollout.sampler import SamplingConfig
from atesd.rollout.server import Refused, Server
from atesd.types import UserError

TRIES = 3
"""How often half an answer is asked for again, and how often a server may forget the adapter, in one call."""


class Requests:
    """What was asked for at once, from what the server calls `name`; at most `concurrency` questions at a time.

    The trainer may compute meanwhile, and end: its threads hold up no interpreter's exit, as an executor's would until
    the last answer has come. What must not be done in these threads is left to whoever waits: a server that
    does not know the name is no error here.
    """

    def __init__(
        self,
        server: Server,
        orders: Sequence[Order],
        name: str,
        sampling: SamplingConfig,
        eos_ids: Sequence[int],
        *,
        concurrency: int,
    ) -> None:
        self.seconds = 0.0
        """From the first question to the last answer so far."""
        self._server = server
        self._name = name
        self._sampling = sampling
        self._eos_ids = tuple(eos_ids)
        self._began = perf_counter()
        self._over = threading.Event()
        self._asked: list[Future[list[Completion] | None]] = [Future() for _ in orders]
        self._left: SimpleQueue[tuple[Future[list[Completion] | None], Order]] = SimpleQueue()
        for each in zip(self._asked, orders, strict=True):
            self._left.put(each)
        for number in range(min(concurrency, len(orders))):
            threading.Thread(target=self._work, name=f"atesd-vllm-{number}", daemon=True).start()

    def answers(self) -> list[list[Completion] | None]:
        """Wait; return the completions of each order, None where the server did not know the name.

        UserError where the server stays away, says no or gives half an answer every time: that ends all that has not
        begun.
        """
        try:
            done, _ = wait(self._asked, return_when=FIRST_EXCEPTION)
            for failed in [each for each in done if each.exception() is not None]:
                failed.result()
            return [each.result() for each in self._asked]
        except BaseException:
            self.give_up()
            raise

    def give_up(self) -> None:
        """Ask for nothing more. What is under way ends with its answer, or where it fails once."""
        self._over.set()
        with suppress(Empty):
            while True:
                future, _ = self._left.get_nowait()
                future.cancel()
                future.set_running_or_notify_cancel()  # which tells whoever waits

    def _work(self) -> None:
        """Ask for one prompt after the other, until none is left."""
        with suppress(Empty):
            while True:
                future, order = self._left.get_nowait()
                try:
                    future.set_result(self._ask(order))
                except BaseException as error:  # raised again where it is waited for
                    future.set_exception(error)

    def _ask(self, order: Order) -> list[Completion] | None:
        """Ask for one prompt's completions, again after half an answer."""
        why = ""
        for attempt in range(TRIES):
            sleep(0.1 * attempt)
            try:
                body = order.body(self._name, self._sampling, self._eos_ids)
                answer = self._server.post("/v1/completions", body, over=self._over)
                found = completions_of(answer, order, self._name, self._sampling, self._eos_ids)
            except HalfAnswer as half:
                why = str(half)
            except Refused as refused:
                if refused.status != 404:
                    raise UserError(
                        f"the vLLM server at {self._server.url} refuses to sample: {refused.words}"
                    ) from refused
                return None
            else:
                self.seconds = perf_counter() - self._began
                return found
        raise UserError(
            f"the vLLM server at {self._server.url} gave half an answer {TRIES} times ({why}): see its log, and "
            "continue with atesd train --resume"
        )
