"""The order of problems: complete epochs, seeded, resumable."""

from __future__ import annotations

import json

import numpy as np
import pytest

from atesd.curriculum import Curriculum, PerplexityConfig, RandomConfig
from atesd.facts import RunFacts
from atesd.seeds import derive_seed
from atesd.types import Measurement, Observation, UserError


def names(count: int) -> list[str]:
    return [f"p{index}" for index in range(count)]


def facts(count: int, batch: int = 1, seed: int = 0) -> RunFacts:
    return RunFacts(seed=seed, problem_ids=names(count), problems_per_step=batch)


def test_every_epoch_holds_every_problem_once_in_a_new_order() -> None:
    order = RandomConfig().build(facts(10, seed=3))
    taken = [index for _ in range(6) for index in order.next(5)]
    epochs = [taken[start : start + 10] for start in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_a_batch_goes_on_into_the_next_epoch_and_may_be_larger_than_one() -> None:
    order = RandomConfig().build(facts(3, seed=0))
    taken = order.next(8)
    assert sorted(taken[:3]) == sorted(taken[3:6]) == [0, 1, 2]
    assert len(taken) == 8


def test_the_seed_fixes_the_order() -> None:
    assert RandomConfig().build(facts(50, seed=1)).next(50) == RandomConfig().build(facts(50, seed=1)).next(50)
    assert RandomConfig().build(facts(50, seed=1)).next(50) != RandomConfig().build(facts(50, seed=2)).next(50)


def test_the_order_of_an_epoch_comes_from_the_runs_own_seed() -> None:
    taken = RandomConfig().build(facts(50, seed=3)).next(100)
    for epoch in (0, 1):
        expected = np.random.default_rng(derive_seed(3, "order", epoch)).permutation(50).tolist()
        assert taken[50 * epoch :][:50] == expected


def test_a_restored_order_goes_on_where_it_was() -> None:
    whole = RandomConfig().build(facts(7, seed=1)).next(40)
    order, taken = RandomConfig().build(facts(7, seed=1)), []
    for count in (3, 4, 5, 9, 19):
        taken += order.next(count)
        state = json.loads(json.dumps(order.state_dict()))
        order = RandomConfig().build(facts(7, seed=1))
        order.load_state_dict(state)
    assert taken == whole


def test_a_state_of_other_data_is_refused() -> None:
    order = RandomConfig().build(facts(10, seed=1))
    order.next(9)
    with pytest.raises(UserError, match="written with 10 training problems, the task now has 5"):
        RandomConfig().build(facts(5, seed=1)).load_state_dict(order.state_dict())


def scores(step: int = 0, **nll: float) -> Observation:
    return Observation(step, measured={Measurement("reference_nll"): nll})


def by_perplexity(kind: str, batch: int = 2, *, seed: int = 0, **fields: str) -> Curriculum:
    return PerplexityConfig(kind=kind, **fields).build(facts(4, batch, seed))  # type: ignore[arg-type]


def test_perplexity_sorts_hardest_or_easiest_first_with_ties_by_index_whatever_the_seed() -> None:
    for seed in (0, 1):
        reverse, forward = by_perplexity("reverse_ppl", seed=seed), by_perplexity("forward_ppl", seed=seed)
        for order in (reverse, forward):
            order.observe(scores(p0=1.0, p1=3.0, p2=1.0, p3=2.0))
        assert reverse.next(4) == [1, 3, 0, 2]
        assert forward.next(4) == [0, 2, 3, 1]


def test_each_epoch_is_sorted_by_scores_taken_before_it_begins() -> None:
    order = by_perplexity("forward_ppl", batch=3)
    assert [m.key for m in order.wants(0)] == ["reference_nll"]
    order.observe(scores(p0=1.0, p1=2.0, p2=3.0, p3=4.0))
    assert order.next(3) == [0, 1, 2]
    assert [m.key for m in order.wants(1)] == ["reference_nll"], "the next batch of 3 begins an epoch"
    order.observe(scores(1, **{"p0": 4.0, "p1": 3.0, "p2": 2.0, "p3": 1.0}))
    assert order.next(3) == [3, 3, 2], "the old epoch ends in its own order, then the new one begins"
    once = by_perplexity("forward_ppl", batch=3, rescore="once")
    once.observe(scores(p0=1.0, p1=2.0, p2=3.0, p3=4.0))
    once.next(3)
    assert once.wants(1) == []
    assert once.next(5) == [3, 0, 1, 2, 3]


def test_scores_are_asked_for_only_before_a_step_that_begins_an_epoch() -> None:
    order = by_perplexity("forward_ppl", batch=1)
    asked = []
    for step in range(9):
        asked.append(bool(order.wants(step)))
        order.observe(scores(step, **dict.fromkeys(names(4), 1.0)))
        order.next(1)
    assert asked == [True, False, False, True, False, False, False, True, False]


def test_a_problem_without_a_score_comes_last_and_scores_not_asked_for_are_ignored() -> None:
    order = by_perplexity("reverse_ppl")
    order.observe(scores(p1=1.0, p3=2.0))
    assert order.next(2) == [3, 1]
    order.observe(scores(1, **{"p0": 9.0}))
    assert order.next(2) == [0, 2]


def test_a_step_without_scores_leaves_the_order_alone() -> None:
    order = by_perplexity("reverse_ppl")
    order.observe(scores(p0=1.0, p1=3.0, p2=1.0, p3=2.0))
    order.observe(Observation(0))
    assert order.next(4) == [1, 3, 0, 2]


def test_a_perplexity_order_is_restored_in_the_middle_of_an_epoch() -> None:
    order = by_perplexity("reverse_ppl")
    order.observe(scores(p0=1.0, p1=3.0, p2=1.0, p3=2.0))
    order.next(3)
    again = by_perplexity("reverse_ppl")
    again.load_state_dict(json.loads(json.dumps(order.state_dict())))
    assert again.next(5) == order.next(5) == [2, 1, 3, 0, 2]
