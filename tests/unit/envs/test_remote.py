"""Environments in worker processes: errors, hangs, deaths and nonsense are told apart, and neighbours go on."""

from __future__ import annotations

import os
import signal
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from atesd.envs.base import EpisodeError
from atesd.envs.libraries import Gymnasium, TrlEnvironment, TrlSession, loaded
from atesd.facts import RunFacts
from atesd.rewards.limit import within
from atesd.rollout.sampler import SamplingConfig
from atesd.types import Ending, Message, Problem, UserError

from support.rollouts import fake_driver

GYM = '''
import time, sys, os
from pathlib import Path

class Count:
    """Counts the replies; the reply names what goes wrong."""

    def reset(self, seed=None, options=None):
        self.said, self.seed = 0, seed
        print("a library that prints")
        self.slow = Path(options.get("slow_file", "/nowhere"))
        if options.get("slow"):
            time.sleep(60)
        return f"seed {seed}", {}

    def step(self, action):
        self.said += 1
        if action == "hang":
            time.sleep(60)
        if action == "die":
            os._exit(3)
        if action == "raise":
            raise ValueError("no such\\ndoor")
        if self.slow.exists():
            time.sleep(0.25)
        if action.startswith("long"):
            return action, 0.0, False, False, {}
        if action == "tell":
            return "long" * 10**5, 0.0, False, False, {}
        said = 7 if action == "number" else f"{self.said} after {self.seed}"
        reward = float("inf") if action == "infinite" else 0.5
        return said, reward, action == "stop", False, {}

    def close(self):
        pass
'''

TRL = '''
class Shop:
    def __init__(self):
        self.reward = 0.0

    def reset(self, **kwargs):
        self.want = kwargs["want"]
        return f"Buy {self.want}."

    def buy(self, thing: str, count: int = 1) -> str:
        """Buy a thing.

        Args:
            thing: what
            count: how many
        """
        if thing != self.want:
            raise ValueError(f"no {thing}")
        self.reward = 1.0
        return f"bought {count} {thing}"

    def _hidden(self):
        return "no tool"
'''


@pytest.fixture
def gym(tmp_path: Path) -> str:
    (tmp_path / "count.py").write_text(GYM)
    return f"{tmp_path / 'count.py'}:Count"


@pytest.fixture
def trl(tmp_path: Path) -> str:
    (tmp_path / "shop.py").write_text(TRL)
    return f"{tmp_path / 'shop.py'}:Shop"


def environment(gym: str, **settings: Any) -> Any:
    """Of a limit that no busy machine reaches, unless another is given."""
    section = {"kind": "gymnasium", "make": gym, "workers": 1, "timeout_s": 120.0, **settings}
    return Gymnasium.model_validate(section).build(RunFacts())


PROMPT = [Message(role="user", content="count")]
PROBLEM = Problem("p", "count", "x", extra={"seed": 5})


def heard(messages: Any) -> list[str]:
    return [message["content"] for message in messages]


def test_what_a_recipe_says_of_attempts_is_what_the_driver_reads(gym: str) -> None:
    found = environment(gym, invalid_penalty=0.25, limit=3)
    assert (found.invalid_penalty, found.limit, found.grades) == (0.25, 3, True)
    game = found.episode(Problem("p", "count", "x"), seed=2**31 + 5)
    assert game.opening["seed"] == 5, "libraries take seeds of 31 bits"


def test_an_episode_elsewhere_is_played_like_any_other(gym: str) -> None:
    episode = environment(gym).episode(PROBLEM, 0)
    assert heard(episode.reset(PROMPT)) == ["count\nseed 5"]
    assert heard(episode.step("a")) == ["1 after 5"]
    assert heard(episode.step("b")) == ["2 after 5"]
    assert episode.step("stop") == ()
    assert episode.reward() == 1.5
    episode.close()


def test_attempts_at_a_problem_without_a_seed_follow_the_attempts_own(gym: str) -> None:
    episode = environment(gym).episode(Problem("q", "count", "x"), 9)
    assert heard(episode.reset(PROMPT)) == ["count\nseed 9"]


@pytest.mark.parametrize(("reply", "ending", "timeout_s", "why"), [
    ("raise", Ending.ERROR, 120.0, "it raised ValueError: no such door"),
    ("die", Ending.ERROR, 120.0, "its process has ended"),
    ("number", Ending.NOT_TEXT, 120.0, "it says int 7, which is no text"),
    ("hang", Ending.HANG, 6.0, r"it did not answer within 6 s \(env\.timeout_s\)"),
])  # fmt: skip
def test_what_goes_wrong_is_told_apart_and_neighbours_go_on(
    gym: str, reply: str, ending: Ending, timeout_s: float, why: str
) -> None:
    """Both episodes are in one process, which a hang or a death ends: the other one is played again from its seed."""
    world = environment(gym, timeout_s=timeout_s)
    bad, good = world.episode(PROBLEM, 0), world.episode(Problem("q", "count", "x", extra={"seed": 8}), 0)
    for episode in (bad, good):
        episode.begin(None)
    for episode in (bad, good):
        episode.reset(PROMPT)
    assert heard(good.step("a")) == ["1 after 8"]
    bad.begin(reply)
    good.begin("b")
    begun = time.monotonic()
    with pytest.raises(EpisodeError, match=why) as caught:
        bad.step(reply)
    assert caught.value.ending is ending
    assert time.monotonic() - begun < 30
    assert heard(good.step("b")) == ["2 after 8"]
    assert good.step("stop") == ()
    assert good.reward() == 1.5
    bad.close()
    good.close()


def hang(episode: Any) -> None:
    with pytest.raises(EpisodeError) as caught:
        episode.step("hang")
    assert caught.value.ending is Ending.HANG


def test_a_long_episode_is_played_again_without_a_deadlock(gym: str) -> None:
    """25 replies and answers of 9 kB are more than both pipes hold: nobody may write them all before it reads."""
    world = environment(gym, timeout_s=3.0)
    bad, good = (world.episode(PROBLEM, 0) for _ in range(2))
    for episode in (bad, good):
        episode.reset(PROMPT)
    for _ in range(25):
        good.step("long" * 2250)
    hang(bad)
    assert heard(within(90.0, lambda: good.step("a"))) == ["26 after 5"]


def test_each_answer_that_is_played_again_has_the_whole_limit(gym: str, tmp_path: Path) -> None:
    """Ten answers of .25 s take longer than the limit of one, 2 s. A new process has more time at its first one."""
    world = environment(gym, timeout_s=2.0)
    problem = Problem("q", "count", "x", extra={"seed": 8, "slow_file": str(tmp_path / "slow")})
    bad, first, second = (world.episode(problem, 0) for _ in range(3))
    for episode in (bad, first, second):
        episode.reset(PROMPT)
    for _ in range(10):
        second.step("a")
    hang(bad)
    assert heard(first.step("a")) == ["1 after 8"]
    (tmp_path / "slow").touch()
    assert heard(second.step("a")) == ["11 after 8"]


def test_a_reply_that_the_process_does_not_take_is_a_hang(gym: str) -> None:
    """A stopped process reads nothing, and a pipe holds 64 kB."""
    world = environment(gym, timeout_s=1.0)
    episode = world.episode(PROBLEM, 0)
    episode.reset(PROMPT)
    os.kill(world._workers[0]._process.pid, signal.SIGSTOP)
    with pytest.raises(EpisodeError, match="it did not answer within 1 s"):
        within(60.0, lambda: episode.step("long" * 10**5))


@pytest.mark.parametrize("reply", ["tell", "long" * 10**5])
def test_a_long_question_or_answer_may_wait_for_its_reader(gym: str, reply: str) -> None:
    """As while the engine samples: a pipe is full, and the rest comes once the first piece is read."""
    episode = environment(gym, timeout_s=2.0).episode(PROBLEM, 0)
    episode.reset(PROMPT)
    episode.begin(reply)
    time.sleep(2.2)
    assert heard(episode.step(reply)) == ["long" * 10**5]


@pytest.mark.parametrize(("column", "given", "message"), [
    ("when", datetime(2026, 1, 2), r"column 'when' of problem 'q' is datetime.*no JSON .*: write it as text or"),
    ("sets", [{1}], r"column 'sets' of problem 'q' is \[\{1\}\], which is no JSON"),
    ("seed", None, r"column 'seed' of problem 'q' is None, but .*: write a whole number, rename the column, or leave"),
    ("seed", "five", "column 'seed' of problem 'q' is 'five', but"),
    ("seed", float("nan"), "column 'seed' of problem 'q' is nan, but"),
    ("seed", float("inf"), "column 'seed' of problem 'q' is inf, but"),
])  # fmt: skip
def test_a_column_that_cannot_be_passed_on_ends_the_run_in_one_line(
    gym: str, column: str, given: Any, message: str
) -> None:
    """Before anything is asked, so that a neighbour closes without waiting."""
    world = environment(gym)
    good = world.episode(PROBLEM, 0)
    good.reset(PROMPT)
    with pytest.raises(UserError, match=f"^env: {message}") as caught:
        world.episode(Problem("q", "count", "x", extra={column: given}), 0)
    assert "\n" not in str(caught.value)
    assert heard(good.step("a")) == ["1 after 5"]
    within(30.0, good.close)


def test_a_question_that_cannot_be_written_is_not_waited_for(gym: str) -> None:
    episode = environment(gym).episode(PROBLEM, 0)
    episode.opening["row"]["when"] = datetime(2026, 1, 2)
    with pytest.raises(TypeError):
        episode.begin(None)
    within(30.0, episode.close)


def test_a_batch_with_hangs_and_infinite_rewards_is_counted(gym: str) -> None:
    replies = ["stop", "hang", "infinite"]
    driver, _ = fake_driver(lambda prompt, place: replies[place % 3] if "after" not in prompt else "stop",
                            lambda **_: [], environment(gym, timeout_s=6.0, workers=2))  # fmt: skip
    with pytest.warns(UserWarning, match="failed in 2 of 3 attempts; in the first it did not answer within 6 s"):
        (group,) = driver.rollout([PROBLEM], SamplingConfig(max_new_tokens=40, group_size=3), seed=0)
    assert [each.ended for each in group.trajectories] == [Ending.OVER, Ending.HANG, Ending.BAD_REWARD]
    assert [each.reward for each in group.trajectories] == [0.5, None, None]


def test_trl_classes_are_played_as_they_are(trl: str) -> None:
    session = TrlSession({"factory": trl})
    told = session.reset({"want": "tea", "id": "p"}, 0)
    assert told.startswith("Buy tea.\n\nTools, one a line:\n")
    assert '"name": "buy"' in told
    assert '"arguments": {"thing": "str", "count": "int"}' in told
    assert "_hidden" not in told
    call = '<tool_call>\n{"name": "buy", "arguments": {"thing": "%s"}}\n</tool_call>'
    assert session.step(call % "jam") == "<tool_response>\n{'error': 'no jam'}\n</tool_response>"
    assert (session.invalid, session.reward()) == (1, 0.0)
    assert session.step(call % "tea") == "<tool_response>\nbought 1 tea\n</tool_response>"
    assert (session.invalid, session.reward()) == (1, 1.0)
    assert "not found" in str(session.step('<tool_call>{"name": "reset", "arguments": {}}</tool_call>'))
    assert "error" in str(session.step("<tool_call>{no json</tool_call>"))
    assert session.step("I am done.") is None


def test_trl_classes_run_in_a_worker_with_the_rows_columns(trl: str) -> None:
    section = TrlEnvironment.model_validate({"kind": "trl", "factory": trl, "workers": 1, "timeout_s": 120.0})
    assert section.code == trl
    episode = section.build(RunFacts()).episode(Problem("p", "Shop.", "x", extra={"want": "tea"}), 0)
    assert heard(episode.reset([Message(role="user", content="Shop.")]))[0].startswith("Shop.\nBuy tea.")
    assert heard(episode.step('<tool_call>{"name": "buy", "arguments": {"thing": "tea", "count": 2}}</tool_call>')) == [
        "<tool_response>\nbought 2 tea\n</tool_response>"
    ]
    assert episode.step("done") == ()
    assert episode.reward() == 1.0


@pytest.mark.parametrize(("place", "message"), [
    ("shop", "names no class: write package.module:Class"),
    ("missing.py:Shop", "there is no file missing.py: mend the path"),
])  # fmt: skip
def test_a_class_that_cannot_be_found_is_named(place: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        loaded(place)


def test_a_class_that_the_file_lacks_is_named(trl: str) -> None:
    with pytest.raises(UserError, match="has no Store: mend the name"):
        loaded(trl.replace("Shop", "Store"))


def test_nothing_is_imported_from_the_working_directory(
    gym: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A json.py there would be what the worker reads its questions with."""
    here = tmp_path / "here"
    here.mkdir()
    for name in ("json", "inspect", "gymnasium"):
        (here / f"{name}.py").write_text('raise RuntimeError("from the working directory")')
    monkeypatch.chdir(here)
    assert heard(environment(gym).episode(PROBLEM, 0).reset(PROMPT)) == ["count\nseed 5"]


@pytest.mark.parametrize(("change", "message"), [
    (lambda place: place.replace("Count", "Counts"), "has no Counts: mend the name"),
    (lambda place: place.replace("count.py", "counts.py"), "there is no file .*counts.py: mend the path"),
])  # fmt: skip
def test_a_class_that_is_not_there_ends_the_run_with_its_own_line(gym: str, change: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        environment(change(gym)).episode(PROBLEM, 0).reset(PROMPT)


SPACES = '''
import gymnasium

class Digit(gymnasium.Env):
    """Takes one digit; says it again; 9 it marks as no action itself."""

    action_space = gymnasium.spaces.Text(min_length=1, max_length=1, charset="0123456789")
    observation_space = gymnasium.spaces.Text(max_length=100)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return "first", {}

    def step(self, action):
        return f"you said {int(action)}", 0.25, False, action == "0", {"invalid": action == "9"}

gymnasium.register("Digit-v0", entry_point=Digit)
'''


def test_a_reply_outside_the_action_space_is_not_passed_on_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`int` would raise over it; a registered environment keeps its space, through the wrappers of its library."""
    (tmp_path / "digits.py").write_text(SPACES)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for place in (f"{tmp_path / 'digits.py'}:Digit", "digits:Digit-v0"):
        episode = environment(place).episode(PROBLEM, 0)
        assert heard(episode.reset(PROMPT)) == ["count\nfirst"]
        said = []
        for reply, invalid in (("7", 0), ("two", 1), ("", 2), ("9", 3), ("4", 3)):
            said += heard(episode.step(reply))
            assert episode.invalid == invalid
        refused = "That is no action here."
        assert said == ["you said 7", refused, refused, "you said 9", "you said 4"]
        assert episode.step("0") == ()
        assert episode.reward() == 1.0, "four actions, .25 each; what was refused earns nothing"
