from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from atesd.report.html import write_report
from atesd.report.load import load_run, load_study
from atesd.report.study import Run
from atesd.report.words import duration, listed, run_in_words, seen_in_words, settings_in_words
from atesd.runlog import RunDir

from support.runs import SEEN, SENTENCES, write_compare, write_run


def described(path: Path, about: Mapping[str, Any] | None, config: Mapping[str, Any] | None = None) -> Run:
    """A run that says this of itself; None for a run directory of version 1."""
    folder = RunDir.create(path, config or {}, about)
    if about is None:
        (folder.path / "about.json").unlink()
    return load_run(folder.path, "arm", None)


def test_a_run_is_described_in_its_own_words(tmp_path: Path) -> None:
    config = {"exposure": {"kind": "fixed"}, "routing": {"kind": "cliff"}}
    about = {"exposure": "half of it", "controls": ["One control: λ 2", "Another"]}
    run = described(tmp_path / "run", about, config)
    assert seen_in_words(run) == "half of it"
    assert run_in_words(run) == "the teacher sees half of it. One control: λ 2. Another"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"exposure": {"kind": "beta"}}, "exposure: beta"),
        (
            {
                "exposure": {"kind": "fixed"},
                "target": {"kind": "extrapolate"},
                "selection": {"kind": "tip"},
                "gate": {"kind": "sdar"},
                "routing": {"kind": "cliff"},
                "curriculum": {"kind": "reverse_ppl"},
            },
            "exposure: fixed, target: extrapolate, selection: tip, gate: sdar, routing: cliff, curriculum: reverse_ppl",
        ),
        (
            {
                "exposure": {"kind": "fixed"},
                "target": {"kind": "plain"},
                "selection": {"kind": "all"},
                "gate": {"kind": "none"},
                "routing": {"kind": "distil"},
                "curriculum": {"kind": "random"},
            },
            "exposure: fixed",
        ),
        ({}, "exposure: not recorded"),
    ],
)
@pytest.mark.parametrize("about", [None, {"format": 2}])
def test_a_run_without_words_of_its_own_names_kinds(
    about: Mapping[str, Any] | None, config: Mapping[str, Any], words: str, tmp_path: Path
) -> None:
    assert run_in_words(described(tmp_path / "run", about, config)) == words


@pytest.mark.parametrize(
    ("rows", "distils", "reinforces"),
    [
        ([], True, False),  # nothing is known yet
        ([{"route/distil_groups": 2.0, "route/rl_groups": 0.0}], True, False),
        ([{"route/distil_groups": 0.0, "route/rl_groups": 2.0}], False, True),
        ([{"route/distil_groups": 0.0, "route/rl_groups": 2.0}, {"route/distil_groups": 1.0}], True, True),
        ([{"route/distil_groups": 0.0, "route/nll_groups": 2.0}], False, False),
    ],
)
def test_losses_are_those_that_the_run_names_or_else_those_in_its_log(
    rows: Sequence[Mapping[str, float]], distils: bool, reinforces: bool, tmp_path: Path
) -> None:
    told = {"exposure": "", "controls": [], "distils": not distils, "reinforces": not reinforces}
    for name, about in (("old", None), ("new", told)):
        described(tmp_path / name, about)
        for step, row in enumerate([{}, *rows]):
            RunDir.open(tmp_path / name).log(step, row)
    old, new = (load_run(tmp_path / name, name, None) for name in ("old", "new"))
    assert (old.distils, old.reinforces) == (distils, reinforces)
    assert (new.distils, new.reinforces) == (not distils, not reinforces)


def test_the_page_says_what_the_runs_say(tmp_path: Path) -> None:
    arms = ("full", "composed", "grpo")
    folder = write_compare(tmp_path / "cmp", arms=arms, seeds=(1,), steps=4, problems=2)
    text = write_report([folder], tmp_path / "report.html").read_text()
    for arm in arms:
        assert f"<td class=words>{SEEN[arm]}</td>" in text
    beyond, half = SENTENCES["composed"]
    assert f"the teacher sees {SEEN['composed']}. {beyond}. {half.replace('<TIP>', '&lt;TIP&gt;')}</li>" in text


def test_a_comparison_of_version_1_is_still_read(tmp_path: Path) -> None:
    arms = ("full", "learned", "composed", "grpo")
    options: Any = {"arms": arms, "seeds": (1,), "steps": 20, "problems": 4}
    old, new = (
        write_compare(tmp_path / name, version=version, **options) for name, version in (("old", 1), ("new", 2))
    )
    assert not list(old.glob("*/*/about.json"))
    assert len(list(new.glob("*/*/about.json"))) == 4
    text, today = (write_report([folder], tmp_path / f"{folder.name}.html").read_text() for folder in (old, new))
    assert "<td class=words>exposure: fixed</td>" in text
    assert "<td class=words>no teacher</td>" in text
    assert (
        "exposure: influence, target: extrapolate, selection: tip, gate: sdar, routing: cliff, curriculum: reverse_ppl"
    ) in text
    assert not [words for words in SEEN.values() if words in text.split("<script")[0]]
    for shared in ("A\n<em>teacher</em>", "Groups may also be <em>reinforced</em>", "The harm of full exposure"):
        assert shared in text
        assert shared in today
    # all figures and completions are there
    assert figures(text) == figures(today)
    assert len(figures(text)) == 13


def figures(page: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(page.partition('id="data">')[2].partition("</script>")[0])
    drawn: dict[str, Any] = found["figures"]
    return drawn


def test_a_page_without_a_teacher_explains_reinforcement_alone(tmp_path: Path) -> None:
    for version in (1, 2):
        run = write_run(tmp_path / f"grpo{version}", arm="grpo", steps=12, problems=2, version=version)
        text = write_report([run.path], tmp_path / "report.html").read_text().partition("<script")[0]
        assert "Left out: no step with a teacher was logged." in text
        assert "answers training problems on its own and is <em>reinforced</em>" in text
        assert "<em>teacher</em>" not in text
        assert "planted" not in text


def test_a_run_without_a_teacher_names_its_policy_loss_instead(tmp_path: Path) -> None:
    settings = dict(settings_in_words(load_study([write_run(tmp_path / "run", arm="grpo", steps=4, problems=2).path])))
    assert not {"Teacher's weights", "Divergence", "Loss"} & set(settings)
    assert settings["Reinforcement"] == (
        "group-relative advantages divided by their standard deviation, mean over tokens, "
        "ratio of each token clipped to 0.8 to 1.2"
    )


def test_settings_that_differ_between_runs_say_so(tmp_path: Path) -> None:
    folder = write_compare(tmp_path / "cmp", arms=("full", "half"), seeds=(1,), steps=4, problems=2)
    study = load_study([folder])
    study.runs[1].config["teacher"]["weights"] = "live"
    settings = dict(settings_in_words(study))
    assert settings["Steps"] == "4, 32 problems in each"
    assert settings["Learning rate"] == "0.001, falling linearly to 0"
    assert settings["Weights trained"] == "all"
    assert settings["Teacher's weights"] == (
        "differs: frozen: the weights before training; live: the student's own current weights"
    )


def test_durations_and_lists() -> None:
    assert [duration(value) for value in (44.6, 200, 7500)] == ["45 s", "3 min 20 s", "2 h 5 min"]
    assert listed(["a"]) == "a"
    assert listed(["a", "b", "c"]) == "a, b and c"
