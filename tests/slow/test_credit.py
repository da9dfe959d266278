"""Do the estimators of influence and paired credit say what a real step of the optimizer does? On the packaged model.

After five steps of recipes/pico.toml with ATESD's exposure, on the completions of the fifth: how far the probe's NLL
falls when the optimizer itself steps at each ratio, what influence credit and a cosine say of it beforehand, and where
paired's virtual step leads. Gradients are taken here, one completion at a time. `python tests/slow/test_credit.py`
prints the numbers.
"""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from atesd.losses.target import Plain
from atesd.recipe import load_config
from atesd.routing.route import Route
from atesd.train.loop import Trainer
from atesd.train.setup import Parts
from atesd.types import Measurement

pytestmark = pytest.mark.slow
RECIPE = Path(__file__).parents[2] / "recipes" / "pico.toml"
RATIOS = (0.0, 0.25, 0.5, 0.75, 1.0)
SEEDS = (1000, 1001, 1002)
Gradient = dict[str, Tensor]


class Found(NamedTuple):
    """Numbers by ratio: falls of the probe's NLL in nats a token, credits, and the gradient's norm."""

    fall: list[float]
    """Behind the optimizer's own next step."""
    virtual: list[float]
    """Behind paired's virtual step."""
    first_order: list[float]
    """Behind a hundredth of the step -rate P g of all weights, times 100: without curvature and first moment."""
    credit: list[float]
    """Influence credit, of the last layer."""
    product: list[float]
    """<g_probe, P g> / sqrt(<g_probe, P g_probe>) of the last layer."""
    cosine: list[float]
    """The same over sqrt(<g, P g>): credit as it was."""
    product_all: list[float]
    cosine_all: list[float]
    """Both of all weights."""
    norm: list[float]
    """||g|| of all weights."""


def log_probs(parts: Parts, prompt: Sequence[int], completion: Sequence[int]) -> Tensor:
    logits: Tensor = parts.model(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)


def gradient(parts: Parts, losses: Any, count: int) -> Gradient:
    """Add up the gradients of summed losses, over `count`."""
    named = dict(parts.model.named_parameters())
    total = {name: torch.zeros_like(weight) for name, weight in named.items()}
    for loss in losses:
        for name, part in zip(named, torch.autograd.grad(loss / count, [*named.values()]), strict=True):
            total[name] += part
    return total


def of_probe(parts: Parts) -> Gradient:
    def losses() -> Any:
        for prompt, completion, _ in parts.probe.references:
            logs = log_probs(parts, prompt, completion)
            yield -logs.gather(1, torch.tensor(completion)[:, None]).sum()

    return gradient(parts, losses(), sum(len(each.completion) for each in parts.probe.references))


def of_distillation(parts: Parts, groups: Any, ratio: float) -> Gradient:
    turns = [(group.problem, attempt.turns[0]) for group in groups for attempt in group.trajectories]

    def losses() -> Any:
        for problem, turn in turns:
            with torch.no_grad(), parts.teacher.in_place():
                log_p = log_probs(parts, parts.hints.teacher_ids(problem, ratio), turn.completion_ids)
            log_q = log_probs(parts, turn.prompt_ids, turn.completion_ids)
            yield (log_p.exp() * (log_p - log_q)).sum()

    return gradient(parts, losses(), sum(len(turn.completion_ids) for _, turn in turns))


def nll(parts: Parts) -> float:
    return float(parts.measurer.measure([Measurement("probe_nll")])[Measurement("probe_nll")])  # type: ignore[arg-type]


def really(parts: Parts, groups: Any, ratio: float) -> float:
    """Return how far the probe's NLL falls in the optimizer's own next step at a ratio; everything is put back."""
    model, optimizer = copy.deepcopy(parts.model.state_dict()), copy.deepcopy(parts.optimizer.state_dict())
    schedule, before = parts.scheduler.state_dict()["last_epoch"], nll(parts)
    rows = parts.rows.build(groups, [Route.DISTIL] * len(groups), [ratio] * len(groups), ("teacher",))
    parts.stepper.optimize(rows, Plain())
    after = nll(parts)
    parts.model.load_state_dict(model)
    parts.optimizer.load_state_dict(optimizer)
    parts.set_schedule(schedule)
    assert nll(parts) == before
    return before - after


@cache
def found(seed: int, steps: int = 5) -> Found:
    """Train so many steps, and ask about one more."""
    overrides = [f"seed={seed}", "eval.k=1", "eval.problems=1", "probe.credit_problems=32", "save.every=1000"]
    overrides += ['exposure={kind="beta"}', 'routing={kind="distil"}']
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer.start(load_config(RECIPE, overrides), Path(folder) / "run")
        trainer._begin()
        for _ in range(steps):
            trainer._one_step()
        trainer.run.unlock()
    parts = trainer.parts
    parts.model.eval()
    kept = parts.credit._distilled
    assert kept is not None
    groups = kept.groups
    measured = parts.measurer.measure([Measurement(kind, r) for kind in ("influence", "virtual_nll") for r in RATIOS])
    optimizer = getattr(parts.optimizer, "optimizer", parts.optimizer)
    group = optimizer.param_groups[0]
    depth = parts.model.config.num_hidden_layers
    scale = {}
    for name, weight in parts.model.named_parameters():
        state = optimizer.state[weight]
        v = state["exp_avg_sq"] / (1 - group["betas"][1] ** float(state["step"]))
        scale[name] = 1 / (v.sqrt() + group["eps"])

    def dot(left: Gradient, right: Gradient, layers: str) -> float:
        return sum(float((left[n] * p * right[n]).double().sum()) for n, p in scale.items() if layers in n)

    def little(own: Gradient, share: float = 0.01) -> float:
        named = dict(parts.model.named_parameters())
        kept = {name: weight.detach().clone() for name, weight in named.items()}
        with torch.no_grad():
            for name, weight in named.items():
                weight.sub_(share * group["lr"] * scale[name] * own[name])
            after = nll(parts)
            for name, weight in named.items():
                weight.copy_(kept[name])
        return (now - after) / share

    now, last = nll(parts), f"layers.{depth - 1}."
    probe, own = of_probe(parts), [of_distillation(parts, groups, ratio) for ratio in RATIOS]
    found_by = {
        layers: [dot(probe, each, layers) / math.sqrt(dot(probe, probe, layers)) for each in own]
        for layers in (last, "")
    }
    lengths = {layers: [math.sqrt(dot(each, each, layers)) for each in own] for layers in (last, "")}
    cosines = {key: [a / b for a, b in zip(found_by[key], lengths[key], strict=True)] for key in lengths}
    return Found(
        fall=[really(parts, groups, ratio) for ratio in RATIOS],
        virtual=[now - float(measured[Measurement("virtual_nll", ratio)]) for ratio in RATIOS],  # type: ignore[arg-type]
        first_order=[little(each) for each in own],
        credit=[float(measured[Measurement("influence", ratio)]) for ratio in RATIOS],  # type: ignore[arg-type]
        product=found_by[last],
        cosine=cosines[last],
        product_all=found_by[""],
        cosine_all=cosines[""],
        norm=[math.sqrt(sum(float(part.double().square().sum()) for part in each.values())) for each in own],
    )


def order(values: Sequence[float]) -> list[float]:
    """Return the ratios, the best first."""
    return [RATIOS[place] for place in sorted(range(len(RATIOS)), key=lambda place: -values[place])]


@pytest.mark.parametrize("seed", SEEDS)
def test_credit_is_the_product_with_the_clipped_gradient(seed: int) -> None:
    run = found(seed)
    assert max(run.norm) < 1.0, "nothing is clipped here"
    assert run.credit == pytest.approx(run.product, rel=1e-2, abs=1e-4)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_product_of_all_weights_ranks_ratios_as_a_small_step_does(seed: int) -> None:
    run = found(seed)
    assert order(run.product_all) == order(run.first_order)
    assert agreement(run.credit, run.fall) >= agreement(run.cosine, run.fall)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_virtual_step_ends_where_the_real_one_does(seed: int) -> None:
    run = found(seed)
    assert run.virtual == pytest.approx(run.fall, rel=2e-2, abs=1e-5)


def agreement(left: Sequence[float], right: Sequence[float]) -> float:
    """Return the rank correlation of two lists without ties."""
    ranks = [[sorted(values).index(value) for value in values] for values in (left, right)]
    return float(torch.corrcoef(torch.tensor(ranks).double())[0, 1])


def main() -> None:
    for seed in SEEDS:
        run = found(seed)
        print(f"seed {seed}, ratios {RATIOS}")
        for name, values in run._asdict().items():
            numbers = " ".join(f"{value:9.5f}" for value in values)
            print(f"  {name:11} {numbers}  rank {agreement(values, run.fall):5.2f}  {order(values)}", flush=True)


if __name__ == "__main__":
    main()
