"""Orders under way at a vLLM server, in threads that touch nothing but it: neither the model nor its tokenizer."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from time import perf_counter, sleep

from atesd.rollout.answers import Completion, HalfAnswer, Order, completions_of
from atesd.rollout.sampler import SamplingConfig
from atesd.rollout.server import Refused, Server
from atesd.types import UserError

TRIES = 3
"""How often half an answer is asked for again, and how often a server may forget the adapter, in one call."""


class Requests:
    """What was asked for at once, from what the server calls `name`; at most `concurrency` questions at a time.

    The trainer may compute meanwhile. What must not be done in these threads is left to whoever waits: a server that
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
        self._pool = ThreadPoolExecutor(min(concurrency, max(1, len(orders))), thread_name_prefix="atesd-vllm")
        self._asked: list[Future[list[Completion] | None]] = [self._pool.submit(self._ask, order) for order in orders]

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
        finally:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def give_up(self) -> None:
        """Ask for nothing more. What is under way ends with its answer, or where it fails once."""
        self._over.set()
        self._pool.shutdown(wait=False, cancel_futures=True)

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
