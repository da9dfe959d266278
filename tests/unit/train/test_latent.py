"""How latent codes are chosen and trained, against dense float64 references and hand values."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from atesd.codes.model import codes_of, unsteered
from atesd.codes.steer import Codes
from atesd.gradients.rule import AllGradients
from atesd.seeds import derive_seed
from atesd.train.latent import divergence, router_loss, zipf

from support.models import ragged_rows, tiny_model
from support.steppers import make_stepper
from support.threads import ThreadWorld, in_threads

COUNT, CHUNK = 5, 3
UPDATE = 0
"""The scheduler's count while the first update is made."""


class Seen(AllGradients):
    """Keeps the gradients of an update."""

    def apply(self, model: nn.Module) -> None:
        kept = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
        object.__setattr__(self, "gradients", kept)


def stepper_of(draws: int = 4, *, seed: int = 0, size: float = 0.5, **sections: Any) -> tuple[Any, Any, Codes, Seen]:
    """Return a stepper in float64 whose codes are far from nothing."""
    model: Any = tiny_model(seed).double()
    rule = Seen()
    section = {"count": COUNT, "chunk": CHUNK, "draws": draws} | sections.pop("codes", {})
    stepper, _ = make_stepper(model, rule=rule, codes=section, **sections)
    codes = codes_of(model)
    assert codes is not None
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        codes.vectors_CH.copy_(size * torch.randn(codes.vectors_CH.shape, generator=generator))
        codes.router_CH.copy_(0.1 * torch.randn(codes.router_CH.shape, generator=generator))
    return stepper, model, codes, rule


@contextmanager
def added(model: Any, layer: int, deltas: Tensor) -> Iterator[None]:
    handle = model.model.layers[layer].register_forward_hook(lambda *args: args[2] + deltas)
    try:
        yield
    finally:
        handle.remove()


def log_probs(model: Any, prompt: Sequence[int], completion: Sequence[int]) -> Tensor:
    ids = torch.tensor([[*prompt, *completion[:-1]]])
    logits: Tensor = model(input_ids=ids).logits[0, len(prompt) - 1 :]
    return logits.log_softmax(-1)


def read_by(model: Any, codes: Codes, row: Any) -> Tensor:
    """Return what the router reads: the layer's own output at every chunk's first position."""
    ids = torch.tensor([[*row.prompt, *row.completion[:-1]]])
    hidden: Tensor = model(input_ids=ids, output_hidden_states=True).hidden_states[codes.layer + 1][0]
    return hidden[len(row.prompt) - 1 :: CHUNK].detach()


def divergences(model: Any, codes: Codes, row: Any, sequence: Sequence[int] | None) -> Tensor:
    """Return KL(teacher || student), [T], dense; the teacher is the model as it is, with the hint and without codes."""
    with torch.no_grad():
        teacher = log_probs(model, row.view_prompts["teacher"], row.completion)
    if sequence is None:
        student = log_probs(model, row.prompt, row.completion)
    else:
        width = len(row.prompt) + len(row.completion) - 1
        tokens = [None] * (len(row.prompt) - 1) + [sequence[t // CHUNK] for t in range(len(row.completion))]
        zero = torch.zeros(codes.vectors_CH.shape[1], dtype=torch.float64)
        deltas = torch.stack([zero if code is None else codes.vectors_CH[code] for code in tokens[:width]])
        with added(model, codes.layer, deltas):
            student = log_probs(model, row.prompt, row.completion)
    return (teacher.exp() * (teacher - student)).sum(-1)


def draws_of(codes: Codes, read_MH: Tensor, index: int, count: int, seed: int = 0) -> list[list[int]]:
    """Draw sequences number by number: uniform numbers by seed, update and place, each inverted on its own."""
    generator = torch.Generator().manual_seed(derive_seed(derive_seed(seed, "codes", UPDATE), "completion", index))
    uniform = torch.rand(count, len(read_MH), generator=generator, dtype=torch.float64).tolist()
    p = [torch.softmax(codes.router_CH.detach() @ row, 0).tolist() for row in read_MH]
    found = []
    for numbers in uniform:
        sequence = []
        for number, weights in zip(numbers, p, strict=True):
            total, code = weights[0], 0
            while number >= total and code + 1 < len(weights):
                code += 1
                total += weights[code]
            sequence.append(code)
        found.append(sequence)
    return found


def expected_update(
    model: Any, codes: Codes, rows: Sequence[Any], draws: int
) -> tuple[Tensor, Tensor, Tensor, list[Any]]:
    """Return the plain, the steered and the router's loss of an update with their graphs, and what was chosen."""
    tokens = sum(len(row.completion) for row in rows)
    plain: Any = 0
    steered: Any = 0
    crossed: Any = 0
    chosen, mean = [], []
    with unsteered(model):
        for index, row in enumerate(rows):
            read = read_by(model, codes, row)
            drawn = draws_of(codes, read, index, draws)
            costs = [float(divergences(model, codes, row, sequence).detach().sum()) for sequence in drawn]
            best = drawn[costs.index(min(costs))]
            chosen.append(best)
            plain = plain + divergences(model, codes, row, None).sum() / tokens
            steered = steered + divergences(model, codes, row, best).sum() / tokens
            log_p = torch.log_softmax(read @ codes.router_CH.T, -1)
            crossed = crossed - 0.5 * sum(log_p[m, code] for m, code in enumerate(best)) / tokens
            mean += list(log_p.exp())
        p = torch.stack(mean).mean(0)
        harmonic = sum(1 / (c + 1) for c in range(COUNT))
        prior = torch.tensor([1 / (c + 1) / harmonic for c in range(COUNT)], dtype=torch.float64)
        router = crossed + 0.1 * (p * (p / prior).log()).sum()
    return plain, steered, router, chosen


# ---- the router's loss ----------------------------------------------------------------------------------------------


def test_kl_against_a_hand_histogram() -> None:
    """Codes 0, 0, 0, 1 of three: (3/4) log((3/4) / (6/11)) + (1/4) log((1/4) / (3/11)); a code unused adds nothing."""
    p = torch.tensor([0.75, 0.25, 0.0], dtype=torch.float64, requires_grad=True)
    found = divergence(p, zipf(3))
    assert found.item() == pytest.approx(0.75 * math.log(0.75 * 11 / 6) + 0.25 * math.log(0.25 * 11 / 3))
    found.backward()  # type: ignore[no-untyped-call]
    assert p.grad is not None
    assert p.grad.isfinite().all()


def test_the_routers_loss_by_hand() -> None:
    """Uniform over two codes, two chunks of five tokens: .5 (2 log 2) / 5 + .1 KL((1/2, 1/2) || (2/3, 1/3))."""
    found = router_loss(torch.zeros(2, 2), torch.tensor([0, 1]), 5, router_coef=0.5, prior_coef=0.1)
    kl = 0.5 * math.log(3 / 4) + 0.5 * math.log(3 / 2)
    assert found.item() == pytest.approx(0.5 * 2 * math.log(2) / 5 + 0.1 * kl)


def test_the_routers_gradient_by_hand_and_by_differences() -> None:
    """Cross-entropy alone: router_coef (p - onehot) / tokens."""
    logits = torch.tensor([[0.3, -1.0, 2.0], [0.0, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    chosen = torch.tensor([2, 0])
    router_loss(logits, chosen, 7, router_coef=0.5, prior_coef=0.0).backward()  # type: ignore[no-untyped-call]
    expected = 0.5 * (logits.detach().softmax(-1) - torch.eye(3, dtype=torch.float64)[chosen]) / 7
    torch.testing.assert_close(logits.grad, expected)
    assert torch.autograd.gradcheck(  # type: ignore[no-untyped-call]
        lambda z: router_loss(z, chosen, 7, router_coef=0.5, prior_coef=0.1), (logits,)
    )


# ---- search and selection -------------------------------------------------------------------------------------------


def chosen_by(stepper: Any, codes: Codes, rows: Sequence[Any]) -> list[list[int]]:
    """Make an update and return what it chose, by row."""
    found: dict[int, list[int]] = {}
    training, original = stepper._codes, stepper._codes.choose

    def choose(passages: Any, indices: Any, *rest: Any) -> Any:
        choice = original(passages, indices, *rest)
        found.update(zip(indices, [each.tolist() for each in choice.codes], strict=True))
        return choice

    training.choose = choose
    stepper.optimize(rows)
    return [found[index] for index in range(len(rows))]


@pytest.mark.parametrize("draws", [2, 4])
def test_the_chosen_sequence_is_the_nearest_to_the_teacher_of_those_drawn(draws: int) -> None:
    stepper, model, codes, _ = stepper_of(draws)
    rows = ragged_rows(6)
    *_, expected = expected_update(model, codes, rows, draws)
    first = [draws_of(codes, read_by(model, codes, row), index, 1)[0] for index, row in enumerate(rows)]
    assert chosen_by(stepper, codes, rows) == expected
    assert expected != first, "the search chose others than the first draws"


def test_one_draw_is_plain_sampling_and_costs_no_pass() -> None:
    stepper, model, codes, _ = stepper_of(draws=1)
    rows = ragged_rows(6)
    with unsteered(model):
        expected = [draws_of(codes, read_by(model, codes, row), index, 1)[0] for index, row in enumerate(rows)]
    passes = []
    original = stepper._scorer.streams
    stepper._scorer.streams = lambda *args, **kwargs: passes.append(1) or original(*args, **kwargs)
    assert chosen_by(stepper, codes, rows) == expected
    assert len(passes) == 2, "the plain pass and the steered one"


def test_draws_are_as_frequent_as_their_probabilities_and_differ_by_update_and_row() -> None:
    stepper, _, codes, _ = stepper_of(draws=1024)
    read = torch.zeros(3, 32, dtype=torch.float64)
    read[:, 0] = 1.0
    with torch.no_grad():
        codes.router_CH.zero_()
        codes.router_CH[:, 0] = torch.tensor([0.1, 0.2, 0.3, 0.15, 0.25], dtype=torch.float64).log()
    drawn = stepper._codes._drawn(read, 0, 0)
    shares = torch.bincount(drawn.flatten(), minlength=5) / drawn.numel()
    assert shares.tolist() == pytest.approx([0.1, 0.2, 0.3, 0.15, 0.25], abs=0.04)
    assert torch.equal(stepper._codes._drawn(read, 0, 0), drawn)
    assert not torch.equal(stepper._codes._drawn(read, 1, 0), drawn)
    assert not torch.equal(stepper._codes._drawn(read, 0, 1), drawn)
    assert not torch.equal(drawn[:, 0], drawn[:, 1]), "chunks are drawn apart"


# ---- the update -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draws", [1, 4])
@pytest.mark.parametrize("budget", [4096, 30])
def test_an_update_has_the_gradient_of_all_three_losses_however_it_is_cut(draws: int, budget: int) -> None:
    stepper, model, codes, rule = stepper_of(draws, step={"token_budget": budget})
    rows = ragged_rows(6)
    plain, steered, router, _ = expected_update(model, codes, rows, draws)
    names, weights = zip(*model.named_parameters(), strict=True)
    total = torch.autograd.grad(plain + steered + router, weights)
    outcome = stepper.optimize(rows)
    assert outcome.metrics["loss/distil"] == pytest.approx(plain.item())
    assert outcome.metrics["loss/steered"] == pytest.approx(steered.item())
    assert outcome.metrics["loss/codes"] == pytest.approx(router.item())
    assert outcome.metrics["loss/total"] == pytest.approx((plain + steered + router).item())
    assert outcome.metrics["codes/gain"] == pytest.approx((plain - steered).item(), rel=1e-5)
    for name, expected in zip(names, total, strict=True):
        torch.testing.assert_close(rule.gradients[name], expected, rtol=1e-6, atol=1e-9, msg=name)


@pytest.mark.parametrize("size", [2, 7])
def test_processes_make_the_update_of_one(size: int) -> None:
    """Of six rows seven processes leave one with none. Gradients are added up in float32."""
    stepper, _, _, rule = stepper_of(step={"token_budget": 30})
    expected = stepper.optimize(ragged_rows(6)).metrics
    turnstile = threading.Lock()  # models are made from the random state of all threads

    def updated(world: ThreadWorld) -> Any:
        with turnstile:
            stepper, _, _, rule = stepper_of(step={"token_budget": 30}, world=world)
        return stepper.optimize(ragged_rows(6)).metrics, rule.gradients

    found = in_threads(size, updated)
    for metrics, gradients in found:
        assert metrics == found[0][0]
        assert metrics | {"optim/micro_batches": 0} == pytest.approx(expected | {"optim/micro_batches": 0}, rel=1e-5)
        for name, gradient in rule.gradients.items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-5, atol=1e-6, msg=name)
    assert {"codes/searched", "codes/gain"} < {*expected}


def test_the_routers_share_of_the_gradient_is_in_the_router_alone() -> None:
    """With and without its loss every other weight has the same gradient."""
    found = []
    for coefs in ({}, {"router_coef": 0.0, "prior_coef": 0.0}):
        stepper, _, _, rule = stepper_of(codes=coefs)
        stepper.optimize(ragged_rows(6))
        found.append(rule.gradients)
    for name in found[0]:
        if "router" in name:
            assert found[0][name].abs().max() > 0
            assert not found[1][name].any()
        else:
            assert torch.equal(found[0][name], found[1][name]), name


def test_codes_of_zero_double_the_distillation_and_change_no_stream() -> None:
    """While vectors are 0 the steered student is the plain one: streams bit-equal, the model's gradient twice."""
    plain_model: Any = tiny_model().double()
    plain_rule = Seen()
    without, _ = make_stepper(plain_model, rule=plain_rule)
    rows = ragged_rows(6)
    plain = without.optimize(rows)
    stepper, _, _, rule = stepper_of(size=0.0)
    outcome = stepper.optimize(rows)
    for index, scored in plain.rows.items():
        assert torch.equal(scored.stats.divergence, outcome.rows[index].stats.divergence)
        assert torch.equal(scored.stats.student_logprob, outcome.rows[index].stats.student_logprob)
        assert torch.equal(scored.stats.student_logprob, outcome.rows[index].as_sampled)
    assert outcome.metrics["loss/steered"] == outcome.metrics["loss/distil"] == plain.metrics["loss/distil"]
    assert outcome.metrics["codes/gain"] == outcome.metrics["codes/searched"] == outcome.metrics["codes/size"] == 0.0
    for name, gradient in plain_rule.gradients.items():
        torch.testing.assert_close(rule.gradients[name], 2 * gradient, rtol=1e-12, atol=1e-12)


def test_the_steered_loss_is_weighed_as_the_plain_one() -> None:
    """A gate and problem weights scale both alike: while vectors are 0 they stay equal."""
    for gate in ({"kind": "sdar"}, {"kind": "sdar", "target": "divergence"}):
        stepper, *_ = stepper_of(size=0.0, gate=gate, loss={"aggregate": "sequence"})
        outcome = stepper.optimize(ragged_rows(6))
        assert outcome.metrics["loss/steered"] == pytest.approx(outcome.metrics["loss/distil"], rel=1e-12)


def test_completions_shorter_than_a_chunk_train() -> None:
    stepper, *_ = stepper_of(codes={"chunk": 64})
    outcome = stepper.optimize(ragged_rows(3))
    assert sum(outcome.metrics[f"codes/share/{code}"] for code in range(COUNT)) == pytest.approx(1.0)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_sampler_is_compared_with_the_steered_student(temperature: float) -> None:
    """The gap is 0 for log-probabilities of the greedily steered student, and not for those of the plain one."""
    from dataclasses import replace

    sampling = {"temperature": temperature}
    stepper, model, _, _ = stepper_of(rollout=sampling)
    rows = ragged_rows(5)
    scorer = stepper._scorer

    def scored() -> list[Tensor]:
        passages = [row.student for row in rows]
        found: list[Tensor] = scorer.each(passages, lambda chosen: scorer.log_likelihood(chosen, temperature))
        return found

    for is_steered in (True, False):
        with torch.no_grad():
            if is_steered:
                own = scored()
            else:
                with unsteered(model):
                    own = scored()
        fresh = [replace(row, sampler_logprobs=tuple(each.tolist())) for row, each in zip(rows, own, strict=True)]
        other, _, _, _ = stepper_of(rollout=sampling)
        gap = other.optimize(fresh).metrics["rollout/logprob_gap"]
        assert gap < 1e-6 if is_steered else gap > 1e-2


def test_metrics_describe_the_codes_of_the_update() -> None:
    stepper, model, codes, _ = stepper_of()
    rows = ragged_rows(6)
    with unsteered(model):
        read = torch.cat([read_by(model, codes, row) for row in rows])
    *_, chosen = expected_update(model, codes, rows, 4)
    logits = (read @ codes.router_CH.T).detach()
    p = logits.softmax(-1)
    flat = torch.tensor([code for sequence in chosen for code in sequence])
    sizes = codes.vectors_CH[flat].norm(dim=-1) / read.norm(dim=-1)
    found = stepper.optimize(rows).metrics
    expected = torch.bincount(logits.argmax(-1), minlength=COUNT) / len(logits)
    assert [found[f"codes/share/{code}"] for code in range(COUNT)] == pytest.approx(expected.tolist())
    assert found["codes/entropy"] == pytest.approx(float(-(p * p.log()).sum(-1).mean()))
    assert found["codes/logprob"] == pytest.approx(float(p.log()[torch.arange(len(flat)), flat].mean()))
    assert found["codes/size"] == pytest.approx(float(sizes.detach().mean()))
    assert found["codes/searched"] > 0


def test_what_is_logged_of_an_update_is_its_own() -> None:
    """Vectors of 0 steer nothing, so that no sequence is nearer to the teacher than another, or than none."""
    stepper, _, codes, _ = stepper_of()
    found = stepper.optimize(ragged_rows(4)).metrics
    assert found["codes/searched"] > 0
    assert found["codes/gain"] != 0
    with torch.no_grad():
        codes.vectors_CH.zero_()
    found = stepper.optimize(ragged_rows(4)).metrics
    assert (found["codes/searched"], found["codes/gain"]) == (0.0, 0.0)
