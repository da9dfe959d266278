"""Public benchmarks of mathematics, from the hub or from a file of yours, to evaluate on: nothing in them trains.

The hub's names of AIME 2024, AIME 2025 and HMMT are those of OPSD's evaluation (2601.18734, released code); the others
are our choice among the copies in wide use.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, get_args

from atesd.facts import RunFacts
from atesd.rewards.kinds import Grader, MathConfig
from atesd.tasks.base import TaskMethod, cites_hint
from atesd.tasks.columns import Columns, RowsMethod, missing_columns
from atesd.tasks.files import source_of
from atesd.tasks.rows import collect
from atesd.tasks.tables import Table
from atesd.tasks.texts import Field as TextField
from atesd.types import Problem, UserError

Name = Literal["aime24", "aime25", "hmmt25", "math500", "amc23", "minerva", "gsm8k"]
NAMES: tuple[str, ...] = get_args(Name)


@dataclass(frozen=True, slots=True)
class Benchmark:
    """Where a benchmark is, and what lm-eval calls it (None: it has no such task)."""

    title: str
    table: Table
    columns: Columns = field(default_factory=Columns)
    lm_eval: str | None = None


_QUESTION = Columns(problem="question")
BENCHMARKS: dict[str, Benchmark] = {
    "aime24": Benchmark("AIME 2024", Table("HuggingFaceH4/aime_2024", split="train"), lm_eval="aime24"),
    "aime25": Benchmark("AIME 2025", Table("yentinglin/aime_2025", split="train"), lm_eval="aime25"),
    "hmmt25": Benchmark("HMMT February 2025", Table("MathArena/hmmt_feb_2025", split="train")),
    "math500": Benchmark("MATH-500", Table("HuggingFaceH4/MATH-500", split="test"), lm_eval="minerva_math500"),
    "amc23": Benchmark("AMC 2023", Table("math-ai/amc23", split="test"), _QUESTION),
    "minerva": Benchmark("Minerva Math", Table("math-ai/minervamath", split="test"), _QUESTION),
    "gsm8k": Benchmark(
        "GSM8K",
        Table("openai/gsm8k", "main", split="test"),
        Columns(problem="question", solution="answer"),
        "gsm8k_cot_zeroshot",
    ),
}


class BenchmarkConfig(TaskMethod):
    """A public benchmark, for `atesd eval`."""

    kind: Literal["benchmark"] = "benchmark"
    name: Name
    """Which one."""
    data: str | None = None
    """A file, folder or data set with its problems; unset, the hub's."""
    revision: str | None = None
    """Commit, branch or tag of the hub's; name a commit to read the same problems for ever."""
    columns: Columns | None = None
    """Names of the columns; unset, those of the hub's data set or, where `data` lacks them, `problem` and `answer`."""

    def build(self, run: RunFacts) -> BenchmarkTask:  # noqa: ARG002
        """Return the task; problems are read when first asked for."""
        return BenchmarkTask(self)

    @property
    def table(self) -> Table:
        """Where its problems are."""
        found = BENCHMARKS[self.name].table
        if self.data is not None:
            return Table(self.data, revision=self.revision)
        return Table(found.path, found.config, self.revision, found.split)


@dataclass(frozen=True)
class BenchmarkTask:
    """The problems of a benchmark, in its order; ids are the numbers of its rows. Repeated texts are kept."""

    config: BenchmarkConfig

    @property
    def name(self) -> str:
        """The benchmark's name."""
        return self.config.name

    @property
    def default_reward(self) -> Grader:
        """Answers are compared by meaning."""
        return MathConfig()

    def train(self) -> list[Problem]:
        """Return none."""
        return []

    def probe(self) -> list[Problem]:
        """Return none."""
        return []

    def evaluation(self) -> list[Problem]:
        """Return the problems."""
        return [problem for _, problem in self._rows]

    def traits(self, problem: Problem, completion: str) -> dict[str, bool]:  # noqa: ARG002
        """Count completions that cite a hint."""
        return {"cites_hint": cites_hint(completion)}

    def place(self, problem: Problem, text: TextField) -> str:
        """Return source, row or line, and which text it is."""
        return f"{next(place for place, each in self._rows if each == problem)}: {text}"

    @cached_property
    def _rows(self) -> list[tuple[str, Problem]]:
        rules = self._rules
        return collect(source_of(self.config.table, rules, solved=False), rules, solved=False)

    @property
    def _rules(self) -> RowsMethod:
        """Return the columns to read: the recipe's, else the first that the source has."""
        if self.config.columns is not None:
            return _rules(self.config.columns)
        known = [_rules(columns) for columns in (BENCHMARKS[self.config.name].columns, Columns())]
        if self.config.data is None:
            return known[0]
        return next((rules for rules in known if self._has_columns(rules)), known[1])

    def _has_columns(self, rules: RowsMethod) -> bool:
        try:
            _, row = next(source_of(self.config.table, rules, solved=False).open(), (0, {}))
        except UserError:  # whatever it is, reading all of it will say
            return False
        return not isinstance(row, UserError) and missing_columns(list(row), rules, solved=False) is None


def _rules(columns: Columns) -> RowsMethod:
    """Return how rows are read; their numbers name them, and nothing but problem and answer is of use."""
    return RowsMethod(columns=columns.model_copy(update={"id": "", "extra": ()}))
