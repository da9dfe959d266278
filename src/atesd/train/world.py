"""Several processes that train one model: all hold its weights and everything that decides, and share out the work.

What is computed in shares is gathered, so that every process goes on from the same numbers; whatever is computed
everywhere alike is handed out by process 0 where a difference would matter. One process alone pays nothing: there is no
process group, and what is given comes back.

Every exchange begins with a word from each process that it is well. One that failed says so in its next exchange, or
rather in place of it, and all end with it: `sound` is where an error is told to the others. What the exchanges carry
besides gradients goes over CPU memory.
"""

from __future__ import annotations

import atexit
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor, nn

from atesd.launch import launched
from atesd.types import Elsewhere, UserError, one_line

T = TypeVar("T")

_PATIENCE = timedelta(hours=2)  # a share of the work takes less; a process that died is noticed at once
_BUCKET = 2**25  # numbers that are added up in one go: 128 MiB


class LostError(UserError):
    """Another process of the run is gone."""


class World:
    """The processes of a run; this one is number `rank` of `size`."""

    def __init__(self, rank: int = 0, size: int = 1, talk: Any = None) -> None:
        self.rank = rank
        self.size = size
        self._talk = talk
        """The group of what is exchanged over CPU memory; gradients go by the default group."""
        self._inside = False
        self._left = False
        self._is_first: bool | None = None
        """Whether this process was the first to notice that one is gone; None before."""

    @staticmethod
    def join() -> World:
        """Meet the other processes that the launcher started; the same world every time."""
        return _join()

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """Return this process's items: they are dealt out in turn."""
        return list(items[self.rank :: self.size])

    def gather(self, items: Sequence[T]) -> list[T]:
        """Return what all processes made of their shares, in the order of what was dealt out."""
        hands = self.collect(list(items))
        return [hands[place % self.size][place // self.size] for place in range(sum(map(len, hands)))]

    def collect(self, mine: T) -> list[T]:
        """Return one object of every process, by its number."""
        if self.size == 1:
            return [mine]
        self.barrier()
        found: list[T] = [mine] * self.size
        with self._exchange():
            dist.all_gather_object(found, mine, group=self._talk)
        return found

    def pool(self, mine: Sequence[T]) -> list[T]:
        """Return everybody's, process by process."""
        return [each for hand in self.collect(list(mine)) for each in hand]

    def merged(self, mine: dict[int, T]) -> dict[int, T]:
        """Return everybody's by key; tensors in it come to the CPU where there are several processes."""
        if self.size == 1:
            return mine
        return {key: value for hand in self.collect(_on_cpu(mine)) for key, value in hand.items()}

    def total(self, numbers: Mapping[str, float]) -> dict[str, float]:
        """Add up numbers of all processes by key; keys come in the order of the processes."""
        added: dict[str, float] = {}
        for each in self.collect(dict(numbers)):
            for key, value in each.items():
                added[key] = added.get(key, 0.0) + value
        return added

    def agreed(self, value: T) -> T:
        """Return what process 0 holds."""
        if self.size == 1:
            return value
        self.barrier()
        box = [value if self.is_main else None]
        with self._exchange():
            dist.broadcast_object_list(box, src=0, group=self._talk)
        return box[0]  # type: ignore[return-value]

    def any(self, flag: bool) -> bool:
        """Tell whether it holds in any process."""
        return flag if self.size == 1 else any(self.collect(flag))

    def barrier(self) -> None:
        """Wait for all. Elsewhere if one of them failed meanwhile."""
        if self.size == 1:
            return
        if self._status(failed=False):
            self._left = True
            rank, line = self._speaker(None)
            raise Elsewhere(f"process {rank} failed: {line}")

    def sum_gradients(self, weights: Sequence[nn.Parameter]) -> None:
        """Add up the gradients of all processes, in float32; a weight without one in every process keeps none."""
        if self.size == 1:
            return
        have_one = self.collect([weight.grad is not None for weight in weights])
        moved = [weight for weight, *held in zip(weights, *have_one, strict=True) if any(held)]
        for weight in moved:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight, dtype=weight.grad_dtype)
        self.sum([weight.grad for weight in moved if weight.grad is not None])

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Add up tensors of all processes in place, in float32."""
        if self.size == 1:
            return
        self.barrier()
        with torch.no_grad():
            for bucket in _buckets(tensors):
                flat = torch.cat([each.flatten().float() for each in bucket])
                with self._exchange():
                    dist.all_reduce(flat)
                for each, part in zip(bucket, flat.split_with_sizes([each.numel() for each in bucket]), strict=True):
                    each.copy_(part.view_as(each))

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Let all processes exchange tensors among themselves inside, by the default group and in the same order.

        A process that fails in there cannot tell the others, which notice that it is gone.
        """
        if self.size == 1:
            yield
            return
        self.barrier()
        with self._exchange(only=_of_the_network):
            yield

    def refuse_difference(self, what: str, mine: str, remedy: str) -> None:
        """UserError, which says that two processes have `what`, unless all hold the same text."""
        other = next((rank for rank, theirs in enumerate(self.collect(mine)) if theirs != mine), None)
        if other is not None:
            raise UserError(f"processes {min(self.rank, other)} and {max(self.rank, other)} have {what}: {remedy}")

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """Let process 0 go before the others."""
        if not self.is_main:
            self.barrier()
        yield
        if self.is_main:
            self.barrier()

    @contextmanager
    def sound(self, *expected: type[Exception]) -> Iterator[None]:
        """End all processes with one that fails; `expected` are raised by all of them anyway.

        Of those that fail, the first raises its error, and all others `Elsewhere`, which says what it was.
        """
        try:
            yield
        except Exception as error:
            if isinstance(error, (Elsewhere, *expected)):
                raise
            if not self._speaks(error):
                raise Elsewhere(f"another process failed, too: {error}") from error
            raise

    def _speaks(self, error: Exception) -> bool:
        """Tell the others of an error, and whether it is this process that tells the user."""
        if isinstance(error, LostError):
            return self._is_first_to_say()
        if self.size == 1 or self._left or self._inside:
            return True
        self._left = True
        try:
            self._status(failed=True)
            rank, _ = self._speaker(one_line(str(error)) or type(error).__name__)
        except LostError:
            return True
        return rank == self.rank

    def _speaker(self, line: str | None) -> tuple[int, str]:
        """Return the first process that failed, and what it says."""
        lines: list[str | None] = [None] * self.size
        with self._exchange():
            dist.all_gather_object(lines, line, group=self._talk)
        return next((rank, said) for rank, said in enumerate(lines) if said is not None)

    def _status(self, *, failed: bool) -> bool:
        """Hear whether any process failed."""
        count = torch.tensor([int(failed)])
        with self._exchange():
            dist.all_reduce(count, group=self._talk)
        return bool(count.item())

    @contextmanager
    def _exchange(self, only: Callable[[Exception], bool] = lambda _: True) -> Iterator[None]:
        """Tell of a process that is gone in the words of the tool. An error in here cannot be told to the others."""
        self._inside = True
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if not only(error):
                raise
            raise LostError(
                "another process of this run is gone, or could not be reached: see its own output; the run goes on "
                "from its last checkpoint with --resume"
            ) from error
        self._inside = False

    def _is_first_to_say(self) -> bool:
        """Tell whether no other process has said that one is gone: all of them notice, perhaps in several blocks."""
        if self._is_first is None:
            try:
                self._is_first = int(dist.distributed_c10d._get_default_store().add("atesd/lost", 1)) == 1
            except RuntimeError:  # the store went with the process that is gone
                self._is_first = True
        return self._is_first


@cache
def _join() -> World:
    _, size = launched()
    if size == 1:
        return World()
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=_PATIENCE)
    if state.num_processes != size:
        raise UserError(
            f"{size} processes were launched, but accelerate joins none of them here: start one (atesd train)"
        )
    world = World(state.process_index, state.num_processes, dist.new_group(backend="gloo", timeout=_PATIENCE))
    atexit.register(_leave, world)
    return world


def _of_the_network(error: Exception) -> bool:
    """Tell an exchange that broke off from errors of what is computed beside it."""
    return isinstance(error, dist.DistError) or "gloo" in str(error) or "NCCL" in str(error)


def _on_cpu(held: dict[int, Any]) -> dict[int, Any]:
    """Return dataclasses of tensors, by key, on the CPU."""
    return {
        key: replace(value, **{each.name: getattr(value, each.name).cpu() for each in fields(value)})
        for key, value in held.items()
    }


def _leave(world: World) -> None:
    """Part from the other processes: a thread that still serves the last exchange aborts an interpreter that ends.

    Where one broke off in the middle its thread may wait for hours, and nothing is parted from.
    """
    if dist.is_initialized() and not world._inside:
        dist.destroy_process_group()


def fingerprint(tensors: Mapping[str, Tensor], state: str = "") -> str:
    """Return a digest of tensors, bit by bit but blind to their order within one, and of a text.

    Sums of the bits as integers, taken where the tensors are: reading billions of weights back would take longer than
    the step.
    """
    sums = [_bits(each.detach()).sum(dtype=torch.int64) for each in tensors.values()]
    numbers = torch.stack([each.cpu() for each in sums]).tolist() if sums else []
    return hashlib.sha256(f"{list(tensors)}{numbers}{state}".encode()).hexdigest()


def _bits(tensor: Tensor) -> Tensor:
    sizes = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(sizes[tensor.element_size()])


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Cut tensors into lists of at most so many numbers, or one tensor."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and sum(each.numel() for each in bucket) + tensor.numel() > _BUCKET:
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket
