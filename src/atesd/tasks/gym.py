"""Problems of a reasoning-gym data set with worked solutions: in its metadata (gsm_symbolic) or our own (chain_sum)."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import Field

from atesd.facts import RunFacts
from atesd.rewards.kinds import Grader, MathConfig
from atesd.tasks.base import TaskMethod, cites_hint
from atesd.tasks.worked import RENDERERS
from atesd.types import Problem, UserError

_SOLUTION_FIELDS = ("answer_cot", "solution_cot", "worked_solution")
_APART = 1_000_003
"""Between two data seeds, as entry i of a data set is drawn by seed + i: neighbours would share all but one."""


class GymConfig(TaskMethod):
    """A generated data set; problems are drawn until there are enough different ones."""

    kind: Literal["gym"] = "gym"
    dataset: str = "gsm_symbolic"
    """Name in reasoning-gym."""
    options: dict[str, float | int | bool | str] = Field(default_factory=dict)
    """Settings of the data set, as reasoning-gym names them."""
    solution_field: str | None = None
    """Metadata field with the worked solution; unset, `answer_cot` and its like are tried, then our own for chain_sum.
    """
    level_field: str | None = None
    """Metadata field that serves as a problem's level, such as num_digits; no levels where unset."""
    train_size: Annotated[int, Field(ge=1)] = 1024
    """Training problems."""
    probe_size: Annotated[int, Field(ge=0)] = 32
    """Problems held out to measure progress."""
    eval_size: Annotated[int, Field(ge=0)] = 64
    """Problems held out for evaluation."""
    data_seed: Annotated[int, Field(ge=0)] = 0
    """Fixes the problems; it does not follow the run's seed."""

    def build(self, run: RunFacts) -> GymTask:  # noqa: ARG002
        """Return the task; problems are drawn when first asked for."""
        return GymTask(self)


@dataclass(frozen=True)
class GymTask:
    """The first different problems of a data set: evaluation, then probe, then training."""

    config: GymConfig

    @property
    def name(self) -> str:
        """The data set's name."""
        return self.config.dataset

    @property
    def default_reward(self) -> Grader:
        """Answers are compared by meaning."""
        return MathConfig()

    def train(self) -> list[Problem]:
        """Return the training problems."""
        return self._problems[self.config.eval_size + self.config.probe_size :]

    def probe(self) -> list[Problem]:
        """Return the probe problems."""
        return self._problems[self.config.eval_size :][: self.config.probe_size]

    def evaluation(self) -> list[Problem]:
        """Return the evaluation problems."""
        return self._problems[: self.config.eval_size]

    def traits(self, problem: Problem, completion: str) -> dict[str, bool]:  # noqa: ARG002
        """Count completions that cite a hint."""
        return {"cites_hint": cites_hint(completion)}

    @cached_property
    def _problems(self) -> list[Problem]:
        config = self.config
        wanted = config.eval_size + config.probe_size + config.train_size
        found: dict[str, Problem] = {}
        for index, entry in enumerate(_dataset(config, size=4 * wanted)):
            content = " ".join(entry["question"].split())
            if content not in found:
                found[content] = _problem(entry, index, config)
            if len(found) == wanted:
                return list(found.values())
        raise UserError(
            f"reasoning-gym's {config.dataset} gave {len(found)} different problems among {4 * wanted}, "
            f"{wanted} are asked for: lower task.train_size"
        )


def _dataset(config: GymConfig, size: int) -> Any:
    if importlib.util.find_spec("reasoning_gym") is None:
        raise UserError("the task kind gym needs an extra: pip install 'atesd[gym]'")
    import reasoning_gym

    try:
        return reasoning_gym.create_dataset(config.dataset, size=size, seed=config.data_seed * _APART, **config.options)
    except (ValueError, TypeError, AssertionError) as error:
        near = difflib.get_close_matches(config.dataset, reasoning_gym.factory.DATASETS, n=1, cutoff=0.5)
        remedy = (
            "mend task.options" if config.dataset in near else f"did you mean {near[0]!r}?" if near else "mend its name"
        )
        raise UserError(
            f"reasoning-gym does not make {config.dataset!r} with {config.options} ({error}): {remedy}"
        ) from error


def _problem(entry: Mapping[str, Any], index: int, config: GymConfig) -> Problem:
    metadata = entry["metadata"]
    fields = [config.solution_field] if config.solution_field else _SOLUTION_FIELDS
    solution = next((metadata[name] for name in fields if isinstance(metadata.get(name), str)), None)
    if solution is None and config.solution_field is None and config.dataset in RENDERERS:
        solution = RENDERERS[config.dataset](metadata)
    if solution is None:
        raise UserError(
            f"reasoning-gym's {config.dataset} has no worked solution in its metadata (fields: {', '.join(metadata)}): "
            "name the field in task.solution_field, or choose a data set with one, such as gsm_symbolic"
        )
    level = "" if config.level_field is None else _level(metadata, config.level_field, config.dataset)
    return Problem(f"{config.dataset}-{index}", entry["question"], solution.strip(), str(entry["answer"]), level)


def _level(metadata: Mapping[str, Any], field: str, dataset: str) -> str:
    if field not in metadata:
        raise UserError(
            f"reasoning-gym's {dataset} has no metadata field {field!r} (fields: {', '.join(metadata)}): name another "
            "in task.level_field, or remove it"
        )
    return str(metadata[field])
