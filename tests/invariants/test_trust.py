"""What a resumed run believes: whole checkpoints, its own recipe, one writer (docs/trust.md)."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from atesd.recipe import build_config
from atesd.runlog import RunDir
from atesd.train.asked import proposed
from atesd.train.loop import Interrupted, Trainer
from atesd.train.resume import digests_of_code, resumed_config
from atesd.types import Problem, UserError

from trust import BASE, EMA, outcome

TREE = BASE | EMA | {"exposure": {"kind": "fixed", "ratio": 0.5}, "step": {"num_steps": 4, "problems": 2}}
TREE |= {"save": {"every": 1, "keep": 2, "rollouts_every": 1}}


def stopped(run: Path, tree: dict[str, Any], step: int = 3, controller: Any = None) -> None:
    trainer = Trainer.start(build_config(tree), run)
    trainer.parts.controller = controller or trainer.parts.controller
    trainer.listener = lambda row: row["step"] == step and trainer.stop()
    with pytest.raises(Interrupted):
        trainer.train()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a whole run, and one that was stopped after step 3 of 4."""
    folder = tmp_path_factory.mktemp("runs")
    Trainer.start(build_config(TREE), folder / "whole").train()
    stopped(folder / "cut", TREE)
    return folder


@pytest.fixture
def cut(runs: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(runs / "cut", tmp_path / "cut"))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "teacher.safetensors", "state.json"])
@pytest.mark.parametrize("damage", [flip, Path.unlink, lambda path: path.write_bytes(b"")])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    name: str, damage: Callable[[Path], Any], cut: Path, runs: Path
) -> None:
    damage(cut / "checkpoints" / "step_000003" / name)
    with pytest.warns(UserWarning, match=f"passed over step_000003: {name} (is|has)"):
        trainer = Trainer.resume(cut)
    assert trainer.step == 2
    trainer.train()
    assert outcome(cut) == outcome(runs / "whole")


def test_a_run_without_a_whole_checkpoint_is_refused_in_one_line(cut: Path) -> None:
    for folder in (cut / "checkpoints").iterdir():
        flip(folder / "teacher.safetensors")
    with pytest.raises(UserError, match=r"no checkpoint of .* can be believed \(step_000003: .*; step_000002: .*\)"):
        Trainer.resume(cut)


def test_a_run_whose_checkpoints_are_gone_is_not_begun_anew(cut: Path) -> None:
    shutil.rmtree(cut / "checkpoints")
    (cut / "checkpoints").mkdir()
    log = (cut / "metrics.jsonl").read_bytes()
    with pytest.raises(
        UserError, match=r"has logged 3 steps, but none of its checkpoints is left, .* due every 1: rest"
    ):
        Trainer.resume(cut)
    assert (cut / "metrics.jsonl").read_bytes() == log


def test_a_run_without_a_checkpoint_of_its_first_steps_begins_anew(tmp_path: Path) -> None:
    stopped(tmp_path / "run", TREE | {"save": {"every": 3}}, step=3)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_000003")
    resumed = Trainer.resume(tmp_path / "run")
    assert resumed.step == 0, "none was due before step 3 was logged"
    resumed.train()
    assert [row["step"] for row in resumed.run.metrics()] == [0, 1, 2, 3, 4], "what was logged before is forgotten"


def test_a_run_that_is_killed_behind_its_last_checkpoint_still_gets_its_result(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(self: Trainer) -> None:
        raise OSError("killed")

    trainer = Trainer.start(build_config(TREE), tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_finish", die)
        with pytest.raises(OSError, match="killed"):
            trainer.train()
    resumed = Trainer.resume(tmp_path / "run")
    assert resumed.step == 4
    resumed.train()
    assert outcome(tmp_path / "run") == outcome(runs / "whole")


OWN = """
from typing import Any, ClassVar, Literal
from atesd.exposure.controller import ExposureMethod
from atesd.types import Stateless


class Steady(ExposureMethod):
    measured: ClassVar[bool] = False
    reads_length: ClassVar[bool] = False
    share: float = 0.5

    def describe(self) -> str:
        return "always the same"

    def build(self, run: Any) -> Any:
        return Kept(self.share)


class Kept(Stateless):
    def __init__(self, share: float) -> None:
        self.share = share

    def propose(self, step: int, problem_ids: Any, pass_rates: Any = ()) -> list[float]:
        return [self.share] * len(problem_ids)
"""


def test_a_run_with_code_of_ones_own_goes_on_in_another_folder_and_tells_changed_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    (here / "steady.py").write_text(OWN)
    monkeypatch.chdir(here)
    stopped(here / "run", TREE | {"exposure": {"kind": "steady.py:Steady"}})
    assert list(RunDir.open(here / "run").env()["code"]) == ["steady.py:Steady"]
    shutil.copytree(here, there)
    monkeypatch.chdir(there)
    monkeypatch.setattr("atesd.own._named", {})  # as in a process of its own
    assert Trainer.resume(there / "run").step == 3
    (there / "steady.py").write_text(OWN + "# changed")
    with pytest.warns(UserWarning, match=r"steady\.py:Steady is no longer the code that the run began with"):
        Trainer.resume(there / "run")
    shutil.copytree(here, tmp_path / "renamed")
    (tmp_path / "renamed" / "steady.py").write_text(OWN.replace("Kept", "Held"))
    monkeypatch.chdir(tmp_path / "renamed")
    monkeypatch.setattr("atesd.own._named", {})
    with pytest.raises(UserError, match=r"steady\.Kept, where its recipe names steady\.Held: give a class that was"):
        Trainer.resume(tmp_path / "renamed" / "run")


@pytest.mark.parametrize(
    ("sections", "place"),
    [
        ({"env": {"kind": "trl", "factory": "own.py:Game"}, "task": {"kind": "jsonl", "path": "x"}}, "own.py:Game"),
        ({"reward": {"kind": "python", "function": "own.py:score"}}, "own.py:score"),
        ({"reward": [{"kind": "exact"}, {"kind": "python", "function": "own.py:score"}]}, "own.py:score"),
    ],
)
def test_code_of_environments_and_rewards_is_known_by_its_digest(
    sections: dict[str, Any], place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text("class Game: ...\n")
    before = digests_of_code(build_config(sections))
    assert list(before) == [place]
    (tmp_path / "own.py").write_text("class Game: 1\n")
    assert digests_of_code(build_config(sections)) != before


def test_a_resumption_that_is_refused_changes_nothing(tmp_path: Path) -> None:
    stopped(tmp_path / "run", TREE, 2, Half())
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()}
    with (
        pytest.warns(UserWarning, match="goes on to step 9"),
        pytest.raises(UserError, match="a controller of its own"),
    ):
        Trainer.resume(tmp_path / "run", ["step.num_steps=9"])
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()} == before


@pytest.mark.parametrize("name", ["about.json", "env.json", "result.json"])
def test_a_record_that_is_not_as_it_was_sealed_is_told(name: str, runs: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(runs / "whole", tmp_path / "run"))
    (run / name).write_text((run / name).read_text() + " ")
    with pytest.raises(UserError, match=rf"is damaged: {re.escape(name)} .*restore it from a copy, or start a new run"):
        Trainer.resume(run)


def test_damaged_logs_are_told_and_logs_of_later_steps_forgotten(cut: Path, runs: Path) -> None:
    with (cut / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "torn')
    (cut / "rollouts" / "step_of_mine.jsonl").write_text("mine")
    Trainer.resume(cut).train()
    (cut / "rollouts" / "step_of_mine.jsonl").unlink()
    assert outcome(cut) == outcome(runs / "whole")


def test_a_flipped_bit_in_the_log_is_not_carried_on(cut: Path) -> None:
    flip(cut / "groups.jsonl")
    with pytest.raises(UserError, match=r"no checkpoint .* groups\.jsonl is not what was written"):
        Trainer.resume(cut)


def edit(run: Path, **changes: Any) -> None:
    config = json.loads((run / "config.json").read_text())
    for key, value in changes.items():
        section, _, name = key.partition("__")
        config[section][name] = value
    (run / "config.json").write_text(json.dumps(config))


def test_an_edited_recipe_is_refused_by_its_key(cut: Path) -> None:
    edit(cut, optim__lr=0.5)
    with pytest.raises(UserError, match=r"optim\.lr is 0\.5, but this run began with 0\.001 .*: put it back"):
        Trainer.resume(cut)
    edit(cut, optim__lr=1e-3)
    assert Trainer.resume(cut).step == 3, "other spacing is no other recipe"


def test_a_run_may_be_made_longer_where_nothing_depends_on_its_length(runs: Path, tmp_path: Path) -> None:
    finished = Path(shutil.copytree(runs / "whole", tmp_path / "run"))
    edit(finished, step__num_steps=5)
    with pytest.warns(UserWarning, match="goes on to step 5 instead of 4"):
        trainer = Trainer.resume(finished)
    assert trainer.train()["step"] == 5
    straight = tmp_path / "straight"
    Trainer.start(build_config(TREE | {"step": {"num_steps": 5, "problems": 2}}), straight).train()
    # The shorter run evaluated and kept a model at what was its end; the rest is the same.
    assert outcome(finished)["weights"] == outcome(straight)["weights"]
    assert amended(finished) == [{"key": "step.num_steps", "from": 4, "to": 5}]
    assert RunDir.open(finished).flaw("config.json", "env.json") is None


def amended(run: Path) -> list[dict[str, Any]]:
    """Return what the run remembers of changes under way."""
    found = json.loads((run / "env.json").read_text())["amended"]
    assert isinstance(found, list)
    return found


def test_overrides_of_a_resumed_run_lengthen_it_as_if_it_had_been_so_from_the_start(cut: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="goes on to step 6 instead of 4"):
        trainer = Trainer.resume(cut, ["step.num_steps=6", "save.keep=5"])
    assert trainer.step == 3
    assert trainer.train()["step"] == 6
    straight = tmp_path / "straight"
    Trainer.start(build_config(TREE | {"step": {"num_steps": 6, "problems": 2}}), straight).train()
    assert outcome(cut)["weights"] == outcome(straight)["weights"]
    assert amended(cut) == [
        {"key": "save.keep", "from": 2, "to": 5},
        {"key": "step.num_steps", "from": 4, "to": 6},
    ]
    assert len(list((cut / "checkpoints").iterdir())) == 5, "steps 2 to 6: nothing was removed any more"
    assert RunDir.open(cut).flaw("config.json", "env.json") is None
    assert Trainer.resume(cut).config.step.num_steps == 6, "the run's own recipe from now on"


class Half:
    """A controller of a user's own."""

    def __init__(self) -> None:
        self.seen = 0

    def propose(self, step: int, problem_ids: Any, pass_rates: Any = ()) -> list[float]:
        return [0.25] * len(problem_ids)

    def wants(self, step: int) -> tuple[()]:
        return ()

    def observe(self, observation: Any) -> None:
        self.seen += 1

    def metrics(self) -> dict[str, float]:
        return {"exposure/mean": 0.25}

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: Any) -> None:
        self.seen = state["seen"]


def test_a_part_assigned_by_hand_is_never_replaced_in_silence(tmp_path: Path) -> None:
    stopped(tmp_path / "run", TREE, 2, Half())
    with pytest.raises(UserError, match=r"a controller of its own, .*Half, where its recipe names .*prepare="):
        Trainer.resume(tmp_path / "run")
    resumed = Trainer.resume(tmp_path / "run", prepare=lambda parts: setattr(parts, "controller", Half()))
    assert resumed.parts.controller.seen == 3, "steps 0 to 2, restored"  # type: ignore[attr-defined]
    resumed.train()
    assert {row["ratio"] for row in resumed.run.groups()} == {0.25}


def test_a_part_assigned_by_hand_is_missed_before_the_first_checkpoint_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer.start(build_config(TREE), tmp_path / "run")
    trainer.parts.controller = Half()

    def die(self: Trainer) -> None:
        raise OSError("killed")

    monkeypatch.setattr(Trainer, "_one_step", die)
    with pytest.raises(OSError, match="killed"):
        trainer.train()
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
    with pytest.raises(UserError, match=r"a controller of its own, .*Half, where its recipe names .*prepare="):
        Trainer.resume(tmp_path / "run")
    assert Trainer.resume(tmp_path / "run", prepare=lambda parts: setattr(parts, "controller", Half())).step == 0


@pytest.mark.parametrize(
    ("verb", "given", "says"),
    [
        ("state_dict", {"seen": {1, 2}}, r"the controller's Odd\.state_dict holds seen = \{1, 2\}, which JSON has not"),
        ("metrics", {"exposure/mean": "high"}, r"Odd\.metrics returned exposure/mean = 'high': return numbers"),
        ("wants", None, r"Odd\.wants returned None at step 0"),
        ("propose", None, None),
    ],
)
def test_what_no_checkpoint_or_log_could_hold_ends_a_run_before_its_first_step(
    verb: str, given: Any, says: str | None, tmp_path: Path
) -> None:
    trainer = Trainer.start(build_config(TREE), tmp_path / "run")
    trainer.parts.controller = type("Odd", (Half,), {verb: lambda *_: given})()
    if says is None:  # a verb that is not there
        trainer.parts.controller = type("Odd", (), {})()  # type: ignore[assignment]
        says = r"the controller is of class Odd, which has no propose, wants, observe"
    with pytest.raises(UserError, match=says):
        trainer.train()
    assert not trainer.run.metrics(), "not at the first checkpoint, when steps would be lost"


WIDE = """
from typing import ClassVar
from atesd.gates.gate import OpenGate


class Wide(OpenGate):
    kind: str = ""

    def weights(self, stats):
        return super().weights(stats)[:, None]
"""


def test_weights_of_another_shape_do_not_train_in_silence(tmp_path: Path) -> None:
    (tmp_path / "wide.py").write_text(WIDE)
    trainer = Trainer.start(build_config(TREE | {"gate": {"kind": f"{tmp_path}/wide.py:Wide"}}), tmp_path / "run")
    with pytest.raises(
        UserError, match=r"Wide\.weights returned shape \(\d+, 1\) for \d+ tokens: return a tensor with"
    ):
        trainer.train()


@pytest.mark.parametrize("name", ["revealer", "rule"])
def test_a_part_that_nobody_would_ask_is_refused(name: str, tmp_path: Path) -> None:
    trainer = Trainer.start(build_config(TREE), tmp_path / "run")
    setattr(trainer.parts, name, Half())
    with pytest.raises(
        UserError, match=rf"parts\.{name} was replaced, but other parts hold the recipe's: name the cla"
    ):
        trainer.train()


@pytest.mark.parametrize(
    ("given", "says"),
    [([0.5], "1 ratios for 2 problems"), ([0.5, 1.5], "the ratio 1.5"), ([float("nan"), 1.0], "the ratio nan")],
)
def test_a_controller_of_ones_own_that_answers_nonsense_is_named(given: list[float], says: str) -> None:
    class Odd:
        def propose(self, step: int, problem_ids: Any, pass_rates: Any = ()) -> list[float]:
            return given

    problems = [Problem("a", "a", "a"), Problem("b", "b", "b")]
    with pytest.raises(UserError, match=rf"Odd\.propose returned {re.escape(says)} at step 3: return one from 0 to 1"):
        proposed(Odd(), 3, problems, [None, None])  # type: ignore[arg-type]


def test_rounding_beyond_the_range_is_cut_off() -> None:
    class Rounding:
        def propose(self, step: int, problem_ids: Any, pass_rates: Any = ()) -> list[float]:
            return [1 + 1e-10, -1e-10]

    problems = [Problem("a", "a", "a"), Problem("b", "b", "b")]
    assert proposed(Rounding(), 3, problems, [None, None]) == [1.0, 0.0]  # type: ignore[arg-type]


def test_memory_may_be_saved_under_way_with_a_word_on_rounding(cut: Path) -> None:
    with pytest.warns(UserWarning, match=r"step\.token_budget is 64 from here on instead of 16384: sums"):
        trainer = Trainer.resume(cut, ["step.token_budget=64"])
    assert trainer.train()["step"] == 4
    assert amended(cut) == [{"key": "step.token_budget", "from": 16384, "to": 64}]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lr=0.5", r"--resume .*: optim\.lr is 0\.5, but this run began with 0\.001 and cannot change it"),
        ("step.problems=4", r"step\.problems is 4, but this run began with 2"),
        ("seed=7", "seed is 7, but this run began with"),
        ("step.num_steps=3", r"step\.num_steps is 3, but this run was to have 4 steps"),
        ("stepp.num_steps=9", r"unknown key 'stepp': did you mean 'step'"),
    ],
)
def test_other_overrides_of_a_resumed_run_are_refused_and_change_nothing(
    override: str, message: str, cut: Path
) -> None:
    before = {path: path.read_bytes() for path in cut.rglob("*.json")}
    with pytest.raises(UserError, match=message):
        Trainer.resume(cut, ["save.keep=5", override])
    assert {path: path.read_bytes() for path in cut.rglob("*.json")} == before


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"optim": {"lr": 1e-3, "schedule": "linear"}}, r'optim\.schedule = "linear" depends on the length of the run'),
        ({"exposure": {"kind": "linear"}}, r'exposure\.kind = "linear" depends on the length of the run'),
        ({"exposure": {"kind": "beta"}}, r'exposure\.kind = "beta" depends on the length of the run'),
    ],
)
def test_a_run_that_depends_on_its_length_keeps_it(section: dict[str, Any], message: str, tmp_path: Path) -> None:
    stopped(tmp_path / "run", TREE | section, step=1)
    edit(tmp_path / "run", step__num_steps=9)
    with pytest.raises(UserError, match=message):
        Trainer.resume(tmp_path / "run")


@pytest.mark.parametrize(
    "override",
    [
        *("rollout.engine.url=http://other:1", "rollout.engine.timeout_s=5.0", "rollout.engine.wait_s=5.0"),
        *("rollout.engine.concurrency=3", "rollout.engine.adapters=elsewhere"),
        *("step.token_budget=64", "rollout.batch_tokens=64", "save.every=7", "track.project=other"),
    ],
)
@pytest.mark.filterwarnings("ignore:.* sums are taken in another order:UserWarning")
def test_what_decides_no_result_may_change_under_way(override: str, tmp_path: Path) -> None:
    config = build_config({"rollout": {"engine": {"kind": "vllm"}}})
    run = RunDir.create(tmp_path / "run", config.model_dump(mode="json"))
    key = override.partition("=")[0]
    assert [changed for changed, *_ in resumed_config(run, None, [override]).changes] == [key]


def test_a_run_is_not_made_shorter(cut: Path) -> None:
    edit(cut, step__num_steps=3)
    with pytest.raises(UserError, match=r"step\.num_steps is 3, but this run was to have 4 steps"):
        Trainer.resume(cut)


def test_two_processes_do_not_continue_one_run(cut: Path) -> None:
    first = Trainer.resume(cut)
    with pytest.raises(UserError, match=f"another process is writing {cut}"):
        Trainer.resume(cut)
    first.train()
    assert Trainer.resume(cut).train()["step"] == 4


def test_a_run_of_an_earlier_version_is_told_and_left_alone(cut: Path) -> None:
    (cut / "about.json").unlink()
    (cut / "manifest.json").unlink()
    before = (cut / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"written by another version of atesd \(format 1, this one continues 2\)"):
        Trainer.resume(cut)
    assert (cut / "metrics.jsonl").read_bytes() == before


def test_a_start_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        Trainer.start(build_config(TREE | {"model": {"path": str(tmp_path / "nowhere")}}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
