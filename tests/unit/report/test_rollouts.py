from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from atesd.report.load import load_study
from atesd.report.rollouts import CHARACTERS, TOKENS, damage_of, pack_rollouts, pack_row
from atesd.runlog import RunDir

from support.runs import rollout_rows, write_compare, write_run


def row() -> dict[str, object]:
    return dict(rollout_rows(5, 0.5, np.random.default_rng(0), hostile=False)[0])


def test_a_row_keeps_its_streams_in_a_fixed_order() -> None:
    given = row() | {
        "tokens": ["a", "b"],
        "divergence": [0.12345, 0.0],
        "student_logprob": [-1.0, -2.0],
        "teacher_logprob": [-3.0, -4.0],
        "student_entropy": [0.5, 0.25],
        "gate": [1.0, 0.0],
    }
    packed = pack_row(given)
    assert packed["streams"] == [[0.123, 0.0], [-1.0, -2.0], [-3.0, -4.0], [0.5, 0.25], [1.0, 0.0]]
    assert packed["hidden"] == 0


def test_long_completions_and_texts_are_cut_and_say_so() -> None:
    number = TOKENS + 25
    streams = dict.fromkeys(
        ("divergence", "student_logprob", "teacher_logprob", "student_entropy", "gate"), [0.0] * number
    )
    packed = pack_row(row() | streams | {"tokens": ["x"] * number, "hint": "h" * (CHARACTERS + 7)})
    assert (len(packed["tokens"]), packed["hidden"]) == (TOKENS, 25)
    assert {len(stream) for stream in packed["streams"]} == {TOKENS}
    assert packed["hint"].endswith("h ... (7 more characters)")


def test_a_completion_outside_every_loss_has_no_streams() -> None:
    given = {key: value for key, value in row().items() if key not in {"divergence", "gate"}}
    assert pack_row(given)["streams"] == []


def test_a_reinforced_completion_has_no_streams_of_a_teacher() -> None:
    given = row() | {
        "tokens": ["a", "b"],
        "components": ["rl"],
        "advantage": -0.3779645,
        "divergence": [0.0, 0.0],
        "student_logprob": [-1.0, -2.0],
        "teacher_logprob": [-1.0, -2.0],
        "student_entropy": [0.5, 0.25],
        "gate": [1.0, 1.0],
    }
    packed = pack_row(given)
    assert packed["streams"] == [[], [-1.0, -2.0], [], [0.5, 0.25], []]
    assert (packed["components"], packed["advantage"]) == (["rl"], -0.378)


def test_a_small_gate_is_not_rounded_to_0() -> None:
    """0 means that a token is not selected or does not listen at all."""
    number = len(row()["tokens"])  # type: ignore[arg-type]
    packed = pack_row(row() | {"gate": [4.5398e-05] + [0.0] * (number - 1)})
    assert packed["streams"][4][:2] == [4.54e-05, 0.0]


@pytest.mark.parametrize(
    ("route", "components"),
    [("distil", ["distil"]), ("both", ["distil", "rl"]), ("nll", ["nll"]), ("skip", []), (None, ["distil"])],
)
def test_files_without_components_have_those_of_their_route(route: str | None, components: list[str]) -> None:
    given = {key: value for key, value in row().items() if key not in {"components", "advantage", "route"}}
    packed = pack_row(given if route is None else given | {"route": route})
    assert (packed["components"], packed["advantage"]) == (components, None)


def test_a_run_without_a_teacher_says_so(tmp_path: Path) -> None:
    packed = pack_rollouts(load_study([write_run(tmp_path / "run", arm="grpo", steps=4, problems=2).path]))
    assert (packed["taught"], packed["scale"]) == (False, 1.0)
    assert packed["shown"] == 4 * 8  # files at steps 1, 2, 3, 4
    composed = pack_rollouts(load_study([write_run(tmp_path / "c", arm="composed", steps=4, problems=2).path]))
    kinds = [found["components"] for found in composed["runs"][0]["steps"][0]["rows"][:5]]
    assert kinds == [["distil"], ["rl"], ["distil", "rl"], ["nll"], []]
    assert composed["taught"]


def test_everything_is_shown_while_it_fits(tmp_path: Path) -> None:
    study = load_study([write_compare(tmp_path / "cmp", steps=8, problems=2)])
    packed = pack_rollouts(study)
    # 8 runs, files at steps 1, 2, 4, 6, 8 with 8 completions each
    assert packed["shown"] == packed["total"] == 8 * 5 * 8
    assert [run["label"] for run in packed["runs"]][:3] == ["full, seed 1", "full, seed 2", "half, seed 1"]
    assert [step["step"] for step in packed["runs"][0]["steps"]] == [1, 2, 4, 6, 8]


def test_a_small_budget_is_shared_between_runs(tmp_path: Path) -> None:
    study = load_study([write_compare(tmp_path / "cmp", steps=8, problems=2)])
    packed = pack_rollouts(study, budget=60_000)
    assert packed["total"] == 320
    assert len(json.dumps(packed["runs"], ensure_ascii=False)) < 66_000
    counts = [sum(len(step["rows"]) for step in run["steps"]) for run in packed["runs"]]
    assert len(counts) == 8
    assert sum(counts) == packed["shown"] < 320
    assert max(counts) - min(counts) <= 1
    assert all(run["steps"][-1]["step"] == 8 for run in packed["runs"])  # the last step comes first


def test_the_colour_scale_is_the_99th_percentile(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run", {})
    values = [float(n) for n in range(101)]  # 0..100: the 99th percentile is 99
    streams = {"divergence": values, "student_logprob": values, "teacher_logprob": values}
    streams |= {"student_entropy": values, "gate": values}
    run.write_rows("rollouts", 1, [row() | streams | {"tokens": ["t"] * 101}])
    assert pack_rollouts(load_study([run.path]))["scale"] == pytest.approx(99.0)


def test_a_run_without_completions_shows_none(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=4, problems=2)
    for file in (run.path / "rollouts").iterdir():
        file.unlink()
    assert pack_rollouts(load_study([run.path])) == {
        "runs": [], "shown": 0, "total": 0, "taught": False, "scale": 1.0, "notes": [],
    }  # fmt: skip


def test_a_masked_hint_says_how_much_of_it_attention_reaches() -> None:
    assert pack_row(row() | {"attended": [3, 12]})["attended"] == [3, 12]
    assert "attended" not in pack_row(row())
    assert damage_of(row() | {"attended": "all"}) == "attended"


def test_a_masked_hint_is_shaded_where_its_parts_spell_it() -> None:
    masked = row() | {"hint": "1+2 #3", "shades": [["1", 1.0], ["+2", 0.25], [" #3", 1.0]]}
    assert damage_of(masked) is None
    assert pack_row(masked)["shades"] == masked["shades"]
    for hint in ("1+2 #4", "1+2 #3 and more"):
        assert "shades" not in pack_row(masked | {"hint": hint})
    long = "a" * 8_001
    assert "shades" not in pack_row(masked | {"hint": long, "shades": [[long, 1.0]]}), "what is cut has other parts"
    assert "shades" not in pack_row(row() | {"shades": []})
    for wrong in ([["1"]], [["1", 2.0]], [["1", -0.5]], [[1, 1.0]], ["ab"], {}):
        assert damage_of(row() | {"shades": wrong}) == "shades"
