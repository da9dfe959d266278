"""The arithmetic of the mutation run (tests/mutation/run.py); the tool itself is not needed here."""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "mutation" / "run.py"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("mutation_run", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "mutation_run", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def mutants(run: Any, file: str, count: int) -> list[Any]:
    changes = [run.Change(file, "f", f"x = {i}", f"x = {i + 1}") for i in range(count)]
    return [run.Mutant(f"{file} {i}", change, line=i, order=0) for i, change in enumerate(changes)]


def test_a_share_is_proportional_and_no_file_is_left_out(run: Any) -> None:
    # 10 of 100: exactly 6.0, 3.7 and 0.3. The floor of 1 takes what the remainder 0.7 would have taken.
    assert run.shares({"a": 60, "b": 37, "c": 3}, 10) == {"a": 6, "b": 3, "c": 1}
    # 5 of 8: exactly 3.75 and 1.25. The larger remainder takes the one that is left.
    assert run.shares({"a": 6, "b": 2}, 5) == {"a": 4, "b": 1}
    assert run.shares({"a": 2, "b": 1, "empty": 0}, 300) == {"a": 2, "b": 1}


def test_a_sample_is_fixed_by_its_seed_and_by_each_file_alone(run: Any) -> None:
    first, second = mutants(run, "a.py", 40), mutants(run, "b.py", 40)
    names = [mutant.name for mutant in run.draw(first + second, 20, seed=0)]
    assert names == [mutant.name for mutant in run.draw((first + second)[::-1], 20, seed=0)]
    assert names != [mutant.name for mutant in run.draw(first + second, 20, seed=1)]
    assert names[:10] == [mutant.name for mutant in run.draw(first, 10, seed=0)]


def test_a_difference_is_the_changed_lines_alone(run: Any) -> None:
    original = ["def f(", "    x,", "):", "    y = g(", "        x,", "        1,", "    )", "    return y"]
    assert run.difference(original, [*original[:-1], "    return None"]) == (7, "return y", "return None")
    assert run.difference(original, original[:5] + original[6:]) == (5, "1,", "")
    assert run.difference(["a(", "  b,", ")"], ["a(b)"]) == (0, "a( b, )", "a(b)")


def test_the_interval_is_wilsons(run: Any) -> None:
    # The interval's ends p solve (8/10 - p)^2 = z^2 p (1 - p) / 10.
    for end in run.wilson(8, 10):
        assert (0.8 - end) ** 2 == pytest.approx(1.96**2 * end * (1 - end) / 10, rel=1e-9)
    assert run.wilson(8, 10)[0] < 0.8 < run.wilson(8, 10)[1]


def test_a_score_counts_timeouts_as_killed_and_leaves_equivalent_mutants_out(run: Any) -> None:
    sample = mutants(run, "a.py", 6)
    ends = ["killed", "timeout", "survived", "no tests", "error", "survived"]
    statuses = {mutant.name: end for mutant, end in zip(sample, ends, strict=True)}
    results = run.summary(sample * 2, sample, statuses, {sample[5].change})
    assert results["score"] == pytest.approx(2 / 5)
    assert results["total"] == {
        "mutants": 12,
        "sampled": 6,
        "equivalent": 1,
        **Counter(s.replace(" ", "_") for s in ends[:5]),
    }
    assert [entry["line"] for entry in results["alive"]] == [2, 3, 4]
    assert [entry["line"] for entry in results["timeouts"]] == [1]
