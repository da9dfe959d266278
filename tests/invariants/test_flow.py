"""A flow's run: exact where it must be, resumed bit for bit, with every controller, and refused in one line."""

from __future__ import annotations

import copy
import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from atesd.cli.main import main
from atesd.flow.loop import FlowTrainer
from atesd.flow.measure import FlowBatch, FlowDirections
from atesd.flow.rollout import Views, roll
from atesd.flow.setup import assemble
from atesd.metrics import METRICS, is_timing
from atesd.recipe import build_config
from atesd.runlog import RunDir
from atesd.train.loop import Interrupted, Trainer
from atesd.trainers import resume_run, start_run
from atesd.types import Measurement, NonFiniteError, UserError

TREE: dict[str, Any] = {
    "threads": 1,
    "task": {"kind": "ring", "train_size": 32, "probe_size": 16, "eval_size": 16},
    "flow": {"steps": 3, "width": 8, "depth": 1, "warm_steps": 5, "warm_batch": 8, "start": [0.0, 0.9]},
    "exposure": {"kind": "beta", "hold": 2, "look_ahead": 4, "decisions_per_update": 2},
    "teacher": {"weights": "ema", "ema_decay": 0.9},
    "optim": {"lr": 1e-3, "schedule": "cosine", "max_grad_norm": 1.0},
    "step": {"num_steps": 8, "problems": 4},
    "eval": {"every": 4, "k": 2, "problems": 4},
    "save": {"every": 2},
}
DIGITS = {"kind": "digits", "train_size": 200, "probe_size": 16}


def tree(**sections: Any) -> dict[str, Any]:
    return TREE | sections


def outcome(run: Path) -> tuple[list[dict[str, Any]], dict[str, bytes], dict[str, bytes]]:
    """Return everything reproducible that a finished run leaves."""
    rows = [{key: v for key, v in row.items() if not is_timing(key)} for row in RunDir.open(run).metrics()]
    weights = {name: each.numpy().tobytes() for name, each in load_file(run / "final" / "model.safetensors").items()}
    return rows, weights, {path.name: path.read_bytes() for path in (run / "eval").iterdir()}


def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(tmp_path: Path) -> None:
    start_run(build_config(TREE), tmp_path / "whole").train()
    expected = outcome(tmp_path / "whole")
    assert [row["step"] for row in expected[0]] == list(range(9))
    assert any("exposure/loss" in row for row in expected[0]), "the controller must have learned something"
    run = tmp_path / "cut"
    trainer = start_run(build_config(TREE), run)
    for stop in (3, 5):
        trainer.listener = lambda row, at=stop: os.kill(os.getpid(), signal.SIGTERM) if row["step"] == at else None
        with pytest.raises(Interrupted):
            trainer.train()
        trainer = resume_run(run)
        assert isinstance(trainer, FlowTrainer)
        assert trainer.step == stop
    trainer.train()
    assert outcome(run) == expected
    before = (run / "metrics.jsonl").read_bytes()
    resume_run(run).train()
    assert (run / "metrics.jsonl").read_bytes() == before, "a finished run is not run again"


def test_the_model_of_the_smallest_distance_is_the_best_one(tmp_path: Path) -> None:
    result = start_run(build_config(tree(eval=TREE["eval"] | {"every": 1})), tmp_path / "run").train()
    rows = RunDir.open(tmp_path / "run").metrics()
    names = [key for key in rows[0] if key.startswith("quality/")]
    best = min(rows, key=lambda row: row[names[0]])
    assert len({row[names[0]] for row in rows}) > 1
    assert result["best"] == {"step": best["step"], "score": -best[names[0]]}


def test_what_a_run_logs_is_in_the_table(tmp_path: Path) -> None:
    result = start_run(build_config(tree(step={"num_steps": 1, "problems": 4})), tmp_path / "run").train()
    rows = RunDir.open(tmp_path / "run").metrics()
    patterns = [key.split("/") for key in METRICS]

    def known(key: str) -> bool:
        return any(
            len(parts) == len(key.split("/"))
            and all(
                a in ("{}", b) or ("{}" in a and a.partition("{")[0] in b)
                for a, b in zip(parts, key.split("/"), strict=True)
            )
            for parts in patterns
        )

    found = {key for row in rows for key in row} - {"step"}
    assert [key for key in found if not known(key.removesuffix("_low").removesuffix("_high"))] == []
    assert {"quality/energy_distance", "quality/mode_coverage", "eval/ring/avg@2"} <= result["final"].keys()
    assert result["best"].keys() == {"step", "score"}
    row = json.loads((tmp_path / "run" / "eval" / "step_000001.jsonl").read_text().splitlines()[0])
    assert len(row["point"]) == 2
    assert (tmp_path / "run" / "best" / "README.md").is_file()


@pytest.mark.parametrize(
    ("ratio", "start"), [(0.0, [0.0, 0.0]), (0.0, [0.0, 0.9])], ids=["from noise", "from noised points"]
)
def test_a_teacher_that_sees_what_the_student_sees_teaches_exactly_nothing(
    ratio: float, start: list[float], tmp_path: Path
) -> None:
    sections = {"exposure": {"kind": "fixed", "ratio": ratio}, "flow": TREE["flow"] | {"start": start}}
    trainer = start_run(build_config(tree(**sections, teacher={})), tmp_path / "run")
    before = {name: value.clone() for name, value in trainer.parts.model.state_dict().items()}
    trainer.train()
    rows = RunDir.open(tmp_path / "run").metrics()[1:]
    assert {(row["loss/total"], row["optim/grad_norm"], row["mismatch/top1"]) for row in rows} == {(0.0, 0.0, 0.0)}
    assert all(torch.equal(value, before[name]) for name, value in trainer.parts.model.state_dict().items())


def test_the_update_descends_the_mean_divergence_of_the_students_own_transitions() -> None:
    """The loss, recomputed state by state in float64 from outside."""
    parts = assemble(build_config(tree(exposure={"kind": "fixed", "ratio": 0.6}, teacher={})))
    config = build_config(TREE).flow
    points, at = parts.task.train, torch.tensor([3, 1, 7])
    states, ends = roll(parts.views, points, at, config, torch.Generator().manual_seed(1), start=True)
    total = 0.0
    with torch.no_grad():
        for x, t, dt, place in zip(states.x_SD, states.t_S1, states.dt_S1, states.at_S, strict=True):
            condition = torch.as_tensor(points.condition_NC)[place]
            sees = [torch.zeros(5), torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0])]
            student, teacher = (parts.model(x[None], t[None], condition[None], each[None])[0].double() for each in sees)
            means = [x + dt * ((1 + config.eta**2 * t / 2) * v - config.eta**2 / 2 * x) for v in (student, teacher)]
            total += float(((means[0] - means[1]) ** 2).sum() / (2 * config.eta**2 * (1 - t) * dt))
    metrics = parts.stepper.optimize(states, [0.6] * 3)
    assert metrics["loss/total"] == pytest.approx(total / len(states.x_SD), rel=1e-4)
    assert len(states.x_SD) == 3 * config.steps
    assert states.trajectory_S.tolist() == [0, 1, 2] * 3
    assert ends.shape == (3, 2)
    part = states.of(torch.tensor([2, 0]))
    assert part.at_S.tolist() == [3, 7] * 3, "in the order of the states"
    assert part.trajectory_S.tolist() == [1, 0] * 3


def test_levels_of_a_gradient_add_up_and_references_fold() -> None:
    parts = assemble(build_config(tree(exposure={"kind": "fixed", "ratio": 1.0}, teacher={})))
    at = torch.arange(4)
    states, _ = roll(
        parts.views, parts.task.train, at, build_config(TREE).flow, torch.Generator().manual_seed(1), start=True
    )
    directions, weights = FlowDirections(parts.probe, parts.stepper), list(parts.model.parameters())
    batch = FlowBatch(states, parts.levels(at.tolist()), [1.0] * 4)
    (whole,) = directions.of_distillation([batch], weights)
    (levels,) = directions.of_distillation([batch], weights, by_level=True)
    assert set(levels) == set(batch.levels)
    summed = [sum(each) for each in zip(*levels.values(), strict=True)]
    for one, other in zip(whole[""], summed, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    folds = directions.of_references_by_fold(range(16), weights)
    mean = [sum(each) / len(folds) for each in zip(*folds, strict=True)]
    for one, other in zip(directions.of_references(range(16), weights), mean, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_credit_of_a_single_probe_point_has_no_error_and_is_none(tmp_path: Path) -> None:
    """What one fold says cannot be weighed: the log counts a discarded credit, and has no credits of 0."""
    exposure = {"kind": "influence", "hold": 1, "play": "best", "grid": [0.0, 1.0]}
    task = {"kind": "ring", "train_size": 32, "probe_size": 1, "eval_size": 16}
    start_run(build_config(tree(exposure=exposure, task=task, step={"num_steps": 1, "problems": 4})), tmp_path).train()
    row = RunDir.open(tmp_path).metrics()[1]
    assert row["exposure/discarded"] == 1.0
    assert not [key for key in row if key.startswith("exposure/credit/")]


CONTROLLERS = [
    {"kind": "fixed", "ratio": 0.4},
    {"kind": "linear"},
    {"kind": "random"},
    {"kind": "beta", "hold": 1, "look_ahead": 1},
    {"kind": "beta", "progress_metric": "probe_kl", "lambda_gt": 0.0},
    {"kind": "beta", "progress_metric": "probe_accuracy", "reward": "lookahead"},
    {"kind": "bandit", "hold": 1},
    {"kind": "influence", "hold": 1, "grid": [0.0, 0.6, 1.0]},
    {"kind": "influence", "hold": 1, "play": "best", "by": "level", "grid": [0.0, 1.0]},
    {"kind": "paired", "hold": 1},
    {"kind": "difficulty", "by": "reference_ppl", "bins": 2},
]


@pytest.mark.parametrize("exposure", CONTROLLERS, ids=lambda each: "-".join(map(str, each.values()))[:40])
def test_every_controller_runs_two_steps(exposure: dict[str, Any], tmp_path: Path) -> None:
    sections = {"exposure": exposure, "step": {"num_steps": 2, "problems": 4}}
    start_run(build_config(tree(**sections)), tmp_path / "run").train()
    rows = RunDir.open(tmp_path / "run").metrics()
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert all(0 <= row["exposure/ratio"] <= 1 for row in rows[1:])
    if exposure["kind"] == "influence":
        assert any(key.startswith("exposure/") and "credit/" in key for key in rows[1])
    if exposure["kind"] == "paired":
        assert "exposure/paired_credit" in rows[1]


def test_probe_kl_is_measured_against_the_teacher_of_step_0() -> None:
    exposure = {"kind": "beta", "progress_metric": "probe_kl"}
    parts = assemble(build_config(tree(exposure=exposure, teacher={"weights": "ema"})))
    before = parts.probe.kl()
    for weight in parts.teacher.tensors().values():
        weight.mul_(3.0)
    assert parts.probe.kl() == before, "whatever became of the average"
    with torch.no_grad():
        for weight in parts.model.parameters():
            weight.mul_(1.5)
    assert parts.probe.kl() != before


def test_a_digits_run_takes_two_steps(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    sections = {"task": DIGITS, "step": {"num_steps": 2, "problems": 4}}
    result = start_run(build_config(tree(**sections)), tmp_path / "run").train()
    assert {"quality/frechet_distance", "quality/class_agreement", "eval/digits/avg@2"} <= result["final"].keys()
    row = json.loads((tmp_path / "run" / "eval" / "step_000002.jsonl").read_text().splitlines()[0])
    assert len(row["point"]) == 64
    assert row["level"].startswith("digit ")


REFUSED = [
    ({"prompt": {"student": "{problem}"}}, "has no language model, so prompt would have no effect: remove it"),
    ({"gate": {"kind": "sdar"}}, "so gate would have no effect"),
    ({"routing": {"kind": "rl"}, "rollout": {"group_size": 2}}, "would have no effect"),
    ({"reveal": {"unit": "line"}}, "so reveal would have no effect"),
    ({"model": {"path": "smollm2"}}, "so model would have no effect"),
    ({"target": {"kind": "extrapolate", "lambda_x": 1.5}}, "so target would have no effect"),
    ({"rollout": {"max_new_tokens": 5}}, "so rollout would have no effect"),
    ({"step": {"token_budget": 99}}, "so step.token_budget would have no effect"),
    ({"step": {"updates_per_batch": 2}}, "so step.updates_per_batch would have no effect"),
    ({"eval": {"temperature": 0.5}}, "so eval.temperature would have no effect"),
    ({"probe": {"sampling_k": 3}}, "so probe.sampling_k would have no effect"),
    ({"save": {"rollouts_every": 3}}, "so save.rollouts_every would have no effect"),
    ({"reward": {"kind": "math"}}, "so reward would have no effect"),
    ({"flow": {"steps": 0}}, "flow.steps: Input should be greater than or equal to 1 (given: 0)"),
    ({"flow": {"start": [0.5, 0.2]}}, "runs backwards"),
    ({"flow": {"start": [0.0, 1.0]}}, "less than 1"),
    ({"flow": {"eta": 1e-6}}, "choose 0, the ODE, or at least 0.01"),
    ({"exposure": {"kind": "difficulty"}}, "group_size"),
    (
        {"task": {"kind": "pico"}, "teacher": {}},
        'task.kind = "pico" is answered in words, so flow would have no effect',
    ),
]


@pytest.mark.parametrize(("sections", "message"), REFUSED, ids=lambda each: str(each)[:50])
def test_what_would_be_ignored_is_refused_by_name(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        build_config(tree(**sections))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("exposure", "kind"),
    [
        ({"kind": "influence", "reference": "reward"}, "reward_influence"),
        ({"kind": "paired", "reference": "reward"}, "virtual_reward"),
        ({"kind": "beta", "gt_target": "answer"}, "gt_answer"),
    ],
)
def test_a_controller_that_asks_for_what_is_not_served_is_refused_before_the_run(
    exposure: dict[str, Any], kind: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=f"asks for the measurement {kind}, which a flow task does not serve"):
        start_run(build_config(tree(exposure=exposure, teacher={})), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            [Measurement("probe_answer")],
            'curriculum.kind = "random" asks for the measurement probe_answer, which a flow',
        ),
        ("probe_nll", r"wants returned 'probe_nll' at step 0"),
    ],
)
def test_what_a_curriculum_asks_for_is_looked_at_before_the_run(
    asked: object, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("atesd.curriculum.Shuffled.wants", lambda self, step: asked)
    with pytest.raises(UserError, match=message):
        start_run(build_config(tree()), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_one_sample_is_too_few_for_a_distance(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"make one sample, of which no distance can be told: raise eval\.k"):
        start_run(build_config(tree(eval={"k": 1, "problems": 1})), tmp_path / "run")


def test_one_that_asks_later_is_stopped_in_one_line(tmp_path: Path) -> None:
    trainer = start_run(build_config(tree(exposure={"kind": "beta", "reward": "aligned", "hold": 1})), tmp_path / "run")
    with pytest.raises(UserError, match="no measurement is called 'reward_influence': known are influence, probe_infl"):
        trainer.train()


@pytest.mark.parametrize("command", ["show", "plan", "check", "eval"])
def test_other_commands_say_that_there_is_no_text(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "ring.toml"
    recipe.write_text('task = {kind = "ring"}\n')
    words = [command, "pico", "--recipe", str(recipe)] if command == "eval" else [command, str(recipe)]
    monkeypatch.setattr("sys.argv", ["atesd", *words])
    with pytest.raises(SystemExit):
        main()
    assert 'task.kind = "ring" has no texts and no language model' in capsys.readouterr().err


def test_the_language_loop_sends_a_flow_away(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r'task\.kind = "ring" has no texts and no language model'):
        Trainer.start(build_config(tree(teacher={})), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_transitions_that_leave_the_finite_numbers_stop_the_run_and_are_named(tmp_path: Path) -> None:
    trainer = start_run(build_config(TREE), tmp_path / "run")
    asked: list[int] = []
    untouched = Views.student

    def broken(self: Views, *arguments: Any) -> Any:
        asked.append(1)
        found = untouched(self, *arguments)
        return found * float("inf") if len(asked) == 2 else found

    trainer._begin()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Views, "student", broken)
        with pytest.raises(
            NonFiniteError, match="transition 2 of 3 of the student's rollout leads to numbers"
        ) as error:
            trainer._one_step()
    assert "\n" not in str(error.value)
    assert trainer.step == 0
    trainer.run.unlock()


def test_a_divergence_that_overflows_is_named_before_weights_move(tmp_path: Path) -> None:
    parts = assemble(build_config(tree(teacher={})))
    states, _ = roll(
        parts.views,
        parts.task.train,
        torch.arange(2),
        build_config(TREE).flow,
        torch.Generator().manual_seed(1),
        start=True,
    )
    before = [weight.detach().clone() for weight in parts.model.parameters()]
    states.x_SD[3] = float("nan")  # the second transition of the second trajectory
    with pytest.raises(NonFiniteError, match="the divergence of transition 2 of 3 is not finite"):
        parts.stepper.optimize(states, [1.0, 1.0])
    assert all(torch.equal(one, other) for one, other in zip(parts.model.parameters(), before, strict=True))


def test_updates_are_those_of_a_plain_loop_with_a_teacher_of_each_kind() -> None:
    """Losses and weights of a student, and of its average, recomputed with torch alone on a copy of the network."""
    for weights in ("frozen", "ema"):
        settings = {"weights": weights} | ({"ema_decay": 0.5} if weights == "ema" else {})
        config = build_config(tree(teacher=settings, step={"num_steps": 3, "problems": 4}))
        parts, noise = assemble(config), config.flow.eta**2
        student, teacher = copy.deepcopy(parts.model), copy.deepcopy(parts.model)
        optimizer = torch.optim.AdamW(
            student.parameters(), betas=config.optim.betas, weight_decay=config.optim.weight_decay
        )
        ratios = [0.2, 1.0, 0.6, 0.0]
        for update in range(3):
            random = torch.Generator().manual_seed(update)
            states, _ = roll(parts.views, parts.task.train, torch.arange(4), config.flow, random, start=True)
            by_state = [ratios[place] for place in states.trajectory_S.tolist()]
            seen = (states.points, states.at_S, states.x_SD, states.t_S1)
            with torch.no_grad():
                target_SD = Views(teacher, parts.task.layout).teacher(*seen, by_state)
            own_SD = Views(student, parts.task.layout).student(*seen)
            gain_S1 = states.dt_S1 * (1 + noise * states.t_S1 / 2)
            variance_S1 = noise * (1 - states.t_S1) * states.dt_S1
            loss = ((gain_S1 * (own_SD - target_SD)).square() / (2 * variance_S1)).sum(-1).mean()
            rate = parts.optimizer.param_groups[0]["lr"]
            found = parts.stepper.optimize(states, ratios)
            assert (found["loss/total"], found["optim/lr"]) == (pytest.approx(float(loss.detach()), rel=1e-4), rate)
            optimizer.param_groups[0]["lr"] = 1e-3 * 0.5 * (1 + math.cos(math.pi * update / 3))
            assert rate == pytest.approx(optimizer.param_groups[0]["lr"])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            if weights == "ema":
                for mean, value in zip(teacher.parameters(), student.parameters(), strict=True):
                    mean.data.lerp_(value.data, 0.5)
        for value, expected in zip(parts.model.parameters(), student.parameters(), strict=True):
            assert torch.allclose(value, expected, atol=1e-6)
