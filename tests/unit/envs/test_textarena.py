"""The adapter to TextArena: against a module that behaves as TextArena 0.7 does, and against the real one where it is
installed."""

from __future__ import annotations

import random
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from atesd.envs.libraries import ArenaSession, TextArena
from atesd.facts import RunFacts
from atesd.types import Message, Problem, UserError

# As in TextArena: a game seeds the global generator and draws from it; the default wrapper says all of it again, along
# with the player's actions; a second invalid move in a row ends the game.
FAKE = """
import random
import numpy

class State:
    def __init__(self, seed):
        random.seed(seed)
        self.current_player_id, self.error_count, self.said, self.done, self.rewards = 0, 0, [], False, None
        self.info = {0: {"invalid_move": False}}

class Game:
    def reset(self, num_players, seed=None):
        assert num_players == 1
        self.state = State(seed)
        self.state.said.append((-1, f"Dice of {random.randint(0, 10**6)}.", "PROMPT"))

    def get_observation(self):
        said, self.state.said = self.state.said, []
        return 0, said

    def step(self, action):
        state = self.state
        state.said.append((0, action, "PLAYER_ACTION"))
        if action == "[roll]":
            state.error_count = 0
            state.said.append((-1, f"You roll {random.randint(0, 10**6)} and {numpy.random.randint(10**6)}.", "GAME"))
            state.said.append((-1, "Again?", "GAME_BOARD"))
        elif action == "[stop]":
            state.rewards, state.done = {0: 0.25}, True
        elif state.error_count:
            state.rewards, state.done, state.info[0]["invalid_move"] = {0: -1.0}, True, True
        else:
            state.error_count += 1
            state.said.append((-1, "You attempted an invalid move.", "GAME_ADMIN"))
        return state.done, {}

    def close(self):
        return self.state.rewards, self.state.info

class Wrapper:
    def __init__(self, env):
        self.env, self.history = env, []

    def __getattr__(self, name):
        return getattr(self.env, name)

    def step(self, action):
        return self.env.step(action=action if action.startswith("[") else f"[{action}]")

    def get_observation(self):
        player, said = self.env.get_observation()
        self.history += said
        return player, "".join(f"[{sender}] {text}" for sender, text, _ in self.history)

def make(env_id):
    if env_id != "Dice-v0":
        raise ValueError(f"Environment {env_id} not found in registry.")
    return Wrapper(Wrapper(Game()))
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "textarena.py").write_text(textwrap.dedent(FAKE))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    own = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "textarena"}
    for name in own:
        del sys.modules[name]
    yield
    sys.modules.pop("textarena", None)
    sys.modules.update(own)


def session(seed: int) -> tuple[ArenaSession, str]:
    made = ArenaSession({"game": "Dice-v0"})
    return made, made.reset({}, seed)


def rolls(seed: int, count: int) -> tuple[str, list[str]]:
    """What a game of a seed says, from generators of its own: the library's order of draws, by hand."""
    own, numbers = random.Random(seed), np.random.RandomState(seed)
    first = f"Dice of {own.randint(0, 10**6)}."
    return first, [f"You roll {own.randint(0, 10**6)} and {numbers.randint(10**6)}.\nAgain?" for _ in range(count)]


@pytest.mark.usefixtures("fake")
def test_the_student_reads_what_the_game_said_since_its_last_action() -> None:
    game, first = session(3)
    expected = rolls(3, 2)
    assert (first, [game.step("[roll]"), game.step("roll")]) == expected, "neither history nor its own actions"
    assert (game.invalid, game.reward()) == (0, 0.0), "a game that is not over"
    assert game.step("[stop]") is None
    assert game.reward() == 0.25


@pytest.mark.usefixtures("fake")
def test_invalid_moves_are_counted_and_the_second_in_a_row_ends_the_game() -> None:
    game, _ = session(3)
    for action, invalid in (("[eat]", 1), ("[roll]", 1), ("[an invalid move]", 2)):
        assert game.step(action) is not None
        assert game.invalid == invalid
    assert game.step("[eat]") is None
    assert (game.invalid, game.reward()) == (3, -1.0)


@pytest.mark.usefixtures("fake")
def test_games_in_one_process_do_not_disturb_each_other_or_anybody_else() -> None:
    random.seed(1)
    np.random.seed(1)
    outside = random.Random(1).random(), np.random.RandomState(1).rand()
    (one, first), (two, second) = session(5), session(6)
    said = [(one.step("[roll]"), two.step("[roll]")) for _ in range(3)]
    assert (first, [each for each, _ in said]) == rolls(5, 3)
    assert (second, [each for _, each in said]) == rolls(6, 3)
    assert (random.random(), np.random.rand()) == outside


@pytest.mark.usefixtures("fake")
def test_a_game_is_played_in_a_worker_with_the_problems_seed() -> None:
    section = TextArena.model_validate({"kind": "textarena", "game": "Dice-v0", "workers": 1})
    assert "TextArena's Dice-v0" in section.describe()
    episode = section.build(RunFacts()).episode(Problem("p", "Play.", "x", extra={"seed": 4}), 99)
    first, (roll,) = rolls(4, 1)
    assert [message["content"] for message in episode.reset([Message(role="user", content="Play.")])] == [
        f"Play.\n{first}"
    ]
    assert [message["content"] for message in episode.step("roll")] == [roll]
    assert [message["content"] for message in episode.step("eat")] == ["You attempted an invalid move."]
    assert episode.invalid == 1
    assert episode.step("[stop]") == ()
    assert episode.reward() == 0.25


@pytest.mark.usefixtures("fake")
def test_a_problem_without_a_seed_is_refused() -> None:
    section = TextArena.model_validate({"kind": "textarena", "game": "Dice-v0"})
    with pytest.raises(UserError, match="plays problems with a 'seed', which 'p' has not"):
        section.build(RunFacts()).episode(Problem("p", "Play.", "x"), 0)


def test_a_missing_library_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("atesd.envs.remote.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs the library textarena: pip install 'atesd\[textarena\]'"):
        TextArena.model_validate({"kind": "textarena", "game": "Dice-v0"}).build(RunFacts())


def test_the_real_library_plays_a_game() -> None:
    pytest.importorskip("textarena", reason="TextArena is not installed: pip install 'atesd[textarena]'")
    game = ArenaSession({"game": "GuessTheNumber-v0"})
    assert "guess the number between 1 and 20" in game.reset({}, 3)
    number = random.Random(3).randint(1, 20)  # what the game draws first
    assert "invalid move" in str(game.step("hello"))
    assert "higher" in str(game.step("[1]")), "seed 3 draws 8"
    assert "lower" in str(game.step("[20]"))
    assert game.step(f"[{number}]") is None
    assert (game.reward(), game.invalid) == (1.0, 1)
