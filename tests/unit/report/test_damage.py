"""Damaged run directories: a note for what is left out, or one line naming file and line; never a traceback."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from atesd.report import html as page
from atesd.report.checked import LARGEST, is_amount, is_number, is_step
from atesd.report.compare import summarise
from atesd.report.html import write_report
from atesd.report.load import load_run, load_study
from atesd.report.special import route_shares
from atesd.runlog import RunDir
from atesd.types import UserError

from support.runs import write_compare, write_run

RUN = "learned/seed_1"
METRICS, LAST = f"{RUN}/metrics.jsonl", f"{RUN}/eval/step_000006.jsonl"
ROLLOUT = f"{RUN}/rollouts/step_000006.jsonl"
NOT_WRITTEN = "learned, seed 1: {} is not what this run wrote"
DEEP = "[" * 50_000 + "]" * 50_000  # deeper than any Python reads: 3.13 reads some ten thousand
Edit = Callable[[Path], None]


def text(file: str, content: str) -> Edit:
    return lambda folder: (folder / file).write_text(content) and None


def without(file: str) -> Edit:
    return lambda folder: (folder / file).unlink()


def replaced(file: str, make: Callable[[Path], object]) -> Edit:
    def edit(folder: Path) -> None:
        (folder / file).unlink()
        make(folder / file)

    return edit


def line(file: str, number: int, content: str) -> Edit:
    """Put another text in place of a line, counted from 1."""

    def edit(folder: Path) -> None:
        lines = (folder / file).read_text().splitlines()
        lines[number - 1] = content
        (folder / file).write_text("\n".join(lines) + "\n")

    return edit


def field(file: str, number: int, **values: Any) -> Edit:
    """Set fields of the object in a line; `...` takes one out."""

    def edit(folder: Path) -> None:
        row = json.loads((folder / file).read_text().splitlines()[number - 1]) | values
        line(file, number, json.dumps({key: value for key, value in row.items() if value is not ...}))(folder)

    return edit


def setting(file: str, **values: Any) -> Edit:
    """Set fields of a JSON file; `...` takes one out."""

    def edit(folder: Path) -> None:
        row = json.loads((folder / file).read_text()) | values
        (folder / file).write_text(json.dumps({key: value for key, value in row.items() if value is not ...}))

    return edit


def logged(key: str, value: Any) -> Edit:
    return field(METRICS, 3, **{key: value})


LOSS = r"metrics\.jsonl, line 3: loss/total is no finite number, left out"
NOTED: Mapping[str, tuple[Edit, str]] = {
    "metric NaN": (logged("loss/total", float("nan")), LOSS),
    "metric Infinity": (logged("loss/total", float("inf")), LOSS),
    "metric beyond any figure": (logged("loss/total", 1e300), LOSS),
    "metric a huge integer": (logged("loss/total", 10**400), LOSS),
    "metric text": (logged("loss/total", "0.5"), LOSS),
    "metric true": (logged("loss/total", True), LOSS),
    "metric a list": (logged("loss/total", [1.0]), LOSS),
    "metric null": (logged("loss/total", None), LOSS),
    "ratio NaN": (logged("exposure/ratio", float("nan")), "exposure/ratio is no finite number"),
    "no step": (logged("step", ...), r"metrics\.jsonl, line 3: no number of a step, left out"),
    "step NaN": (logged("step", float("nan")), "line 3: no number of a step"),
    "step negative": (logged("step", -1), "line 3: no number of a step"),
    "step true": (logged("step", True), "line 3: no number of a step"),
    "step huge": (logged("step", 10**400), "line 3: no number of a step"),
    "unknown metric": (logged("surprise/me", 1.0), NOT_WRITTEN.format(r"metrics\.jsonl")),
    "unknown name of a credit": (logged("exposure/credit/x y", 1.0), NOT_WRITTEN.format(r"metrics\.jsonl")),
    "Beta policy of 0": (logged("exposure/ka", 0.0), NOT_WRITTEN.format(r"metrics\.jsonl")),
    "Beta policy of 1e99": (logged("exposure/ka", 1e99), NOT_WRITTEN.format(r"metrics\.jsonl")),
    "ratio of 1e50": (logged("exposure/ratio", 1e50), NOT_WRITTEN.format(r"metrics\.jsonl")),
    "routes that sum to 0": (logged("route/skip_groups", -32.0), NOT_WRITTEN.format(r"metrics\.jsonl")),
    "metrics empty": (text(METRICS, ""), r"metrics\.jsonl is not what this run wrote \(0 bytes instead of \d+\)$"),
    "metrics missing": (without(METRICS), r"learned, seed 1: metrics\.jsonl is missing"),
    "last line torn": (
        lambda folder: os.truncate(folder / METRICS, (folder / METRICS).stat().st_size - 9),
        r"metrics\.jsonl is not what this run wrote \(\d+ bytes instead of \d+\)$",
    ),
    "same length, other number": (
        lambda folder: text(METRICS, (folder / METRICS).read_text().replace('"step": 3', '"step": 4', 1))(folder),
        r"metrics\.jsonl is not what this run wrote$",
    ),
    "last evaluation empty": (text(LAST, ""), "eval, step 6: empty, left out"),
    "last evaluation missing": (without(LAST), "no evaluation of the last step, 6: the run has no final accuracy"),
    "an evaluation that nobody wrote": (
        text(f"{RUN}/eval/step_last.jsonl", "junk\n"),
        "",
    ),
    "a folder among evaluations": (lambda folder: (folder / RUN / "eval/step_000009.jsonl").mkdir(), ""),
    "stream NaN": (
        field(ROLLOUT, 1, divergence=[float("nan")]),
        "learned, seed 1: a completion of step 6 was left out, its field 'divergence' is damaged",
    ),
    "stream text": (field(ROLLOUT, 1, student_logprob="x"), "field 'student_logprob' is damaged"),
    "stream short": (field(ROLLOUT, 1, student_entropy=[0.5]), "field 'student_entropy' is damaged"),
    "stream missing": (field(ROLLOUT, 1, gate=...), "field 'gate' is damaged"),
    "tokens missing": (field(ROLLOUT, 1, tokens=...), "field 'tokens' is damaged"),
    "tokens numbers": (field(ROLLOUT, 1, tokens=[1, 2]), "field 'tokens' is damaged"),
    "problem null": (field(ROLLOUT, 1, problem=None), "field 'problem' is damaged"),
    "hint a number": (field(ROLLOUT, 1, hint=3), "field 'hint' is damaged"),
    "ratio Infinity": (field(ROLLOUT, 1, ratio=float("inf")), "field 'ratio' is damaged"),
    "reward text": (field(ROLLOUT, 1, reward="1"), "field 'reward' is damaged"),
    "advantage null": (field(ROLLOUT, 1, advantage=None), "field 'advantage' is damaged"),
    "route a list": (field(ROLLOUT, 1, route=[]), "field 'route' is damaged"),
    "half a surrogate pair": (field(ROLLOUT, 1, problem="\ud83d"), NOT_WRITTEN.format(r"rollouts/step_000006\.jsonl")),
    "rollouts empty": (text(ROLLOUT, ""), NOT_WRITTEN.format(r"rollouts/step_000006\.jsonl")),
    "controls text": (
        setting(f"{RUN}/about.json", controls="x"),
        "about.json: field 'controls' is \"x\", and was left out",
    ),
    "exposure a number": (setting(f"{RUN}/about.json", exposure=1), "field 'exposure' is 1, and was left out"),
    "distils null": (setting(f"{RUN}/about.json", distils=None), "field 'distils' is null, and was left out"),
    "about missing": (without(f"{RUN}/about.json"), r"about\.json is missing"),
    "env missing": (without(f"{RUN}/env.json"), r"env\.json is missing"),
    "env NaN": (setting(f"{RUN}/env.json", python=float("nan")), NOT_WRITTEN.format(r"env\.json")),
    "seconds NaN": (setting(f"{RUN}/result.json", seconds=float("nan")), "field 'seconds' is NaN, and was left out"),
    "seconds missing": (setting(f"{RUN}/result.json", seconds=...), NOT_WRITTEN.format(r"result\.json")),
    "last step text": (setting(f"{RUN}/result.json", step="6"), "field 'step' is \"6\", and was left out"),
    "policy text": (
        setting("grpo/seed_1/config.json", rl="x"),
        r"grpo, seed 1: config\.json is not what this run wrote",
    ),
    "clip text": (setting("grpo/seed_1/config.json", rl={"eps_low": "x", "kl_coef": []}), r"config\.json is not what"),
    "rate text": (
        setting(f"{RUN}/config.json", optim={"lr": "x", "schedule": []}),
        NOT_WRITTEN.format(r"config\.json"),
    ),
    "lambda text": (setting(f"{RUN}/config.json", target={"lambda_x": "x"}), NOT_WRITTEN.format(r"config\.json")),
    "group size text": (
        setting(f"{RUN}/config.json", rollout={"group_size": "x"}),
        NOT_WRITTEN.format(r"config\.json"),
    ),
    "sections null": (setting(f"{RUN}/config.json", model=None, task=None), NOT_WRITTEN.format(r"config\.json")),
    "manifest missing": (
        without(f"{RUN}/manifest.json"),
        "manifest.json is missing or damaged: files cannot be vouched",
    ),
    "manifest junk": (text(f"{RUN}/manifest.json", "{"), "manifest.json is missing or damaged"),
    "manifest of nothing": (setting(f"{RUN}/manifest.json", files=[]), "manifest.json is missing or damaged"),
    "manifest too deep": (text(f"{RUN}/manifest.json", DEEP), "manifest.json is (missing or )?damaged"),
    "comparison with another key": (setting("compare.json", surprise=float("nan")), ""),
    "seeds twice": (setting("compare.json", seeds=[1, 1]), ""),
    "seconds of a comparison null": (setting("compare.json", seconds=None), ""),
}

AT = r"/{}, line {} is damaged"
REFUSED: Mapping[str, tuple[Edit, str]] = {
    "metrics no JSON": (line(METRICS, 2, '{"step": '), AT.format(r"metrics\.jsonl", 2)),
    "metrics a number": (line(METRICS, 2, "3"), AT.format(r"metrics\.jsonl", 2)),
    "metrics too deep": (line(METRICS, 2, DEEP), AT.format(r"metrics\.jsonl", 2)),
    "metrics no text": (
        lambda folder: (folder / METRICS).write_bytes(b"\xff\xfe\n") and None,
        r"metrics\.jsonl is damaged",
    ),
    "metrics a folder": (replaced(METRICS, Path.mkdir), r"metrics\.jsonl is no ordinary file"),
    "metrics a pipe": (replaced(METRICS, os.mkfifo), r"metrics\.jsonl is no ordinary file"),
    "graded NaN": (field(LAST, 2, reward=float("nan")), r"step_000006\.jsonl, line 2, .*'reward' is NaN"),
    "graded Infinity": (field(LAST, 2, reward=float("inf")), r"line 2, .*'reward' is Infinity"),
    "graded text": (field(LAST, 2, reward="1.0"), r"line 2, .*'reward'"),
    "graded nothing": (field(LAST, 2, reward=...), r"line 2, .*'reward' is missing"),
    "problem without name": (field(LAST, 3, problem_id=...), r"line 3, .*'problem_id' is missing"),
    "problem named by a list": (field(LAST, 3, problem_id=[]), r"line 3, .*'problem_id'"),
    "level a number": (field(LAST, 3, level=5), r"line 3, .*'level'"),
    "answer a list": (field(LAST, 3, answer=["2"]), r"line 3, .*'answer'"),
    "length null": (field(LAST, 3, length=None), r"line 3, .*'length'"),
    "length negative": (field(LAST, 3, length=-1), r"line 3, .*'length'"),
    "stop null": (field(LAST, 3, stop=None), r"line 3, .*'stop'"),
    "traits a list": (field(LAST, 3, traits=[]), r"line 3, .*'traits'"),
    "trait NaN": (field(LAST, 3, traits={"cites_hint": float("nan")}), r"line 3, .*'traits'"),
    "evaluation a list": (line(LAST, 4, "[]"), AT.format(r"eval/step_000006\.jsonl", 4)),
    "rollout no JSON": (line(ROLLOUT, 2, "{"), AT.format(r"rollouts/step_000006\.jsonl", 2)),
    "about a list": (text(f"{RUN}/about.json", "[]"), r"about\.json is damaged \(no object\)"),
    "result empty": (text(f"{RUN}/result.json", ""), r"result\.json is damaged"),
    "result a list": (text(f"{RUN}/result.json", "[]"), r"result\.json is damaged"),
    "env a list": (text(f"{RUN}/env.json", "[]"), r"env\.json is damaged"),
    "env too deep": (text(f"{RUN}/env.json", f'{{"a": {DEEP}}}'), r"env\.json is damaged"),
    "config empty": (text(f"{RUN}/config.json", ""), r"config\.json is damaged"),
    "config cut short": (text(f"{RUN}/config.json", '{"seed": 1, '), r"config\.json is damaged"),
    "config no text": (
        lambda folder: (folder / RUN / "config.json").write_bytes(b"\xff") and None,
        r"config\.json is damaged",
    ),
    "comparison empty": (text("compare.json", ""), r"compare\.json is damaged"),
    "comparison a list": (text("compare.json", "[]"), r"compare\.json is damaged"),
    "comparison cut short": (text("compare.json", '{"arms": {'), r"compare\.json is damaged"),
    "no arms": (setting("compare.json", arms=...), r"compare\.json is damaged \(field 'arms' is missing\)"),
    "arms a list": (setting("compare.json", arms=["learned"]), "field 'arms'"),
    "overrides text": (setting("compare.json", arms={"learned": "x=1"}), "field 'arms'"),
    "an arm elsewhere": (
        setting("compare.json", arms={"../learned": []}),
        r"compare\.json is damaged \(.*names of arms",
    ),
    "an arm without name": (setting("compare.json", arms={"": []}), "names of arms"),
    "an arm of half a pair": (setting("compare.json", arms={"\ud83d": []}), "names of arms"),
    "seeds text": (setting("compare.json", seeds="1"), "field 'seeds'"),
    "a seed between seeds": (setting("compare.json", seeds=[1.5]), "field 'seeds'"),
    "k of 0": (setting("compare.json", k=0), "field 'k' is 0"),
    "k NaN": (setting("compare.json", k=float("nan")), "field 'k' is NaN"),
    "recipe null": (setting("compare.json", recipe=None), "field 'recipe' is null"),
    "task a number": (setting("compare.json", task=3), "field 'task' is 3"),
    "seconds text": (setting("compare.json", seconds="x"), r"compare\.json is damaged"),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound") / "cmp"
    return write_compare(folder, arms=("learned", "grpo"), seeds=(1,), steps=6, problems=4)


@pytest.fixture
def copy(sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(page, "get_plotlyjs", lambda: "plotly")  # four megabytes a page
    return Path(shutil.copytree(sound, tmp_path / "cmp"))


def notes_of(written: str) -> list[str]:
    notes = re.search(r"Not everything is as the runs wrote it.*?<ul>(.*?)</ul>", written)
    return [html.unescape(note) for note in re.findall("<li>(.*?)</li>", notes[1])] if notes else []


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} in the page")


def data_of(written: str) -> Any:
    found = re.search(r'<script type="application/json"[^>]*>(.*?)</script>', written, re.DOTALL)
    assert found is not None
    return json.loads(found[1], parse_constant=refuse)


def test_a_sound_comparison_has_no_note(copy: Path) -> None:
    written = write_report([copy], copy / "report.html").read_text()
    assert notes_of(written) == load_study([copy]).notes == []
    assert "is not what this run wrote" not in written


@pytest.mark.parametrize("name", NOTED)
def test_what_is_damaged_is_left_out_and_noted(name: str, copy: Path) -> None:
    edit, expected = NOTED[name]
    edit(copy)
    written = write_report([copy], copy / "report.html").read_text()
    summarise(copy)
    data_of(written)
    notes = notes_of(written)
    assert any(re.search(expected, note) for note in notes) if expected else not notes, notes
    alone = write_report([copy / RUN], copy / "alone.html").read_text()
    assert len(notes_of(alone)) == sum(note.startswith("learned") for note in notes)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_one_line_with_the_file(name: str, copy: Path) -> None:
    edit, expected = REFUSED[name]
    edit(copy)
    with pytest.raises(UserError, match=expected) as caught:
        write_report([copy], copy / "report.html")
    assert "\n" not in str(caught.value)
    assert not (copy / "report.html").exists()


def test_every_file_that_differs_is_noted_and_runs_of_version_1_have_no_seals(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=6, problems=4)
    for name in ("groups.jsonl", "about.json", "eval/step_000003.jsonl"):
        with (run.path / name).open("a") as file:
            file.write("\n")
    (run.path / "groups.jsonl").touch()
    found = load_run(run.path, "a", None).notes
    assert [note.partition(" is")[0] for note in found] == ["about.json", "eval/step_000003.jsonl"]
    old = write_run(tmp_path / "old", steps=6, problems=4, version=1)
    (old.path / "manifest.json").unlink()
    assert load_run(old.path, "a", None).notes == ()


def test_the_logs_of_a_run_that_goes_on_may_grow(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=6, problems=4)
    run.amend(run.config(), [("step.num_steps", 6, 8)])
    run.log(7, {"loss/total": 0.5})
    assert load_run(run.path, "a", None).notes == ()
    (run.path / "config.json").write_text("{}")
    assert load_run(run.path, "a", None).notes == (
        "config.json is not what this run wrote (2 bytes instead of "
        f"{json.loads((run.path / 'manifest.json').read_text())['files']['config.json']['size']})",
    )


def test_a_file_of_fewer_problems_is_named(copy: Path) -> None:
    other = write_run(copy / "learned" / "seed_2", seed=2, steps=6, problems=3)
    setting("compare.json", seeds=[1, 2])(copy)
    with pytest.raises(UserError, match=f"{other.path}/eval/step_00000.*has 3, .*seed_1/eval/.* has 4"):
        write_report([copy], copy / "report.html")


def test_a_note_is_text_and_many_are_counted(copy: Path) -> None:
    row = {f"<b>{number}</b>": "x" for number in range(30)}
    field(METRICS, 3, **row)(copy)
    written = write_report([copy], copy / "report.html").read_text()
    notes = notes_of(written)
    assert "<b>0</b>" not in written
    assert len(notes) == 21
    assert notes[-1] == "and 11 more"  # 30 values and the seal, of which 20 are shown


def test_shares_leave_out_steps_whose_counts_make_no_sense(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run", {})
    run.log(1, {"route/distil_groups": 2.0, "route/skip_groups": -2.0})
    run.log(2, {"route/distil_groups": 3.0, "route/skip_groups": 1.0})
    assert route_shares(load_run(run.path, "a", None)).tolist() == [[2, 0.75, 0, 0, 0, 0.25]]


@pytest.mark.parametrize(
    ("value", "number", "amount", "step"),
    [
        (0, True, True, True),
        (-1, True, False, False),
        (0.5, True, True, False),
        (True, False, False, False),
        (float("nan"), False, False, False),
        (float("-inf"), False, False, False),
        (LARGEST, False, False, False),
        (10**400, False, False, False),
        (10**12, True, True, False),
        ("1", False, False, False),
        (None, False, False, False),
    ],
)
def test_what_counts_as_a_number(value: Any, number: bool, amount: bool, step: bool) -> None:
    assert (is_number(value), is_amount(value), is_step(value)) == (number, amount, step)


def test_an_edited_log_of_a_run_that_is_not_complete_is_noted(tmp_path: Path) -> None:
    """Its newest checkpoint remembers how the logs began."""
    run = write_run(tmp_path / "run", steps=4, problems=4, finished=False)
    for step, written in ((2, {"metrics.jsonl": {"size": 3, "sha256": "0"}}), (4, run.written()), (6, None), (8, [])):
        (run.checkpoints / f"step_{step:06d}").mkdir()
        (run.checkpoints / f"step_{step:06d}" / "state.json").write_text(json.dumps({"written": written}))
    (run.checkpoints / "step_000010").mkdir()
    (run.checkpoints / "step_000012.partial").mkdir()
    run.log(5, {"loss/total": 1.0})
    assert load_run(run.path, "learned", 1).notes == (), "what came later is not known to any checkpoint"
    text = run.metrics_path.read_text()
    run.metrics_path.write_text(text.replace('"step": 3', '"step": 9', 1))
    (run.path / "eval" / "step_000002.jsonl").unlink()
    assert load_run(run.path, "learned", 1).notes == (
        "metrics.jsonl is not what this run wrote",
        "eval/step_000002.jsonl is missing",
    )
    shutil.rmtree(run.checkpoints)
    assert load_run(run.path, "learned", 1).notes == ()
