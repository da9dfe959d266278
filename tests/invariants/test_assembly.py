"""Which setting reaches which part of a run, where nothing else would show it."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from atesd.recipe import build_config
from atesd.routing.route import Route
from atesd.runlog import RunDir
from atesd.train.hints import Hints
from atesd.train.loop import Interrupted, Trainer
from atesd.train.setup import Parts, assemble, losses_of
from atesd.types import Observation, Stateless, UserError

from support.composition import BASE as IN_TURNS
from support.recording import record, rendered
from support.wired import BASE, GROUPS, PARTIAL, SAMPLING

DOORS: dict[str, Any] = IN_TURNS | {
    "task": {"kind": "doors", "train_size": 4, "probe_size": 3, "eval_size": 2},
    "env": {"kind": "doors"},
    "reveal": {"kind": "turns"},
}


def parts(**sections: Any) -> Parts:
    return assemble(build_config(BASE | sections))


def test_adapters_begin_by_the_runs_seed() -> None:
    def adapters(seed: int) -> torch.Tensor:
        model = parts(seed=seed, model={"path": "pico", "lora": {"r": 2}}).model
        return torch.cat([weight.flatten() for name, weight in model.named_parameters() if "lora_A" in name])

    first = adapters(0)
    assert torch.equal(first, adapters(0))
    assert not torch.equal(first, adapters(1))


def test_room_is_kept_for_the_hints_of_training_and_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    surplus = Hints.surplus
    monkeypatch.setattr(Hints, "surplus", lambda self, of: (asked.extend(each.id for each in of), surplus(self, of))[1])
    made = assemble(build_config(DOORS))
    assert asked == [each.id for each in (*made.problems, *made.task.probe())]


def test_the_probe_knows_the_models_context() -> None:
    """Solutions longer than completions are cut to what the context holds behind the longest prompt."""
    made = parts(rollout=SAMPLING | {"max_new_tokens": 2})
    context = made.model.config.max_position_embeddings
    (problem, *_) = made.task.probe()
    assert made.probe._context == context
    solution = len(made.hints.solution_ids(problem))
    assert len(made.probe._ids(problem, problem.solution)) == min(solution, context - made.hints.longest(problem))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_checkpointing_runs_layers_again_in_the_backward_pass(checkpointing: bool) -> None:
    made = parts(model={"path": "pico", "gradient_checkpointing": checkpointing})
    groups = made.driver.rollout(made.problems[:2], build_config(BASE).rollout, seed=1)
    rows = made.rows.build(groups, [Route.DISTIL] * 2, [0.5] * 2, ("teacher",))
    passes: list[bool] = []
    made.model.model.layers[0].self_attn.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    made.stepper.optimize(rows, build_config(BASE).target.at(1.0))
    batches = len({row.components for row in rows})
    assert (passes.count(True) > batches) == checkpointing


@pytest.mark.parametrize("listed", [True, False])
def test_a_models_further_end_tokens_end_completions(listed: bool, tmp_path: Path) -> None:
    from atesd.train.model import resolve

    model = AutoModelForCausalLM.from_pretrained(resolve("pico"))
    tokenizer = AutoTokenizer.from_pretrained(resolve("pico"))
    further = next(id_ for id_ in range(len(tokenizer)) if id_ != tokenizer.eos_token_id)
    model.generation_config = GenerationConfig(eos_token_id=[tokenizer.eos_token_id, further] if listed else further)
    for each in (model, tokenizer):
        each.save_pretrained(tmp_path)
    assert parts(model={"path": str(tmp_path)}).renderer.eos_ids == (tokenizer.eos_token_id, further)


def test_each_role_thinks_as_its_own_setting_says_and_the_teacher_begins_with_its_prefill(tmp_path: Path) -> None:
    template = tmp_path / "thinking.jinja"
    template.write_text(
        "{% for message in messages %}{{ '<|' + message.role + '|>' + message.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{{ '1' if enable_thinking else '0' }}{% endif %}"
    )
    prompt = {"chat_template": str(template), "enable_thinking_student": False, "enable_thinking_teacher": True}
    made = parts(prompt=BASE["prompt"] | prompt | {"teacher_prefill": "abc"})
    (problem, *_) = made.problems
    student = made.tokenizer.decode(made.hints.student_ids(problem))
    teacher = made.tokenizer.decode(made.hints.teacher_ids(problem, 1.0))
    assert student == f"<|user|>{problem.problem}<|assistant|>0"
    assert teacher == f"<|user|>{problem.problem}\n>{problem.solution}<|assistant|>1abc"


def test_a_schedule_is_put_where_it_stood_after_so_many_updates() -> None:
    made = parts(optim={"lr": 1e-3, "schedule": "linear"}, step={"num_steps": 2, "problems": 4, "updates_per_batch": 2})
    made.set_schedule(3)
    assert made.scheduler.get_last_lr() == [pytest.approx(1e-3 / 4)], "what the next update logs"
    assert [group["lr"] for group in made.optimizer.param_groups] == made.scheduler.get_last_lr()
    made.optimizer.step()
    made.scheduler.step()
    assert made.scheduler.get_last_lr() == [pytest.approx(0.0)]


def test_sampled_tokens_are_corrected_where_the_sampler_has_weights_of_its_own() -> None:
    sampled = {"loss": {"divergence": {"kind": "sampled", "importance_clip": 3.0}}}
    served = {"rollout": SAMPLING | {"engine": {"kind": "vllm"}}}
    assert losses_of(build_config(sampled)).corrects is None
    assert losses_of(build_config(sampled | served)).corrects == 3.0
    assert losses_of(build_config(served)).corrects is None, "a divergence does not depend on what was sampled"


def test_a_run_knows_how_many_tokens_its_model_has() -> None:
    made = parts()
    assert made.driver.vocabulary == made.model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]


def test_the_weights_that_a_step_begins_with_are_asked_where_a_loss_reads_them() -> None:
    assert not losses_of(build_config({})).importance
    assert losses_of(build_config({"loss": {"divergence": {"kind": "sampled"}}})).importance
    assert losses_of(build_config({"routing": {"kind": "both"}, "rollout": {"group_size": 2}})).importance


def test_a_run_evaluates_with_the_prompts_of_evaluation(tmp_path: Path) -> None:
    prompt = BASE["prompt"] | {"evaluation": "{problem}\n"}
    run = record(BASE | {"prompt": prompt, "step": {"num_steps": 1, "problems": 2}}, tmp_path / "run")
    expected = {rendered(run.tokenizer, f"{problem.problem}\n") for problem in run.evaluation}
    assert [set(call.prompts) for call in run.calls if expected & set(call.prompts)] == [expected, expected]


def test_a_router_reads_the_largest_exposure_of_its_step(tmp_path: Path) -> None:
    sections = {"exposure": {"kind": "random"}, "routing": {"kind": "retire"}, "rollout": GROUPS}
    trainer = Trainer.start(build_config(BASE | sections), tmp_path / "run")
    seen: list[float] = []
    route = trainer.parts.router.route
    trainer.parts.router.route = lambda groups, ratio: (seen.append(ratio), route(groups, ratio))[1]  # type: ignore[method-assign]
    trainer.parts.controller.propose = lambda *_: [0.25, 0.75, 0.5, 0.25]  # type: ignore[method-assign]
    trainer.train()
    assert seen == [0.75, 0.75]


def test_the_gap_to_the_sampler_is_judged_by_the_recipes_own_bounds(tmp_path: Path) -> None:
    """Rounding in float32 is beyond the one that is next to nothing, whichever it is."""
    strict = SAMPLING | {"gap_warning": 1e-15}
    with pytest.warns(UserWarning, match=r"more than rollout\.gap_warning = 1e-15"):
        Trainer.start(build_config(BASE | {"rollout": strict}), tmp_path / "warned").train()
    with pytest.raises(UserError, match=r"more than rollout\.gap_limit = 1e-15"):
        Trainer.start(build_config(BASE | {"rollout": strict | {"gap_limit": 1e-15}}), tmp_path / "stopped").train()


class Idle(Stateless):
    """A router that leaves every group alone."""

    capped = False

    def __init__(self) -> None:
        self.ratios: list[float] = []

    def route(self, groups: Any, ratio: float) -> list[Route]:
        self.ratios.append(ratio)
        return [Route.SKIP] * len(groups)


@pytest.mark.parametrize(("kind", "is_paused"), [("aligned", False), ("retire", True)])
def test_windows_go_on_without_distillation_where_the_router_reads_the_exposure(
    kind: str, is_paused: bool, tmp_path: Path
) -> None:
    sections = {"exposure": {"kind": "random", "hold": 1}, "routing": {"kind": kind}, "rollout": GROUPS}
    trainer = Trainer.start(build_config(BASE | sections | {"step": {"num_steps": 3, "problems": 4}}), tmp_path / "run")
    trainer.parts.router = idle = Idle()
    trainer.train()
    rows = RunDir.open(tmp_path / "run").metrics()[1:]
    assert [(row["route/idle"], row["route/paused"]) for row in rows] == [(1.0, float(is_paused))] * 3
    assert len(idle.ratios) == 3
    assert len(set(idle.ratios)) == (1 if is_paused else 3)


def test_the_probe_reads_as_many_tokens_of_a_reference_as_the_recipe_says() -> None:
    assert {len(each.completion) for each in parts(probe={"max_tokens": 3}).probe.references} == {3}


def test_sampled_tokens_a_second(tmp_path: Path) -> None:
    Trainer.start(build_config(BASE), tmp_path / "run").train()
    for row in RunDir.open(tmp_path / "run").metrics()[1:]:
        assert row["time/tokens_per_s"] == pytest.approx(row["optim/tokens"] / row["time/sample_s"])


def test_the_seconds_of_a_run_are_those_of_all_its_parts(tmp_path: Path) -> None:
    trainer = Trainer.start(build_config(BASE), tmp_path / "run")
    trainer.listener = lambda row: os.kill(os.getpid(), signal.SIGTERM) if row["step"] == 1 else None
    with pytest.raises(Interrupted):
        trainer.train()
    before = sum(row.get("time/step_s", 0.0) for row in RunDir.open(tmp_path / "run").metrics())
    resumed = Trainer.resume(tmp_path / "run")
    assert resumed._seconds == trainer._seconds >= before > 0
    result = resumed.train()
    steps = [row["time/step_s"] for row in RunDir.open(tmp_path / "run").metrics() if row["step"]]
    assert result["seconds"] >= trainer._seconds + steps[-1] * 0.99


def test_no_teacher_is_shown_the_own_solution_where_it_is_to_see_anothers() -> None:
    made = parts(prompt=BASE["prompt"] | {"hint": "wrong_problem"})
    probe = made.task.probe()
    for problem, others in [(each, made.problems) for each in made.problems] + [(each, probe) for each in probe]:
        shown = made.hints.hint(problem, 1.0).text
        assert shown in {other.solution for other in others if other.id != problem.id}
    single = parts(prompt=BASE["prompt"] | {"hint": "wrong_problem"}, task=BASE["task"] | {"probe_size": 1})
    (only,) = single.task.probe()
    assert single.hints.hint(only, 1.0).text == single.task.train()[0].solution


def test_skills_are_credited_for_distilled_attempts_alone(tmp_path: Path) -> None:
    """Credit asks what distilling any attempt would do, which teaches nothing about skills."""
    (tmp_path / "skills").mkdir()
    (tmp_path / "skills" / "look.md").write_text("*")
    sections = {
        "reveal": {"kind": "skills", "folder": str(tmp_path / "skills"), "retriever": "ucb"},
        "exposure": {"kind": "influence", "reference": "reward", "hold": 1, "grid": [0.0, 1.0]},
        "routing": {"kind": "hdpo"},
        "rollout": SAMPLING | {"group_size": 2, "temperature": 1.5},
        "step": {"num_steps": 3, "problems": 4},
        "probe": {"credit_steps": 1},
    }
    trainer = Trainer.start(build_config(BASE | sections), tmp_path / "run")
    heard: list[int] = []
    optimize = trainer.parts.stepper.optimize
    trainer.parts.stepper.optimize = lambda rows, *given, **named: (  # type: ignore[method-assign]
        heard.append(sum("distil" in row.components for row in rows)),
        optimize(rows, *given, **named),
    )[1]
    trainer.train()
    uses = [row["skill/look/uses"] for row in RunDir.open(tmp_path / "run").metrics() if "skill/look/uses" in row]
    assert 0 < sum(heard) < 3 * 8, "or this shows nothing"
    assert uses[-1] == sum(heard)
    revealer = trainer.parts.revealer
    revealer.observe(Observation(4))
    assert revealer.metrics() == {"skill/look/uses": sum(heard)}, "and not twice"


def test_a_teacher_that_scales_advantages_alone_keeps_windows_going(tmp_path: Path) -> None:
    """RLSD with coef 0: no distillation loss, and yet exposure decides what every advantage is multiplied with."""
    sections = {
        "exposure": {"kind": "random", "hold": 1},
        "routing": {"kind": "both", "coef": 0},
        "rl": {"teacher_credit": {}},
        "reward": PARTIAL,
        "rollout": GROUPS,
        "step": {"num_steps": 4, "problems": 4},
    }
    Trainer.start(build_config(BASE | sections), tmp_path / "run").train()
    rows = RunDir.open(tmp_path / "run").metrics()[1:]
    acting = [row for row in rows if "rl/credit" in row]
    assert acting
    assert all(row["route/idle"] == float("rl/credit" not in row) for row in rows)
    assert len({row["exposure/ratio"] for row in rows}) > 1
    assert not any("loss/distil" in row for row in rows)


def test_credit_of_weights_in_half_precision_adds_up_in_float32() -> None:
    from atesd.train.directions import _nothing

    weights = [
        torch.nn.Parameter(torch.zeros(2, dtype=dtype)) for dtype in (torch.bfloat16, torch.float32, torch.float64)
    ]
    assert [each.dtype for each in _nothing(weights)] == [torch.float32, torch.float32, torch.float64]
