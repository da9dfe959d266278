"""Several turns as a user types it: an environment of Gymnasium's trained by a recipe, and all that can go wrong."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from atesd.cli.main import main

ROOT = Path(__file__).parents[2]
DOORS = str(ROOT / "recipes" / "pico-agents.toml")
TINY = [
    "task.train_size=4", "task.probe_size=2", "task.eval_size=2", "step.num_steps=1", "step.problems=2", "eval.k=2",
    "rollout.group_size=2",
]  # fmt: skip

GUESS = '''
import time

import gymnasium


class Guess(gymnasium.Env):
    """Guess a digit; every second seed is in trouble at its second reply, of the kind that the class names."""

    action_space = gymnasium.spaces.Text(min_length=1, max_length=1, charset="0123456789")
    observation_space = gymnasium.spaces.Text(max_length=400)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.number, self.trouble, self.tries = int(self.np_random.integers(10)), seed % 2 == 0, 0
        return ("a" * 300 if self.trouble and type(self).__name__ == "Long" else "0"), {}

    def step(self, action):
        self.tries += 1
        right = int(action) == self.number
        said = "=" if right else "+" if int(action) < self.number else "-"
        if self.trouble:
            said = self.troubled(said)
        return said, float(right), right, False, {}

    def troubled(self, said):
        return said


class Raises(Guess):
    def troubled(self, said):
        raise RuntimeError("stuck")


class Hangs(Guess):
    def troubled(self, said):
        time.sleep(60)


class Mute(Guess):
    def troubled(self, said):
        return 7


class Rich(Guess):
    def step(self, action):
        return "=", float("inf") if self.trouble else 0.0, True, False, {}


class Long(Guess):
    pass


class Nobody(Raises):
    def reset(self, **given):
        raise OSError("no world")
'''

RECIPE = """
seed = 0
threads = 1

[model]
path = "pico-doors"

[task]
kind = "episodes"
text = "a"
train_size = 6
eval_size = 2

[env]
kind = "gymnasium"
make = "{make}"
limit = 3
timeout_s = 120.0
invalid_penalty = 0.25

[prompt]
student = "{{problem}}"
teacher = "{{problem}}\\n{{hint}}"

[routing]
kind = "rl"

[rollout]
group_size = 4
max_new_tokens = 3

[optim]
lr = 1e-3

[step]
num_steps = 2
problems = 2

[eval]
k = 2

[save]
rollouts_every = 1
rollouts = 40
"""


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run the command in process and return its exit code; its warnings are told, as a user's are."""
    monkeypatch.setattr(sys, "argv", ["atesd", *arguments])
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        try:
            main()
        except SystemExit as stop:
            return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    pytest.importorskip("gymnasium")
    (tmp_path / "guess.py").write_text(GUESS)
    (tmp_path / "guess.toml").write_text(RECIPE.format(make="guess.py:Guess"))
    return tmp_path / "guess.toml"


def test_an_environment_of_a_library_is_trained_evaluated_and_reported(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = recipe.parent / "run"
    assert run(monkeypatch, "train", str(recipe), "--out", str(out)) == 0
    steps = rows(out / "metrics.jsonl")[1:]
    assert [row["step"] for row in steps] == [1, 2]
    for row in steps:
        attempts = rows(out / "rollouts" / f"step_{row['step']:06d}.jsonl")
        lasts = [turn for turn in attempts if turn["turn"] == turn["turns"]]
        assert len(lasts) == 8, "two problems with four attempts each, all of them kept"
        for turn in lasts:
            parts = turn["rewards"]
            assert parts["invalid"] == -0.25 * turn["invalid"]
            assert turn["reward"] == parts["env"] + parts["invalid"]
            assert parts["env"] == (1.0 if turn["ended"] == "over" else 0.0), "right ends it"
        assert row["env/invalid"] == sum(turn["invalid"] for turn in lasts)
        assert row["reward/mean"] == pytest.approx(sum(turn["reward"] for turn in lasts) / 8)
        assert row["rollout/turns_mean"] == len(attempts) / 8
        heard = {turn["observation"] for turn in attempts if turn["turn"] > 1}
        assert heard <= {"+", "-", "That is no action here."}
    assert any(row.get("optim/grad_norm", 0.0) > 0 for row in steps), "it was trained"
    assert run(monkeypatch, "eval", str(out)) == 2
    assert "allow it with --run-code" in " ".join(capsys.readouterr().err.split())
    assert run(monkeypatch, "eval", str(out), "--run-code") == 0
    text = capsys.readouterr().out
    assert "runs code of yours, with your rights: environment 'Guess'" in text
    assert "pass@2" in text
    assert "turns_mean" in text
    assert run(monkeypatch, "report", str(out)) == 0
    assert "A conversation is shown turn by turn" in (out / "report.html").read_text()


@pytest.mark.parametrize(("kind", "ending", "why"), [
    ("Raises", "error", "it raised RuntimeError: stuck"),
    ("Hangs", "hang", "it did not answer within 4 s (env.timeout_s)"),
    ("Mute", "not_text", "it says int 7, which is no text"),
    ("Rich", "bad_reward", "its reward is inf"),
    ("Long", "error", "what it says first makes a prompt of"),
])  # fmt: skip
def test_what_goes_wrong_in_some_attempts_is_counted_and_the_run_goes_on(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str, ending: str, why: str
) -> None:
    """Of two problems, every second is in trouble, with two attempts at each."""
    out = recipe.parent / "run"
    limit_s = 4.0 if kind == "Hangs" else 120.0  # a busy machine needs seconds for an honest answer
    sizes = [f"env.timeout_s={limit_s}", "task.train_size=2", "step.num_steps=1", "rollout.group_size=2", "eval.k=1"]
    assert run(monkeypatch, "train", str(recipe), f"env.make=guess.py:{kind}", *sizes, "--out", str(out)) == 0
    told = " ".join(capsys.readouterr().err.split())
    assert why in told
    assert told.count("the environment failed in") == 1, "said once"
    step = rows(out / "metrics.jsonl")[-1]
    # a first reply that is no action does not reach the environment, so that some attempts may escape their trouble
    failed = step[f"env/ended/{ending}"]
    assert failed == step["reward/ungradable"]
    assert 1 <= failed <= 2
    written = rows(out / "rollouts" / "step_000001.jsonl")
    troubled = [turn for turn in written if turn["ended"] == ending]
    assert troubled
    assert all(turn["reward"] is None and turn["components"] == [] for turn in troubled)
    assert (out / "final").is_dir()


@pytest.mark.parametrize(("overrides", "message"), [
    (["env.make=guess.py:Nobody"], "failed in 4 of 4 attempts; in the first it raised OSError: no world: mend it"),
    (["env.make=guess.py:Guesses"], "guess.py has no Guesses: mend the name"),
    (["env.make=gues.py:Guess"], "there is no file gues.py: mend the path"),
    (["env.make=NoSuch-v0"], "NoSuch"),
    (['reward={kind="exact"}'], "grades attempts itself, so [reward] would have no effect"),
    (["env.invalid_penalty=-1"], "greater than or equal to 0 (given: -1)"),
    (['reveal={kind="turns"}', 'routing={kind="both"}'], "has no expert"),
])  # fmt: skip
def test_a_recipe_that_cannot_work_ends_in_one_line(
    recipe: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    overrides: list[str],
    message: str,
) -> None:
    assert run(monkeypatch, "train", str(recipe), *overrides, "--out", "run") == 2
    told = capsys.readouterr().err
    assert message in " ".join(told.split())
    assert "Traceback" not in told


@pytest.mark.parametrize(("folder", "message"), [
    ("nowhere", "is no folder: name the folder that holds the skills' .md files"),
    ("empty", "holds no skill: put at least one .md file with text into it"),
    ("blank", "holds no skill"),
])  # fmt: skip
def test_a_skill_folder_without_skills_ends_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: str, message: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank").mkdir()
    (tmp_path / "blank" / "nothing.md").write_text(" \n")
    section = f'reveal={{kind="skills", folder="{tmp_path / folder}"}}'
    assert run(monkeypatch, "train", DOORS, *TINY, section, "--out", str(tmp_path / "run")) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


def test_experts_that_do_not_replay_are_named_by_check_and_told_by_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An expert takes two turns a door, three doors or more: five turns are too few for any."""
    assert run(monkeypatch, "check", DOORS, *TINY[:3], "env.limit=5") == 2
    told = capsys.readouterr()
    assert "the reward is 0.0 after 5 turns, and 1 turns of the expert are left over" in " ".join(told.out.split())
    assert "8 experts do not reach the goal" in " ".join(told.err.split())
    assert run(monkeypatch, "train", DOORS, *TINY, "env.limit=5", "--out", str(tmp_path / "run")) == 0
    told = " ".join(capsys.readouterr().err.split())
    assert told.count("does not reach the goal in this environment, so that its hint misleads: atesd check RECIPE") == 1
    assert run(monkeypatch, "check", DOORS, *TINY[:3]) == 0
