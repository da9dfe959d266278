"""What several processes refuse, and what a launcher says that the recipe then holds."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from atesd.recipe import build_config
from atesd.train.loop import Trainer
from atesd.train.share import decide_shard, refuse_uncredited, refuse_unshared
from atesd.train.world import World
from atesd.types import Measurement, Stateless, UserError

PICO: dict[str, Any] = {
    "threads": 1,
    "task": {"kind": "pico", "train_size": 5, "probe_size": 1, "eval_size": 1},
    "prompt": {"student": "{problem}", "teacher": "{problem}\n>{hint}", "answer": "\n#{answer}"},
}


class Asking(Stateless):
    """A policy that asks for one thing in every step."""

    def __init__(self, measurement: Measurement) -> None:
        self._measurement = measurement

    def wants(self, step: int) -> list[Measurement]:
        return [self._measurement]


class Agreeing(World):
    """A world whose other processes do as this one."""

    def collect(self, mine: Any) -> list[Any]:
        return [mine] * self.size


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"gradient": {"kind": "longact"}, "model": {"shard": True}}, "gradient.kind"),
        ({"reveal": {"kind": "retention"}, "model": {"shard": True}}, "reveal.kind"),
        ({"codes": {}, "model": {"shard": True}}, "[codes] with model.shard"),
        ({"model": {"lora": {}, "quantization": "4bit"}}, "model.quantization"),
    ],
)
def test_what_is_not_shared_yet_is_refused_with_the_remedy(change: dict[str, Any], words: str) -> None:
    config = build_config(PICO | change)
    refuse_unshared(config, World(), {})
    with pytest.raises(UserError, match=r"cannot be used with 2 processes yet: .*, or start one") as error:
        refuse_unshared(config, Agreeing(0, 2), {})
    assert str(error.value).startswith(words)


@pytest.mark.parametrize(
    "change",
    [
        {"gradient": {"kind": "longact"}},
        {"reveal": {"kind": "retention"}},
        {"codes": {}},
        {"task": {"kind": "doors"}, "env": {"kind": "doors"}},
        {"model": {"lora": {}, "shard": True}, "rollout": {"engine": {"kind": "vllm"}}},
    ],
)
def test_what_is_shared_is_not_refused(change: dict[str, Any]) -> None:
    refuse_unshared(build_config(PICO | change), Agreeing(0, 2), {})


def test_a_rule_that_watches_passes_by_itself_is_refused() -> None:
    config = build_config(PICO | {"gradient": {"kind": "longact"}})
    own = type("Watching", (type(config.gradient),), {"watches": True})()
    with pytest.raises(UserError, match=r"gradient\.kind"):
        refuse_unshared(config.model_copy(update={"gradient": own}), Agreeing(0, 2), {})


def test_an_engine_elsewhere_is_refused() -> None:
    config = build_config(PICO)
    engine = type(config.rollout.engine)
    elsewhere = type("Elsewhere", (engine,), {"samples_parts": False})()
    rollout = config.rollout.model_copy(update={"engine": elsewhere})
    with pytest.raises(UserError, match=r"rollout\.engine\.kind"):
        refuse_unshared(config.model_copy(update={"rollout": rollout}), Agreeing(0, 2), {})


@pytest.mark.parametrize("size", [1, 2])
def test_deepspeed_is_refused(size: int) -> None:
    name = "ACCELERATE_USE_DEEPSPEED"
    refuse_unshared(build_config(PICO), Agreeing(0, size), {name: "false"})
    with pytest.raises(UserError, match="--use_deepspeed shards the model in a way that atesd does not"):
        refuse_unshared(build_config(PICO), Agreeing(0, size), {name: "true"})


def test_accelerates_fsdp2_is_the_recipes_setting_and_forgotten() -> None:
    config = build_config(PICO)
    for environment in ({}, {"ACCELERATE_USE_FSDP": "false"}):
        assert decide_shard(config, environment) == config
    # What accelerate's launcher sets for --use_fsdp --fsdp_version 2 and nothing else.
    environment = {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_RESHARD_AFTER_FORWARD": "full_shard",
        "FSDP_OFFLOAD_PARAMS": "false",
        "FSDP_ACTIVATION_CHECKPOINTING": "false",
    }
    expected = build_config(PICO | {"model": {"shard": True}})
    assert decide_shard(config, environment) == expected
    assert "ACCELERATE_USE_FSDP" not in environment
    assert decide_shard(expected, {**environment, "ACCELERATE_USE_FSDP": "true"}) == expected


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"FSDP_VERSION": "1"}, "give --fsdp_version 2, or launch without both and set model.shard = true"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "--fsdp_offload_params true is not supported: leave it out"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "and set model.gradient_checkpointing = true"),
        ({"FSDP_RESHARD_AFTER_FORWARD": "false"}, "--fsdp_reshard_after_forward false is not supported"),
    ],
)
def test_options_of_fsdp_that_would_be_ignored_are_refused(change: dict[str, str], words: str) -> None:
    environment = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", **change}
    with pytest.raises(UserError, match=re.escape(words)):
        decide_shard(build_config(PICO), environment)


def test_a_gradient_rule_over_shares_is_refused() -> None:
    config = build_config(PICO | {"model": {"shard": True}})
    rule = type("Rule", (type(config.gradient),), {})()
    with pytest.raises(UserError, match=r"gradient\.kind = .* with model\.shard cannot be used with 2 processes yet"):
        refuse_unshared(config.model_copy(update={"gradient": rule}), Agreeing(0, 2), {})
    refuse_unshared(config, Agreeing(0, 2), {})


def test_credit_of_shares_is_refused_by_the_part_that_asks_for_it() -> None:
    policies = {"controller": Asking(Measurement("probe_nll")), "router": Asking(Measurement("virtual_nll", 0.5))}
    with pytest.raises(UserError, match=r"the router asks for virtual_nll, .* remove model\.shard"):
        refuse_uncredited(policies, World(0, 2))
    refuse_uncredited({"controller": policies["controller"]}, World(0, 2))


@pytest.mark.parametrize("world", [World(), Agreeing(0, 2)])
@pytest.mark.parametrize(
    ("variable", "nothing", "asked", "option"),
    [
        ("ACCELERATE_MIXED_PRECISION", "no", "bf16", "--mixed_precision bf16"),
        ("ACCELERATE_DYNAMO_BACKEND", "NO", "INDUCTOR", "--dynamo_backend inductor"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1", "4", "--gradient_accumulation_steps 4"),
    ],
)
def test_what_a_launcher_would_change_is_refused(
    world: World, variable: str, nothing: str, asked: str, option: str
) -> None:
    refuse_unshared(build_config(PICO), world, {variable: nothing})
    with pytest.raises(
        UserError, match=rf"accelerate's {option} \({variable}\) is not supported: leave it out, and set"
    ):
        refuse_unshared(build_config(PICO), world, {variable: asked})


def test_what_a_launcher_would_change_is_refused_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with pytest.raises(UserError, match="--gradient_accumulation_steps 4"):
        Trainer.start(build_config(PICO), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[3] / "docs" / "accelerate").iterdir()))
def test_the_documented_launch_configs_are_accelerates(path: Path) -> None:
    config = load_config_from_file(str(path))
    each = 4 if path.stem == "gpus_4" else 8
    assert config.num_processes == each * config.num_machines
    assert "Never ran" in path.read_text().splitlines()[0]
    assert config.mixed_precision == "no"
