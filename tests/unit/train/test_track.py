"""Trackers: tensorboard for real, through a run and its continuation; the others by what accelerate would hand them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator, tracking

from atesd.recipe import build_config
from atesd.sections import TrackConfig
from atesd.train import track
from atesd.train.loop import Interrupted, Trainer
from atesd.train.track import Trackers, refuse_missing
from atesd.types import UserError

from trust import BASE


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return what tensorboard shows of a folder."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(str(folder / "tensorboard"))
    found.Reload()
    shown = {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}
    return shown | {"recipe": [(event.step, 0.0) for event in found.Tensors("recipe/text_summary")]}


def test_tensorboard_shows_every_step_once_though_the_run_was_interrupted(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    tree = BASE | {"step": {"num_steps": 3, "problems": 2}, "save": {"every": 1}, "track": {"to": ["tensorboard"]}}
    trainer = Trainer.start(build_config(tree), tmp_path / "run")
    trainer.listener = lambda row: row["step"] == 2 and trainer.stop()
    with pytest.raises(Interrupted):
        trainer.train()
    Trainer.resume(tmp_path / "run").train()
    rows = trainer.run.metrics()
    shown = scalars(tmp_path / "run" / "track")
    assert shown["loss/total"] == [(row["step"], pytest.approx(row["loss/total"], rel=1e-6)) for row in rows[1:]]
    assert [step for step, _ in shown["time/step_s"]] == [1, 2, 3]
    assert shown["recipe"] == [(0, 0.0), (2, 0.0)], "the recipe, at the start and where the run went on"


def test_tensorboard_forgets_the_steps_that_a_crash_lost(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    tree = BASE | {"step": {"num_steps": 4, "problems": 2}, "save": {"every": 2}, "track": {"to": ["tensorboard"]}}
    trainer = Trainer.start(build_config(tree), tmp_path / "run")

    def crash(row: dict[str, float]) -> None:
        if row["step"] == 3:
            raise RuntimeError("crashed")

    trainer.listener = crash
    with pytest.raises(RuntimeError, match="crashed"):
        trainer.train()
    assert [step for step, _ in scalars(tmp_path / "run" / "track")["loss/total"]] == [1, 2, 3]
    Trainer.resume(tmp_path / "run").train()
    assert [step for step, _ in scalars(tmp_path / "run" / "track")["loss/total"]] == [1, 2, 3, 4]
    assert [step for step, _ in scalars(tmp_path / "run" / "track")["time/step_s"]] == [1, 2, 3, 4]


class Fake:
    """Stands in for a tracker class of accelerate."""

    made: list[Fake]

    def __init__(self, project: str, **options: Any) -> None:
        self.name, self.project, self.options = "wandb", project, options
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.files: list[tuple[str, dict[str, Any]]] = []
        self.state: list[str] = []
        type(self).made.append(self)

    @property
    def tracker(self) -> Fake:
        return self

    def start(self) -> None:
        self.state.append("start")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.state.append(f"recipe {values['seed']}")

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))

    def log_artifact(self, path: str, **options: Any) -> None:
        self.files.append((path, options))

    def finish(self) -> None:
        self.state.append("finish")


@pytest.mark.parametrize("online", [False, True])
def test_wandb_is_offline_unless_asked_and_gets_recipe_numbers_and_report(
    online: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Accelerator(cpu=True)
    Fake.made = []
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", Fake)
    (tmp_path / "run").mkdir()
    trackers = Trackers(TrackConfig(to=("wandb",), project="mine", online=online), tmp_path / "run")
    assert not trackers.keep_files, "nothing is open yet"
    trackers.start({"seed": 7}, 0)
    (fake,) = Fake.made
    assert (fake.project, fake.options["name"], fake.options["mode"]) == ("mine", "run", ["offline", "online"][online])
    assert fake.options["dir"] == str(tmp_path / "run" / "track")
    trackers.log(4, {"loss/total": 0.5, "cliff/lambda_star": float("inf")})
    assert fake.logged == [(4, {"loss/total": 0.5})]
    assert trackers.keep_files
    trackers.attach(tmp_path / "run" / "report.html")
    assert fake.files == [(str(tmp_path / "run" / "report.html"), {"name": "run-report", "type": "report"})]
    trackers.finish()
    trackers.finish()
    assert fake.state == ["start", "recipe 7", "finish"]


class Plain:
    """A tracker's own object that has no place for files, as tensorboard's."""


def test_a_tracker_without_a_place_for_files_gets_none_beside_one_that_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Accelerator(cpu=True)

    class Bare(Fake):
        @property
        def tracker(self) -> Any:
            return Plain()

    class Files(Fake):
        pass

    Bare.made, Files.made = [], []
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "trackio", Bare)
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", Files)
    (tmp_path / "run").mkdir()
    alone = Trackers(TrackConfig(to=("trackio",), project="mine"), tmp_path / "run")
    alone.start({"seed": 7}, 0)
    assert not alone.keep_files
    assert Bare.made[0].project == "mine"
    assert Bare.made[0].options == {"name": "run", "resume": "allow"}, "a run that goes on is one run"
    both = Trackers(TrackConfig(to=("trackio", "wandb")), tmp_path / "run")
    both.start({"seed": 7}, 0)
    assert both.keep_files
    both.attach(tmp_path / "report.html")
    assert [len(fake.files) for fake in (*Bare.made, *Files.made)] == [0, 0, 1]


def test_a_run_gives_its_report_to_trackers_that_keep_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Fake.made = []
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", Fake)
    monkeypatch.setattr(track, "_NEEDS", {"wandb": ("json",)})
    tree = BASE | {"step": {"num_steps": 1, "problems": 2}, "track": {"to": ["wandb"]}}
    trainer = Trainer.start(build_config(tree), tmp_path / "run")
    trainer.report = lambda path: path / "report.html"
    trainer.train()
    (fake,) = Fake.made
    assert [path for path, _ in fake.files] == [str(tmp_path / "run" / "report.html")]
    assert [step for step, _ in fake.logged] == [0, 1]
    assert fake.state[-1] == "finish"


def test_what_is_not_installed_is_named_with_its_remedy_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(track, "_NEEDS", {"trackio": ("no_such_library",), "tensorboard": ("json",)})
    config = build_config(BASE | {"track": {"to": ["trackio"]}})
    with pytest.raises(UserError, match=r"track\.to names trackio, .* pip install 'atesd\[trackio\]'"):
        Trainer.start(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    Trainer.start(build_config(BASE), tmp_path / "begun").run.unlock()
    with pytest.raises(UserError, match=r"track\.to names trackio, .* pip install 'atesd\[trackio\]'"):
        Trainer.resume(tmp_path / "begun", ['track.to=["trackio"]'])
    assert Trainer.resume(tmp_path / "begun").config.track.to == ()
    with pytest.raises(UserError, match="names a tracker twice"):
        refuse_missing(TrackConfig(to=("tensorboard", "tensorboard")))


def test_accelerate_has_every_tracker_that_a_recipe_may_name() -> None:
    assert set(track._NEEDS) <= set(tracking.LOGGER_TYPE_TO_CLASS)
