"""TextWorld's games (1806.11532) as problems: built here from seeds, without any download, with their winning commands.

A game is compiled once, about a second, and kept in `folder`. Its number is its seed; training games come first, then
those of the probe and of evaluation, and a game with the same text as an earlier one is passed over.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from atesd.facts import RunFacts
from atesd.rewards.kinds import ExactConfig, Grader
from atesd.tasks.base import Task, TaskMethod, content_of
from atesd.types import ExpertTurn, Problem, UserError


class TextWorldConfig(TaskMethod):
    """Games that TextWorld builds, each with the commands that win it as its expert; play them with env `textworld`."""

    kind: Literal["textworld"] = "textworld"
    train_size: Annotated[int, Field(ge=1)] = 16
    """Training games."""
    probe_size: Annotated[int, Field(ge=0)] = 4
    """Games on which progress is measured."""
    eval_size: Annotated[int, Field(ge=1)] = 8
    """Held-out games."""
    first_seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the first game."""
    rooms: Annotated[int, Field(ge=1, le=20)] = 2
    """Rooms of a game."""
    objects: Annotated[int, Field(ge=1, le=50)] = 4
    """Objects of a game."""
    quest_length: Annotated[int, Field(ge=1, le=20)] = 2
    """Commands that win a game."""
    folder: str = ""
    """Where compiled games are kept; unset, atesd/textworld in the user's cache folder."""

    def build(self, run: RunFacts) -> Task:  # noqa: ARG002
        """Return the task. UserError where TextWorld is not installed."""
        if find_spec("textworld") is None:
            raise UserError("task.kind = \"textworld\" needs the library: pip install 'atesd[textworld]'")
        sizes = (self.train_size, self.probe_size, self.eval_size)
        games = _games(self, sum(sizes))
        ends = (sizes[0], sizes[0] + sizes[1])
        return TextWorldTask(games[: ends[0]], games[ends[0] : ends[1]], games[ends[1] :])


@dataclass(frozen=True, slots=True)
class TextWorldTask:
    """Games in three sets."""

    training: list[Problem]
    probing: list[Problem]
    held_out: list[Problem]
    name: str = "textworld"
    default_reward: Grader = field(default_factory=ExactConfig)

    def train(self) -> list[Problem]:
        """Return the training games."""
        return self.training

    def probe(self) -> list[Problem]:
        """Return the probe games."""
        return self.probing

    def evaluation(self) -> list[Problem]:
        """Return the held-out games."""
        return self.held_out

    def traits(self, problem: Problem, completion: str) -> dict[str, bool]:  # noqa: ARG002
        """Count nothing."""
        return {}


def _games(config: TextWorldConfig, count: int) -> list[Problem]:
    place = Path(config.folder) if config.folder else _cache() / "atesd" / "textworld"
    shape = f"{config.rooms}-{config.objects}-{config.quest_length}"
    place.mkdir(parents=True, exist_ok=True)
    found: list[Problem] = []
    seen: set[str] = set()
    for seed in _seeds(config.first_seed, most=20 * count + 50):
        told = _game(config, seed, place / f"{shape}-{seed}.z8")
        problem = _problem(told, f"textworld-{shape}-{seed}", str(place / f"{shape}-{seed}.z8")) if told else None
        if problem is not None and content_of(problem) not in seen:
            seen.add(content_of(problem))
            found.append(problem)
        if len(found) == count:
            return found
    raise UserError(
        f"TextWorld makes only {len(found)} of {count} different games with task.rooms = {config.rooms}, "
        f"task.objects = {config.objects} and task.quest_length = {config.quest_length}: raise rooms or objects"
    )


def _seeds(first: int, most: int) -> Iterator[int]:
    return iter(range(first, first + most))


def _game(config: TextWorldConfig, seed: int, path: Path) -> dict[str, Any] | None:
    """Return what is said of a game, which is built where the folder does not hold it; None where no quest fits."""
    notes = path.with_suffix(".atesd.json")
    if notes.is_file() and path.is_file():
        told: dict[str, Any] = json.loads(notes.read_text(encoding="utf-8"))
        if told.get("game") == hashlib.sha256(path.read_bytes()).hexdigest():
            return told
    import textworld
    import textworld.generator
    from textworld.generator import GameOptions
    from textworld.generator.chaining import QuestGenerationError

    options = GameOptions()
    options.seeds, options.nb_rooms, options.nb_objects = seed, config.rooms, config.objects
    chaining = options.chaining
    chaining.min_length = chaining.max_length = chaining.max_depth = config.quest_length
    chaining.min_breadth = chaining.max_breadth = 1
    options.path, options.force_recompile = str(path), True
    try:
        game = textworld.generator.make_game(options)
    except QuestGenerationError:
        return None
    textworld.generator.compile_game(game, options)
    env = textworld.start(str(path), textworld.EnvInfos(description=True))
    text = f"{' '.join(game.objective.split())}\n\n{str(env.reset().description).strip()}"
    env.close()
    told = {
        "game": hashlib.sha256(path.read_bytes()).hexdigest(),
        "text": text,
        "objective": " ".join(game.objective.split()),
        "commands": list(game.walkthrough),
    }
    notes.write_text(json.dumps(told), encoding="utf-8")
    return told


def _problem(told: dict[str, Any], name: str, path: str) -> Problem:
    expert = tuple(ExpertTurn(command, f"> {command}\n") for command in told["commands"])
    return Problem(
        id=name,
        problem=told["text"],
        solution="".join(turn.text for turn in expert),
        answer=told["objective"],
        extra={"game": path, "seed": 0},
        expert=expert,
    )


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
