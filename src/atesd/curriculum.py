"""The order in which problems are trained on.

    random       a new order every epoch
    reverse_ppl  by descending perplexity of the reference under the student: hardest first
    forward_ppl  by ascending perplexity

Perplexity curricula: SU-01, arXiv 2605.13301: PPL = exp(-(1/T) sum_t log p_S(y*_t | x, y*_<t)) over the first
`probe.max_tokens` tokens of the reference, without a hint; sorted, not shuffled; ties by index; whatever the seed.
There the solution is the training target, here it is what the teacher sees: an analogy. Ours: rescored every epoch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Protocol

import numpy as np

from atesd.facts import RunFacts
from atesd.seeds import derive_seed
from atesd.types import Measurement, Method, Observation, Policy, Stateless, UserError

REFERENCES = Measurement("reference_nll")


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
        self._order = self._sorted()

    def next(self, count: int) -> list[int]:
        """Return the next indices."""
        taken: list[int] = []
        while len(taken) < count:
            part = self._order[self._position : self._position + count - len(taken)]
            taken += part
            self._position += len(part)
            if self._position == self._num_problems:
                self._epoch, self._position = self._epoch + 1, 0
                self._order = self._sorted()
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
        self._order = self._sorted()

    def _sorted(self) -> list[int]:
        """Return the order of the present epoch."""
        rng = np.random.default_rng(derive_seed(self._seed, "order", self._epoch))
        order: Sequence[int] = rng.permutation(self._num_problems).tolist()
        return list(order)


class ByPerplexity(Shuffled):
    """Problems sorted by the negative log-likelihood of their reference; perplexity has the same order.

    Scores are asked for when the next batch will need a new epoch's order. A problem that could not be scored comes
    last.
    """

    def __init__(self, config: PerplexityConfig, run: RunFacts) -> None:
        self._config = config
        self._ids = list(run.problem_ids)
        self._batch = run.problems_per_step
        self._nll: list[float | None] = []
        super().__init__(len(self._ids), seed=0)

    def wants(self, step: int) -> Sequence[Measurement]:
        """Ask for all references before the first step, and before a step that reaches the end of an epoch."""
        begins = self._position + self._batch >= self._num_problems and self._config.rescore == "epoch"
        return [REFERENCES] if step == 0 or begins else []

    def observe(self, observation: Observation) -> None:
        """Keep new scores. They sort the epoch that has not begun; one under way keeps its order."""
        scores = observation.table(REFERENCES)
        if not scores or not self.wants(observation.step):
            return
        self._nll = [scores.get(problem) for problem in self._ids]
        if self._position == 0:
            self._order = self._sorted()

    def state_dict(self) -> dict[str, Any]:
        """Return the scores and the present order besides."""
        return {**super().state_dict(), "nll": self._nll, "order": self._order}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at a position of an order."""
        self._nll = list(state["nll"])
        super().load_state_dict(state)
        self._order = list(state["order"])

    def _sorted(self) -> list[int]:
        if not self._nll:
            return list(range(self._num_problems))
        sign = -1.0 if self._config.kind == "reverse_ppl" else 1.0
        known = [(sign * score, index) for index, score in enumerate(self._nll) if score is not None]
        missing = [index for index, score in enumerate(self._nll) if score is None]
        return [index for _, index in sorted(known)] + missing


class CurriculumMethod(Method):
    """Base of curricula's sections."""

    declares: ClassVar[tuple[str, ...]] = ("describe", "build")


class RandomConfig(CurriculumMethod):
    """Shuffle the problems anew in every epoch."""

    kind: Literal["random"] = "random"

    def describe(self) -> str:
        """Nothing to say."""
        return ""

    def build(self, run: RunFacts) -> Curriculum:
        """Return the order."""
        assert run.problem_ids
        return Shuffled(len(run.problem_ids), run.seed)


class PerplexityConfig(CurriculumMethod):
    """Sort the problems by the perplexity of their reference under the student (SU-01 2605.13301)."""

    kind: Literal["reverse_ppl", "forward_ppl"] = "reverse_ppl"
    """`reverse_ppl`: hardest first, SU-01's best. `forward_ppl`: easiest first."""
    rescore: Literal["epoch", "once"] = "epoch"
    """Score all training problems before every epoch, or only before the first step; each costs one pass over them."""

    def describe(self) -> str:
        """Name order and cadence."""
        first = "Hardest" if self.kind == "reverse_ppl" else "Easiest"
        when = "before the first step" if self.rescore == "once" else "before every epoch"
        return f"{first} problems first, by the perplexity of the reference, scored {when}"

    def build(self, run: RunFacts) -> Curriculum:
        """Return the order."""
        assert run.problem_ids
        return ByPerplexity(self, run)
