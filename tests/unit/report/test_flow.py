"""Reports about flows: numbers about sets of samples, their pictures, and words that speak of no language model."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest

from atesd.cli.compare import finish
from atesd.cli.progress import make_console
from atesd.files import dump_json, write_atomic
from atesd.report.compare import summarise
from atesd.report.html import render
from atesd.report.load import load_study
from atesd.report.panels import PANELS
from atesd.report.quality import qualities, quality_tables, reading, said
from atesd.report.samples import sample_figures, samples_of
from atesd.runlog import RunDir

import evidence
from support.runs import write_compare as write_texts

ABOUT = {"exposure": "the whole condition", "controls": [], "distils": True, "reinforces": False}
POINTS = {"samples": "points", "right": "lie within <3> deviations"}
IMAGES = {"samples": "images", "right": "are taken for the digit"}
FLOW = {"steps": 10, "eta": 0.7, "start": [0.0, 0.9], "width": 64, "depth": 3, "warm_steps": 5, "blind": 0.1}


def write_flow(path: Path, distances: tuple[float, float], about: dict[str, Any], points: list[list[float]]) -> None:
    """Write a complete run of two steps."""
    config = {"seed": 0, "task": {"kind": "ring"}, "flow": FLOW, "model": {"path": "pico"}, "step": {"num_steps": 2}}
    run = RunDir.create(path, config, ABOUT | about)
    for step, distance in zip((0, 2), distances, strict=True):
        row = {"exposure/ratio": 0.5, "mismatch/top1": 0.1, "divergence/mean": 0.2, "divergence/p99": 0.3}
        run.log(step, {"quality/energy_distance": distance, **(row if step else {})})
        if not step:
            run.log(1, row)
        run.write_rows("eval", step, [sample(number, point) for number, point in enumerate(points)])
    run.finish({"step": 2, "seconds": 3.0})
    run.unlock()


def sample(number: int, point: list[float]) -> dict[str, Any]:
    row = {"problem_id": f"eval-{number // 2}", "level": f"digit {number % 3}", "sample": number % 2, "answer": "a"}
    return row | {"reward": 1.0, "stop": "eos", "length": 10, "traits": {}, "point": point}


def write_comparison(path: Path, about: dict[str, Any] = POINTS) -> Path:
    """Full ends at .4 and .6, half at .1 and .2, learned at .3, on two seeds; both begin at .5 and .7."""
    arms = {"full": (0.4, 0.6), "half": (0.1, 0.2), "learned": (0.3, 0.3)}
    for arm, ends in arms.items():
        for seed, (start, end) in enumerate(zip((0.5, 0.7), ends, strict=True)):
            points = [[0.1 * number, -1.0] for number in range(4)]
            if about is IMAGES:
                points = [[-1.0] * 63 + [1.0]] * 6
            write_flow(path / arm / f"seed_{seed}", (start, end), about, points)
    found = {"recipe": "ring.toml", "arms": {arm: [] for arm in arms}, "seeds": [0, 1], "task": "ring", "k": 2}
    write_atomic(path / "compare.json", dump_json(found))
    return path


def test_means_and_paired_differences_have_students_intervals_over_seeds(tmp_path: Path) -> None:
    found = qualities(load_study([write_comparison(tmp_path)]))["energy_distance"]
    # two seeds: mean +- 12.706 * |difference| / 2
    assert found["start"] == pytest.approx(
        {"mean": 0.6, "low": 0.6 - 1.2706, "high": 0.6 + 1.2706, "seeds": 2}, abs=1e-4
    )
    assert {name: entry["mean"] for name, entry in found["arms"].items()} == pytest.approx(
        {"full": 0.5, "half": 0.15, "learned": 0.3}
    )
    assert {name: entry["mean"] for name, entry in found["paired"].items()} == pytest.approx(
        {"learned-full": -0.2, "learned-half": 0.15, "half-full": -0.35}
    )
    assert found["paired"]["half-full"]["low"] == pytest.approx(-0.35 - 12.706 * 0.1 / 2, abs=1e-4)


def test_runs_named_together_each_have_their_start(tmp_path: Path) -> None:
    """Starts of .5 and .7: .6, which is no mean over seeds of one thing."""
    folder = write_comparison(tmp_path)
    found = qualities(load_study([folder / "full" / f"seed_{seed}" for seed in (0, 1)]))["energy_distance"]
    assert found["start"] == {"mean": pytest.approx(0.6), "low": None, "high": None, "seeds": 2}


def test_pairs_of_arms_with_hyphens_are_split_between_the_arms(tmp_path: Path) -> None:
    for arm in ("gt-full", "no-gt-full"):
        write_flow(tmp_path / arm / "seed_0", (0.5, 0.4), POINTS, [[0.0, 1.0]] * 2)
    found = {"recipe": "r.toml", "arms": {"gt-full": [], "no-gt-full": []}, "seeds": [0], "task": "ring", "k": 2}
    write_atomic(tmp_path / "compare.json", dump_json(found))
    assert "no-gt-full \u2212 gt-full" in quality_tables(load_study([tmp_path]))


def test_what_an_interval_says() -> None:
    entry = {"mean": 0.5, "low": 0.1, "high": 0.9, "seeds": 2}
    assert [reading(entry), reading(entry | {"low": -1.0}), reading(entry | {"low": -2.0, "high": -1.0})] == [
        "higher",
        "not told apart",
        "lower",
    ]
    assert reading(entry | {"low": None, "high": None}) == "one seed"
    assert reading(entry | {"low": 0.5, "high": 0.5}) == "not told apart", "coverage moves by eighths: seeds may agree"
    assert said(entry, "+") == "+0.5000 (+0.1000 to +0.9000)"
    assert said(entry | {"low": None}) == "0.5000"
    assert said(None) == ""


def test_the_page_speaks_of_samples_and_shows_them(tmp_path: Path) -> None:
    page = render(load_study([write_comparison(tmp_path)]))
    shown = page[page.index("<body") :].partition("Every setting of")[0]
    assert "lie within &lt;3&gt; deviations" in shown
    assert "Energy distance" in shown
    assert "velocity network, 3 layers of 64 units" in shown
    for words in ("language model", "Qwen3", "completion", "answers training problems"):
        assert words not in shown, words


@pytest.mark.parametrize("about", [POINTS, IMAGES], ids=["points", "images"])
def test_both_figures_are_valid_plotly(about: dict[str, Any], tmp_path: Path) -> None:
    study = load_study([write_comparison(tmp_path, about)])
    shown = [panel.show(study) for panel in PANELS if panel.name in ("quality", "samples")]
    assert all(shown)
    for panel in filter(None, shown):
        assert panel.caption.endswith(".")
        for drawn in panel.choices.values():
            text = re.sub(r'"@[^"]*"', '"#123456"', json.dumps(drawn, allow_nan=False))
            go.Figure(json.loads(text))  # raises on an unknown property or a wrong value


def test_points_are_drawn_before_and_after(tmp_path: Path) -> None:
    drawn = sample_figures(load_study([write_comparison(tmp_path)]))
    assert list(drawn) == [f"{arm}, seed {seed}" for arm in ("full", "half", "learned") for seed in (0, 1)]
    before, after = drawn["full, seed 0"]["data"]
    assert (before["name"], after["name"]) == ("before training", "step 2")
    assert after["x"] == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert after["y"] == [-1.0] * 4


def test_images_make_a_grid_with_a_row_for_each_level(tmp_path: Path) -> None:
    drawn = sample_figures(load_study([write_comparison(tmp_path, IMAGES)]))
    assert list(drawn)[:2] == ["full, seed 0, before training", "full, seed 0, step 2"]
    pixels = drawn["full, seed 0, step 2"]["data"][0]["z"]
    assert len(pixels) == 3 * 10, "three levels of 8 pixels in a frame of one"
    assert len(pixels[0]) == 8 * 10
    assert pixels[0][:3] == [None] * 3
    assert (pixels[1][1], pixels[8][8], pixels[8][18]) == (-1.0, 1.0, 1.0)
    assert pixels[8][28] is None, "two images a level, then none"


def test_damaged_points_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "step_000001.jsonl"
    rows = [sample(0, [1.0, 2.0]), sample(1, ["x", 2.0]), sample(2, [1.0]), sample(3, [1e60, 2.0])]  # type: ignore[list-item]
    rows.append({**sample(4, [3.0, 4.0]), "point": None})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    points, levels = samples_of(path)
    assert points.tolist() == [[1.0, 2.0], [10.0, 2.0]], "far ones stand at the edge"
    assert levels == ["digit 0", "digit 0"]


def test_texts_have_none_of_it(tmp_path: Path) -> None:
    study = load_study([write_texts(tmp_path, seeds=(1,), steps=20)])
    assert study.right == ""
    assert qualities(study) == {}
    assert quality_tables(study) == ""
    assert dict(sample_figures(study)) == {}


def test_a_flows_comparison_is_summarised_and_its_evidence_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_comparison(tmp_path / "runs")
    assert summarise(folder)["arms"]["half"]["average_at_k"] == 1.0
    finish(folder, make_console())
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["quality"]["energy_distance"]["paired"]["half-full"]["mean"] == pytest.approx(-0.35)
    assert "energy distance, mean over seeds" in capsys.readouterr().out
    monkeypatch.setattr(evidence, "OUT", tmp_path)
    monkeypatch.setattr(evidence, "write_figure", lambda *_: None)
    evidence.comparison(folder, "ring", "full")
    written = json.loads((tmp_path / "ring.json").read_text())
    assert written["quality"]["energy_distance"]["paired"]["half-full"]["mean"] == pytest.approx(-0.35)
    assert set(written["quality"]["energy_distance"]["paired"]) == {"half-full", "learned-full"}
    assert written["first_step"]["full"] == {"exposure/ratio": 0.5, "divergence/mean": 0.2, "mismatch/top1": 0.1}
    text = capsys.readouterr().out
    assert "| `half` | 0.1500 (-0.4853 to 0.7853) | -0.3500 (-0.9853 to +0.2853) | not told apart |" in text
    assert math.isfinite(written["first_step"]["half"]["divergence/mean"])
