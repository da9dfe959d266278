"""A CUDA device that is pretended on the CPU: tensors that say `cuda:0`, and a count of what would wait for a GPU.

Every operation on such tensors runs on the CPU. What a GPU would refuse is refused: an operation on tensors of both
devices. What would make the CPU wait for it is counted, by kind and phase:

    scalar    .item(), float(), int(), bool() of a tensor, and whatever reads one number of it
    sizes     shapes that depend on numbers: nonzero, masks as indices, unique, repeat_interleave without a size
    fetch     a copy to the CPU
    send      a copy to the device from memory that is not pinned: the CPU waits until it is done

Kernels are not those of a GPU, so nothing is said about their speed or rounding. One process pretends for all of its
life (`pretend`): torch notes that there is a device when the first backward pass begins. A model must have been loaded
before: transformers fills the buffers of its first one in another way where torch has a device of its own.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

DEVICE = torch.device("cuda", 0)
_CPU = torch.device("cpu")
_INNER = torch.device("privateuseone:0")
"""What torch's own C++ takes the tensors to be on: a build without CUDA knows nothing of CUDA devices."""
aten: Any = torch.ops.aten

_SCALARS = {aten._local_scalar_dense, aten.equal, aten.is_nonzero}
_SIZES = {
    aten.nonzero,
    aten.masked_select,
    aten._unique,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.bincount,
    aten.histc,
}
_INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
_COPIES = {aten._to_copy, aten.copy_, aten.copy}


class Waits:
    """What would have waited, by phase and kind."""

    def __init__(self) -> None:
        self.phase = "elsewhere"
        self.by_phase: dict[str, Counter[str]] = {}
        self.places: Counter[tuple[str, str, str]] = Counter()
        self.on = False

    def add(self, kind: str) -> None:
        if not self.on:
            return
        self.by_phase.setdefault(self.phase, Counter())[kind] += 1
        self.places[self.phase, kind, _place()] += 1

    @contextmanager
    def within(self, phase: str) -> Iterator[None]:
        """Count what happens inside under a phase."""
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    @contextmanager
    def counting(self) -> Iterator[Waits]:
        """Count inside the block, from nothing."""
        self.by_phase, self.places, self.on = {}, Counter(), True
        try:
            yield self
        finally:
            self.on = False

    def total(self, *kinds: str) -> int:
        return sum(count for counts in self.by_phase.values() for kind, count in counts.items() if kind in kinds)


def _place() -> str:
    """Return the innermost lines of the project and of libraries from which an operation was called."""
    frame: Any = sys._getframe(1)
    ours, theirs = "", ""
    while frame is not None:
        name = frame.f_code.co_filename
        if "/atesd/" in name and not name.endswith("/transfer.py"):
            ours = f"{name.rsplit('/atesd/', 1)[1]}:{frame.f_lineno}"
            break
        if not theirs and "site-packages" in name and "/torch/" not in name:
            theirs = f"{name.rsplit('site-packages/', 1)[1]}:{frame.f_lineno}"
        frame = frame.f_back
    return " < ".join(filter(None, (theirs, ours))) or "tests"


WAITS = Waits()


class Pretended(Tensor):
    """A tensor that says it is on a GPU."""

    plain: Tensor

    @staticmethod
    def __new__(cls, plain: Tensor) -> Any:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            plain.size(),
            strides=plain.stride(),
            storage_offset=plain.storage_offset(),
            dtype=plain.dtype,
            layout=plain.layout,
            device=_INNER,
        )
        made.plain = plain
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self, **_: Any) -> str:
        return f"Pretended({self.plain})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    device = DEVICE  # type: ignore[assignment]
    is_cuda = True  # type: ignore[assignment]

    @property  # type: ignore[override]
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, other: Tensor) -> None:
        assert isinstance(other, Pretended), "a weight would move to the CPU"
        self.plain = other.plain

    def data_ptr(self) -> int:
        return self.plain.data_ptr()

    def untyped_storage(self) -> Any:
        return self.plain.untyped_storage()

    def tolist(self) -> Any:
        WAITS.add("fetch")
        return self.plain.tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")


class _Mode(TorchDispatchMode):
    """Makes tensors on the pretended device where one is asked for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        if any(isinstance(each, Pretended) for each in leaves) or _is_ours(kwargs.get("device")):
            return _run(func, args, kwargs)
        return func(*args, **kwargs)


def _is_ours(device: Any) -> bool:
    return device is not None and torch.device(device).type in ("cuda", "privateuseone", "pretended")


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    packet = func.overloadpacket
    leaves = tree_leaves((args, kwargs))
    ours = [each for each in leaves if isinstance(each, Pretended)]
    others = [each for each in leaves if isinstance(each, Tensor) and not isinstance(each, Pretended)]
    for kind in _kinds(packet, args, kwargs, ours):
        WAITS.add(kind)
    _refuse_mixture(packet, func, args, others)
    plain_args, plain_kwargs = tree_map(_plain, (args, kwargs))
    to_cpu = _goes_to_cpu(packet, kwargs)
    if func is torch.ops.prim.device.default:
        return DEVICE
    if func is aten.mm.dtype:  # which CPUs lack
        left, right, dtype = plain_args
        out = left.to(dtype) @ right.to(dtype)
    else:
        out = func(*plain_args, **plain_kwargs)
    written = [
        given
        for argument, given in _arguments(func, args, kwargs)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    if written:
        returned = written[0] if len(written) == 1 else written
        for each in tree_leaves(written):
            if isinstance(each, Pretended) and each.shape != each.plain.shape:
                raise NotImplementedError(f"{func} changes a shape in place")
        if len(func._schema.returns) == 0:
            return None
        if all(each.alias_info is not None and each.alias_info.is_write for each in func._schema.returns):
            return returned if len(func._schema.returns) == 1 else tuple(written)
    return out if to_cpu else tree_map(_wrapped, out)


def _arguments(func: Any, args: Any, kwargs: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    for place, argument in enumerate(func._schema.arguments):
        if place < len(args):
            yield argument, args[place]
        elif argument.name in kwargs:
            yield argument, kwargs[argument.name]


def _plain(value: Any) -> Any:
    if isinstance(value, Pretended):
        return value.plain
    if isinstance(value, torch.device) and value.type != "cpu":
        return _CPU
    return value


def _wrapped(value: Any) -> Any:
    return Pretended(value) if isinstance(value, Tensor) and not isinstance(value, Pretended) else value


def _goes_to_cpu(packet: Any, kwargs: dict[str, Any]) -> bool:
    device = kwargs.get("device")
    return packet is aten._to_copy and device is not None and torch.device(device).type == "cpu"


def _kinds(packet: Any, args: Any, kwargs: dict[str, Any], ours: list[Any]) -> Iterator[str]:
    """Yield what of an operation would wait."""
    if packet in _SCALARS and ours:
        yield "scalar"
    elif ours and (packet in _SIZES or (packet is aten.repeat_interleave and kwargs.get("output_size") is None)):
        yield "sizes"
    elif packet in _INDEXED and isinstance(args[0], Pretended):
        yield from _of_index(args)
    elif packet is aten._to_copy and kwargs.get("device") is not None:
        yield from _of_copy(args[0], to_ours=_is_ours(kwargs["device"]))
    elif packet in (aten.copy_, aten.copy):
        yield from _of_copy(args[1], to_ours=isinstance(args[0], Pretended))


def _of_index(args: Any) -> Iterator[str]:
    indices = [each for each in args[1] if isinstance(each, Tensor)]
    if any(each.dtype in (torch.bool, torch.uint8) for each in indices):
        yield "sizes"
    values = [each for each in args[2:3] if isinstance(each, Tensor) and each.dim() > 0]
    if any(not isinstance(each, Pretended) for each in (*indices, *values)):
        yield "send"


def _of_copy(source: Any, *, to_ours: bool) -> Iterator[str]:
    is_ours = isinstance(source, Pretended)
    if is_ours and not to_ours:
        yield "fetch"
    if to_ours and not is_ours:
        yield "pinned" if _is_pinned(source) else "send"


def _is_pinned(tensor: Tensor) -> bool:
    return getattr(tensor, "pretends_to_be_pinned", False)


def _pinned(tensor: Tensor, *_: Any) -> Tensor:
    made = tensor.clone()
    made.pretends_to_be_pinned = True  # type: ignore[attr-defined]
    return made


class _Module(_DummyBackendModule):
    """What torch and accelerate ask of a device's module besides."""

    def get_rng_state(self, *_: Any) -> Tensor:
        return torch.zeros(1)

    def set_rng_state(self, *_: Any) -> None:
        return None


def _refuse_mixture(packet: Any, func: Any, args: Any, others: list[Any]) -> None:
    if packet in _COPIES:
        return
    if packet in _INDEXED and isinstance(args[0], Pretended):
        return  # indices may be on the CPU
    wrong = [each for each in others if each.dim() > 0]
    if wrong and any(isinstance(each, Pretended) for each in tree_leaves(args)):
        raise RuntimeError(f"expected all tensors to be on the same device, but {func} got cuda:0 and cpu")


def pretend() -> Waits:
    """Let there be a CUDA device for the rest of the process's life."""
    torch.cuda._lazy_init = lambda: None  # type: ignore[assignment]
    _setup_privateuseone_for_python_backend("pretended", _Module())
    Tensor.pin_memory = _pinned  # type: ignore[method-assign]
    for name, stand_in in {
        "device": lambda _: nullcontext(),
        "manual_seed": lambda _: None,
        "get_rng_state": _Module().get_rng_state,
        "set_rng_state": _Module().set_rng_state,
    }.items():
        setattr(torch.cuda, name, stand_in)
    plain = torch.tensor

    def tensor(data: Any, *, device: Any = None, **more: Any) -> Tensor:  # its own copy is no operation that is seen
        made = plain(data, **more)
        return made.to(DEVICE) if _is_ours(device) else made

    torch.tensor = tensor
    torch.nn.Module.to = _tied(torch.nn.Module.to)  # type: ignore[method-assign]
    _Mode().__enter__()
    return WAITS


def _tied(plain: Any) -> Any:
    """Let weights that a module has twice stay one, as on a real device, where they keep their objects."""

    def to(self: torch.nn.Module, *arguments: Any, **options: Any) -> torch.nn.Module:
        places: dict[int, list[tuple[torch.nn.Module, str]]] = {}
        for module in self.modules():
            for name, weight in module._parameters.items():
                places.setdefault(id(weight), []).append((module, name))
        plain(self, *arguments, **options)
        for first, *others in places.values():
            for module, name in others:
                module._parameters[name] = first[0]._parameters[first[1]]
        return self

    return to
