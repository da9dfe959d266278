"""Retention gates in training: their loss and gradient in float64, who moves, runs at both ends, and resume."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from atesd.exposure.retention import Retainer, Retention
from atesd.exposure.retention_gates import Gates
from atesd.facts import RunFacts
from atesd.losses.divergence import LossConfig
from atesd.metrics import is_timing
from atesd.recipe import build_config
from atesd.runlog import RunDir
from atesd.sections import LoraConfig, TeacherConfig
from atesd.train.batch import Row, Veil
from atesd.train.loop import Interrupted, Trainer
from atesd.train.model import add_lora
from atesd.train.retention import Learning
from atesd.train.scorer import Scorer
from atesd.train.teacher import Teacher, Teachers
from atesd.train.veils import veils_for
from atesd.types import NonFiniteError

from support.architectures import family
from support.models import PAD, tiny_model
from support.plain_models import final_states
from support.threads import ThreadWorld, in_threads

SECTION = Retention(hidden=6, bias=1.0, learning_rate=0.05, ntp=0.5, cap=2.0)
ROWS = [
    Row(
        prompt=(3, 4), completion=completion, components=("distil",), group=0, ratio=0.5,
        view_prompts={"teacher": prompt}, veils={"teacher": veil} if veil else {},
    )
    for prompt, completion, veil in (
        ((5, 6, 7, 8, 9, 10, 11, 12), (2, 3, 4), Veil(1, 6, 2)),
        ((9, 8, 7, 6, 5, 4), (1, 2, 3, 4, 5, 6), Veil(0, 4, 1)),
        ((9, 8, 7), (1, 2), None),
        ((2, 3, 4, 5, 6, 7, 8, 9, 2, 3, 4, 5), (7,), Veil(3, 11, 4)),
    )
]  # fmt: skip


def learning(model: Any, *, budget: int = 10_000, rows: list[Row] = ROWS, section: Retention = SECTION) -> Learning:
    masker = section.build(RunFacts(seed=3))
    veils = veils_for(model, masker)
    scorer = Scorer(model, pad_id=PAD, loss=LossConfig(), temperature=1.3, token_budget=budget, veils=veils)
    batch = SimpleNamespace(groups=[None], ratios=[0.5])
    return Learning(
        masker,
        scorer=scorer,
        veils=veils,
        teachers=Teachers(Teacher(TeacherConfig(), model), None),
        rows=cast("Any", SimpleNamespace(build=lambda *_: rows)),
        credit=cast("Any", SimpleNamespace(distilled=batch)),
    )


def reference(model: Any, made: Learning) -> tuple[dict[str, float], list[Tensor]]:
    """Return the parts of the loss and the gates' gradient, from models in float64."""
    veiled = [(row.view_prompts["teacher"], row.completion, row.veils["teacher"]) for row in ROWS if row.veils]
    return loss_of(model, made._gates, veiled, ntp=0.5, cap=2.0)


def loss_of(
    model: Any, gates: Gates, rows: Sequence[tuple[tuple[int, ...], tuple[int, ...], Veil]], *, ntp: float, cap: float
) -> tuple[dict[str, float], list[Tensor]]:
    networks = gates.networks.double()
    head = model.lm_head.weight.detach().double()
    count = sum(len(completion) for _, completion, _ in rows)
    kl, nll, excess = (torch.zeros((), dtype=torch.float64) for _ in range(3))
    for prompt, completion, veil in rows:
        ids = prompt + completion[:-1]
        seen: list[Tensor] = []

        def fading(layer: int, states_TW: Tensor, veil: Veil = veil, seen: list[Tensor] = seen) -> Tensor:
            first, _, last = networks[layer]  # type: ignore[misc]
            x = states_TW @ first.weight.T + first.bias
            score = (x * x.sigmoid()) @ last.weight.T + last.bias
            log_beta_GT = -torch.log1p((-score).exp()).T
            seen.append(log_beta_GT[:, veil.start : veil.stop])
            place = torch.arange(len(states_TW))
            is_hint = (place >= veil.start) & (place < veil.stop)
            return (place[:, None] - place) * (log_beta_GT * is_hint)[:, None, :]

        gated = (final_states(model, ids, fading)[len(prompt) - 1 :] @ head.T).log_softmax(-1)
        full = (final_states(model, ids)[len(prompt) - 1 :] @ head.T).log_softmax(-1)
        kl = kl + (full.exp() * (full - gated)).sum() / count
        nll = nll - gated[range(len(completion)), list(completion)].sum() / count
        length = len(ids) - veil.start
        for log_beta_GI in seen:
            for log_beta_I in log_beta_GI:
                for t in range(1, length + 1):
                    held = sum((log_beta_I[i - 1] * (t - i)).exp() for i in range(1, min(t, len(log_beta_I)) + 1))
                    beyond = cast("Tensor", held) - veil.keep
                    if beyond > 0:
                        excess = excess + beyond / t / length / (len(seen) * len(log_beta_GI)) / len(rows)
    gradient = torch.autograd.grad(kl + ntp * nll + cap * excess, list(networks.parameters()))
    gates.networks.float()
    return {name: float(part.detach()) for name, part in (("kl", kl), ("ntp", nll), ("cap", excess))}, list(gradient)


@pytest.mark.parametrize("name", ["qwen3", "llama"])
@pytest.mark.parametrize("budget", [1, 10_000])
def test_loss_and_gradient_of_the_gates_are_the_formulas(
    name: str, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model().eval() if name == "qwen3" else family("llama")
    made = learning(model, budget=budget)
    numbers, gradient = reference(model, made)
    moved: list[Tensor] = []
    monkeypatch.setattr(type(made._gates), "update", lambda self, gradients: moved.extend(gradients))
    loss = made.update()
    assert min(numbers.values()) > 1e-2
    assert loss == pytest.approx(numbers["kl"] + 0.5 * numbers["ntp"] + 2.0 * numbers["cap"], rel=1e-5)
    logged = made._masker.metrics()
    assert {key: logged[f"retention/{key}"] for key in numbers} == pytest.approx(numbers, rel=1e-4)
    for found, expected in zip(moved, gradient, strict=True):
        torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=2e-3)


@pytest.mark.parametrize("size", [2, 5])
def test_processes_move_the_same_gates_as_one(size: int) -> None:
    """Two passages of three are one process's; of five processes two read none."""
    alone, *made = (learning(tiny_model(), budget=14) for _ in range(1 + size))
    read: list[list[int]] = [[] for _ in made]

    def moved(world: ThreadWorld) -> list[float | None]:
        mine = made[world.rank]
        mine._scorer.world = world
        original = mine._scorer.hidden
        mine._scorer.hidden = lambda passages: read[world.rank].append(len(passages)) or original(passages)  # type: ignore[method-assign, func-returns-value]
        return [mine.update() for _ in range(2)]

    expected = [alone.update() for _ in range(2)]
    found = in_threads(size, moved)
    for losses, mine in zip(found, made, strict=True):
        assert losses == found[0]
        assert losses == pytest.approx(expected, rel=1e-5)
        assert mine._masker.metrics() == made[0]._masker.metrics()
        assert mine._masker.metrics() == pytest.approx(alone._masker.metrics(), rel=1e-5)
        assert mine._masker.state_dict() == made[0]._masker.state_dict()
        for weight, other in zip(mine._gates.weights, alone._gates.weights, strict=True):
            torch.testing.assert_close(weight, other, rtol=1e-4, atol=1e-5)
    shares = [2, 1] if size == 2 else [1, 1, 1, 0, 0]
    assert [sum(each) for each in read] == [4 * share for share in shares], "two passes in each of two updates"


def test_only_the_gates_move_and_nothing_is_left_on_the_model() -> None:
    model = tiny_model()
    made = learning(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gates = [weight.detach().clone() for weight in made._gates.weights]
    losses = [made.update() for _ in range(30)]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(weight.requires_grad and weight.grad is None for weight in model.parameters())
    assert all(not torch.equal(old, new) for old, new in zip(gates, made._gates.weights, strict=True))
    assert cast("float", losses[-1]) < 0.9 * cast("float", losses[0]), "they learn"
    assert model.config._attn_implementation == "sdpa"
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_adapters_are_neither_asked_for_gradients_nor_moved() -> None:
    """With adapters the frozen teacher is the base, whose hints fade as without adapters."""
    adapted = add_lora(tiny_model(), LoraConfig(r=2, alpha=4), 0)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.fill_(0.5)
    before = {name: value.clone() for name, value in adapted.state_dict().items()}
    plain, made = learning(tiny_model()), learning(adapted)
    assert made.update() == pytest.approx(plain.update(), rel=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in adapted.state_dict().items())
    trained = {name for name, weight in adapted.named_parameters() if weight.requires_grad}
    assert trained == {name for name, _ in adapted.named_parameters() if "lora_" in name}


def test_a_step_without_a_veiled_hint_moves_nothing() -> None:
    made = learning(tiny_model(), rows=[row for row in ROWS if not row.veils])
    assert made.update() is None
    made._credit = cast("Any", SimpleNamespace(distilled=None))
    assert made.update() is None
    assert made._gates.updates == 0


def test_rows_outside_every_loss_do_not_count() -> None:
    idle = Row(**{**{name: getattr(ROWS[0], name) for name in Row.__slots__}, "components": ()})
    assert learning(tiny_model(), rows=[idle]).update() is None


def test_a_loss_that_is_not_finite_stops_before_the_gates_move() -> None:
    made = learning(tiny_model())
    with torch.no_grad():
        made._gates.weights[0].fill_(torch.nan)
    with pytest.raises(NonFiniteError, match=r"retention gates is nan .* lower reveal.learning_rate"):
        made.update()
    assert made._gates.updates == 0


TREE: dict[str, Any] = {
    "threads": 1,
    "task": {"kind": "pico", "train_size": 12, "probe_size": 2, "eval_size": 2},
    "prompt": {"student": "{problem}", "teacher": "{problem}\n>{hint}", "answer": "\n#{answer}"},
    "reveal": {"kind": "retention", "hidden": 8, "learning_rate": 0.01, "bias": 2.0},
    "exposure": {"kind": "fixed", "ratio": 0.25},
    "teacher": {"weights": "ema", "ema_decay": 0.9},
    "rollout": {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 40},
    "optim": {"lr": 1e-3},
    "step": {"num_steps": 4, "problems": 4},
    "eval": {"every": 4, "k": 1},
    "save": {"every": 2, "rollouts_every": 2},
}
SEGMENTS = {"kind": "segments", "unit": "line"}


def train(tree: dict[str, Any], run: Path) -> list[dict[str, Any]]:
    Trainer.start(build_config(tree), run).train()
    return reproducible(run)


def reproducible(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if not is_timing(k)} for row in RunDir.open(run).metrics()]


def weights(run: Path) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in load_file(run / "final" / "model.safetensors").items()}


def gates_of(run: Path, step: int) -> Any:
    state = json.loads((run / "checkpoints" / f"step_{step:06d}" / "state.json").read_text())
    return state["policies"]["revealer"]["gates"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    train(TREE, run)
    return run


def test_every_step_moves_the_gates_by_the_parts_of_their_loss(whole: Path) -> None:
    rows = reproducible(whole)
    assert "measure/retention" not in rows[0]
    for row in rows[1:]:
        parts = [row[f"retention/{name}"] for name in ("kl", "ntp", "cap")]
        assert row["measure/retention"] == pytest.approx(sum(parts), rel=1e-6)
        assert 0 < row["retention/beta"] < 1
    assert [gates_of(whole, step)["updates"] for step in (2, 4)] == [2, 4]
    assert gates_of(whole, 2)["weights"] != gates_of(whole, 4)["weights"]
    shown = [json.loads(line) for line in (whole / "rollouts" / "step_000002.jsonl").read_text().splitlines()]
    for row in shown:
        size = len(row["hint"].rpartition("#")[0].rstrip())
        keep = math.ceil(0.25 * size)
        assert row["attended"] == [keep, size]
        texts, shares = zip(*row["shades"], strict=True)
        assert "".join(texts) == row["hint"]
        assert all(share == 1.0 for share in shares[size:]), "the answer is read by all"
        assert sum(shares[:size]) == pytest.approx(keep, abs=0.001 * size), "over layers and heads the budget is exact"
        assert len(set(shares[:size])) > 2, "gates choose by layer and head"


def test_until_the_gates_are_warm_the_teacher_reads_the_first_tokens(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(TREE | {"reveal": TREE["reveal"] | {"warmup": 2}, "save": {"rollouts_every": 1, "every": 2}}, run)
    for step in (1, 2, 3):
        shown = [json.loads(line) for line in (run / "rollouts" / f"step_{step:06d}.jsonl").read_text().splitlines()]
        for row in shown:
            keep, size = row["attended"]
            shares = [share for _, share in row["shades"][:size]]
            assert (shares == [1.0] * keep + [0.0] * (size - keep)) == (step <= 2)
    assert [gates_of(run, step)["updates"] for step in (2, 4)] == [2, 4], "they learn all the while"


def test_what_a_run_logs_is_of_its_own_completions_and_hints(tmp_path: Path) -> None:
    """The frozen teacher and the gates of the start; a token a letter, and ceil(.25 n) of those before the answer."""
    trainer = Trainer.start(
        build_config(TREE | {"teacher": {"weights": "frozen"}, "step": {"num_steps": 1, "problems": 3}}),
        tmp_path / "run",
    )
    parts, groups = trainer.parts, []
    assert isinstance(parts.revealer, Retainer)
    assert parts.revealer.gates is not None
    model, networks = deepcopy(parts.model), deepcopy(parts.revealer.gates.networks)
    remember = parts.credit.remember
    parts.credit.remember = lambda found, *more: (groups.extend(found), remember(found, *more))[1]  # type: ignore
    trainer.train()
    rows = []
    for group in groups:
        solution = group.problem.solution
        head, tail = parts.renderer.text_ids(f"{group.problem.problem}\n>"), parts.renderer.text_ids(solution)
        (opening, *_, closing) = parts.renderer.teacher_ids([{"role": "user", "content": "1"}])
        prompt = (opening, *head, *tail, closing)
        size = len(solution.rpartition("#")[0].rstrip())
        assert len(tail) == len(solution)
        start = 1 + len(head)
        turn = group.trajectories[0].turns[0]
        rows.append((prompt, turn.completion_ids, Veil(start, start + size, math.ceil(0.25 * size))))
    numbers, _ = loss_of(model, cast("Any", SimpleNamespace(networks=networks)), rows, ntp=1.0, cap=1.0)
    logged = reproducible(tmp_path / "run")[1]
    assert {name: logged[f"retention/{name}"] for name in numbers} == pytest.approx(numbers, rel=1e-3, abs=1e-6)


def test_a_run_that_was_cut_goes_on_bit_for_bit(whole: Path, tmp_path: Path) -> None:
    trainer = Trainer.start(build_config(TREE), tmp_path / "cut")
    trainer.listener = lambda row: row["step"] == 2 and trainer.stop()
    with pytest.raises(Interrupted):
        trainer.train()
    Trainer.resume(tmp_path / "cut").train()
    assert reproducible(tmp_path / "cut") == reproducible(whole)
    assert weights(tmp_path / "cut") == weights(whole)
    assert gates_of(tmp_path / "cut", 4) == gates_of(whole, 4)


@pytest.mark.parametrize("choose", ["gates", "random_tokens"])
@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_at_both_ends_a_run_is_that_of_any_reveal_bit_for_bit(choose: str, ratio: float, tmp_path: Path) -> None:
    exposure = {"exposure": {"kind": "fixed", "ratio": ratio}, "step": {"num_steps": 2, "problems": 4}}
    plain = train(TREE | exposure | {"reveal": SEGMENTS}, tmp_path / "plain")
    masked = train(TREE | exposure | {"reveal": {"kind": "retention", "choose": choose}}, tmp_path / "masked")
    assert masked == plain
    assert weights(tmp_path / "masked") == weights(tmp_path / "plain")


def test_between_them_every_choice_is_another_run(whole: Path, tmp_path: Path) -> None:
    found = {str(reproducible(whole)[1]["loss/distil"])}
    for choose in ("prefix", "random_tokens", "random_segments"):
        rows = train(TREE | {"reveal": {"kind": "retention", "choose": choose}}, tmp_path / choose)
        assert "measure/retention" not in rows[1]
        found.add(str(rows[1]["loss/distil"]))
    assert len(found) == 4


def test_measurements_at_a_ratio_read_what_is_not_hidden(tmp_path: Path) -> None:
    """By hand: the answer's log-probability under a teacher that attends to the first half of the solution."""
    from atesd.train.setup import assemble

    parts = assemble(build_config(TREE | {"reveal": {"kind": "retention", "choose": "prefix"}}))
    found = parts.probe.teacher_log_likelihood(0.5, "solution")
    total, count = 0.0, 0
    for problem in parts.probe.problems:
        hint = parts.hints.hint(problem, 0.5)
        assert hint.veil is not None
        start, stop, keep, kept = hint.veil
        assert kept == tuple(range(keep))
        reply = parts.renderer.solution_ids(problem.solution)
        ids = (*hint.prompt_ids, *reply[:-1])

        def hiding(_: int, states_TW: Tensor, low: int = start + keep, high: int = stop) -> Tensor:
            place = torch.arange(len(states_TW))
            is_hidden = (place >= low) & (place < high) & (place != place[:, None])
            return torch.where(is_hidden, -1e30, 0.0).double().expand(4, -1, -1)

        states = final_states(parts.model, ids, hiding)[len(hint.prompt_ids) - 1 :]
        log_p = (states @ cast("Any", parts.model).lm_head.weight.detach().double().T).log_softmax(-1)
        total += float(log_p[range(len(reply)), reply].sum())
        count += len(reply)
    assert found == pytest.approx(total / count, rel=1e-4)
    assert isinstance(parts.revealer, Retainer)


def test_shades_are_those_of_the_teachers_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    parts = Trainer.start(build_config(TREE | {"teacher": {"weights": "frozen"}}), tmp_path / "run").parts
    assert parts.veils is not None
    hint = parts.hints.hint(parts.problems[0], 0.25)
    assert hint.veil is not None
    row = Row(
        prompt=(3,), completion=(4,), components=("distil",), group=0, ratio=0.25,
        view_prompts={"teacher": hint.prompt_ids}, veils={"teacher": hint.veil},
    )  # fmt: skip
    before = parts.reached(row)
    with torch.no_grad():
        for weight in parts.model.parameters():
            weight.add_(torch.randn_like(weight))
    assert parts.reached(row) == before
    assert parts.veils.reached(row.view("teacher")) != before
    assert parts.reached(replace(row, veils={})) == []
