"""Gradient credit, contract measurement and reference scores, against plain forward passes and finite differences."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from atesd.cliff import CliffConfig
from atesd.losses import gradient
from atesd.losses.target import Plain
from atesd.recipe import build_config
from atesd.routing.route import Route
from atesd.train.contract import contract_places
from atesd.train.measure import logged
from atesd.train.setup import Parts, assemble
from atesd.types import Group, Measurement, StopReason, Turn

from support.composition import BASE

RATIOS = (0.0, 0.5, 1.0)
ASKED = (
    Measurement("reward_influence", 0.5),
    Measurement("reward_influence_by_level", 0.5),
    Measurement("reward_influence_lambda", 1.0),
)
OPTIM: dict[str, Any] = {"lr": 1e-3, "max_grad_norm": 0.0, "eps": 1e-5}
TREE: dict[str, Any] = BASE | {"probe": {"credit_parameters": "all"}, "optim": OPTIM}


def assembled(**sections: Any) -> Parts:
    """Return the parts of a run whose first generation batch has been sampled and is remembered."""
    parts = assemble(build_config(TREE | sections))
    groups = parts.driver.rollout(parts.problems[:3], build_config(TREE).rollout, seed=1)
    routes = [Route.DISTIL, Route.DISTIL, Route.SKIP]
    parts.credit.remember(groups, routes, [0.5] * 3, build_config(TREE | sections).target)
    return parts


def taken(parts: Parts, *wanted: Measurement) -> dict[str, float]:
    """Return what is measured, as the log names it."""
    return {key.removeprefix("measure/"): value for key, value in logged(parts.measurer.measure(wanted)).items()}


def weights(parts: Parts) -> list[Tensor]:
    return [weight.detach().clone() for weight in parts.model.parameters()]


def logs(parts: Parts, prompt: tuple[int, ...], completion: tuple[int, ...]) -> Tensor:
    """Return log-probabilities [T, V] of a plain forward pass."""
    found: Tensor = parts.model(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return found


def remembered(parts: Parts) -> list[Group]:
    assert parts.credit._distilled is not None
    return list(parts.credit._distilled.groups)


def distil_loss(parts: Parts, ratio: float) -> Tensor:
    """Compute KL(teacher at the ratio || student) over the remembered completions, one by one and dense."""
    values = []
    for group in remembered(parts):
        for attempt in group.trajectories:
            turn = attempt.turns[0]
            with parts.teacher.in_place():
                log_p = logs(parts, parts.hints.teacher_ids(group.problem, ratio), turn.completion_ids)
            log_q = logs(parts, turn.prompt_ids, turn.completion_ids)
            values.append((log_p.exp() * (log_p - log_q)).sum(-1))
    return torch.cat(values).mean()


def probe_loss(parts: Parts) -> Tensor:
    values = []
    for prompt, completion, _ in parts.probe.references:
        logits = parts.model(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
        values.append(torch.nn.functional.cross_entropy(logits, torch.tensor(completion), reduction="none"))
    return torch.cat(values).mean()


def size(gradient: Any) -> float:
    return float(sum(part.double().square().sum() for part in gradient) ** 0.5)


@pytest.mark.parametrize("limit", [0.0, 1e-3, 1e3])
def test_influence_before_the_first_update_is_the_clipped_gradient_along_the_probes(limit: float) -> None:
    """P is 1: min(1, limit / |g|) <g_probe, g> / |g_probe|. Neither no limit nor one that is not reached clips."""
    parts = assembled(optim=OPTIM | {"max_grad_norm": limit})
    trained = list(parts.model.parameters())
    probe = torch.autograd.grad(probe_loss(parts), trained)
    found = taken(parts, *(Measurement("influence", ratio) for ratio in RATIOS))
    for ratio in RATIOS:
        own = torch.autograd.grad(distil_loss(parts, ratio), trained)
        assert 1e-3 < size(own) < 1e3
        product = sum(float((x.double() * y.double()).sum()) for x, y in zip(probe, own, strict=True))
        kept = limit / size(own) if limit == 1e-3 else 1.0
        expected = kept * product / size(probe)
        assert found[Measurement("influence", ratio).key] == pytest.approx(
            expected, rel=2e-3, abs=2e-4 * kept * size(own)
        )


def updated(parts: Parts) -> None:
    """Take an update, so that Adam has moments."""
    rows = parts.rows.build(remembered(parts), [Route.DISTIL] * 2, [1.0] * 2, ("teacher",))
    parts.stepper.optimize(rows, Plain())
    parts.model.eval()


def preconditioner(parts: Parts) -> list[Tensor]:
    """Return 1 / (sqrt(v) + eps) from the optimizer's own state, v corrected for its start."""
    optimizer = getattr(parts.optimizer, "optimizer", parts.optimizer)
    found = []
    for weight in parts.model.parameters():
        state, group = optimizer.state[weight], optimizer.param_groups[0]
        v = state["exp_avg_sq"].double() / (1 - group["betas"][1] ** float(state["step"]))
        found.append(1 / (v.sqrt() + group["eps"]))
    return found


def test_influence_predicts_the_sign_and_size_of_a_small_step() -> None:
    """A step of size h along the preconditioned gradient lowers the probe loss by h <g_probe, P g> to first order."""
    parts = assembled()
    trained = list(parts.model.parameters())
    updated(parts)
    scale = preconditioner(parts)
    assert float(scale[0].std()) > 0, "Adam's second moments are in use"
    probe = torch.autograd.grad(probe_loss(parts), trained)
    own = torch.autograd.grad(distil_loss(parts, 0.5), trained)

    def dot(a: Any, b: Any) -> float:
        return sum(float((x.double() * p.double() * y.double()).sum()) for x, p, y in zip(a, scale, b, strict=True))

    credit = taken(parts, Measurement("influence", 0.5))["influence@0.5"]
    assert credit == pytest.approx(dot(probe, own) / dot(probe, probe) ** 0.5, rel=2e-3)
    before = float(probe_loss(parts).detach().double())
    h = 1e-3 * before / abs(dot(probe, own))
    with torch.no_grad():
        for weight, factor, gradient in zip(trained, scale, own, strict=True):
            weight.sub_(h * factor * gradient)
    fall = before - float(probe_loss(parts).detach().double())
    assert fall == pytest.approx(h * credit * dot(probe, probe) ** 0.5, rel=0.1)


def test_the_last_layer_alone_gives_a_cheaper_credit_of_its_own() -> None:
    parts = assembled(probe={"credit_parameters": "last_layer"})
    names = {id(weight): name for name, weight in parts.model.named_parameters()}
    chosen = [names[id(weight)] for weight in parts.credit._weights("last_layer")]
    depth = parts.model.config.num_hidden_layers
    assert chosen
    assert all(f"layers.{depth - 1}." in name for name in chosen)
    whole = assembled(probe={"credit_parameters": "all"})
    found = [taken(each, Measurement("influence", 1.0))["influence@1.0"] for each in (parts, whole)]
    own = torch.autograd.grad(distil_loss(parts, 1.0), parts.credit._weights("last_layer"))
    assert 0 < abs(found[0]) <= size(own) * (1 + 1e-5), "Cauchy and Schwarz"
    assert found[0] != pytest.approx(found[1], rel=1e-2)


@pytest.mark.parametrize("limit", [0.0, 1e-2])
@pytest.mark.parametrize("updates", [0, 1])
def test_a_virtual_step_is_the_optimizers_own_and_leaves_no_trace(limit: float, updates: int) -> None:
    """What `torch.optim.AdamW` itself makes of the clipped gradient, moments, decay and rate included."""
    parts = assembled(optim=OPTIM | {"lr": 5e-3, "max_grad_norm": limit, "weight_decay": 5.0, "schedule": "linear"})
    for _ in range(updates):
        updated(parts)
    before = weights(parts)
    found = taken(parts, Measurement("virtual_nll", 1.0), Measurement("probe_nll"))
    assert all(torch.equal(a, b) for a, b in zip(before, weights(parts), strict=True))
    trained = list(parts.model.parameters())
    gradient = torch.autograd.grad(distil_loss(parts, 1.0), trained)
    assert size(gradient) > 1e-2
    for weight, part in zip(trained, gradient, strict=True):
        weight.grad = part * (limit / size(gradient) if limit else 1.0)
    optimizer = getattr(parts.optimizer, "optimizer", parts.optimizer)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(5e-3 * (1 - updates / 2))
    torch.optim.AdamW.step(optimizer)
    after = taken(parts, Measurement("probe_nll"))["probe_nll"]
    moved = after - found["probe_nll"]
    assert abs(moved) > 5e-4
    assert found["virtual_nll@1.0"] - found["probe_nll"] == pytest.approx(moved, rel=1e-2)


def test_credit_without_a_batch_is_absent() -> None:
    parts = assemble(build_config(TREE))
    assert taken(parts, Measurement("influence", 0.5), Measurement("virtual_nll", 0.5)) == {}
    parts.credit.remember([], [], [], build_config(TREE).target)
    assert taken(parts, Measurement("influence", 0.5), Measurement("virtual_reward", 0.5), *ASKED) == {}


def test_contract_places_are_the_tokens_of_forced_form() -> None:
    parts = assemble(build_config(BASE))
    ids = (*parts.renderer.text_ids("a3*4=7\n#7"), parts.renderer.eos_ids[0])
    config = CliffConfig(contract={"product": r"\*\d=(\d)", "line": r"\n#", "none": "zzz"})
    turn = Turn((1,), ids, (), "", StopReason.EOS, 0)
    assert contract_places(parts.renderer, turn, config) == [(5, "product"), (6, "line"), (7, "line"), (9, "eos")]
    cut = Turn((1,), ids[:-1], (), "", StopReason.LENGTH, 0)
    assert contract_places(parts.renderer, cut, CliffConfig(contract={})) == []


def test_contract_probabilities_are_those_of_plain_forward_passes() -> None:
    section = {"contract": {"answer": "#"}, "min_hits": 1}
    parts = assemble(build_config(BASE | {"cliff": section}))
    found = taken(parts, Measurement("contract", 0.5))
    groups = parts.probe.samples()
    logits_p, logits_b = [], []
    for group in groups:
        turn = group.trajectories[0].turns[0]
        text = "".join(parts.renderer.token_texts(turn.completion_ids))
        places = [match.start() for match in re.finditer("#", text)]
        for prompt, kept in (
            (parts.hints.teacher_ids(group.problem, 0.5), logits_p),
            (parts.hints.student_ids(group.problem), logits_b),
        ):
            with torch.no_grad():
                logits = parts.model.eval()(torch.tensor([[*prompt, *turn.completion_ids]])).logits[0]
            kept += [logits[len(prompt) - 1 + place].double().softmax(-1) for place in places]
    modal = [int(p.argmax()) for p in logits_p]
    for name, rows in (("p", logits_p), ("b", logits_b)):
        values = torch.stack([row[token] for row, token in zip(rows, modal, strict=True)]).clamp(1e-6, 1 - 1e-6)
        assert found[f"contract@0.5/answer/{name}"] == pytest.approx(float(values.logit().mean().sigmoid()), abs=1e-5)
    assert found["contract@0.5/answer/hits"] == len(modal)


def test_every_training_problem_is_scored_by_id() -> None:
    parts = assemble(build_config(BASE))
    measured = parts.measurer.measure([Measurement("reference_nll")])
    scores = measured[Measurement("reference_nll")]
    assert isinstance(scores, dict)
    assert set(scores) == {problem.id for problem in parts.problems}
    problem = parts.problems[2]
    prompt, ids = parts.hints.student_ids(problem), parts.renderer.text_ids(problem.solution)
    with torch.no_grad():
        logits = parts.model.eval()(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
    expected = float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids)))
    assert scores[problem.id] == pytest.approx(expected, rel=1e-4)
    assert logged(measured)["measure/reference_nll"] == pytest.approx(sum(scores.values()) / len(scores))


def test_credit_is_taken_on_at_most_the_problems_asked_for() -> None:
    few = assembled(probe={"credit_problems": 1, "credit_parameters": "all"})
    whole = assembled(probe={"credit_problems": 2, "credit_parameters": "all"})
    assert [len(remembered(parts)) for parts in (few, whole)] == [1, 2]
    first, both = (taken(parts, Measurement("influence", 1.0))["influence@1.0"] for parts in (few, whole))
    assert first != pytest.approx(both, rel=1e-3)


def test_contract_probabilities_are_at_the_temperature_of_the_views() -> None:
    """Twice the temperature halves the logit differences; the clamped mean logit of the modal token falls."""
    cliff = {"contract": {"equals": "="}, "min_hits": 1}
    cold = taken(assemble(build_config(BASE | {"cliff": cliff})), Measurement("contract", 0.5))
    warm = taken(
        assemble(build_config(BASE | {"cliff": cliff, "loss": {"temperature_teacher": 2.0}})),
        Measurement("contract", 0.5),
    )
    assert warm["contract@0.5/equals/p"] < cold["contract@0.5/equals/p"]


@pytest.mark.parametrize("target", ["divergence", "surrogate"])
def test_credit_goes_over_a_frozen_head_once(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = assembled(
        gate={"kind": "sdar", "target": target}, loss={"tile_logits": 1}, model={"path": "pico", "lora": {}}
    )
    monkeypatch.setattr(gradient._Pass, "again", lambda *_: pytest.fail("the streams that are derived were not said"))
    assert all(taken(parts, *(Measurement("influence", ratio) for ratio in RATIOS)).values())
