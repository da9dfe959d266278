"""Measurements: what they measure, at which weights, and what cannot be measured."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from atesd.recipe import build_config
from atesd.rollout.hf import HFSampler
from atesd.rollout.render import Renderer
from atesd.seeds import derive_seed
from atesd.train.hints import Hints
from atesd.train.loop import Trainer
from atesd.train.setup import Parts, assemble, for_evaluation
from atesd.types import Group, Measurement, Trajectory, UserError

TREE: dict[str, Any] = {
    "threads": 1,
    "task": {"kind": "pico", "train_size": 4, "probe_size": 3, "eval_size": 2},
    "prompt": {"student": "{problem}", "teacher": "{problem}\n>{hint}", "answer": "\n#{answer}"},
    "rollout": {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 40},
    "step": {"problems": 4},
}


@pytest.fixture(scope="module")
def parts() -> Parts:
    return assemble(build_config(TREE))


def take(parts: Parts, kind: str, ratio: float | None = None) -> float | None:
    measurement = Measurement(kind, ratio)
    value = parts.measurer.measure([measurement]).get(measurement)
    assert value is None or isinstance(value, float)
    return value


def mean_nll(parts: Parts, prompts: list[tuple[int, ...]], texts: list[str]) -> float:
    """Compute the token mean by plain forward passes, one sequence at a time."""
    values = []
    for prompt, text in zip(prompts, texts, strict=True):
        ids = parts.renderer.text_ids(text)
        with torch.no_grad():
            logits = parts.model.eval()(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
        values.append(torch.nn.functional.cross_entropy(logits, torch.tensor(ids), reduction="none"))
    return float(torch.cat(values).mean())


def test_probe_nll_is_the_students_hint_free_nll_of_the_reference(parts: Parts) -> None:
    problems = parts.task.probe()
    expected = mean_nll(parts, [parts.hints.student_ids(p) for p in problems], [p.solution for p in problems])
    assert take(parts, "probe_nll") == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
def test_grounded_terms_are_the_teachers_log_probability_at_the_ratio(parts: Parts, ratio: float) -> None:
    problems = parts.task.probe()
    prompts = [parts.hints.teacher_ids(problem, ratio) for problem in problems]
    assert take(parts, "gt_solution", ratio) == pytest.approx(
        -mean_nll(parts, prompts, [problem.solution for problem in problems]), rel=1e-4
    )
    assert take(parts, "gt_answer", ratio) == pytest.approx(
        -mean_nll(parts, prompts, [problem.answer or "" for problem in problems]), rel=1e-3
    )


def test_what_is_hidden_cannot_be_scored_where_nothing_is_hidden(parts: Parts) -> None:
    assert take(parts, "gt_hidden_only", 1.0) is None
    assert take(parts, "gt_hidden_only", 0.0) == pytest.approx(take(parts, "gt_solution", 0.0), rel=1e-5)


def test_probe_kl_uses_the_completions_of_step_0_and_survives_a_resume(parts: Parts) -> None:
    first = take(parts, "probe_kl")
    assert first is not None
    assert first > 0
    state = parts.probe.state_dict()
    assert len(state["stored"]) == 3
    fresh = assemble(build_config(TREE | {"seed": 5, "task": TREE["task"] | {"data_seed": 0}}))
    fresh.probe.load_state_dict(state)
    assert take(fresh, "probe_kl") == pytest.approx(first, rel=1e-5)


@pytest.mark.parametrize("weights", ["frozen", "ema", "live"])
@pytest.mark.parametrize("policy", [False, True])
def test_probe_kl_is_measured_against_the_teacher_of_step_0(weights: str, policy: bool) -> None:
    exposure: dict[str, Any] = {"kind": "beta", "progress_metric": "probe_kl"}
    if policy:
        exposure = {"kind": "difficulty", "by": "reference_ppl", "policy": exposure}
    parts = assemble(build_config(TREE | {"exposure": exposure, "teacher": {"weights": weights}}))
    first = take(parts, "probe_kl")
    stored = parts.probe._stored_turns()
    views = [parts.probe.hinted(each, 1.0) for each in stored]
    at_start = [parts.model.eval()(torch.tensor([[*v.prompt, *v.completion]])).logits[0].detach() for v in views]
    with torch.no_grad():
        for weight in parts.model.parameters():
            weight.mul_(1.02)
    divergences = []
    for view, student, logits in zip(views, [each.student for each in stored], at_start, strict=True):
        teacher = logits[len(view.prompt) - 1 : -1].log_softmax(-1)
        with torch.no_grad():
            ids = torch.tensor([[*student.prompt, *student.completion]])
            own = parts.model(ids).logits[0, len(student.prompt) - 1 : -1].log_softmax(-1)
        divergences.append((teacher.exp() * (teacher - own)).sum(-1))
    assert take(parts, "probe_kl") == pytest.approx(float(torch.cat(divergences).mean()), rel=1e-3)
    assert take(parts, "probe_kl") != pytest.approx(first, rel=1e-2)


def test_probe_accuracy_is_the_mean_reward_of_hint_free_samples_and_repeatable(parts: Parts) -> None:
    value = take(parts, "probe_accuracy")
    assert value in (0.0, pytest.approx(1 / 3), pytest.approx(2 / 3), 1.0)
    assert take(parts, "probe_accuracy") == value


def test_the_teachers_accuracy_is_that_of_its_own_completions_behind_its_own_prompts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With step-0 weights whatever became of the student, at the ratio asked about, rendered as a teacher's."""
    prefilled = TREE["prompt"] | {"teacher_prefill": "a"}
    parts = assemble(build_config(TREE | {"prompt": prefilled, "probe": {"sampling_k": 2}}))
    asked: list[list[tuple[int, ...]]] = []
    sample = HFSampler.sample

    def watched(self: HFSampler, prompts: Any, sampling: Any, *, seed: int, **more: Any) -> Any:
        asked.append([tuple(prompt) for prompt in prompts])
        return sample(self, prompts, sampling, seed=seed, **more)

    monkeypatch.setattr(HFSampler, "sample", watched)
    values = {ratio: take(parts, "teacher_accuracy", ratio) for ratio in (0.25, 1.0)}
    problems = [problem for problem in parts.task.probe() for _ in range(2)]
    assert asked == [[parts.hints.teacher_ids(problem, ratio) for problem in problems] for ratio in values]
    assert parts.hints.teacher_ids(problems[0], 1.0)[-1:] == tuple(parts.renderer.text_ids("a"))
    student = take(parts, "probe_accuracy")
    assert student is not None
    turns = sample(parts.driver.sampler, asked[1], build_config(TREE).rollout, seed=derive_seed(0, "probe"))
    attempts = [Group(problem, (Trajectory((turn,)),)) for problem, turn in zip(problems, turns, strict=True)]
    rewards = [reward for group in parts.driver.grade(attempts) for reward in group.rewards]
    assert values[1.0] == sum(rewards) / 6
    with torch.no_grad():
        for weight in parts.model.parameters():
            weight.mul_(-1)
    assert take(parts, "teacher_accuracy", 1.0) == values[1.0] > 0
    assert take(parts, "probe_accuracy") == 0.0 < student


def test_measuring_moves_neither_weights_nor_the_global_random_state(parts: Parts) -> None:
    before = [weight.clone() for weight in parts.model.parameters()]
    state = torch.get_rng_state()
    for kind in ("probe_nll", "probe_kl", "probe_accuracy", "teacher_accuracy"):
        take(parts, kind)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(before, parts.model.parameters(), strict=True))


def test_a_task_without_probe_problems_is_refused_when_something_is_measured(tmp_path: Path) -> None:
    parts = assemble(build_config(TREE | {"task": TREE["task"] | {"probe_size": 0}}))
    assert parts.measurer.measure([]) == {}
    with pytest.raises(UserError, match="no probe problems"):
        take(parts, "probe_nll")


def test_a_run_whose_exposure_needs_probe_problems_is_refused_before_its_folder_is_made(tmp_path: Path) -> None:
    """A resumed run could not be given any, so that one must not be advised to go on."""
    config = build_config(TREE | {"task": TREE["task"] | {"probe_size": 0}, "exposure": {"kind": "beta"}})
    with pytest.raises(UserError, match="no probe problems"):
        Trainer.start(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("teacher", ["frozen", "ema"])
def test_a_run_that_distils_nothing_keeps_no_teachers_weights_and_measures_none(teacher: str) -> None:
    alone = TREE | {"routing": {"kind": "sft"}, "teacher": {"weights": teacher}}
    parts = assemble(build_config(alone))
    assert parts.teacher.tensors() == {}
    with torch.no_grad():
        next(parts.model.parameters()).zero_()
        own = parts.model(torch.tensor([[3, 4]])).logits
        with parts.teacher.in_place():
            assert torch.equal(parts.model(torch.tensor([[3, 4]])).logits, own), "no copy of weights"
    assert take(parts, "probe_nll") is not None
    with pytest.raises(UserError, match="measures gt_answer, and the run keeps no teacher, as its routing distils"):
        take(parts, "gt_answer", 1.0)


def test_reinforcement_alone_keeps_the_first_weights_where_a_kl_term_reads_them() -> None:
    sampling = TREE["rollout"] | {"group_size": 2}
    for coef, is_kept in ((0.0, False), (0.1, True)):
        alone = TREE | {"routing": {"kind": "rl"}, "rl": {"kl_coef": coef}, "rollout": sampling}
        parts = assemble(build_config(alone))
        base = parts.measurer._teachers.base if parts.measurer._teachers else None
        assert (base is not None) == is_kept
        if base is not None:
            first = parts.model.lm_head.weight.detach().clone()
            with torch.no_grad():
                parts.model.lm_head.weight.zero_()
            with base.in_place():
                assert torch.equal(parts.model.lm_head.weight, first)


def test_evaluation_may_have_a_prompt_of_its_own(parts: Parts) -> None:
    config = build_config(TREE | {"prompt": TREE["prompt"] | {"evaluation": "#{problem}"}})
    problems, sampling = parts.task.probe(), config.eval.sampling(config.rollout)
    trained = parts.driver.rollout(problems, config.rollout, seed=1)
    evaluated = for_evaluation(parts.driver, config).rollout(problems, sampling, seed=1)
    for problem, train, evaluation in zip(problems, trained, evaluated, strict=True):
        texts = [parts.renderer.prompt_text(group.trajectories[0].turns[0].prompt_ids) for group in (train, evaluation)]
        assert texts == [f"<|user|>{problem.problem}<|assistant|>", f"<|user|>#{problem.problem}<|assistant|>"]


def test_references_longer_than_the_context_are_cut_the_same_at_every_ratio() -> None:
    """256 positions: a probe problem's solution is read behind a prompt that holds it already."""
    tree = TREE | {"rollout": TREE["rollout"] | {"max_new_tokens": 4}}
    parts = assemble(build_config(tree))
    probe = parts.probe
    problem = probe.problems[0]
    text = problem.solution * 2  # a prompt that holds it leaves less room than it needs
    longer = replace(problem, solution=text)
    whole = parts.renderer.solution_ids(text)
    longest = parts.hints.longest(longer)
    probe._context = longest + len(whole) - 3
    for ratio in (0.0, 0.5, 1.0):
        (passage,) = probe._part(0, longer, ratio, "solution")
        assert passage.completion == tuple(whole[:-3])
        assert len(passage.prompt) + len(passage.completion) <= probe._context
    assert probe._reference(longer)[0].completion == tuple(whole[:-3])
    probe._context = longest + len(whole)
    assert probe._reference(longer)[0].completion == tuple(whole)


@pytest.mark.parametrize("overlong", ["error", "drop"])
def test_probe_problems_that_do_not_fit_are_refused_or_left_out_as_others_are(
    overlong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = assemble(build_config(TREE))
    named = whole.probe.problems[0].id
    longest = Hints.longest
    monkeypatch.setattr(Hints, "_surely_fits", lambda *_: False)
    monkeypatch.setattr(Hints, "longest", lambda self, each: 10**6 if each.id == named else longest(self, each))
    tree = TREE | {"step": {**TREE["step"], "overlong": overlong}}
    if overlong == "error":
        with pytest.raises(
            UserError, match=rf"1 problems \({re.escape(named)}\) do not fit the model's context of 256"
        ):
            assemble(build_config(tree))
        return
    with pytest.warns(UserWarning, match=f"dropped 1 overlong probe problems: {re.escape(named)}"):
        parts = assemble(build_config(tree))
    assert [each.id for each in parts.probe.problems] == [each.id for each in whole.probe.problems[1:]]
    assert not parts.dropped


def test_where_no_problem_fits_the_line_does_not_name_what_is_set_already(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Hints, "_surely_fits", lambda *_: False)
    monkeypatch.setattr(Hints, "longest", lambda *_: 10**6)
    with pytest.raises(UserError, match=r"none of the \d+ training problems fits .* shorten rollout.max_new_tokens"):
        assemble(build_config(TREE | {"step": {**TREE["step"], "overlong": "drop"}}))


def test_evaluation_problems_that_do_not_fit_are_refused_or_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = assemble(build_config(TREE))
    named = whole.eval_problems[0].id
    batch = Renderer.student_batch
    asking = {whole.eval_problems[0].problem}

    def lengthened(self: Renderer, prompts: Any) -> list[list[int]]:
        found = batch(self, prompts)
        return [
            [0] * 246 if any(text in turn["content"] for turn in messages for text in asking) else ids
            for messages, ids in zip(prompts, found, strict=True)
        ]

    monkeypatch.setattr(Renderer, "student_batch", lengthened)
    tree = TREE | {"eval": {**TREE.get("eval", {}), "max_new_tokens": 11}}
    with pytest.raises(
        UserError,
        match=rf"1 evaluation problems \({re.escape(named)}\) do not fit .* 256 tokens with a completion of 11",
    ):
        assemble(build_config(tree))
    dropping = tree | {"step": {**TREE["step"], "overlong": "drop"}}
    with pytest.warns(UserWarning, match=rf"dropped 1 evaluation problems \({re.escape(named)}\) which do not fit"):
        parts = assemble(build_config(dropping))
    assert [each.id for each in parts.eval_problems] == [each.id for each in whole.eval_problems[1:]]
    asking |= {each.problem for each in whole.eval_problems}
    with pytest.raises(UserError, match="and no others are left"):
        assemble(build_config(dropping))
