"""Processes of a run that are threads of this one: what they exchange, without a network."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from atesd.train.world import World

T = TypeVar("T")
LIMIT_S = 600.0


class ThreadWorld(World):
    """One of several threads that meet in every exchange; one that stays away ends all."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, hands: list[Any]) -> None:
        super().__init__(rank, size)
        self._barrier = barrier
        self._hands = hands
        self.met = 0
        """How many exchanges there were."""

    def collect(self, mine: T) -> list[T]:
        self.met += 1
        self._hands[self.rank] = mine
        self._barrier.wait(LIMIT_S)
        found = list(self._hands)
        self._barrier.wait(LIMIT_S)
        return found

    def barrier(self) -> None:
        self.collect(None)

    def agreed(self, value: T) -> T:
        return self.collect(value)[0]

    def sum(self, tensors: Sequence[Tensor]) -> None:
        known = self.collect([each.detach().clone() for each in tensors])
        with torch.no_grad():
            for each, parts in zip(tensors, zip(*known, strict=True), strict=True):
                each.copy_(torch.stack([part.float() for part in parts]).sum(0))


def in_threads(size: int, action: Callable[[ThreadWorld], T]) -> list[T]:
    """Run an action in several threads that are a world, and return what each gave; the first error is raised."""
    barrier, hands = threading.Barrier(size), [None] * size

    def run(rank: int) -> T:
        try:
            return action(ThreadWorld(rank, size, barrier, hands))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(run, rank) for rank in range(size)]
    errors = [each.exception() for each in futures]
    own = [error for error in errors if error is not None and not isinstance(error, threading.BrokenBarrierError)]
    for error in [*own, *filter(None, errors)]:
        raise error
    return [each.result() for each in futures]
