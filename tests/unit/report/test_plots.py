from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest

from atesd.report import controls, plots
from atesd.report.load import Study, load_study
from atesd.report.traces import MAX_POINTS, short, thin
from atesd.runlog import RunDir

from support.runs import ARMS, write_compare, write_graded, write_run


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    folder = tmp_path_factory.mktemp("runs") / "cmp"
    return load_study([write_compare(folder, arms=(*ARMS, "composed", "grpo"), steps=30, problems=6)])


def panels(study: Study) -> list[plots.Panel]:
    found = [
        plots.accuracy_panel(study),
        plots.exposure_panel(study),
        plots.density_panel(study),
        *plots.mismatch_panels(study),
        plots.reward_panel(study),
        plots.level_panel(study),
        plots.trait_panel(study),
        plots.curve_panel(study),
        controls.credit_panel(study),
        controls.route_panel(study),
        controls.gate_panel(study),
        controls.cliff_panel(study),
    ]
    return [panel for panel in found if panel is not None]


def test_every_figure_is_a_valid_plotly_figure(study: Study) -> None:
    def real(value: Any) -> Any:
        """Stand-ins for the colour names that the page looks up."""
        if isinstance(value, dict):
            return {key: real(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [real(inner) for inner in value]
        return "#123456" if isinstance(value, str) and value.startswith("@") else value

    assert len(panels(study)) == 13
    for panel in panels(study):
        for figure in panel.choices.values():
            go.Figure(real(figure))  # raises on an unknown property or a wrong value
            json.dumps(figure, allow_nan=False)


def test_the_accuracy_line_is_the_mean_over_seeds_and_samples(tmp_path: Path) -> None:
    # step 0: all wrong; step 10: seed 1 (1 + .5)/2 = .75, seed 2 (0 + .5)/2 = .25, mean .5
    rewards = {1: [[1.0, 1.0], [1.0, 0.0]], 2: [[0.0, 0.0], [0.0, 1.0]]}
    panel = plots.accuracy_panel(load_study([write_graded(tmp_path / "cmp", {"full": rewards})]))
    assert panel is not None
    band, line = panel.choices[""]["data"]
    assert (line["x"], line["y"]) == ([0, 10], [0, 0.5])
    assert band["x"] == [0, 10, 10, 0]
    assert band["y"][0] == band["y"][3] == 0
    assert band["y"][2] <= 0.5 <= band["y"][1]


def test_exposure_is_shown_as_a_mean_and_by_seed(tmp_path: Path) -> None:
    folder = write_graded(tmp_path / "cmp", {"random": {1: [[1.0]], 2: [[1.0]]}})
    for seed, ratios in ((1, [0.5, 0.5]), (2, [1.0, 0.0])):
        run = RunDir.open(folder / "random" / f"seed_{seed}")
        for step, ratio in enumerate(ratios, start=1):
            run.log(step, {"exposure/ratio": ratio})
    panel = plots.exposure_panel(load_study([folder]))
    assert panel is not None
    drawn = {label: [trace["y"] for trace in figure["data"]] for label, figure in panel.choices.items()}
    assert drawn == {"mean over seeds": [[0.75, 0.25]], "seed 1": [[0.5, 0.5]], "seed 2": [[1.0, 0.0]]}


def test_supervised_training_has_no_exposure(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run", {})
    run.log(1, {"exposure/ratio": 1.0, "route/distil_groups": 0.0})
    assert plots.exposure_panel(load_study([run.path])) is None


def test_an_arm_keeps_colour_and_index_in_every_figure(study: Study) -> None:
    for panel in panels(study):
        for figure in panel.choices.values():
            for trace in figure["data"]:
                if "meta" in trace:
                    shades = json.dumps([trace["line"] if "line" in trace else trace["marker"], trace.get("fillcolor")])
                    assert f"@arm{trace['meta']['arm']}" in shades


def test_the_density_is_that_of_the_beta_distribution() -> None:
    # Beta(3, 3) at 1/2: 30 x^2 (1-x)^2 = 30/16; Beta(2, 1) at 1/4: 2x = 1/2; Beta(1, 1): 1
    ratios = np.array([0.25, 0.5])
    found = plots.beta_density(ratios, np.array([3.0, 2.0, 1.0]), np.array([3.0, 1.0, 1.0]))
    np.testing.assert_allclose(found, [[30 / 16 * 9 / 16, 0.5, 1.0], [30 / 16, 1.0, 1.0]], rtol=1e-12)


def test_the_mismatch_line_joins_medians_of_tenths(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", arm="full", steps=3, problems=2)
    run.metrics_path.write_text("")
    for step, (ratio, mismatch) in enumerate([(0.5, 0.1), (0.5, 0.3), (0.5, 0.2), (1.0, 0.7)], start=1):
        run.log(step, {"exposure/ratio": ratio, "mismatch/top1": mismatch})
    (panel,) = plots.mismatch_panels(load_study([run.path]))
    cloud, medians = panel.choices[""]["data"]
    assert cloud["x"] == [0.5, 0.5, 0.5, 1.0]
    assert (medians["x"], medians["y"]) == ([0.5, 1.0], [0.2, 0.7])
    # quartiles of .1, .2, .3 are .15 and .25
    assert medians["error_y"]["array"] == [0.05, 0.0]
    assert medians["error_y"]["arrayminus"] == [0.05, 0.0]


def test_levels_are_in_the_order_of_their_numbers(study: Study) -> None:
    def renamed(name: str) -> str:
        return {"5 steps": "10 steps"}.get(name, name)

    arms = tuple(
        replace(
            arm,
            runs=tuple(
                replace(
                    run,
                    evaluations=tuple(replace(e, levels=tuple(map(renamed, e.levels))) for e in run.evaluations),
                )
                for run in arm.runs
            ),
        )
        for arm in study.arms
    )
    panel = plots.level_panel(replace(study, arms=arms))
    assert panel is not None
    assert panel.choices[""]["layout"]["xaxis"]["ticktext"] == ["7 steps", "9 steps", "10 steps"]


def test_a_trait_that_never_occurs_has_no_figure(study: Study) -> None:
    panel = plots.trait_panel(study)
    assert panel is not None
    assert list(panel.choices) == ["answers early"]


def test_figures_without_data_are_left_out(tmp_path: Path) -> None:
    study = load_study([write_graded(tmp_path / "cmp", {"full": {1: [[1.0]]}})])
    assert [panel.name for panel in panels(study)] == ["accuracy", "traits"]


def test_long_series_are_thinned_but_keep_their_ends() -> None:
    points = np.stack([np.arange(10_000.0), np.arange(10_000.0)], axis=1)
    thinned = thin(points)
    assert len(thinned) == MAX_POINTS
    assert (thinned[0, 0], thinned[-1, 0]) == (0, 9_999)
    assert short([0.123456, 1234.56, float("nan")]) == [0.1235, 1235.0, None]


def test_any_number_of_arms_can_be_told_apart(tmp_path: Path) -> None:
    arms = {f"arm{number:02}": {1: [[1.0]]} for number in range(24)}
    panel = plots.accuracy_panel(load_study([write_graded(tmp_path / "cmp", arms)]))
    assert panel is not None
    lines = panel.choices[""]["data"][1::2]
    looks = {(trace["line"]["color"], trace["line"]["dash"], trace["marker"]["symbol"]) for trace in lines}
    assert len(looks) == 24
    css = (Path(plots.__file__).parent / "page.css").read_text()
    assert all(f"--{trace['line']['color'][1:]}: #" in css for trace in lines)


def test_an_arm_name_is_no_markup_for_plotly(tmp_path: Path) -> None:
    study = load_study([write_graded(tmp_path / "cmp", {"<b>%{x}": {1: [[1.0]]}})])
    panel = plots.accuracy_panel(study)
    assert panel is not None
    assert panel.choices[""]["data"][1]["hovertemplate"].startswith("&lt;b>% {x}, step")
