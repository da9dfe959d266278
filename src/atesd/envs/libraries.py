"""Adapters to environments of other libraries: TextArena, Gymnasium's text environments, TRL's environment classes."""

from __future__ import annotations

import inspect
import json
import random
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module, util
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy
from pydantic import Field

from atesd.envs.remote import RemoteMethod
from atesd.types import UserError

_GAME = -1  # who speaks for the game in TextArena's observations
NO_ACTION = "That is no action here."
"""What the student reads after a reply that a Gymnasium environment's action space does not contain."""
_CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)


class TextArena(RemoteMethod):
    """A game for one player of TextArena (2504.11442). The reward is the game's own for that player."""

    kind: Literal["textarena"] = "textarena"
    game: str
    """The game's id, such as `GuessTheNumber-v0`."""

    session: ClassVar[str] = "atesd.envs.libraries:ArenaSession"
    library: ClassVar[tuple[str, str]] = ("textarena", "textarena")
    needs: ClassVar[str] = "seed"

    def settings(self) -> dict[str, Any]:
        """Return the game."""
        return {"game": self.game}

    def describe(self) -> str:
        """Say what the student acts in."""
        return f"The student plays TextArena's {self.game}, in at most {self.limit} turns"


class ArenaSession:
    """One game of TextArena.

    Its wrappers format actions; what they make of observations, mostly the whole history again, is passed by: the
    student reads what the game says since its last action. A move that the game calls invalid is answered by the game,
    which ends at the second one in a row. The game draws from Python's and NumPy's global generators: it gets states
    of its own, so that games in one process do not disturb each other.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        import textarena

        self._env = textarena.make(env_id=settings["game"])
        self._game = self._env
        while "env" in vars(self._game):
            self._game = self._game.env
        self._rewards: Mapping[int, float] | None = None
        self.invalid = 0

    def reset(self, row: Mapping[str, Any], seed: int) -> str:  # noqa: ARG002
        """Begin the game."""
        self._random = random.Random(seed).getstate(), numpy.random.RandomState(seed).get_state()
        with self._own_random():
            self._env.reset(num_players=1, seed=seed)
        return self._said()

    def step(self, reply: str) -> str | None:
        """Take the player's action, as the game's wrappers format it."""
        with self._own_random():
            done, _ = self._env.step(action=reply)
        if done:
            self._rewards, information = self._env.close()
            own = information.get(0, {}) if isinstance(information, Mapping) else {}
            self.invalid += bool(own.get("invalid_move"))
            return None
        self.invalid += bool(getattr(self._game.state, "error_count", 0))  # of invalid moves in a row
        return self._said()

    def reward(self) -> float | None:
        """Return the player's reward; 0 where the game is not over."""
        return 0.0 if not self._rewards else float(self._rewards[0])

    def _said(self) -> str:
        """Return what the game says since it was last asked, without the player's own actions."""
        _, said = self._game.get_observation()
        return "\n".join(str(text) for sender, text, *_ in said if sender == _GAME).strip()

    @contextmanager
    def _own_random(self) -> Iterator[None]:
        outside = random.getstate(), numpy.random.get_state()
        random.setstate(self._random[0])
        numpy.random.set_state(self._random[1])
        try:
            yield
        finally:
            self._random = random.getstate(), numpy.random.get_state()
            random.setstate(outside[0])
            numpy.random.set_state(outside[1])


class Gymnasium(RemoteMethod):
    """A Gymnasium environment whose observations and actions are text. The reward is the sum of all steps' rewards.

    A reply that its action space does not contain is no action: it is not passed on, and the student is told so. What
    an environment calls no action itself, with a true `info["invalid"]`, is counted as well.
    """

    kind: Literal["gymnasium"] = "gymnasium"
    make: str
    """Id of a registered environment (`module:Name-v0` imports the module first), or `path/to/file.py:Class`."""

    session: ClassVar[str] = "atesd.envs.libraries:GymSession"
    library: ClassVar[tuple[str, str]] = ("gymnasium", "gymnasium")

    @property
    def code(self) -> str | None:
        """The class, where it is the user's own."""
        return self.make if ".py:" in self.make else None

    def settings(self) -> dict[str, Any]:
        """Return what is made."""
        return {"make": self.make}

    def describe(self) -> str:
        """Say what the student acts in."""
        return f"The student acts in {self.make}, in at most {self.limit} turns"


class GymSession:
    """One episode of a Gymnasium environment."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        import gymnasium

        place = settings["make"]
        self._env = loaded(place)() if ".py:" in place else gymnasium.make(place)
        self._total = 0.0
        self.invalid = 0

    def reset(self, row: Mapping[str, Any], seed: int) -> str:
        """Begin; the row's columns are the options."""
        said, _ = self._env.reset(seed=seed, options=dict(row))
        return said  # type: ignore[no-any-return]

    def step(self, reply: str) -> str | None:
        """Take the reply as the action, where the environment's space contains it."""
        space = getattr(self._env, "action_space", None)
        if space is not None and not space.contains(reply):
            self.invalid += 1
            return NO_ACTION
        said, reward, terminated, truncated, info = self._env.step(reply)
        self.invalid += bool(isinstance(info, Mapping) and info.get("invalid"))
        self._total += float(reward)
        return None if terminated or truncated else said

    def reward(self) -> float | None:
        """Return the sum so far."""
        return self._total

    def close(self) -> None:
        """Close the environment."""
        self._env.close()


class TrlEnvironment(RemoteMethod):
    """A class for TRL's `environment_factory`, as it is: public methods are tools, `reset` gets the problem's columns.

    Tools are called as Qwen and Hermes models do, `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, and
    described behind the prompt, with their docstrings. A reply without a call ends the attempt, as in TRL. The reward
    is what `get_reward()` returns, or the attribute `reward`. As in TRL an exception of a tool is told to the student.
    Deviations from TRL 1.16: 1. tools are described in the user's message, not by the chat template; 2. what tools
    return is a user's message with `<tool_response>` around it, as Qwen's template writes it; 3. classes are made in
    worker processes, by name, so they cannot close over variables of a script; asynchronous tools are not called.
    """

    kind: Literal["trl"] = "trl"
    factory: str
    """Where the class is: `package.module:Class`, or `path/to/file.py:Class`. Its code runs with your rights."""
    limit: Annotated[int, Field(ge=1)] = 10
    """Most turns."""

    session: ClassVar[str] = "atesd.envs.libraries:TrlSession"

    @property
    def code(self) -> str | None:
        """The class."""
        return self.factory

    def settings(self) -> dict[str, Any]:
        """Return the class's place."""
        return {"factory": self.factory}

    def describe(self) -> str:
        """Say what the student acts in."""
        return f"The student calls the tools of {self.factory.rpartition(':')[2]}, in at most {self.limit} turns"


class TrlSession:
    """One episode of an environment class of TRL's."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._env = loaded(settings["factory"])()
        self._tools = {
            name: method
            for name, method in inspect.getmembers(self._env, inspect.ismethod)
            if not name.startswith("_") and name not in ("reset", "get_reward")
        }
        self.invalid = 0

    def reset(self, row: Mapping[str, Any], seed: int) -> str:  # noqa: ARG002
        """Reset with the row's columns and describe the tools."""
        said = self._env.reset(**row)
        tools = "\n".join(json.dumps(_schema(name, method)) for name, method in self._tools.items())
        how = (
            f"Tools, one a line:\n{tools}\nTo call one, reply with "
            '<tool_call>{"name": NAME, "arguments": {...}}</tool_call>.'
        )
        return how if said is None else f"{said}\n\n{how}" if isinstance(said, str) else said

    def step(self, reply: str) -> str | None:
        """Call the reply's tools; a reply without one ends the attempt."""
        calls = _CALL.findall(reply)
        if not calls:
            return None
        return "\n".join(f"<tool_response>\n{self._called(call)}\n</tool_response>" for call in calls)

    def reward(self) -> float | None:
        """Return what the class says of the attempt."""
        given = self._env.get_reward() if hasattr(self._env, "get_reward") else getattr(self._env, "reward", None)
        return None if given is None else float(given)

    def _called(self, call: str) -> str:
        try:
            asked = json.loads(call)
            name, arguments = asked["name"], asked.get("arguments") or {}
            if name not in self._tools:
                raise ValueError(f"Tool {name} not found.")
            return str(self._tools[name](**arguments))
        except Exception as error:  # TRL's rule: the student reads it
            self.invalid += 1
            return str({"error": str(error)})


def _schema(name: str, method: Callable[..., Any]) -> dict[str, Any]:
    """Return what the student reads of a tool: its name, its docstring, and its arguments with their types."""
    arguments = {
        each.name: getattr(each.annotation, "__name__", str(each.annotation))
        for each in inspect.signature(method).parameters.values()
    }
    return {"name": name, "description": inspect.cleandoc(method.__doc__ or ""), "arguments": arguments}


def loaded(place: str) -> Any:
    """Import `package.module:name` or `path/to/file.py:name`. UserError says what is missing."""
    source, colon, name = place.rpartition(":")
    if not colon or not source or not name:
        raise UserError(f"env: {place!r} names no class: write package.module:Class or file.py:Class")
    if source.endswith(".py"):
        spec = util.spec_from_file_location(f"atesd_env_{Path(source).stem}", source)
        if spec is None or spec.loader is None or not Path(source).is_file():
            raise UserError(f"env: {place!r}: there is no file {source}: mend the path")
        module = util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        module = import_module(source)
    found = getattr(module, name, None)
    if not callable(found):
        raise UserError(f"env: {place!r}: {source} has no {name}: mend the name")
    return found
