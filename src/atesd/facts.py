"""What a method may depend on besides its own section: the one argument of every `build`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from atesd.cliff import CliffConfig
from atesd.seeds import derive_seed


@dataclass(frozen=True, slots=True)
class RunFacts:
    """Facts of one run, known before its first step."""

    seed: int = 0
    """The run's seed. A method's own random choices take `seed_for(purpose)`."""
    total_steps: int = 100
    problems_per_step: int = 1
    problem_ids: Sequence[str] = ()
    """Of the training problems, in their order."""
    levels: Mapping[str, str] = field(default_factory=dict)
    """Level of each training problem by its id."""
    has_probe: bool = True
    """Whether the task keeps problems on which progress is measured."""
    teacher_frozen: bool = True
    """Whether the teacher's answers depend on the hint alone for the whole run."""
    strength: float = 1.0
    """The target's lambda."""
    cliff: CliffConfig = field(default_factory=CliffConfig)
    c: float = 5.0
    """The importance clip behind lambda*."""

    def seed_for(self, purpose: str) -> int:
        """Return a seed of its own for a purpose."""
        return derive_seed(self.seed, purpose)
