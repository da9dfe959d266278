"""Tasks made of rows: your own JSON Lines, and everything that `datasets` reads.

Every defect is reported with its place and column, up to ten at a time; nothing is skipped silently.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, Self

import numpy as np
from pydantic import model_validator

from atesd.facts import RunFacts
from atesd.rewards.kinds import Grader, MathConfig
from atesd.seeds import derive_seed
from atesd.tasks.base import check_disjoint, cites_hint
from atesd.tasks.columns import Columns, RowsMethod
from atesd.tasks.jsonl import jsonl_source
from atesd.tasks.rows import Source, collect
from atesd.tasks.tables import SUFFIXES, Table, table_source
from atesd.tasks.texts import Field as TextField
from atesd.types import Problem, UserError

__all__ = ["Columns", "DatasetConfig", "JsonlConfig", "RowsTask", "read_problems", "source_of"]


class JsonlConfig(RowsMethod):
    """Your own problems with worked solutions, from a JSONL file."""

    kind: Literal["jsonl"] = "jsonl"
    path: str
    """The file with training problems; probe and, without `eval_path`, evaluation problems are split off it."""
    eval_path: str | None = None
    """A second file with evaluation problems."""

    def build(self, run: RunFacts) -> RowsTask:  # noqa: ARG002
        """Return the task; the file is read when problems are first asked for."""
        return RowsTask(self)

    def sources(self) -> list[Source]:
        """Return the source of training problems and, where there is one, that of evaluation problems."""
        return [jsonl_source(path, self.max_line_bytes) for path in (self.path, self.eval_path) if path]


class DatasetConfig(RowsMethod):
    """Problems from a Hugging Face data set, on the hub or on disk, or from a Parquet, CSV or JSON Lines file.

    Read by `datasets`, JSON Lines excepted (`tasks/jsonl.py` says why).
    """

    kind: Literal["dataset"] = "dataset"
    path: str
    """A name on the hub, a folder that `save_to_disk` wrote or that holds a data set's files, or a file."""
    config: str | None = None
    """The configuration (subset) of a data set that has several."""
    revision: str | None = None
    """Commit, branch or tag on the hub; name a commit to read the same rows for ever."""
    split: str | None = None
    """The split with training problems; unset, `train`, or the only one."""
    eval_path: str | None = None
    """A second data set or file with evaluation problems."""
    eval_split: str | None = None
    """The split with evaluation problems, of `eval_path` where that is set."""
    streaming: bool = False
    """Read rows from the hub one by one instead of downloading all; needs `limit`."""

    @model_validator(mode="after")
    def _stream_ends(self) -> Self:
        if self.streaming and self.limit is None:
            raise ValueError("streaming reads on until the end of the data set: set limit, the number of rows to read")
        return self

    def build(self, run: RunFacts) -> RowsTask:  # noqa: ARG002
        """Return the task; rows are read when problems are first asked for."""
        return RowsTask(self)

    def sources(self) -> list[Source]:
        """Return the source of training problems and, where there is one, that of evaluation problems."""
        tables = [Table(self.path, self.config, self.revision, self.split, self.streaming)]
        if self.eval_path:
            tables.append(Table(self.eval_path, None, None, self.eval_split, self.streaming))
        elif self.eval_split:
            tables.append(Table(self.path, self.config, self.revision, self.eval_split, self.streaming))
        return [source_of(table, self) for table in tables]


def source_of(table: Table, rules: RowsMethod, *, solved: bool = True) -> Source:
    """Return the source of a table: ours for JSON Lines, that of `datasets` for all else."""
    if table.path.endswith((".jsonl", ".json")):
        table.refuse_options("a JSON Lines file")
        return jsonl_source(table.path, rules.max_line_bytes)
    return table_source(table, rules, solved=solved)


@dataclass(frozen=True)
class RowsTask:
    """The problems of one or two sources, split by a seed of their own."""

    config: JsonlConfig | DatasetConfig

    @property
    def name(self) -> str:
        """The file's stem, or the last part of a data set's name."""
        path = Path(self.config.eval_path or self.config.path)
        return path.stem if path.suffix in SUFFIXES else path.name

    @property
    def default_reward(self) -> Grader:
        """Answers are compared by meaning."""
        return MathConfig()

    def train(self) -> list[Problem]:
        """Return what is neither probe nor evaluation problem."""
        return self._split[0]

    def probe(self) -> list[Problem]:
        """Return the probe problems."""
        return self._split[1]

    def evaluation(self) -> list[Problem]:
        """Return the evaluation problems."""
        return self._split[2]

    def traits(self, problem: Problem, completion: str) -> dict[str, bool]:  # noqa: ARG002
        """Count completions that cite a hint."""
        return {"cites_hint": cites_hint(completion)}

    def place(self, problem: Problem, field: TextField) -> str:
        """Return source, line or row, and column of a problem's text."""
        columns = self.config.columns
        name = columns.messages if columns.messages and field != "answer" else getattr(columns, field)
        return f"{self._places[problem]} {name!r}"

    @cached_property
    def _sources(self) -> list[Source]:
        return self.config.sources()

    @cached_property
    def _rows(self) -> list[list[tuple[str, Problem]]]:
        return [collect(source, self.config) for source in self._sources]

    @cached_property
    def _places(self) -> dict[Problem, str]:
        found = zip(self._sources, self._rows, strict=True)
        return {problem: f"{place}: {source.word}" for source, rows in found for place, problem in rows}

    def _called(self, problem: Problem) -> str:
        """Return where a problem stands; of two equal ones each has its own place."""
        return next(place for rows in self._rows for place, each in rows if each is problem)

    @cached_property
    def _split(self) -> tuple[list[Problem], list[Problem], list[Problem]]:
        config = self.config
        problems, *others = ([problem for _, problem in rows] for rows in self._rows)
        held_out = others[0] if others else []
        if config.eval_size == "all" and not held_out:
            check_disjoint({"evaluation": problems}, self._called)
            return [], [], problems
        evaluated = 0 if config.eval_size == "all" or held_out else config.eval_size
        needed = config.probe_size + evaluated
        if len(problems) <= needed:
            raise UserError(
                f"{self._sources[0].name} has {len(problems)} problems, of which {needed} would be held out: "
                "lower task.probe_size and task.eval_size, or add problems"
            )
        order = np.random.default_rng(derive_seed(config.split_seed, "split")).permutation(len(problems))
        shuffled = [problems[index] for index in order]
        probe, rest = shuffled[: config.probe_size], shuffled[config.probe_size :]
        if not held_out:
            held_out, rest = rest[:evaluated], rest[evaluated:]
        check_disjoint({"train": rest, "probe": probe, "evaluation": held_out}, self._called)
        return rest, probe, held_out


def read_problems(path: Path, config: JsonlConfig) -> list[Problem]:
    """Read and validate a JSON Lines file. UserError naming every defect (at most ten) by line and field."""
    return [problem for _, problem in collect(jsonl_source(str(path), config.max_line_bytes), config)]
