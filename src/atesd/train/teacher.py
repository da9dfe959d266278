"""The teacher's weights: frozen at step 0, live, or an exponential moving average of the student's.

Only weights that train can differ between the roles, so a teacher is a set of values for those weights, put in place
for the duration of its forward pass. With LoRA the frozen teacher is the adapter switched off: no second copy.
Where the student's weights are sharded, the teacher's are too, and whole only while they are held (`Teachers.held`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from atesd.codes.model import unsteered
from atesd.losses.target import View
from atesd.sections import TeacherConfig
from atesd.train.shard import Whole, gathered, local
from atesd.types import UserError


class Teacher:
    """Puts the teacher's weights in place and keeps them up to date.

    EMA: theta_T <- d theta_T + (1 - d) theta_S after every optimizer step, from the student on (2601.18734, code). Of
    weights in half precision the average is kept in float32, and rounded where it scores.
    """

    def __init__(self, config: TeacherConfig, model: nn.Module) -> None:
        self._kind = config.weights
        self._decay = 0.999 if config.ema_decay is None else config.ema_decay
        self._model = model
        self._adapter_off = config.weights == "frozen" and hasattr(model, "peft_config")
        self._weights: dict[str, Tensor] = {}
        if config.weights != "live" and not self._adapter_off:
            self._weights = {name: self._copy(weight.detach()) for name, weight in _trainable(model)}
        self._shares = {name: weight for name, weight in _trainable(model) if local(weight) is not weight}
        """The student's weights where they are sharded, which the model does not show while they are whole."""
        self._held: dict[str, Tensor] = {}

    @property
    def frozen(self) -> bool:
        """Whether the teacher's answers depend on the hint alone for the whole run."""
        return self._kind == "frozen"

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Score with the teacher's weights, which no code steers, inside the block; no gradient flows there."""
        with torch.no_grad(), unsteered(self._model):
            if self._adapter_off:
                with cast("Any", self._model).disable_adapter():
                    yield
                return
            own = {name: weight.data for name, weight in _trainable(self._model)} if self._weights else {}
            assert self._held or not (self._weights and self._shares), "the teacher's shares were not gathered"
            try:
                self._put(self._held or self._weights)
                yield
            finally:
                self._put(own)

    def update(self) -> None:
        """Follow the student after an optimizer step."""
        if self._kind != "ema":
            return
        with torch.no_grad():
            for name, weight in self._shares.items() or _trainable(self._model):
                average = local(self._weights[name])
                average.lerp_(local(weight.detach()).to(average.dtype), 1 - self._decay)

    def gather(self) -> None:
        """Put shares together, until `release`."""
        if self._shares:
            whole = dict(_trainable(self._model))
            self._held = {name: gathered(share).to(whole[name].dtype) for name, share in self._weights.items()}

    def release(self) -> None:
        """Keep this process's share alone."""
        self._held = {}

    def tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint must hold: the average; the frozen weights come from the model's source."""
        return self._weights if self._kind == "ema" else {}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore `tensors`, or this process's shares of them. UserError unless they are the same weights."""
        if set(tensors) != set(self.tensors()):
            raise UserError("the checkpoint holds other teacher weights than this run's: it was written by another run")
        for name, value in tensors.items():
            local(self._weights[name]).copy_(value)

    def _put(self, weights: Mapping[str, Tensor]) -> None:
        for name, weight in _trainable(self._model):
            if name in weights:
                weight.data = weights[name].to(weight.dtype)

    def _copy(self, weight: Tensor) -> Tensor:
        """Return where a teacher's weight begins."""
        is_averaged = self._kind == "ema" and weight.dtype in (torch.bfloat16, torch.float16)
        return weight.float() if is_averaged else weight.clone()


@dataclass(frozen=True, slots=True)
class Teachers:
    """The weights behind every view: the teacher's own, and the step-0 ones where a view, a KL term or lambda* asks."""

    own: Teacher
    base: Teacher | None
    shards: Whole = field(default_factory=Whole)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the weights of all teachers whole inside, in every process; nothing to do where they are not sharded."""
        every = dict.fromkeys(teacher for teacher in (self.own, self.base) if teacher is not None)
        with self.shards.exchanging():
            for teacher in every:
                teacher.gather()
        try:
            yield
        finally:
            for teacher in every:
                teacher.release()

    def of(self, view: View) -> Teacher:
        """Return the weights of a view."""
        if view != "base":
            return self.own
        assert self.base is not None, "a base view was asked for without the base weights"
        return self.base


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights that train, detached, by name."""
    return {name: weight.detach() for name, weight in _trainable(model)}


def _trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, weight) for name, weight in model.named_parameters() if weight.requires_grad)
