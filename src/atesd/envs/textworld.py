"""TextWorld's games (1806.11532) as an environment: each problem is a game, made by `tasks/textworld.py`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from atesd.envs.remote import RemoteMethod

_STATUS = re.compile(r"\n>\s{8,}.*", re.DOTALL)  # the prompt and the status line that some turns end with


class TextWorld(RemoteMethod):
    """TextWorld's games, a command a turn. A game that is won is a reward of 1, all else 0."""

    kind: Literal["textworld"] = "textworld"

    session: ClassVar[str] = "atesd.envs.textworld:Session"
    library: ClassVar[tuple[str, str]] = ("textworld", "textworld")
    needs: ClassVar[str] = "game"

    def describe(self) -> str:
        """Say what the student acts in."""
        return f"The student plays TextWorld's games, in at most {self.limit} turns"


class Session:
    """One game. A command that the game does not admit at the time is invalid, and answered by the game itself."""

    def __init__(self, settings: Mapping[str, Any]) -> None:  # noqa: ARG002
        self.invalid = 0
        self._state: Any = None

    def reset(self, row: Mapping[str, Any], seed: int) -> str:
        """Start the game; the same for every attempt. What it says first is in the problem's text already."""
        import textworld

        self._game = textworld.start(row["game"], textworld.EnvInfos(admissible_commands=True, won=True, lost=True))
        self._game.seed(seed)
        self._state = self._game.reset()
        return ""

    def step(self, reply: str) -> str | None:
        """Give a command: the reply's first line."""
        command = (reply.strip().splitlines() or [""])[0].strip().removeprefix(">").strip().lower()
        self.invalid += command not in self._state.admissible_commands
        self._state, _, done = self._game.step(command or "look")
        return None if done else _STATUS.sub("", str(self._state.feedback)).strip() or "Nothing happens."

    def reward(self) -> float | None:
        """Return 1 where the game is won."""
        return float(bool(self._state.won))

    def close(self) -> None:
        """End the game's interpreter."""
        self._game.close()
