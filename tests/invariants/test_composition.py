"""Everything composes: every pair of values runs, what makes no sense is refused, and a sample resumes bit for bit."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from atesd.metrics import METRICS, is_timing
from atesd.recipe import build_config
from atesd.routing.route import Route
from atesd.runlog import RunDir
from atesd.train.loop import Interrupted, Trainer
from atesd.types import UserError

from support.composition import AXES, BASE, bound, covering, covering_in_turns, every, legal, pairs, tree, tree_in_turns
from support.folders import write_byte_model

COVERING = covering()


def name_of(names: dict[str, str]) -> str:
    return "-".join(names.values())


def train(names: dict[str, str], run: Path) -> list[dict[str, Any]]:
    Trainer.start(build_config(tree(names)), run).train()
    return reproducible(run)


def reproducible(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if not is_timing(k)} for row in RunDir.open(run).metrics()]


def known(key: str) -> bool:
    """Tell whether the metric table describes a key."""
    parts = key.split("/")
    for pattern in METRICS:
        names = pattern.split("/")
        head, last = names[:-1], names[-1]
        if all(name in ("{}", part) for name, part in zip(head, parts, strict=False)) and len(parts) >= len(names):
            rest = "/".join(parts[len(head) :])
            if last in ("{}", rest) or ("@" in last and rest.startswith(last.split("@")[0])):
                return True
    return False


def test_the_covering_array_holds_every_pair_that_makes_sense() -> None:
    held = set().union(*(pairs(names) for names in COVERING))
    assert all(legal(names) for names in COVERING)
    assert held == set().union(*(pairs(names) for names in every() if legal(names)))
    assert len(COVERING) < 170


def test_exactly_the_combinations_that_make_no_sense_are_refused() -> None:
    """The full product but for what fits everything."""
    for names in bound():
        if legal(names):
            build_config(tree(names))
        else:
            with pytest.raises(UserError, match=r"set|remove"):
                build_config(tree(names))


@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.parametrize("names", COVERING, ids=name_of)
def test_every_pair_runs(names: dict[str, str], tmp_path: Path) -> None:
    rows = train(names, tmp_path / "run")
    assert [row["step"] for row in rows] == [0, 1, 2]
    unknown = {key for row in rows for key in row if key != "step" and not known(key)}
    assert not unknown
    for row in rows[1:]:
        groups = {name: row[f"route/{name}_groups"] for name in ("distil", "rl", "nll", "skip")}
        assert sum(groups.values()) >= 4, "every group has a route"
        assert "loss/total" in row or row.get("optim/empty_updates"), "no silent zero loss"
        assert ("loss/distil" in row) <= (groups["distil"] > 0)
        assert row["route/idle"] == float("loss/distil" not in row)
        assert ("loss/rl" in row) <= (groups["rl"] > 0)
        assert all(math.isfinite(value) for value in row.values())
    groups = RunDir.open(tmp_path / "run").groups()
    assert [group["step"] for group in groups] == [1] * 4 + [2] * 4
    for group in groups:
        distilled = group["route"] in ("distil", "both")
        assert (group["lambda"] is not None) <= distilled
        assert (group["ratio"] is not None) <= distilled


@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.parametrize("names", COVERING[::9], ids=name_of)
def test_a_sample_resumes_bit_for_bit(names: dict[str, str], tmp_path: Path) -> None:
    whole = train(names, tmp_path / "whole")
    trainer = Trainer.start(build_config(tree(names)), tmp_path / "cut")
    trainer.listener = lambda row: row["step"] == 1 and trainer.stop()
    with pytest.raises(Interrupted):
        trainer.train()
    Trainer.resume(tmp_path / "cut").train()
    assert reproducible(tmp_path / "cut") == whole
    assert RunDir.open(tmp_path / "cut").groups() == RunDir.open(tmp_path / "whole").groups()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.parametrize("exposure", AXES["exposure"])
def test_the_full_product_runs(exposure: str, tmp_path: Path) -> None:
    """About an hour in all."""
    combinations = [names for names in every() if names["exposure"] == exposure and legal(names)]
    for number, names in enumerate(combinations):
        assert [row["step"] for row in train(names, tmp_path / str(number))] == [0, 1, 2], names
        shutil.rmtree(tmp_path / str(number))


def test_every_route_names_its_components() -> None:
    assert {route: route.components for route in Route} == {
        Route.DISTIL: ("distil",),
        Route.RL: ("rl",),
        Route.BOTH: ("distil", "rl"),
        Route.NLL: ("nll",),
        Route.SKIP: (),
    }


def test_every_kind_of_every_axis_is_here() -> None:
    """A new method must join the composition."""
    schema = build_config({}).model_json_schema()
    for axis, values in AXES.items():
        field = schema["properties"][axis]
        options = field.get("oneOf", field.get("anyOf", [field]))
        refs = [option["$ref"] for option in options if "$ref" in option]  # the other one is a class of a user's own
        kinds: set[str] = set()
        for ref in refs:
            kind = schema["$defs"][ref.rpartition("/")[2]]["properties"]["kind"]
            kinds |= set(kind.get("enum", [kind.get("const", kind.get("default"))]))
        in_turns = {"turns", "skills"} if axis == "reveal" else set()  # test_every_value_runs_in_turns
        assert kinds == {value.get("kind", "segments") for value in values.values()} | in_turns, axis


@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.parametrize(
    "names",
    [
        {"exposure": "influence", "routing": "cliff", "target": "extrapolate", "gate": "sdar_multiplier"},
        {"exposure": "paired", "routing": "both", "target": "residual", "selection": "tip"},
    ],
    ids=name_of,
)
def test_adapters_in_bfloat16_compose_too(names: dict[str, str], tmp_path: Path) -> None:
    """With LoRA the frozen teacher and the base are the adapter switched off."""
    model = {"path": str(write_byte_model(tmp_path / "model")), "dtype": "bfloat16", "lora": {"r": 2, "alpha": 4}}
    section = {"model": model, "rl": {"kl_coef": 0.1}, "teacher": {"weights": "live"}, "optim": {"lr": 1e-2}}
    contract = {"contract": {"any": "[a-z]"}, "min_hits": 1, "every": 1}
    config = build_config(tree(names) | section | {"cliff": contract, "step": {"num_steps": 3, "problems": 4}})
    Trainer.start(config, tmp_path / "run").train()
    rows = reproducible(tmp_path / "run")
    assert any("loss/distil" in row for row in rows)
    key = "influence" if names["exposure"] == "influence" else "virtual_nll"
    assert any(f"measure/{key}" in name for row in rows[1:] for name in row)


def test_the_perplexity_of_a_steps_references_is_that_of_its_problems_before_the_update(tmp_path: Path) -> None:
    config = build_config(BASE | {"probe": {"log_references": True}, "step": {"num_steps": 1, "problems": 4}})
    trainer = Trainer.start(config, tmp_path / "run")
    scores = trainer.parts.probe.nll_of(trainer.parts.problems)
    trainer.train()
    chosen = [group["problem_id"] for group in RunDir.open(tmp_path / "run").groups()]
    logged = RunDir.open(tmp_path / "run").metrics()[1]["curriculum/reference_nll"]
    assert logged == pytest.approx(sum(scores[problem] for problem in chosen) / 4, rel=1e-5)


def test_the_router_is_asked_at_the_largest_exposure_of_the_step(tmp_path: Path) -> None:
    section = {"routing": {"kind": "cliff"}, "target": {"kind": "extrapolate"}, "exposure": {"kind": "difficulty"}}
    trainer = Trainer.start(build_config(BASE | section), tmp_path / "run")
    asked: list[float] = []
    router, strength = trainer.parts.router, trainer.parts.strength
    route, at = router.route, strength.at
    trainer.parts.controller.propose = lambda *_: [0.1, 0.9, 0.4, 0.2]  # type: ignore[method-assign]
    router.route = lambda groups, ratio: (asked.append(ratio), route(groups, ratio))[1]  # type: ignore
    strength.at = lambda ratio, *, capped: (asked.append(ratio), at(ratio, capped=capped))[1]  # type: ignore
    trainer._begin()
    trainer._one_step()
    assert asked == [0.9, 0.9]


@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.parametrize("names", covering_in_turns(COVERING), ids=name_of)
def test_every_value_runs_in_turns(names: dict[str, str], tmp_path: Path) -> None:
    """Controllers, gates, selections, routers, targets and orders know nothing of turns, and run with them."""
    (tmp_path / "skills").mkdir()
    (tmp_path / "skills" / "look.md").write_text("*")
    skills = {"kind": "skills", "folder": str(tmp_path / "skills"), "retriever": "ucb", "turns": True}
    reveal = {"reveal": skills} if names["reveal"] == "overlap" else {}
    Trainer.start(build_config(tree_in_turns(names) | reveal), tmp_path / "run").train()
    rows = reproducible(tmp_path / "run")
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert not {key for row in rows for key in row if key != "step" and not known(key)}
    for row in rows[1:]:
        assert row["rollout/turns_mean"] > 1
        assert sum(value for key, value in row.items() if key.startswith("env/ended/")) == (
            4 if names["routing"] == "sft" else 8
        )
        assert "loss/total" in row or row.get("optim/empty_updates"), "no silent zero loss"
