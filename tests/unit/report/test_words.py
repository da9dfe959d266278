from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from atesd.report.load import load_study
from atesd.report.words import duration, exposure_in_words, listed, settings_in_words

from support.runs import write_compare


@pytest.mark.parametrize(
    ("exposure", "words"),
    [
        ({"kind": "fixed", "ratio": 1.0}, "the whole solution (OPSD)"),
        ({"kind": "fixed", "ratio": 0.0}, "the final answer only"),
        ({"kind": "fixed", "ratio": 0.25}, "the first 25 % of the solution, always"),
        (
            {"kind": "random", "low": 0.0, "high": 1.0, "hold": 5},
            "a random share between 0 % and 100 %, kept for 5 steps",
        ),
        ({"kind": "linear", "start": 1.0, "end": 0.3}, "a share moving from 100 % to 30 % (linear)"),
        ({"kind": "steps", "values": [1.0, 0.5]}, "shares set in advance: 100 %, then 50 %"),
        ({"kind": "beta"}, "a learned share: a Beta policy, rewarded for the student's progress (ATESD)"),
        ({"kind": "new"}, "new"),
        (None, "not recorded"),
    ],
)
def test_exposure_in_words(exposure: Any, words: str) -> None:
    assert exposure_in_words({"exposure": exposure}) == words


def test_supervised_runs_have_no_teacher() -> None:
    config = {"exposure": {"kind": "fixed", "ratio": 1.0}, "routing": {"kind": "sft"}}
    assert exposure_in_words(config).startswith("nothing: no teacher")


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
