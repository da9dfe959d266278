"""The benchmark's own parts at toy sizes, and its results in the repository; no peer is needed."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from atesd.recipe import load_config
from bench import figure, machine, phases, run, score, step, summary
from bench.timing import interleaved, ratio

RESULTS = Path(__file__).parents[2] / "bench" / "results"
TOY = score.Case("toy", 16, 50, 2, 3, layers=1, prompt=2, hint=4)


@pytest.mark.parametrize("lora", [False, True])
def test_both_arms_compute_the_same_loss_and_gradient(tmp_path: Path, lora: bool) -> None:
    case = replace(TOY, lora=lora)
    pair = score.load_pair(case, score.write_model(case, tmp_path))
    arms = score.own_arms(pair, score.random_batch(case))
    found = score.disagreement(pair.student, arms)
    assert found.keys() == {"atesd", "dense"}
    _, gradient = score.gradient(pair.student, arms["atesd"])
    # With adapters: rank 16 on projections of 16 -> 64, 32, 32, 64 -> 16, and 16 -> 48 twice, 48 -> 16; nothing else.
    sizes = [(16, 64), (16, 64), (16, 64), (64, 16), (16, 48), (16, 48), (48, 16)]
    trained = sum(16 * (a + b) for a, b in sizes) if lora else sum(w.numel() for w in pair.student.parameters())
    assert gradient.numel() == trained
    assert float(gradient.norm()) > 0


def test_arms_that_differ_are_noticed(tmp_path: Path) -> None:
    pair = score.load_pair(TOY, score.write_model(TOY, tmp_path))
    arms = score.own_arms(pair, score.random_batch(TOY))
    with pytest.raises(AssertionError, match="atesd: loss"):
        score.disagreement(pair.student, arms | {"atesd": lambda: 1.0001 * arms["dense"]()})
    weight = next(iter(pair.student.parameters()))
    skewed = {"atesd": lambda: arms["dense"]() + (weight - weight.detach()).sum() / 10}
    with pytest.raises(AssertionError, match="atesd: gradient"):
        score.disagreement(pair.student, arms | skewed)


def test_one_pass_leaves_no_gradient_behind() -> None:
    layer = torch.nn.Linear(2, 1)
    score.one_pass(layer, lambda: layer(torch.ones(2)).sum())()
    assert layer.weight.grad is None


def test_rounds_are_interleaved_and_the_warm_up_is_dropped() -> None:
    order: list[str] = []
    samples = interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3, warm_up=1)
    assert order == ["a", "b"] * 4
    assert {name: len(taken) for name, taken in samples.items()} == {"a": 3, "b": 3}


def test_ratios_are_taken_round_by_round() -> None:
    # 2/1, 6/2, 20/5 = 2, 3, 4; the ratio of medians would be 6/2 as well, of means 28/8
    assert ratio([2, 6, 20], [1, 2, 5]) == {"low": 2.5, "median": 3.0, "high": 3.5}


def test_operations_of_a_pass_by_hand() -> None:
    # One layer, H 16, one head of 64 and one of keys: 16 * 64 * 4 for attention, 3 * 16 * 48 for the MLP = 6,400
    # weights. Student: 2 sequences of 2 + 3 - 1 = 4 positions, each 2 * 6,400 + 2 * 4 * 64; teacher 6 positions.
    student = 2 * 4 * (2 * 6_400 + 2 * 4 * 64)
    teacher = 2 * 6 * (2 * 6_400 + 2 * 6 * 64)
    head = 2 * 16 * 50 * 2 * 3
    assert machine.operations(TOY) == 3 * (student + head) + teacher + head


def test_the_counted_weights_are_those_of_the_model(tmp_path: Path) -> None:
    model = score.load_student(TOY, score.write_model(TOY, tmp_path))
    assert sum(weight.numel() for name, weight in model.named_parameters() if "_proj" in name) == 6_400


def test_time_grows_with_tokens(tmp_path: Path) -> None:
    found = machine.growth(tmp_path, quick=True)
    assert list(found["seconds"]) == ["64", "128", "256", "512"]
    assert math.isfinite(found["exponent"]["median"])


def test_shares_of_phases() -> None:
    rows = [{"time/step_s": 1.0, "time/probe_s": 0.5}, {"time/step_s": 3.0, "time/sample_s": 3.0}]
    assert phases.share(rows, "probe") == 0.5 / 4
    lines = phases.table(rows).splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [
        ["step", "100.0%"],
        ["sample", "75.0%"],
        ["probe", "12.5%"],
        ["rest", "12.5%"],
    ]


def test_a_run_moves_on_step_by_step(tmp_path: Path) -> None:
    setting = step.SETTINGS[0]
    small = ("task.train_size=4", "task.probe_size=2", "task.eval_size=2", "step.problems=2")
    config = step.configs(replace(setting, overrides=small, learned=()), tmp_path, steps=2)["atesd"]
    moved = step.Stepped(config, tmp_path / "run")
    moved.step()
    assert [row["step"] for row in moved.metrics] == [1]
    moved.step()
    moved.finish()
    assert [row["step"] for row in moved.metrics] == [1, 2]
    assert moved.trainer.step == 3
    assert all(row["time/step_s"] <= taken for row, taken in zip(moved.metrics, moved.seconds, strict=True))
    assert not any("time/probe_s" in row or "time/eval_s" in row for row in moved.metrics)


def test_the_arms_differ_in_exposure_or_compiling_alone(tmp_path: Path) -> None:
    found = step.configs(step.SETTINGS[0], tmp_path, steps=2)
    assert {name: (config.exposure.kind, config.model.compile) for name, config in found.items()} == {
        "atesd": ("fixed", False),
        "atesd_beta": ("beta", False),
        "atesd_compiled": ("fixed", True),
    }
    plain, beta, compiled = (config.model_dump() for config in found.values())
    assert plain | {"exposure": beta["exposure"]} == beta
    assert plain | {"model": plain["model"] | {"compile": True}} == compiled
    assert plain["routing"]["kind"] == "distil"


def test_only_atesds_arm_has_its_lora_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = replace(TOY, lora=True)
    pair, batch = score.load_pair(case, score.write_model(case, tmp_path)), score.random_batch(case)
    kinds: dict[str, set[str]] = {}
    states = score.states

    def watching(name: str) -> Callable[..., Any]:
        def watch(model: Any, *given: Any) -> Any:
            layers = {type(each).__name__ for each in model.modules() if hasattr(each, "lora_A")}
            kinds[name] = kinds.get(name, set()) | layers
            return states(model, *given)

        return watch

    for name, loss in score.own_arms(pair, batch).items():
        monkeypatch.setattr(score, "states", watching(name))
        loss()
    assert kinds == {"atesd": {"AdaptedLinear"}, "dense": {"Linear"}}


def test_smollm2_is_warmed_up_once_and_keeps_its_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[object]] = []
    monkeypatch.setattr(step, "ROOT", tmp_path)
    monkeypatch.setattr(step.subprocess, "run", lambda command, **_: commands.append(command))
    setting = next(each for each in step.SETTINGS if each.warmed_up)
    assert step.warmed_up(setting, tmp_path / "own") == tmp_path / "own" / "warm"
    (command,) = commands
    assert command[1:4] == ["-m", "atesd", "warmup"]
    assert command[command.index("--data") + 1] == tmp_path / "recipes" / setting.recipe
    assert "task.data_seed=1" in command, "other problems than the recipe trains on"
    (tmp_path / "runs" / "smollm2-warm").mkdir(parents=True)
    assert step.warmed_up(setting, tmp_path / "own") == tmp_path / "runs" / "smollm2-warm"
    assert len(commands) == 1

    monkeypatch.setattr(step, "ROOT", Path(step.__file__).parents[1])
    monkeypatch.setattr(step, "warmed_up", lambda *_: tmp_path)
    monkeypatch.setattr("atesd.train.model.choose_dtype", lambda: ("bfloat16", "said so"))
    config, learned = step.configs(setting, tmp_path, steps=2).values()
    assert (learned.model.path, learned.model.dtype) == (str(tmp_path), "bfloat16")
    shipped = load_config("recipes/smollm2-cpu-atesd.toml")
    assert (learned.exposure, learned.prompt, learned.reveal) == (shipped.exposure, shipped.prompt, shipped.reveal)
    assert learned.task.model_dump()["probe_size"] == shipped.task.model_dump()["probe_size"] > 0
    assert (config.model.path, config.model.dtype) == (str(tmp_path), "bfloat16")
    assert (config.step.problems, config.rollout.max_new_tokens) == (12, 64), "as it ships"


def test_an_error_in_the_run_reaches_the_caller(tmp_path: Path) -> None:
    small = ("task.train_size=4", "task.probe_size=2", "task.eval_size=2", "step.problems=2")
    config = step.configs(replace(step.SETTINGS[0], overrides=small, learned=()), tmp_path, steps=2)["atesd"]
    moved = step.Stepped(config, tmp_path / "run")
    moved.trainer.parts.driver = None  # type: ignore[assignment]
    with pytest.raises(AttributeError, match="rollout"):
        moved.step()


def test_peer_rows_hold_the_prompts_of_the_recipe() -> None:
    config = load_config(step.ROOT / "recipes" / "pico.toml", ["task.train_size=2"])
    problem = config.task.build(config.facts()).train()[0]
    (row,) = step.as_rows([problem], config)
    assert row == {
        "prompt": [{"role": "user", "content": problem.problem}],
        "privileged_context": problem.solution,
    }


def test_results_in_the_repository_are_whole() -> None:
    kept = json.loads((RESULTS / "summary.json").read_text(encoding="utf-8"))
    assert set(summary.KEYS) <= kept.keys()
    assert all(math.isfinite(value) for value in kept.values())
    raw = {name: json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8")) for name in run.SECTIONS}
    assert not any(found["quick"] for found in raw.values())
    assert summary.summarise({name: found["results"] for name, found in raw.items()}) == pytest.approx(kept)
    for case in raw["score"]["results"].values():
        assert len(case["seconds"]["atesd"]) >= 5
        assert all(apart["loss"] < 1e-5 for arm, apart in case["disagreement"].items() if arm != "dense")


def test_the_figure_marks_median_and_quartiles() -> None:
    # The axis runs from 1/2 to 4, three doublings over 360: 1 stands a third along, 2 two thirds.
    line = summary.Line("score <a>", "trl", 2.0, 1.0, 4.0, own=1.0, other=2.0, unit="s")
    root = ET.fromstring(figure.draw([line]))
    bar = next(each for each in root.iter("{http://www.w3.org/2000/svg}line") if each.get("class") == "bar")
    (dot,) = root.iter("{http://www.w3.org/2000/svg}circle")
    assert [bar.get("x1"), dot.get("cx"), bar.get("x2")] == ["450.0", "570.0", "690.0"]
