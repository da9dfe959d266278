"""The order in which problems are trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np

from atesd.seeds import derive_seed
from atesd.types import Config, Policy, Stateless, UserError


class Curriculum(Policy, Protocol):
    """Chooses the next problems."""

    def next(self, count: int) -> list[int]:
        """Return the indices of the next `count` problems, going on to the next epoch where this one ends."""
        ...


class Shuffled(Stateless):
    """A new random order every epoch. The state is the epoch and the position in it: orders follow from the seed."""

    def __init__(self, num_problems: int, seed: int) -> None:
        self._num_problems = num_problems
        self._seed = seed
        self._epoch = 0
        self._position = 0
        self._order = self._shuffle()

    def next(self, count: int) -> list[int]:
        """Return the next indices."""
        taken: list[int] = []
        while len(taken) < count:
            part = self._order[self._position : self._position + count - len(taken)]
            taken += part
            self._position += len(part)
            if self._position == self._num_problems:
                self._epoch, self._position = self._epoch + 1, 0
                self._order = self._shuffle()
        return taken

    def state_dict(self) -> dict[str, Any]:
        """Return epoch, position and number of problems."""
        return {"epoch": self._epoch, "position": self._position, "num_problems": self._num_problems}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at an epoch and position. UserError if the number of problems is another one."""
        if state["num_problems"] != self._num_problems:
            raise UserError(
                f"the checkpoint was written with {state['num_problems']} training problems, the task now has "
                f"{self._num_problems}: restore the data, or start a new run"
            )
        self._epoch, self._position = state["epoch"], state["position"]
        self._order = self._shuffle()

    def _shuffle(self) -> list[int]:
        rng = np.random.default_rng(derive_seed(self._seed, "order", self._epoch))
        order: Sequence[int] = rng.permutation(self._num_problems).tolist()
        return list(order)


class RandomConfig(Config):
    """Shuffle the problems anew in every epoch."""

    kind: Literal["random"] = "random"

    def build(self, num_problems: int, seed: int) -> Curriculum:
        """Return the order."""
        assert num_problems > 0
        return Shuffled(num_problems, seed)


CurriculumConfig = RandomConfig
