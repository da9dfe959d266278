from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from atesd.report.load import load_study
from atesd.report.words import controls_in_words, duration, exposure_in_words, listed, settings_in_words

from support.runs import run_config, write_compare, write_run


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
        ({"kind": "difficulty", "bins": 3}, "learned shares: a Beta policy for each of 3 difficulties of problems"),
        ({"kind": "closed_form"}, "the largest share at which the target's λ is safe by the measured λ*"),
        ({"kind": "new"}, "new"),
        (None, "not recorded"),
    ],
)
def test_exposure_in_words(exposure: Any, words: str) -> None:
    assert exposure_in_words({"exposure": exposure}) == words


def test_supervised_runs_have_no_teacher() -> None:
    config = {"exposure": {"kind": "fixed", "ratio": 1.0}, "routing": {"kind": "sft"}}
    assert exposure_in_words(config).startswith("nothing: no teacher")


def test_reinforced_runs_have_no_teacher() -> None:
    config = {"exposure": {"kind": "fixed", "ratio": 1.0}, "routing": {"kind": "rl"}}
    assert exposure_in_words(config).startswith("nothing: no teacher")


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"target": {"kind": "plain"}}, None),
        ({"target": {"kind": "extrapolate", "lambda_x": 1.0}}, None),
        ({"target": {"kind": "extrapolate", "lambda_x": 1.25}}, "The target goes beyond the teacher: λ 1.25"),
        (
            {"target": {"kind": "extrapolate", "lambda_x": 1.25, "guard": True}},
            "The target goes beyond the teacher: λ 1.25, capped by the measured λ*",
        ),
        (
            {"target": {"kind": "extrapolate", "lambda_x": 0.5}},
            "The target stays between the step-0 weights and the teacher: λ 0.5",
        ),
        (
            {"target": {"kind": "anchor_mix", "weight": 0.4, "anchor": "answer"}},
            "The target mixes 40 % of the teacher with a teacher who sees the answer alone",
        ),
        (
            {"target": {"kind": "residual", "scale": 0.6, "bound": 5.0}},
            "The target adds 60 % of what full exposure would add, at most 5 nats a token",
        ),
        ({"selection": {"kind": "all"}}, None),
        ({"selection": {"kind": "tip", "ratio": 1.0}}, None),
        (
            {"selection": {"kind": "tip", "ratio": 0.2, "score": "entropy"}},
            "Of the tokens 20 % are distilled, those of high student entropy (TIP)",
        ),
        ({"gate": {"kind": "none"}}, None),
        (
            {"gate": {"kind": "sdar", "beta": 5.0, "score": "gap", "target": "divergence"}},
            "Every token's divergence is weighed by a gate: the sigmoid of 5 times the log-probability gap between "
            "teacher and student (SDAR)",
        ),
        (
            {"gate": {"kind": "sdar", "beta": 2.0, "score": "entropy", "target": "surrogate", "centered": True}},
            "Every token's log-probability gap is weighed by a gate: the sigmoid of 2 times the student's entropy, "
            "less 1/2 (SDAR)",
        ),
        ({"routing": {"kind": "distil"}}, None),
        ({"routing": {"kind": "sft"}}, None),
        (
            {"routing": {"kind": "both", "coef": 0.01}},
            "Every group is reinforced and distilled, the distillation loss times 0.01",
        ),
        ({"routing": {"kind": "hdpo"}}, "Groups without any success are distilled, the others reinforced"),
        (
            {"routing": {"kind": "cliff"}},
            "Groups are distilled while the target's λ is at most the measured λ*, else reinforced",
        ),
        ({"routing": {"kind": "new"}}, "Router: new"),
        ({"curriculum": {"kind": "random"}}, None),
        (
            {"curriculum": {"kind": "reverse_ppl", "rescore": "once"}},
            "Hardest problems first, by the perplexity of the reference, scored before the first step",
        ),
        ({"loss": {"prompt_weight": "paced"}}, "Problems weigh p (1 - p) by their pass rate p (PACED)"),
        ({}, None),
    ],
)
def test_controls_in_words(section: Any, words: str | None) -> None:
    assert controls_in_words(section) == ([] if words is None else [words])


def test_every_control_of_a_composed_run_is_named_and_none_of_a_plain_one() -> None:
    assert len(controls_in_words(run_config("composed", 1, 10))) == 5
    assert controls_in_words(run_config("full", 1, 10)) == []


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
