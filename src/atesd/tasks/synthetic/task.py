"""The pico tier's tasks: problems drawn by `pico.py` and `doors.py`, new ones for every seed of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from atesd.rewards.kinds import ExactConfig, Grader
from atesd.tasks.synthetic import doors, pico
from atesd.types import Problem


@dataclass(frozen=True, slots=True)
class PicoTask:
    """Chain arithmetic. Training and evaluation problems follow the run's seed; the probe set is fixed."""

    train_size: int
    probe_size: int
    eval_size: int
    seed: int
    levels: Sequence[pico.Level] = pico.LEVELS
    name: str = "pico"
    default_reward: Grader = field(default_factory=ExactConfig)

    def train(self) -> list[Problem]:
        """Return the training problems."""
        return pico.problems("train", self.train_size, self.seed, self.levels)

    def probe(self) -> list[Problem]:
        """Return the probe problems."""
        return pico.problems("probe", self.probe_size, 0, self.levels)

    def evaluation(self) -> list[Problem]:
        """Return the held-out problems."""
        return pico.problems("eval", self.eval_size, self.seed, self.levels)

    def traits(self, problem: Problem, completion: str) -> dict[str, bool]:
        """Count completions that answer before all steps are worked: the imitated shortcut."""
        return {"answers_early": pico.answers_early(problem, completion)}


@dataclass(frozen=True, slots=True)
class DoorsTask:
    """Rows of doors. Training and evaluation problems follow the run's seed; the probe set is fixed."""

    train_size: int
    probe_size: int
    eval_size: int
    seed: int
    name: str = "doors"
    default_reward: Grader = field(default_factory=ExactConfig)

    def train(self) -> list[Problem]:
        """Return the training problems."""
        return doors.problems("train", self.train_size, self.seed)

    def probe(self) -> list[Problem]:
        """Return the probe problems."""
        return doors.problems("probe", self.probe_size, 0)

    def evaluation(self) -> list[Problem]:
        """Return the held-out problems."""
        return doors.problems("eval", self.eval_size, self.seed)

    def traits(self, problem: Problem, completion: str) -> dict[str, bool]:  # noqa: ARG002
        """Count nothing: a single reply says little."""
        return {}
