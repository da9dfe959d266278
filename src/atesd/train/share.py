"""Rollouts shared out among processes, problem by problem, and what several processes cannot do yet."""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, cast

from atesd.config import RunConfig
from atesd.gradients.rule import AllGradients
from atesd.rollout.attempt import Attempt
from atesd.rollout.driver import Driver, Underway
from atesd.rollout.grading import Judging
from atesd.rollout.sampler import AheadSampler, SamplingConfig
from atesd.seeds import derive_seed
from atesd.train.world import World
from atesd.types import Ending, Group, Policy, Problem, Turn, UserError

_IGNORED = (
    ("FSDP_OFFLOAD_PARAMS", "--fsdp_offload_params", ""),
    (
        "FSDP_ACTIVATION_CHECKPOINTING",
        "--fsdp_activation_checkpointing",
        ", and set model.gradient_checkpointing = true",
    ),
)
"""What accelerate would do beside sharding, by the variable that asks for it."""
_LAUNCHERS = (
    ("ACCELERATE_MIXED_PRECISION", "no", "--mixed_precision", 'set model.dtype = "bfloat16"'),
    ("ACCELERATE_DYNAMO_BACKEND", "no", "--dynamo_backend", "set model.compile = true"),
    (
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
        "1",
        "--gradient_accumulation_steps",
        "set step.token_budget, which cuts an update into micro-batches",
    ),
)
"""What accelerate would do to the student's passes alone, or to gradients that are divided already: the variable, what
it says where nothing is asked for, the option, and the recipe's own."""
_SECTIONS = {"controller": "exposure", "router": "routing"}
"""Where a recipe chooses a policy that has another name than its section."""


class PartialSampler(Protocol):
    """An engine that samples some of the prompts as it would among all."""

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingConfig,
        *,
        seed: int,
        part: Sequence[int] | None = None,
        **more: Any,
    ) -> list[Turn]:
        """Sample one completion for each prompt of the part."""
        ...


@dataclass(frozen=True, slots=True)
class SharedDriver(Driver):
    """A driver whose process plays, samples and grades the groups of some problems; all processes get all groups.

    A group is never split, and has the episodes and completions that one process alone would have, but for rounding:
    seeds and draws are those of an attempt's place among all attempts. Before every turn all processes tell each other
    which attempts go on, and what they read; one whose attempts are over takes part as well.
    """

    world: World = field(default_factory=World)

    def rollout(self, problems: Sequence[Problem], sampling: SamplingConfig, *, seed: int) -> list[Group]:
        """Return one graded group a problem. UserError where the environment fails in all attempts of all processes."""
        sampler = cast("PartialSampler", self.sampler)
        longest = sampling.max_new_tokens
        mine = self._dealt(problems, sampling, seed, longest)
        active, turn = mine, 0
        while prompts := self._read(active):
            turns = sampler.sample(
                list(prompts.values()),
                sampling,
                seed=derive_seed(seed, "turn", turn) if turn else seed,
                part=[number for number, place in enumerate(prompts) if place in active],
                **self._known([active.get(place) for place in prompts]),
            )
            active, turn = self._heard(active, turns, longest), turn + 1
        return self._gathered(problems, list(mine.values()))

    def ahead(self, problems: Sequence[Problem], sampling: SamplingConfig, *, seed: int) -> Underway:
        """Ask for the groups that `rollout` would return now, without waiting; all processes must wait for them."""
        mine = self._dealt(problems, sampling, seed, 0)
        prompts = self._read(mine)
        sampler = cast("AheadSampler", self.sampler)
        part = [number for number, place in enumerate(prompts) if place in mine]
        submitted = sampler.submit(list(prompts.values()), sampling, seed=seed, part=part)

        def groups() -> list[Group]:
            going_on = self._heard(mine, submitted.result(), 0)
            assert not going_on, "environments of several turns are refused"
            return self._gathered(problems, list(mine.values()))

        return Underway(groups, submitted.drop, submitted.seconds)

    def replay(self, problems: Sequence[Problem]) -> list[Group]:
        """Play the expert's replies: every process plays all that it is asked for, by itself."""
        return self._by_itself.replay(problems)

    def reference(self, problems: Sequence[Problem], limit: int) -> list[Group]:
        """Return the reference solutions in place of samples: every process grades all of them."""
        return self._judged(self._by_itself.reference(problems, limit))

    @property
    def _by_itself(self) -> Driver:
        return Driver(**{each.name: getattr(self, each.name) for each in fields(Driver)})

    def _dealt(
        self, problems: Sequence[Problem], sampling: SamplingConfig, seed: int, longest: int
    ) -> dict[int, Attempt]:
        """Open the attempts at this process's problems, by their place among all attempts."""
        size = sampling.group_size
        part = self.world.share(range(len(problems)))
        places = [place * size + number for place in part for number in range(size)]
        asked = [problems[place // size] for place in places]
        return dict(zip(places, self._opened(asked, seed, longest, places), strict=True))

    def _read(self, active: Mapping[int, Attempt]) -> dict[int, list[int]]:
        """Return what is read next in every attempt that goes on in any process, in the order of their places."""
        known = self.world.collect({place: attempt.prompt for place, attempt in active.items()})
        return dict(sorted((place, prompt) for hand in known for place, prompt in hand.items()))

    def _heard(self, active: Mapping[int, Attempt], turns: Sequence[Turn], longest: int) -> dict[int, Attempt]:
        """Take in the turns of this process's attempts, and return those that go on."""
        self._begin(list(active.values()), turns)
        return {
            place: attempt
            for (place, attempt), turn in zip(active.items(), turns, strict=True)
            if self._goes_on(attempt, turn, longest)
        }

    def _gathered(self, problems: Sequence[Problem], mine: Sequence[Attempt]) -> list[Group]:
        """Grade this process's attempts, and return the groups of all."""
        graded = self._grouped(self.world.share(problems), mine, problems)
        ends = iter([(attempt.ended, attempt.why) for attempt in mine])
        known = self.world.gather([(each.trajectories, list(islice(ends, len(each.trajectories)))) for each in graded])
        groups = [Group(problem, each) for problem, (each, _) in zip(problems, known, strict=True)]
        Driver._report_failures(self, [end for _, found in known for end in found])
        if not self.environment.grades:
            self._judged(groups)
        Driver.tell_ungradable(self, [each.reward for group in groups for each in group.trajectories])
        return groups

    def _judged(self, groups: list[Group]) -> list[Group]:
        """Tell a reward function of the whole round, where it asks for that."""
        if isinstance(self.reward, Judging):
            attempts = [(group.problem, each) for group in groups for each in group.trajectories]
            self.reward.judge([each.reward for _, each in attempts], [problem.answer for problem, _ in attempts])
        return groups

    def _report_failures(self, ends: Sequence[tuple[Ending | None, str]]) -> None:
        """Leave it until all attempts are known."""

    def tell_ungradable(self, rewards: Sequence[float | None]) -> None:
        """Leave it until all rewards are there."""


def shared(driver: Driver, world: World) -> Driver:
    """Return the driver as several processes use it."""
    if world.size == 1:
        return driver
    reward = driver.reward.by_shares() if isinstance(driver.reward, Judging) else driver.reward
    known = {each.name: getattr(driver, each.name) for each in fields(Driver)}
    return SharedDriver(**known | {"reward": reward}, world=world)


def refuse_unshared(config: RunConfig, world: World, environment: Mapping[str, str] = os.environ) -> None:
    """UserError for what several processes cannot do yet, or where they were given different recipes.

    And, of one process as well, for what a launcher would change behind the recipe's back.
    """
    if _says(environment, "ACCELERATE_USE_DEEPSPEED"):
        raise UserError(
            "accelerate's --use_deepspeed shards the model in a way that atesd does not: launch with --use_fsdp "
            "--fsdp_version 2 instead, or set model.shard = true"
        )
    for variable, nothing, option, remedy in _LAUNCHERS:
        asked = environment.get(variable, nothing).lower()
        if asked != nothing:
            raise UserError(f"accelerate's {option} {asked} ({variable}) is not supported: leave it out, and {remedy}")
    if world.size == 1:
        return
    for unshared, what, remedy in _unshared(config):
        if unshared:
            raise UserError(
                f"{what} cannot be used with {world.size} processes yet: {remedy}, or start one (atesd train)"
            )
    world.refuse_difference("different recipes", config.model_dump_json(), "start all with the same command")


def refuse_uncredited(policies: Mapping[str, Policy], world: World) -> None:
    """UserError where a policy that has seen nothing yet asks, or will ask, for credit of sharded weights."""
    for name, policy in policies.items():
        asked = [each.kind for step in (0, 1) for each in policy.wants(step)]
        found = next((kind for kind in asked if "influence" in kind or kind.startswith("virtual")), None)
        if found is not None:
            section = _SECTIONS.get(name, name)
            raise UserError(
                f"the {name} asks for {found}, which compares gradients of whole weights, and model.shard = true cuts "
                f"them among {world.size} processes: remove model.shard, or set another {section}.kind"
            )


def decide_shard(config: RunConfig, environment: MutableMapping[str, str] = os.environ) -> RunConfig:
    """Return the recipe with `model.shard` where accelerate was launched with --use_fsdp, which is then forgotten.

    UserError for another version than FSDP2, and for options of it that would be ignored.
    """
    if not _says(environment, "ACCELERATE_USE_FSDP"):
        return config
    version = environment.get("FSDP_VERSION", "1")
    if version != "2":
        raise UserError(
            f"accelerate's --use_fsdp with --fsdp_version {version} is not supported: give --fsdp_version 2, or launch "
            "without both and set model.shard = true"
        )
    for switch, option, remedy in _IGNORED:
        if _says(environment, switch):
            raise UserError(f"accelerate's {option} true is not supported: leave it out{remedy}")
    if environment.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() not in {"true", "full_shard"}:
        raise UserError(
            "accelerate's --fsdp_reshard_after_forward false is not supported: leave it out, or set it to true"
        )
    del environment["ACCELERATE_USE_FSDP"]  # else accelerate would wrap what it is given once more
    return config.model_copy(update={"model": config.model.model_copy(update={"shard": True})})


def refuse_unseen(run: Path, world: World) -> None:
    """UserError where a process does not see the run directory: each saves its share of sharded weights there."""
    world.barrier()
    record = run / "env.json"
    world.refuse_difference(
        f"different folders at {run}, where each saves its share of the weights",
        record.read_text(encoding="utf-8") if record.is_file() else "",
        "put --out on a disk that all machines have under the same path, or remove model.shard",
    )


def _says(environment: Mapping[str, str], switch: str) -> bool:
    return environment.get(switch, "false").lower() in {"true", "1"}


def refuse_several(world: World, what: str) -> None:
    """UserError for what only one process can do, if there are several."""
    if world.size > 1:
        raise UserError(f"{what} trains in one process, {world.size} were started: start one (atesd train)")


def _unshared(config: RunConfig) -> list[tuple[bool, str, str]]:
    """Return what may stand in a recipe, whether it does, and what to do."""
    section: Any = config
    return [
        (config.codes is not None and config.model.shard, "[codes] with model.shard", "remove one of both"),
        (
            config.reveal.masks and config.model.shard,
            f'reveal.kind = "{config.reveal.kind}" with model.shard',
            'set reveal = {kind = "segments"}, or remove model.shard',
        ),
        (config.gradient.watches, f'gradient.kind = "{config.gradient.kind}"', 'set gradient = {kind = "none"}'),
        (
            not config.rollout.engine.samples_parts,
            f'rollout.engine.kind = "{section.rollout.engine.kind}"',
            'set rollout.engine = {kind = "hf"}',
        ),
        (config.model.quantization is not None, "model.quantization", "remove it"),
        (
            config.model.shard and type(config.gradient) is not AllGradients,
            f'gradient.kind = "{config.gradient.kind}" with model.shard',
            'set gradient = {kind = "none"}, or remove model.shard',
        ),
    ]
