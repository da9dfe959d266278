"""Sharded weights (FSDP2): each process keeps a share of every weight, of its gradient and of the optimizer's averages.

Every decoder layer is a part of its own; what is left (embedding, last norm, head) is one more, the root. Weights are

    whole     in every process, gathered once after an update, for all that only reads them: sampling, evaluation,
              measurements, the teacher's passes. Nothing is exchanged in a pass, so that processes need not make
              equally many
    derived   while gradients are taken: a layer is gathered for its own forward and backward pass alone, and its
              gradient is added up over processes and cut into shares at once. The root stays whole, is gathered no
              second time, and its gradient is added up at the end of the update

While gradients are taken every process must make equally many passes. One that has fewer micro-batches than another
makes up for it with passes over one token whose loss counts nothing.

Gradients are added up, never averaged, in float32: losses are divided by counts of all processes.

Weights that all train in bfloat16 have shares in float32, the masters that the optimizer moves, and are whole, read and
derived in bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from atesd.train.world import World
from atesd.types import UserError


class Whole:
    """Weights that every process holds: there is nothing to gather."""

    is_sharded: ClassVar[bool] = False

    def __init__(self, world: World | None = None) -> None:
        self.world = world or World()
        self.is_deriving = False
        """Whether gradients are being taken of shares."""

    @property
    def mark(self) -> str:
        """What the names of this process's own files end in; nothing where one process writes for all."""
        return ""

    def gather(self) -> None:
        """Make the weights whole."""

    def masters(self) -> dict[str, Tensor]:
        """Return this process's shares by name, where they are more exact than the whole weights."""
        return {}

    def absorb(self) -> None:
        """Take over what was written into the whole weights."""

    @contextmanager
    def deriving(self, own: int) -> Iterator[Iterable[bool]]:
        """Yield the passes with gradient that this process makes, and whether each is one of its `own`."""
        yield [True] * own

    def exchanging(self) -> AbstractContextManager[None]:
        """Return a context in which weights may be exchanged."""
        return nullcontext()

    def add_up(self, model: nn.Module) -> None:
        """Add up the gradients of all processes."""
        self.world.sum_gradients([weight for weight in model.parameters() if weight.requires_grad])

    def clip(self, accelerator: Accelerator, model: nn.Module, largest: float) -> float:
        """Clip the gradient to a norm, and return the norm that it had."""
        return float(accelerator.clip_grad_norm_(model.parameters(), largest))


class Shards(Whole):
    """The shares of a model's weights. `root` is the module around the model whose forward pass is derived.

    `computes_in`: the precision of whole weights, where it is not that of the shares.
    """

    is_sharded: ClassVar[bool] = True

    def __init__(
        self,
        root: nn.Module,
        model: nn.Module,
        world: World,
        device: torch.device,
        computes_in: torch.dtype | None = None,
    ) -> None:
        super().__init__(world)
        from torch.distributed.device_mesh import init_device_mesh  # seconds, which one process alone need not wait
        from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

        if not hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
            raise UserError(
                f"model.shard needs torch 2.13, and this is {torch.__version__}: install it, or remove model.shard"
            )
        layers = _layers(model)
        mesh = init_device_mesh(device.type, (world.size,))
        policy = MixedPrecisionPolicy(param_dtype=computes_in, reduce_dtype=torch.float32)
        for layer in layers:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(root, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
        self._root = cast("Any", root)
        self._layers = layers
        self._model = model
        self._has_masters = computes_in is not None
        self._is_whole = False
        for part in self._parts:
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)
        self._root.set_reduce_scatter_unused_params(True)
        self._root._get_fsdp_state()._lazy_init()  # else the first layer that is read alone would be its own root
        for group in self._groups:  # state dicts are asked for and loaded while weights are whole: nothing to do
            for handle in (
                *group._module_to_pre_save_state_dict_hook_handle.values(),
                *group._module_to_pre_load_state_dict_hook_handle.values(),
                *(each._post_load_hook_handle for each in group.fsdp_params),
            ):
                handle.remove()
        self._shares = dict(model.named_parameters())

    @property
    def mark(self) -> str:
        """What the names of this process's own files end in."""
        return f"-{self.world.rank + 1:05d}-of-{self.world.size:05d}"

    @property
    def _parts(self) -> list[Any]:
        return [self._root, *self._layers]

    @property
    def _groups(self) -> list[Any]:
        return [group for part in self._parts for group in part._get_fsdp_state()._fsdp_param_groups]

    def gather(self) -> None:
        """Make the weights whole in every process: all must ask for it."""
        if self._is_whole:
            return
        self._root.set_reshard_after_forward(False)
        with self.exchanging():
            for part in self._parts:
                part.unshard()
        self._is_whole = True

    def masters(self) -> dict[str, Tensor]:
        """Return this process's shares by name, where they are more exact than the whole weights."""
        return {name: local(share) for name, share in self._shares.items()} if self._has_masters else {}

    def absorb(self) -> None:
        """Take over what was written into the whole weights."""
        assert self._is_whole, "shares are taken of whole weights"
        whole = dict(self._model.named_parameters())
        with torch.no_grad():
            for name, share in self._shares.items():
                local(share).copy_(piece(whole[name], self.world))

    @contextmanager
    def deriving(self, own: int) -> Iterator[Iterable[bool]]:
        """Yield as many passes with gradient as the busiest process makes, and whether each is one of its `own`."""
        total = max(self.world.collect(own))
        if not total:
            yield ()
            return
        for layer in self._layers:
            layer.reshard()
            layer.set_reshard_after_forward(True, recurse=False)
        for group in self._groups:  # passes over whole weights say nothing about what to gather ahead of its use
            group._post_forward_indices.clear()
        self._root._get_fsdp_state()._comm_ctx.post_forward_order.clear()
        self._is_whole, self.is_deriving = False, True
        with self.exchanging():
            yield self._passes(own, total)
        self.is_deriving = False

    def _passes(self, own: int, total: int) -> Iterator[bool]:
        for place in range(total):
            is_last = place + 1 == total
            self._root.set_requires_gradient_sync(is_last, recurse=False)
            self._root.set_reshard_after_backward(is_last, recurse=False)
            yield place < own

    def exchanging(self) -> AbstractContextManager[None]:
        """Return a context in which weights may be exchanged."""
        return self.world.joined()

    def add_up(self, model: nn.Module) -> None:
        """Do nothing: the backward pass has added them up."""

    def clip(self, accelerator: Accelerator, model: nn.Module, largest: float) -> float:
        """Clip the gradient to a norm over all shares, and return the norm that it had."""
        with self.exchanging():
            norm: Any = accelerator.clip_grad_norm_(model.parameters(), largest)
            return float(norm.full_tensor())


def _layers(model: nn.Module) -> list[Any]:
    """Return the layers that the model's authors want in one piece. UserError where they name none."""
    base: Any = cast("Any", model).get_base_model() if hasattr(model, "get_base_model") else model
    names = set(getattr(base, "_no_split_modules", None) or ())
    found = [module for module in base.modules() if type(module).__name__ in names]
    if not found:
        raise UserError(
            f"{type(base).__name__} does not say which of its layers belong together (_no_split_modules), so that "
            "there is nothing to shard it by: remove model.shard"
        )
    return found


def local(tensor: Tensor) -> Tensor:
    """Return this process's share of a sharded tensor, and any other tensor as it is; what is written there is kept."""
    with torch.no_grad():
        return cast("Tensor", cast("Any", tensor).to_local()) if hasattr(tensor, "to_local") else tensor


def gathered(tensor: Tensor) -> Tensor:
    """Return a sharded tensor whole; all processes must ask for it."""
    return cast("Tensor", cast("Any", tensor).full_tensor())


def shared_as(weight: Tensor, share: Tensor) -> Tensor:
    """Return this process's share of a tensor as one that is cut like a weight; as it is where the weight is whole."""
    if local(weight) is weight:
        return share
    like = torch.zeros_like(weight.detach())
    local(like).copy_(share)
    return like


def piece(whole: Tensor, world: World) -> Tensor:
    """Return this process's share of a whole tensor: some of its first dimension's entries, or none."""
    pieces = whole.detach().chunk(world.size)
    return pieces[world.rank] if world.rank < len(pieces) else whole.detach()[:0]
