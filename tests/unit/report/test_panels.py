"""The table of figures, row by row: what each shows, and when it is left out."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest

from atesd.metrics import METRICS
from atesd.report import special
from atesd.report.compare import find
from atesd.report.load import load_run, load_study
from atesd.report.panels import CURVES, PANELS
from atesd.report.plots import Shown, names_in
from atesd.report.sections import sections
from atesd.report.study import Run, Study
from atesd.runlog import RunDir

from support.runs import ARMS, route_metrics, write_compare, write_graded, write_run

OF_A_TEACHER = ("exposure", "density", "credits", "gates", "cliff", "mismatch", "tail", "rewards")


def logged(path: Path, rows: Sequence[Mapping[str, float]], config: Mapping[str, Any] | None = None) -> Path:
    """Write a run that logged these rows at steps 1, 2, ..."""
    run = RunDir.create(path, config or {})
    for step, row in enumerate(rows, start=1):
        run.log(step, row)
    return path


def shown(name: str, *paths: Path) -> Shown | None:
    return panel_of(name, load_study(paths))


def panel_of(name: str, study: Study) -> Shown | None:
    (panel,) = (panel for panel in PANELS if panel.name == name)
    return panel.show(study)


def drawn(panel: Shown | None, label: str = "") -> dict[str, Any]:
    """What a figure shows by the names of its lines."""
    assert panel is not None
    return {trace["name"]: trace["y"] for trace in panel.choices[label]["data"] if "name" in trace}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    folder = tmp_path_factory.mktemp("runs") / "cmp"
    return load_study([write_compare(folder, arms=(*ARMS, "composed", "grpo"), steps=30, problems=6)])


@pytest.fixture(scope="module")
def panels(study: Study) -> list[Shown]:
    return [found for panel in PANELS if (found := panel.show(study))]


# ---- the table ----


def test_every_section_has_its_figures_in_their_order(study: Study) -> None:
    found = {part.name: [panel.name for panel in part.panels] for part in sections(study, find(study))}
    assert found == {
        "results": [],
        "setup": [],
        "accuracy": ["accuracy"],
        "levels": ["levels"],
        "exposure": ["exposure", "density", "credits"],
        "controls": ["routes", "gates", "cliff"],
        "mismatch": ["mismatch", "tail"],
        "reward": ["rewards"],
        "behaviour": ["traits"],
        "curves": ["curves"],
        "rollouts": [],
    }


def test_every_key_that_a_figure_reads_is_in_the_table_of_metrics(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tables agree, so that a renamed metric does not leave an empty figure behind."""
    read: set[str] = set()
    series = Run.series

    def watched(run: Run, *keys: str, **options: Any) -> Any:
        read.update(keys)
        return series(run, *keys, **options)

    monkeypatch.setattr(Run, "series", watched)
    for panel in PANELS:
        panel.show(study)
    patterns = [re.compile(re.escape(key).replace(r"\{\}", "[^/]+")) for key in METRICS]
    assert {key for key in read if not any(pattern.fullmatch(key) for pattern in patterns)} == set()
    assert {"exposure/ka", "route/both_groups", "cliff/lambda_star", "gate/gap", "exposure/credit/0.5"} <= read


def test_every_figure_is_a_valid_plotly_figure(panels: Sequence[Shown]) -> None:
    def real(value: Any) -> Any:
        """Stand-ins for the colour names that the page looks up."""
        if isinstance(value, dict):
            return {key: real(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [real(inner) for inner in value]
        return "#123456" if isinstance(value, str) and value.startswith("@") else value

    elsewhere = {"quality", "samples", "arms", "codes"}  # of flows (test_flow.py), of DLR: the study has neither
    assert {panel.name for panel in panels} == {panel.name for panel in PANELS} - elsewhere
    assert len(PANELS) == 17
    for panel in panels:
        assert panel.description
        assert "{" not in panel.description
        assert panel.caption.endswith(".")
        for figure in panel.choices.values():
            go.Figure(real(figure))  # raises on an unknown property or a wrong value
            json.dumps(figure, allow_nan=False)


def test_an_arm_keeps_colour_and_index_in_every_figure(study: Study, panels: Sequence[Shown]) -> None:
    names = [arm.name for arm in study.arms]
    for panel in panels:
        traces = [trace for figure in panel.choices.values() for trace in figure["data"]]
        for trace in (trace for trace in traces if "meta" in trace):
            shades = json.dumps([trace["line"] if "line" in trace else trace["marker"], trace.get("fillcolor")])
            assert f"@arm{trace['meta']['arm']}" in shades
            assert trace.get("name") in {names[trace["meta"]["arm"]], None}
        of_arms = panel.name not in {"density", "credits", "routes", "cliff", "rewards"}
        assert any("meta" in trace for trace in traces) == of_arms  # pressing an arm hides its lines


def test_figures_without_data_are_left_out(tmp_path: Path) -> None:
    study = load_study([write_graded(tmp_path / "cmp", {"full": {1: [[1.0]]}})])
    assert [panel.name for panel in PANELS if panel.show(study)] == ["accuracy", "traits"]


def test_many_choices_are_cut_and_the_caption_says_so(tmp_path: Path) -> None:
    routes = shown("routes", *(logged(tmp_path / f"run{n}", [route_metrics(rl=1)]) for n in range(26)))
    assert routes is not None
    assert list(routes.choices) == ["run0", *(f"run{n}" for n in range(1, 24))]
    assert routes.caption.endswith(" Shown for 24 of 26.")
    beta = {"exposure/ka": 2.0, "exposure/kb": 2.0, "exposure/ratio": 0.5}
    density = shown("density", *(logged(tmp_path / f"beta{n}", [beta]) for n in range(13)))
    assert density is not None
    assert len(density.choices) == 12
    assert density.caption.endswith(" drawn. Shown for 12 of 13.")


# ---- lines over steps ----


def test_exposure_is_shown_as_a_mean_and_by_seed(tmp_path: Path) -> None:
    folder = write_graded(tmp_path / "cmp", {"random": {1: [[1.0]], 2: [[1.0]]}})
    for seed, ratios in ((1, [0.5, 0.5]), (2, [1.0, 0.0])):
        run = RunDir.open(folder / "random" / f"seed_{seed}")
        for step, ratio in enumerate(ratios, start=1):
            run.log(step, {"exposure/ratio": ratio})
    panel = shown("exposure", folder)
    assert panel is not None
    assert {label: drawn(panel, label) for label in panel.choices} == {
        "mean over seeds": {"random": [0.75, 0.25]},
        "seed 1": {"random": [0.5, 0.5]},
        "seed 2": {"random": [1.0, 0.0]},
    }


def test_a_seed_without_a_teacher_is_no_choice_of_the_exposure_figure(tmp_path: Path) -> None:
    folder = write_compare(tmp_path / "cmp", arms=("composed",), seeds=(1, 2), steps=4, problems=2)
    run = RunDir.open(folder / "composed" / "seed_2")
    rows = [{k: v for k, v in row.items() if not k.startswith("exposure/ratio")} for row in run.metrics()]
    run.metrics_path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    panel = shown("exposure", folder)
    assert panel is not None
    assert list(panel.choices) == ["mean over seeds", "seed 1"]


def test_ratios_of_steps_without_distillation_are_not_shown(tmp_path: Path) -> None:
    """Early logs name a ratio in every step."""
    rows = [{"exposure/ratio": 0.5, **route_metrics(distil=1)}, {"exposure/ratio": 1.0, **route_metrics(rl=1)}]
    assert drawn(shown("exposure", logged(tmp_path / "run", rows))) == {"run": [0.5]}
    assert shown("exposure", logged(tmp_path / "sft", rows[1:])) is None


def test_gates_are_shown_where_they_are_not_1_throughout(tmp_path: Path) -> None:
    open_ = logged(tmp_path / "open", [{"gate/mean": 1.0, "gate/kept_frac": 1.0}] * 2)
    closing = logged(tmp_path / "closing", [{"gate/mean": mean, "gate/kept_frac": 1.0} for mean in (1.0, 0.5)])
    assert shown("gates", open_) is None
    panel = shown("gates", open_, closing)
    assert panel is not None
    assert list(panel.choices) == ["Mean weight of distilled tokens"]  # every token was selected
    assert drawn(panel, "Mean weight of distilled tokens") == {"open": [1, 1], "closing": [1, 0.5]}


def test_every_quantity_of_gates_is_a_choice_with_its_unit(tmp_path: Path) -> None:
    keys = ("mean", "kept_frac", "open_frac", "gap", "gap_negative")
    panel = shown("gates", logged(tmp_path / "run", [{f"gate/{key}": 0.25 for key in keys}]))
    assert panel is not None
    percent = [figure["layout"]["yaxis"].get("tickformat") == ".0%" for figure in panel.choices.values()]
    assert percent == [False, True, True, False, True]
    assert {figure["layout"]["yaxis"]["rangemode"] for figure in panel.choices.values()} == {"tozero"}


def test_curves_are_means_over_the_seeds_that_logged_them(tmp_path: Path) -> None:
    folder = write_graded(tmp_path / "cmp", {"full": {1: [[1.0]], 2: [[1.0]]}})
    for seed, losses in ((1, [0.5, 0.25]), (2, [0.0])):
        for step, loss in enumerate(losses, start=1):
            RunDir.open(folder / "full" / f"seed_{seed}").log(step, {"loss/total": loss})
    assert drawn(shown("curves", folder), "Loss") == {"full": [0.25, 0.25]}  # (.5 + 0) / 2, then .25 alone


def test_every_curve_is_a_choice_where_it_was_logged(tmp_path: Path) -> None:
    always = [
        "loss/total", "divergence/mean", "divergence/p99", "mismatch/top1", "student/entropy", "teacher/entropy",
        "reward/mean", "rollout/length_mean", "optim/grad_norm", "optim/lr", "time/step_s", "time/sample_s",
    ]  # fmt: skip
    where_they_change = [
        "loss/rl", "reward/uniform_groups", "rl/ratio", "rl/clip_frac", "rl/sampler_weight", "rl/kl",
        "route/mismatch_ema", "route/retired", "exposure/paired_credit",
    ]  # fmt: skip
    of_classes = ["cliff/b/box", "cliff/p/box"]
    labels = {quantity.key.format("box"): quantity.label.format("box") for quantity in CURVES}
    keys = [*always, *where_they_change, *of_classes]
    rows = [{key: number + step for number, key in enumerate(keys)} for step in range(2)]
    panel = shown("curves", logged(tmp_path / "moving", rows))
    assert panel is not None
    assert [drawn(panel, label) for label in panel.choices] == [{"moving": [n, n + 1]} for n in range(len(keys))]
    assert list(panel.choices) == [labels[key] for key in keys]
    still = shown("curves", logged(tmp_path / "still", rows[:1] * 2))
    assert still is not None
    assert list(still.choices) == [labels[key] for key in (*always, *of_classes)]


def test_curves_keep_their_order_and_name_contract_classes(tmp_path: Path) -> None:
    rows = [{"loss/rl": value, "cliff/p/box": 0.9, "cliff/b/eos": 0.2, "loss/total": 0.5} for value in (0.1, 0.2)]
    panel = shown("curves", logged(tmp_path / "run", rows))
    assert panel is not None
    assert list(panel.choices) == [
        "Loss",
        "Policy loss",
        "Base's probability of the forced token, eos",
        "Teacher's probability of the forced token, box",
    ]


def test_credits_are_lines_in_the_order_of_their_ratios(tmp_path: Path) -> None:
    rows = [
        {"exposure/credit/1": 0.1, "exposure/credit/0.5": 0.3},
        {},
        {"exposure/credit/1": 0.2, "exposure/credit/0.5": 0.4},
    ]
    panel = shown("credits", logged(tmp_path / "run", rows))
    assert panel is not None
    assert panel.caption.endswith("where candidates are mixed, else all windows' credit over its standard error.")
    lines = panel.choices["run"]["data"]
    assert [(trace["name"], trace["x"], trace["y"]) for trace in lines] == [
        ("ratio 0.5", [1, 3], [0.3, 0.4]),
        ("ratio 1", [1, 3], [0.1, 0.2]),
    ]
    assert len({trace["marker"]["symbol"] for trace in lines}) == 2
    assert [trace["line"]["color"] for trace in lines] == ["@heat-high/0.45", "@heat-high/1.00"]


def test_names_stand_between_the_parts_of_a_pattern(tmp_path: Path) -> None:
    row = dict.fromkeys(("a/10/z", "a/2/z", "a/b c/z", "a/z", "a//z", "a/2/y", "xa/3/z", "a.4.z"), 1.0)
    run = load_run(logged(tmp_path / "run", [row]), "arm", None)
    assert names_in([run], "a/{}/z") == ["b c", "2", "10"]


# ---- routes ----


def test_groups_with_both_losses_are_counted_once(tmp_path: Path) -> None:
    # 8 groups: of 6 distilled and 5 reinforced 4 are both, so 2 distilled alone, 1 reinforced alone; 1 skipped
    run = load_run(logged(tmp_path / "run", [route_metrics(distil=6, rl=5, both=4, skip=1)]), "arm", None)
    assert special.route_shares(run).tolist() == [[1, 2 / 8, 4 / 8, 1 / 8, 0, 1 / 8]]


def test_a_log_of_version_1_counts_no_group_with_both_losses(tmp_path: Path) -> None:
    rows = [route_metrics(distil=3, nll=1), {"loss/total": 1.0}, route_metrics(rl=4), route_metrics(distil=2, rl=2)]
    old = [{key: value for key, value in row.items() if key != "route/both_groups"} for row in rows]
    run = load_run(logged(tmp_path / "run", old, {"step": {"problems": 2}}), "arm", None)
    expected = [[1, 0.75, 0, 0, 0.25, 0], [3, 0, 0, 1, 0, 0], [4, 0.5, 0, 0.5, 0, 0]]
    assert special.route_shares(run).tolist() == expected


def test_routes_are_stacked_where_one_occurs_that_is_no_plain_distillation(tmp_path: Path) -> None:
    plain = logged(tmp_path / "plain", [route_metrics(distil=4)] * 2)
    mixed = logged(tmp_path / "mixed", [route_metrics(distil=4), route_metrics(distil=1, rl=3)])
    assert shown("routes", plain) is None
    panel = shown("routes", plain, mixed)
    assert panel is not None
    assert drawn(panel, "mixed") == {"distilled": [1.0, 0.25], "reinforced": [0.0, 0.75]}
    assert list(panel.choices) == ["mixed"]
    assert panel.caption.endswith("Left out, as every group was distilled: plain.")
    stack = panel.choices["mixed"]["data"]
    assert {trace["stackgroup"] for trace in stack} == {"routes"}
    assert len({trace["fillpattern"]["shape"] for trace in stack}) == 2  # told apart without colour


def test_routes_of_several_seeds_are_shown_as_a_mean_and_one_by_one(tmp_path: Path) -> None:
    folder = write_compare(tmp_path / "cmp", arms=("grpo",), steps=4, problems=2)
    for seed, rl in ((1, 1), (2, 3)):
        run = RunDir.open(folder / "grpo" / f"seed_{seed}")
        run.metrics_path.write_text("")
        run.log(1, route_metrics(distil=4 - rl, rl=rl))
    panel = shown("routes", folder)
    assert panel is not None
    assert list(panel.choices) == ["grpo, mean over seeds", "grpo, seed 1", "grpo, seed 2"]
    assert drawn(panel, "grpo, mean over seeds") == {"distilled": [0.5], "reinforced": [0.5]}


# ---- the cliff ----


def test_the_cliff_has_gaps_where_every_lambda_is_safe_and_shades_reinforcing_steps(tmp_path: Path) -> None:
    rows = [
        {"cliff/lambda_star": 1.5, "cliff/lambda": 1.3, "cliff/reinforcing": 0.0},
        {"cliff/lambda": 1.3, "cliff/reinforcing": 0.0},
        {"cliff/lambda_star": 1.2, "cliff/lambda": 1.1, "cliff/reinforcing": 1.0},
    ]
    assert drawn(shown("cliff", logged(tmp_path / "run", rows)), "run") == {
        "reinforcing steps": [0, 0, 1],
        "λ*, the largest safe λ": [1.5, None, 1.2],
        "λ in force": [1.3, 1.3, 1.1],
    }


def test_a_step_between_gaps_is_a_point(tmp_path: Path) -> None:
    rows = [{"cliff/lambda": 1.3} | ({"cliff/lambda_star": 1.4} if step in {0, 2, 3} else {}) for step in range(4)]
    panel = shown("cliff", logged(tmp_path / "run", rows))
    assert panel is not None
    (bound,) = (trace for trace in panel.choices["run"]["data"] if "largest" in trace["name"])
    assert [size > 0 for size in bound["marker"]["size"]] == [True, False, False, False]


def test_without_a_lambda_in_the_log_the_bound_is_held_against_the_targets(tmp_path: Path) -> None:
    config = {"target": {"kind": "extrapolate", "lambda_x": 1.25}}
    rows = [{"cliff/lambda_star": 1.5}, {"cliff/lambda_star": 1.4}]
    found = drawn(shown("cliff", logged(tmp_path / "run", rows, config)), "run")
    assert found["λ in force"] == [1.25, 1.25]
    assert "reinforcing steps" not in found


def test_a_bound_with_nothing_to_hold_it_against_stands_alone(tmp_path: Path) -> None:
    found = drawn(shown("cliff", logged(tmp_path / "run", [{"cliff/lambda_star": 1.5}, {"loss/total": 1.0}])), "run")
    assert found == {"λ*, the largest safe λ": [1.5]}
    assert shown("cliff", logged(tmp_path / "safe", [{"cliff/lambda": 1.25}])) is None


def test_a_far_bound_leaves_room_for_the_lambda_in_force(tmp_path: Path) -> None:
    rows = [{"cliff/lambda_star": 400.0, "cliff/lambda": 1.25}, {"cliff/lambda_star": 1.5, "cliff/lambda": 1.25}]
    panel = shown("cliff", logged(tmp_path / "run", rows))
    assert panel is not None
    low, high = panel.choices["run"]["layout"]["yaxis"]["range"]
    # 1 + 4 * .25 = 2, with 6 % of .75 at either end
    assert (low, high) == (pytest.approx(1.205), pytest.approx(2.045))


# ---- learned exposure ----


def test_the_density_is_that_of_the_beta_distribution() -> None:
    # Beta(3, 3) at 1/2: 30 x^2 (1-x)^2 = 30/16; Beta(2, 1) at 1/4: 2x = 1/2; Beta(1, 1): 1
    ratios = np.array([0.25, 0.5])
    found = special.beta_density(ratios, np.array([3.0, 2.0, 1.0]), np.array([3.0, 1.0, 1.0]))
    np.testing.assert_allclose(found, [[30 / 16 * 9 / 16, 0.5, 1.0], [30 / 16, 1.0, 1.0]], rtol=1e-12)


def test_every_difficulty_bin_has_its_density_and_rewards(tmp_path: Path) -> None:
    row = {f"exposure/bin{n}/{key}": 2.0 for n in range(3) for key in ("ka", "kb", "mean", "reward", "reward_lp")}
    path = logged(tmp_path / "run", [row, row])
    labels = ["run, easiest problems", "run, problems of difficulty 2 of 3", "run, hardest problems"]
    density, rewards = shown("density", path), shown("rewards", path)
    for panel in (density, rewards):
        assert panel is not None
        assert list(panel.choices) == labels
    assert drawn(density, labels[0]) == {"mean of the policy": [2, 2]}
    assert density is not None
    assert density.caption.endswith("the line is the policy's mean.")
    assert drawn(rewards, labels[0]) == {"reward": [2, 2], "learning progress": [2, 2]}


def test_the_terms_of_a_reward_have_scales_of_their_own(tmp_path: Path) -> None:
    row = {"exposure/ka": 2.0, "exposure/kb": 2.0, "exposure/reward": 1.0, "exposure/reward_gt": 3.0}
    density, rewards = (shown(name, logged(tmp_path / name / "run", [row])) for name in ("density", "rewards"))
    assert drawn(rewards, "run") == {"reward": [1], "teacher-grounded": [3]}
    assert rewards is not None
    assert [trace["yaxis"] for trace in rewards.choices["run"]["data"]] == ["y", "y2"]
    lower, upper = (rewards.choices["run"]["layout"][name]["domain"] for name in ("yaxis2", "yaxis"))
    assert 0 <= lower[0] < lower[1] < upper[0] < upper[1] <= 1
    assert density is not None
    assert "bin" not in density.caption


# ---- figures against something else ----


def test_a_run_without_any_teacher_has_no_figure_of_one(tmp_path: Path) -> None:
    path = write_run(tmp_path / "grpo", arm="grpo", steps=12, problems=2).path
    assert [shown(name, path) for name in OF_A_TEACHER] == [None] * 8
    assert drawn(shown("routes", path), "grpo") == {"reinforced": [1.0] * 12}


def test_the_accuracy_line_is_the_mean_over_seeds_and_samples(tmp_path: Path) -> None:
    # step 0: all wrong; step 10: seed 1 (1 + .5)/2 = .75, seed 2 (0 + .5)/2 = .25, mean .5
    rewards = {1: [[1.0, 1.0], [1.0, 0.0]], 2: [[0.0, 0.0], [0.0, 1.0]]}
    panel = shown("accuracy", write_graded(tmp_path / "cmp", {"full": rewards}))
    assert panel is not None
    assert panel.description == "Average@2 over training steps"
    band, line = panel.choices[""]["data"]
    assert (line["x"], line["y"]) == ([0, 10], [0, 0.5])
    assert band["x"] == [0, 10, 10, 0]
    assert band["y"][0] == band["y"][3] == 0
    assert band["y"][2] <= 0.5 <= band["y"][1]


def test_the_mismatch_line_joins_medians_of_tenths(tmp_path: Path) -> None:
    pairs = [(0.5, 0.1), (0.5, 0.3), (0.5, 0.2), (1.0, 0.7)]
    for name, key in (("mismatch", "mismatch/top1"), ("tail", "divergence/p99")):
        panel = shown(name, logged(tmp_path / name, [{"exposure/ratio": ratio, key: value} for ratio, value in pairs]))
        assert panel is not None
        cloud, medians = panel.choices[""]["data"]
        assert (cloud["x"], cloud["y"]) == ([0.5, 0.5, 0.5, 1.0], [0.1, 0.3, 0.2, 0.7])
        assert (medians["x"], medians["y"]) == ([0.5, 1.0], [0.2, 0.7])
        # quartiles of .1, .2, .3 are .15 and .25
        assert medians["error_y"]["array"] == [0.05, 0.0]
        assert medians["error_y"]["arrayminus"] == [0.05, 0.0]


def test_levels_are_in_the_order_of_their_numbers_and_arms_stand_side_by_side(tmp_path: Path) -> None:
    folder = write_compare(tmp_path / "cmp", arms=("full", "half"), seeds=(1,), steps=6, problems=6)
    for path in folder.glob("*/*/eval/*.jsonl"):
        path.write_text(path.read_text().replace("5 steps", "10 steps"))
    panel = shown("levels", folder)
    assert panel is not None
    assert panel.choices[""]["layout"]["xaxis"]["ticktext"] == ["7 steps", "9 steps", "10 steps"]
    # two arms, a quarter of a level left and right of its place
    places = {
        trace["name"]: dict(zip(trace["customdata"], trace["x"], strict=True)) for trace in panel.choices[""]["data"]
    }
    assert places["full"] == {"7 steps": -0.125, "9 steps": 0.875, "10 steps": 1.875}
    assert places["half"] == {"7 steps": 0.125, "9 steps": 1.125, "10 steps": 2.125}


def test_levels_are_drawn_where_every_seed_has_problems_of_its_own(tmp_path: Path) -> None:
    """Of two problems a level one is right in seed 1 and both in seed 2: .75; with another number there is no mean."""
    folder = write_graded(tmp_path / "cmp", {"full": {1: [[1.0], [0.0]] * 2, 2: [[1.0], [1.0]] * 2}})

    def rewrite(levels: Mapping[int, Sequence[str]]) -> None:
        for seed, names in levels.items():
            for path in folder.glob(f"*/seed_{seed}/eval/*.jsonl"):
                rows = [json.loads(line) for line in path.read_text().splitlines()]
                own = [
                    row | {"problem_id": f"seed{seed}-{number}", "level": names[number]}
                    for number, row in enumerate(rows)
                ]
                path.write_text("".join(json.dumps(row) + "\n" for row in own))

    rewrite({1: ["long", "long", "short", "short"], 2: ["short", "long", "long", "short"]})
    panel = shown("levels", folder)
    assert panel is not None
    (trace,) = panel.choices[""]["data"]
    assert (trace["customdata"], trace["y"]) == (["long", "short"], [0.75, 0.75])
    rewrite({2: ["short", "long", "long", "long"]})
    assert shown("levels", folder) is None


@pytest.mark.parametrize(("name", "key"), [("codes", "codes/share/{}"), ("arms", "exposure/arm/{}")])
def test_codes_and_arms_are_lines_by_their_share(name: str, key: str, tmp_path: Path) -> None:
    rows = [{key.format(0): 0.25, key.format(1): 0.75}, {key.format(0): 0.5, key.format(1): 0.5}]
    panel = shown(name, logged(tmp_path / "run", rows))
    assert panel is not None
    drawn = panel.choices["run"]
    assert [(trace["name"].split()[1], trace["y"]) for trace in drawn["data"]] == [
        ("0", [0.25, 0.5]),
        ("1", [0.75, 0.5]),
    ]
    go.Figure(
        {
            **drawn,
            "data": [trace | {"line": {}, "marker": {}} for trace in drawn["data"]],
            "layout": {
                "yaxis": {name: value for name, value in drawn["layout"]["yaxis"].items() if "color" not in name}
            },
        }
    )
    json.dumps(drawn, allow_nan=False)


def test_a_trait_that_never_occurs_has_no_figure(study: Study) -> None:
    panel = panel_of("traits", study)
    assert panel is not None
    assert list(panel.choices) == ["answers early"]


def test_the_composed_arm_shows_every_control(study: Study) -> None:
    found = [panel_of(name, study) for name in ("routes", "gates", "cliff", "credits")]
    assert [panel and list(panel.choices)[:2] for panel in found] == [
        ["composed, mean over seeds", "composed, seed 1"],
        ["Mean weight of distilled tokens", "Share of distilled tokens that are selected"],
        ["composed, seed 1", "composed, seed 2"],
        ["composed, seed 1", "composed, seed 2"],
    ]
