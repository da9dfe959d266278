"""Groups are shared out whole, and are those that one process alone would have."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from atesd.recipe import build_config
from atesd.rollout.driver import Driver
from atesd.rollout.sampler import SamplingConfig
from atesd.train.model import load
from atesd.train.setup import sampling_side
from atesd.train.share import decide_shard, refuse_uncredited, refuse_unshared, shared
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


class Deaf(World):
    """A world whose other processes are not there: instead of their attempts there are none."""

    def gather(self, items: Sequence[Any]) -> list[Any]:
        assert self.size == 2
        left = iter(items)
        return [next(left) if place % 2 == self.rank else () for place in range(self.problems)]

    problems = 5


@pytest.fixture(scope="module")
def side() -> tuple[Driver, list[Any]]:
    config = build_config(PICO)
    model, tokenizer = load(config.model, 0, None)
    driver, _, task = sampling_side(config, model, tokenizer)
    return driver, list(task.train())


# In one call, in several, and in calls that hold less than a group.
@pytest.mark.parametrize("batch_tokens", [262_144, 300, 60])
@pytest.mark.parametrize("decode", ["auto", "generate"])
def test_processes_sample_and_grade_whole_groups_as_one_does(
    batch_tokens: int, decode: str, side: tuple[Driver, list[Any]]
) -> None:
    driver, problems = side
    engine = build_config(PICO | {"rollout": {"engine": {"kind": "hf", "decode": decode}}}).rollout.engine
    sampler = engine.build(driver.sampler._whole, driver.renderer)  # type: ignore[attr-defined]
    graded: list[list[str]] = []

    def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        graded.append(prompts)
        return [float(len(completion)) for completion in completions]

    whole = Driver(sampler, driver.renderer, driver.environment, driver.student_messages, reward)
    sampling = SamplingConfig(temperature=1.0, max_new_tokens=12, group_size=3, batch_tokens=batch_tokens)
    expected = whole.rollout(problems, sampling, seed=7)
    del graded[:]
    for rank in range(2):
        groups = shared(whole, Deaf(rank, 2)).rollout(problems, sampling, seed=7)
        assert [group.problem for group in groups] == problems
        part = groups[rank::2]
        assert not any(group.trajectories for group in groups[1 - rank :: 2])
        assert [[attempt.final.completion_ids for attempt in group.trajectories] for group in part] == [
            [attempt.final.completion_ids for attempt in group.trajectories] for group in expected[rank::2]
        ]
        assert [group.rewards for group in part] == [group.rewards for group in expected[rank::2]]
    assert graded == [[each.problem for each in problems[rank::2] for _ in range(3)] for rank in range(2)]


def test_a_process_without_a_problem_samples_nothing(side: tuple[Driver, list[Any]]) -> None:
    driver, problems = side
    sampling = SamplingConfig(max_new_tokens=4)
    world = Deaf(1, 2)
    world.problems = 1
    (group,) = shared(driver, world).rollout(problems[:1], sampling, seed=0)
    assert group.trajectories == ()


def test_one_process_keeps_its_driver(side: tuple[Driver, list[Any]]) -> None:
    assert shared(side[0], World()) is side[0]


def test_what_cannot_be_graded_is_told_of_the_whole_round(side: tuple[Driver, list[Any]]) -> None:
    driver, problems = side

    class Two(World):
        def gather(self, items: Sequence[Any]) -> list[Any]:
            return [*items, *others]

    sampling = SamplingConfig(max_new_tokens=4)
    others = [group.trajectories for group in driver.rollout(problems[1::2], sampling, seed=0)]
    reader = Driver(driver.sampler, driver.renderer, driver.environment, driver.student_messages, nothing)
    groups = shared(reader, Two(0, 2)).rollout(problems, sampling, seed=0)  # the other process could grade
    assert [len(group.rewards) for group in groups] == [0, 0, 0, 1, 1]
    others = [(replace(attempt, reward=None),) for (attempt,) in others]
    with pytest.warns(UserWarning, match="no completion could be graded: all 5 rewards"):
        shared(reader, Two(0, 2)).rollout(problems, sampling, seed=0)


def nothing(completions: list[str], **columns: Any) -> list[None]:
    return [None] * len(completions)


class Agreeing(World):
    """A world whose other processes do as this one."""

    def collect(self, mine: Any) -> list[Any]:
        return [mine] * self.size


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"gradient": {"kind": "longact"}}, "gradient.kind"),
        ({"reveal": {"kind": "retention"}}, "reveal.kind"),
        ({"codes": {}}, "[codes]"),
        ({"task": {"kind": "doors"}, "env": {"kind": "doors"}}, "env.kind"),
        ({"model": {"lora": {}, "quantization": "4bit"}}, "model.quantization"),
        (
            {"model": {"dtype": "bfloat16", "shard": True}},
            'model.dtype = "bfloat16" of all weights with model.shard cannot be used with 2 processes yet: set '
            'model.dtype = "float32"',
        ),
        (
            {"model": {"lora": {}, "shard": True}, "rollout": {"engine": {"kind": "vllm"}}},
            'rollout.engine.kind = "vllm" with model.shard',
        ),
    ],
)
def test_what_is_not_shared_yet_is_refused_with_the_remedy(change: dict[str, Any], words: str) -> None:
    config = build_config(PICO | change)
    refuse_unshared(config, World(), {})
    with pytest.raises(UserError, match=r"cannot be used with 2 processes yet: .*, or start one") as error:
        refuse_unshared(config, Agreeing(0, 2), {})
    assert str(error.value).startswith(words)


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


def test_a_launchers_precision_is_refused() -> None:
    refuse_unshared(build_config(PICO), World(), {"ACCELERATE_MIXED_PRECISION": "bf16"})
    refuse_unshared(build_config(PICO), Agreeing(0, 2), {"ACCELERATE_MIXED_PRECISION": "no"})
    with pytest.raises(UserError, match="--mixed_precision bf16"):
        refuse_unshared(build_config(PICO), Agreeing(0, 2), {"ACCELERATE_MIXED_PRECISION": "bf16"})


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[3] / "docs" / "accelerate").iterdir()))
def test_the_documented_launch_configs_are_accelerates(path: Path) -> None:
    config = load_config_from_file(str(path))
    each = 4 if path.stem == "gpus_4" else 8
    assert config.num_processes == each * config.num_machines
    assert "Never ran" in path.read_text().splitlines()[0]
    assert config.mixed_precision == "no"
