"""TIP's selection: scores by hand, the share that is kept, and the edge cases."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import permutations
from typing import Literal

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from atesd.kinds import SelectionSection
from atesd.losses.combine import Aggregate, Component, aggregate_weights, combine, selected_units
from atesd.losses.stats import TokenStats
from atesd.selection import SelectAll, TipSelection


def stats_of(h: list[float], d: list[float], divergence: list[float] | None = None) -> TokenStats:
    columns = {"student_entropy": torch.tensor(h), "reverse_kl": torch.tensor(d)}
    columns["divergence"] = torch.tensor(divergence or d)
    return TokenStats(**{name: columns.get(name, torch.zeros(len(h))) for name in TokenStats.__slots__})


HAND = stats_of([0.1, 0.5, 0.3, 0.2], [0.2, 0.0, 0.8, 0.4])


def kept(selection: TipSelection, stats: TokenStats, seed: int = 0) -> list[int]:
    return selection.select(stats, seed).nonzero()[:, 0].tolist()


def test_scores_by_hand() -> None:
    # h^ = (0, 1, .5, .25), d^ = (.25, 0, 1, .5)
    scores: dict[str, list[float]] = {
        "soft_or": [0.25, 1.0, 1.0, 0.625],
        "q3": [0.25, 0.0, 0.5, 0.375],
        "entropy": [0.0, 1.0, 0.5, 0.25],
    }
    for name, expected in scores.items():
        selection = TipSelection(score=name, percentile=1.0)  # type: ignore[arg-type]
        torch.testing.assert_close(selection.scores(HAND), torch.tensor(expected))


def test_a_ratio_of_three_quarters_keeps_the_last_three_of_four() -> None:
    assert kept(TipSelection(ratio=0.75, percentile=1.0), HAND) == [1, 2, 3]
    assert kept(TipSelection(ratio=0.5, score="q3", percentile=1.0), HAND) == [2, 3]
    assert kept(TipSelection(ratio=0.01), HAND) == [1], "at least one token is kept"


def test_a_ratio_of_1_keeps_everything_without_a_score_pass() -> None:
    everything = TipSelection(ratio=1.0)
    assert not everything.needs_batch
    assert TipSelection(ratio=0.99).needs_batch
    assert everything.select(HAND, 0).tolist() == SelectAll().select(HAND, 0).tolist() == [1, 1, 1, 1]


def test_equal_values_normalise_to_0_and_the_first_tokens_win() -> None:
    flat = stats_of([0.4] * 4, [0.2] * 4)
    assert TipSelection().scores(flat).tolist() == [0, 0, 0, 0]
    assert kept(TipSelection(ratio=0.5), flat) == [0, 1]


def test_entropies_are_cut_at_their_98th_percentile() -> None:
    entropies = [index / 100 for index in range(99)] + [50.0]
    cut = TipSelection(score="entropy").scores(stats_of(entropies, [0.0] * 100))
    assert cut[97:].tolist() == [1.0, 1.0, 1.0]
    assert float(cut[49]) == pytest.approx(0.49 / 0.97)  # without the cut it would be .0098


def test_the_multinomial_draw_is_seeded_without_replacement_and_follows_its_weights() -> None:
    stats = stats_of([1.0, 1.0, 0.5, 0.5], [0.0] * 4, divergence=[0.2, 0.1, 0.2, 5.0])
    # h_norm (D / ln 2): proportional to .2, .1, .1, .5 ln 2
    draw = TipSelection(score="multinomial", ratio=0.25)
    weights = [0.2, 0.1, 0.1, 0.5 * math.log(2)]
    counts: Counter[int] = Counter()
    for seed in range(4000):
        (chosen,) = kept(draw, stats, seed)
        counts[chosen] += 1
    for token, weight in enumerate(weights):
        assert counts[token] / 4000 == pytest.approx(weight / sum(weights), abs=0.03)
    assert kept(draw, stats, 7) == kept(draw, stats, 7)
    most = TipSelection(score="multinomial", ratio=0.75)
    assert all(len(kept(most, stats, seed)) == 3 for seed in range(20))


@pytest.mark.parametrize(
    ("powers", "weights"),
    [
        # h_norm = (1, .5, .25), D / ln 2 = (.5, 1, 1)
        ({}, (0.5, 0.5, 0.25)),
        ({"entropy_power": 2.0}, (0.5, 0.25, 0.0625)),
        ({"entropy_power": 0.0}, (0.5, 1.0, 1.0)),
        ({"divergence_power": 2.0}, (0.25, 0.5, 0.25)),
        ({"divergence_power": 0.0}, (1.0, 0.5, 0.25)),
        ({"entropy_power": 3.0, "divergence_power": 3.0}, (0.125, 0.125, 0.015625)),
    ],
)
def test_the_multinomial_draw_goes_by_powers_of_entropy_and_divergence(
    powers: dict[str, float], weights: tuple[float, ...]
) -> None:
    half = 0.5 * math.log(2)
    stats = stats_of([0.8, 0.4, 0.2], [0.0] * 3, divergence=[half, 2 * half, 2 * half])
    draw = TipSelection(score="multinomial", ratio=0.34, **powers)  # type: ignore[arg-type]
    counts = Counter(kept(draw, stats, seed)[0] for seed in range(4000))
    for token, weight in enumerate(weights):
        assert counts[token] / 4000 == pytest.approx(weight / sum(weights), abs=0.025)  # 3 standard errors


# Draw weights h_norm (D / ln 2) = (1, .4, .3, .2, .1) up to ln 2; what is averaged is large where the weight is.
DRAWN = stats_of([1.0, 0.8, 0.6, 0.4, 0.2], [0.0] * 5, divergence=[0.5, 0.25, 0.25, 0.25, 0.25])
WEIGHTS = (1.0, 0.4, 0.3, 0.2, 0.1)
VALUES = torch.tensor([2.0, 0.5, 1.0, 0.2, 0.3], dtype=torch.float64)


def chances(weights: Sequence[float], kept: int) -> dict[frozenset[int], float]:
    """Exactly how likely each set is, drawn one after another without replacement: every order of every set."""
    found: dict[frozenset[int], float] = {}
    for order in permutations(range(len(weights)), kept):
        chance, left = 1.0, sum(weights)
        for token in order:
            chance, left = chance * weights[token] / left, left - weights[token]
        found[frozenset(order)] = found.get(frozenset(order), 0.0) + chance
    return found


def draws(weighting: Literal["none", "importance"], number: int = 6000) -> Tensor:
    draw = TipSelection(score="multinomial", ratio=0.6, weighting=weighting)
    return torch.stack([draw.select(DRAWN, seed) for seed in range(number)]).double()


def test_what_a_multinomial_draw_selects_has_another_mean_than_all_tokens() -> None:
    exact = chances(WEIGHTS, 3)
    mean = sum(chance * float(VALUES[list(chosen)].mean()) for chosen, chance in exact.items())
    assert sum(exact.values()) == pytest.approx(1.0)
    assert mean == pytest.approx(1.0119, abs=1e-4)
    assert float(VALUES.mean()) == pytest.approx(0.8)
    estimates = (draws("none") * VALUES).sum(1) / 3
    assert float(estimates.mean()) == pytest.approx(mean, abs=4 * float(estimates.std()) / math.sqrt(6000))


def test_importance_weights_keep_the_draw_and_make_its_mean_that_of_all_tokens() -> None:
    selected = draws("importance")
    assert ((selected > 0).sum(1) == 3).all()
    counts = Counter(frozenset(row.nonzero()[:, 0].tolist()) for row in selected)
    for chosen, chance in chances(WEIGHTS, 3).items():
        assert counts[chosen] / 6000 == pytest.approx(chance, abs=4 * math.sqrt(chance * (1 - chance) / 6000))
    for token in range(5):  # for every function of the tokens: E s_t = K / N
        error = 4 * float(selected[:, token].std()) / math.sqrt(6000)
        assert 0.0 < error < 0.08
        assert float(selected[:, token].mean()) == pytest.approx(3 / 5, abs=error)


def test_importance_weights_are_the_inverse_of_the_chance_that_the_others_leave() -> None:
    """Given the bound tau, token t was kept with 1 - exp(-v_t tau): one tau explains all weights of a draw."""
    draw = TipSelection(score="multinomial", ratio=0.6, weighting="importance")
    for seed in range(20):
        selected = draw.select(DRAWN, seed)
        kept_weights = {token: float(selected[token]) for token in range(5) if selected[token] > 0}
        last = max(kept_weights)  # of the least draw weight: the others are closer to 1, where digits are lost
        bound = -math.log1p(-0.6 / kept_weights[last]) / WEIGHTS[last]
        expected = {token: 0.6 / (1 - math.exp(-WEIGHTS[token] * bound)) for token in kept_weights}
        assert kept_weights == pytest.approx(expected, rel=1e-5)
        assert selected.tolist() == draw.select(DRAWN, seed).tolist()


def test_equal_draw_weights_need_no_correction_in_the_mean_and_all_tokens_none_at_all() -> None:
    flat = stats_of([1.0] * 400, [0.0] * 400, divergence=[0.3] * 400)
    selected = TipSelection(score="multinomial", ratio=0.25, weighting="importance").select(flat, 0)
    kept_weights = selected[selected > 0]
    assert len(kept_weights) == 100
    assert float(kept_weights.std()) == pytest.approx(0.0, abs=1e-5)
    # tau is the 101st of 400 exponential numbers: -ln(.75) up to its spread, sqrt(1 / 3 / 400) = .03
    assert float(kept_weights[0]) == pytest.approx(1.0, abs=0.3)
    whole = TipSelection(score="multinomial", ratio=0.9999999999, weighting="importance")
    assert whole.select(DRAWN, 0).tolist() == [1.0] * 5
    assert TipSelection(score="multinomial", ratio=0.1, weighting="importance").select(stats_of([1.0], [1.0]), 0) == 1


@pytest.mark.parametrize("aggregate", ["token", "sequence"])
def test_the_loss_of_an_importance_weighted_draw_is_in_expectation_that_of_all_tokens(aggregate: Aggregate) -> None:
    """As the step takes it: weights that hold selection and gate. One sequence: of it `sequence` takes the ratio."""
    gate, sequence = torch.tensor([0.5, 1.0, 0.25, 1.0, 2.0]).double(), torch.tensor([4] * 5)
    losses = []
    for selection in draws("importance"):
        weights = aggregate_weights(selection * gate, selection, sequence, aggregate)
        units = selected_units(selection, sequence, aggregate)
        assert units == (3 if aggregate == "token" else 1)
        losses.append(combine({"distil": Component(VALUES, weights, units)}))
        if aggregate == "sequence":
            assert float(losses[-1]) == pytest.approx(float((selection * gate * VALUES).sum() / selection.sum()))
    mean = torch.stack(losses).mean()
    error = 4 * float(torch.stack(losses).std()) / math.sqrt(6000)
    if aggregate == "token":
        assert error < 0.02
        assert float(mean) == pytest.approx(float((gate * VALUES).mean()), abs=error)


def test_another_seed_draws_other_tokens() -> None:
    stats = stats_of([1.0] * 50, [1.0] * 50)
    draw = TipSelection(score="multinomial", ratio=0.2)
    assert len({tuple(kept(draw, stats, seed)) for seed in range(5)}) == 5


def test_a_zero_weight_can_still_fill_the_share() -> None:
    stats = stats_of([0.0, 0.0, 1.0, 0.0], [0.1] * 4)
    assert len(kept(TipSelection(score="multinomial", ratio=0.75, divergence_power=0.0), stats)) == 3


def test_nothing_to_select_from_gives_nothing() -> None:
    empty: Tensor = TipSelection().select(stats_of([], []), 0)
    assert empty.numel() == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ratio": 0.0}, "greater than 0"),
        ({"ratio": 1.5}, "less than or equal to 1"),
        ({"score": "multinomial", "entropy_power": 0.0, "divergence_power": 0.0}, "draws at random"),
        ({"score": "entropy", "weighting": "importance"}, "makes good a random draw"),
    ],
)
def test_what_makes_no_sense_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TypeAdapter(SelectionSection).validate_python({"kind": "tip"} | fields)
