from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from atesd.report import controls, plots
from atesd.report.html import write_report
from atesd.report.load import Run, Study, load_run, load_study
from atesd.report.plots import Panel
from atesd.runlog import RunDir

from support.runs import route_metrics, write_compare, write_run


def logged(path: Path, rows: Sequence[Mapping[str, float]], config: Mapping[str, Any] | None = None) -> Path:
    """Write a run that logged these rows at steps 1, 2, ..."""
    run = RunDir.create(path, config or {})
    for step, row in enumerate(rows, start=1):
        run.log(step, row)
    return path


def loaded(path: Path, rows: Sequence[Mapping[str, float]], config: Mapping[str, Any] | None = None) -> Run:
    return load_run(logged(path, rows, config), "arm", None)


def drawn(panel: Panel | None, label: str) -> dict[str, Any]:
    """What a figure shows by the names of its lines."""
    assert panel is not None
    return {trace["name"]: trace["y"] for trace in panel.choices[label]["data"]}


def test_groups_counted_twice_took_both_routes(tmp_path: Path) -> None:
    # 8 groups: 6 distilled + 5 reinforced + 1 skipped = 12 counts, so 4 are both, 2 distilled alone, 1 reinforced alone
    run = loaded(tmp_path / "run", [route_metrics(distil=6, rl=5, skip=1)], {"step": {"problems": 8}})
    assert controls.route_shares(run).tolist() == [[1, 2 / 8, 4 / 8, 1 / 8, 0, 1 / 8]]


def test_without_a_batch_size_the_counts_are_the_groups(tmp_path: Path) -> None:
    run = loaded(tmp_path / "run", [route_metrics(distil=3, nll=1), {"loss/total": 1.0}, route_metrics(rl=4)])
    assert controls.route_shares(run).tolist() == [[1, 0.75, 0, 0, 0.25, 0], [3, 0, 0, 1, 0, 0]]


def test_routes_are_stacked_where_one_occurs_that_is_no_plain_distillation(tmp_path: Path) -> None:
    plain = logged(tmp_path / "plain", [route_metrics(distil=4)] * 2)
    mixed = logged(tmp_path / "mixed", [route_metrics(distil=4), route_metrics(distil=1, rl=3)])
    assert controls.route_panel(load_study([plain])) is None
    panel = controls.route_panel(load_study([plain, mixed]))
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
    panel = controls.route_panel(load_study([folder]))
    assert panel is not None
    assert list(panel.choices) == ["grpo, mean over seeds", "grpo, seed 1", "grpo, seed 2"]
    assert drawn(panel, "grpo, mean over seeds") == {"distilled": [0.5], "reinforced": [0.5]}


def test_gates_are_shown_where_they_are_not_1_throughout(tmp_path: Path) -> None:
    open_ = logged(tmp_path / "open", [{"gate/mean": 1.0, "gate/kept_frac": 1.0}] * 2)
    closing = logged(tmp_path / "closing", [{"gate/mean": mean, "gate/kept_frac": 1.0} for mean in (1.0, 0.5)])
    assert controls.gate_panel(load_study([open_])) is None
    panel = controls.gate_panel(load_study([open_, closing]))
    assert panel is not None
    assert list(panel.choices) == ["Mean weight of distilled tokens"]  # every token was selected
    assert drawn(panel, "Mean weight of distilled tokens") == {"open": [1, 1], "closing": [1, 0.5]}


def test_the_cliff_has_gaps_where_every_lambda_is_safe_and_shades_reinforcing_steps(tmp_path: Path) -> None:
    rows = [
        {"cliff/lambda_star": 1.5, "cliff/lambda": 1.3, "cliff/reinforcing": 0.0},
        {"cliff/lambda": 1.3, "cliff/reinforcing": 0.0},
        {"cliff/lambda_star": 1.2, "cliff/lambda": 1.1, "cliff/reinforcing": 1.0},
    ]
    found = drawn(controls.cliff_panel(load_study([logged(tmp_path / "run", rows)])), "run")
    assert found == {
        "reinforcing steps": [0, 0, 1],
        "λ*, the largest safe λ": [1.5, None, 1.2],
        "λ in force": [1.3, 1.3, 1.1],
    }


def test_a_step_between_gaps_is_a_point(tmp_path: Path) -> None:
    rows = [{"cliff/lambda": 1.3} | ({"cliff/lambda_star": 1.4} if step in {0, 2, 3} else {}) for step in range(4)]
    panel = controls.cliff_panel(load_study([logged(tmp_path / "run", rows)]))
    assert panel is not None
    (bound,) = (trace for trace in panel.choices["run"]["data"] if "largest" in trace["name"])
    assert [size > 0 for size in bound["marker"]["size"]] == [True, False, False, False]


def test_without_a_lambda_in_the_log_the_bound_is_held_against_the_targets(tmp_path: Path) -> None:
    config = {"target": {"kind": "extrapolate", "lambda_x": 1.25}}
    rows = [{"cliff/lambda_star": 1.5}, {"cliff/lambda_star": 1.4}]
    found = drawn(controls.cliff_panel(load_study([logged(tmp_path / "run", rows, config)])), "run")
    assert found["λ in force"] == [1.25, 1.25]
    assert "reinforcing steps" not in found


def test_a_far_bound_leaves_room_for_the_lambda_in_force(tmp_path: Path) -> None:
    rows = [{"cliff/lambda_star": 400.0, "cliff/lambda": 1.25}, {"cliff/lambda_star": 1.5, "cliff/lambda": 1.25}]
    panel = controls.cliff_panel(load_study([logged(tmp_path / "run", rows)]))
    assert panel is not None
    low, high = panel.choices["run"]["layout"]["yaxis"]["range"]
    # 1 + 4 * .25 = 2, with 6 % of .75 at either end
    assert (low, high) == (pytest.approx(1.205), pytest.approx(2.045))


def test_credits_are_lines_in_the_order_of_their_ratios(tmp_path: Path) -> None:
    rows = [
        {"exposure/credit/1": 0.1, "exposure/credit/0.5": 0.3},
        {},
        {"exposure/credit/1": 0.2, "exposure/credit/0.5": 0.4},
    ]
    panel = controls.credit_panel(load_study([logged(tmp_path / "run", rows)]))
    assert panel is not None
    lines = panel.choices["run"]["data"]
    assert [(trace["name"], trace["x"], trace["y"]) for trace in lines] == [
        ("ratio 0.5", [1, 3], [0.3, 0.4]),
        ("ratio 1", [1, 3], [0.1, 0.2]),
    ]
    assert len({trace["marker"]["symbol"] for trace in lines}) == 2


def test_many_runs_are_cut_and_the_caption_says_so(tmp_path: Path) -> None:
    paths = [logged(tmp_path / f"run{n}", [route_metrics(rl=1)]) for n in range(controls.RUNS + 2)]
    panel = controls.route_panel(load_study(paths))
    assert panel is not None
    assert len(panel.choices) == controls.RUNS
    assert panel.caption.endswith(f"Shown for {controls.RUNS} of {controls.RUNS + 2}.")


def test_a_run_without_any_teacher_has_no_figure_of_one(tmp_path: Path) -> None:
    run = write_run(tmp_path / "grpo", arm="grpo", steps=12, problems=2)
    study = load_study([run.path])
    teachers: list[Panel | None] = [
        plots.exposure_panel(study),
        plots.density_panel(study),
        plots.reward_panel(study),
        controls.gate_panel(study),
        controls.cliff_panel(study),
        controls.credit_panel(study),
    ]
    assert teachers == [None] * 6
    assert plots.mismatch_panels(study) == []
    assert drawn(controls.route_panel(study), "grpo") == {"reinforced": [1.0] * 12}
    text = write_report([run.path], tmp_path / "report.html").read_text()
    assert "Left out: no step with a teacher was logged." in text
    assert "is <em>reinforced</em>" in text
    assert "A <em>teacher</em>" not in text
    assert "planted" not in text.split('<script type="app')[0]
    assert "the student is reinforced by the rewards" in text


def test_a_seed_without_a_teacher_is_no_choice_of_the_exposure_figure(tmp_path: Path) -> None:
    folder = write_compare(tmp_path / "cmp", arms=("composed",), seeds=(1, 2), steps=4, problems=2)
    run = RunDir.open(folder / "composed" / "seed_2")
    rows = [{k: v for k, v in row.items() if not k.startswith("exposure/ratio")} for row in run.metrics()]
    run.metrics_path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    panel = plots.exposure_panel(load_study([folder]))
    assert panel is not None
    assert list(panel.choices) == ["mean over seeds", "seed 1"]


def test_ratios_of_steps_without_distillation_are_not_shown(tmp_path: Path) -> None:
    """Early logs name a ratio in every step."""
    rows = [{"exposure/ratio": 0.5, **route_metrics(distil=1)}, {"exposure/ratio": 1.0, **route_metrics(rl=1)}]
    panel = plots.exposure_panel(load_study([logged(tmp_path / "run", rows)]))
    assert drawn(panel, "") == {"run": [0.5]}


def test_every_difficulty_bin_has_its_density_and_rewards(tmp_path: Path) -> None:
    row = {f"exposure/bin{n}/{key}": 2.0 for n in range(3) for key in ("ka", "kb", "mean", "reward", "reward_lp")}
    study = load_study([logged(tmp_path / "run", [row, row])])
    labels = ["run, easiest problems", "run, problems of difficulty 2 of 3", "run, hardest problems"]
    for panel in (plots.density_panel(study), plots.reward_panel(study)):
        assert panel is not None
        assert list(panel.choices) == labels
    assert drawn(plots.reward_panel(study), labels[0]) == {"reward": [2, 2], "learning progress": [2, 2]}


def test_numbers_of_the_policy_loss_are_curves_where_they_change(tmp_path: Path) -> None:
    rows = [{"loss/rl": value, "rl/ratio": 1.0, "cliff/p/box": 0.9} for value in (0.1, 0.2)]
    panel = plots.curve_panel(load_study([logged(tmp_path / "run", rows)]))
    assert panel is not None
    assert list(panel.choices) == ["Policy loss", "Teacher's probability of the forced token, box"]


def test_the_composed_arm_shows_everything(tmp_path: Path) -> None:
    study: Study = load_study([write_compare(tmp_path / "cmp", arms=("full", "composed"), seeds=(1,), problems=2)])
    found = [
        controls.route_panel(study),
        controls.gate_panel(study),
        controls.cliff_panel(study),
        controls.credit_panel(study),
    ]
    assert [panel and next(iter(panel.choices)) for panel in found] == [
        "composed, seed 1",
        "Mean weight of distilled tokens",
        "composed, seed 1",
        "composed, seed 1",
    ]
    text = write_report([tmp_path / "cmp"], tmp_path / "report.html").read_text()
    assert "(influence credit). The target goes beyond the teacher: λ 1.35. Of the tokens 50 % are distilled" in text
    assert '<div class="choice">Shown: composed, seed 1</div>' in text  # a single choice names its run
