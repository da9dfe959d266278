"""reasoning-gym data sets: worked problems, disjoint sets, mistakes."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from atesd.facts import RunFacts
from atesd.tasks.base import check_disjoint, check_gold
from atesd.tasks.files import JsonlConfig, read_problems
from atesd.tasks.gym import GymConfig
from atesd.types import UserError

ROOT = Path(__file__).parents[3]


def test_gym_gives_different_worked_problems_in_disjoint_sets() -> None:
    task = GymConfig(train_size=8, probe_size=2, eval_size=3).build(RunFacts())
    sets = {"train": task.train(), "probe": task.probe(), "evaluation": task.evaluation()}
    assert [len(problems) for problems in sets.values()] == [8, 2, 3]
    check_disjoint(sets)
    report = check_gold(task.train(), task.default_reward.build(RunFacts()))
    assert (report.gradable, report.passed) == (8, True)


def test_neighbouring_data_seeds_share_no_problem() -> None:
    first, second = (
        GymConfig(dataset="chain_sum", train_size=8, data_seed=seed).build(RunFacts()).train() for seed in (1, 2)
    )
    assert not {each.problem for each in first} & {each.problem for each in second}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GymConfig(dataset="nosuch"), "does not make 'nosuch' .*not registered.*: mend its name$"),
        (GymConfig(dataset="gsm_symbolc"), "did you mean 'gsm_symbolic'\\?$"),
        (GymConfig(dataset="basic_arithmetic", train_size=2), "has no worked solution in its metadata"),
        (GymConfig(dataset="chain_sum", solution_field="nosuch"), "has no worked solution in its metadata"),
        (GymConfig(options={"colour": 1}), "does not make 'gsm_symbolic' .*'colour'.*: mend task.options$"),
    ],
)
def test_gym_mistakes(config: GymConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        config.build(RunFacts()).train()


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'atesd\[gym\]'"):
        GymConfig().build(RunFacts()).train()


def test_the_script_writes_a_file_that_reads_back_as_the_same_problems(tmp_path: Path) -> None:
    path = tmp_path / "new" / "gsm.jsonl"
    script = ROOT / "repro" / "gsm_symbolic_jsonl.py"
    subprocess.run([sys.executable, str(script), str(path), "5"], check=True, capture_output=True)
    drawn = GymConfig(train_size=5, probe_size=0, eval_size=0).build(RunFacts()).train()
    assert read_problems(path, JsonlConfig(path=str(path))) == drawn
    assert [json.loads(line)["answer"] for line in path.read_text().splitlines()] == [p.answer for p in drawn]
