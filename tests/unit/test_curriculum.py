"""The order of problems: complete epochs, seeded, resumable."""

from __future__ import annotations

import json

import pytest

from atesd.curriculum import RandomConfig
from atesd.types import UserError


def names(count: int) -> list[str]:
    return [f"p{index}" for index in range(count)]


def test_every_epoch_holds_every_problem_once_in_a_new_order() -> None:
    order = RandomConfig().build(names(10), 1, seed=3)
    taken = [index for _ in range(6) for index in order.next(5)]
    epochs = [taken[start : start + 10] for start in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_a_batch_goes_on_into_the_next_epoch_and_may_be_larger_than_one() -> None:
    order = RandomConfig().build(names(3), 1, seed=0)
    taken = order.next(8)
    assert sorted(taken[:3]) == sorted(taken[3:6]) == [0, 1, 2]
    assert len(taken) == 8


def test_the_seed_fixes_the_order() -> None:
    assert RandomConfig().build(names(50), 1, seed=1).next(50) == RandomConfig().build(names(50), 1, seed=1).next(50)
    assert RandomConfig().build(names(50), 1, seed=1).next(50) != RandomConfig().build(names(50), 1, seed=2).next(50)


def test_a_restored_order_goes_on_where_it_was() -> None:
    whole = RandomConfig().build(names(7), 1, seed=1).next(40)
    order, taken = RandomConfig().build(names(7), 1, seed=1), []
    for count in (3, 4, 5, 9, 19):
        taken += order.next(count)
        state = json.loads(json.dumps(order.state_dict()))
        order = RandomConfig().build(names(7), 1, seed=1)
        order.load_state_dict(state)
    assert taken == whole


def test_a_state_of_other_data_is_refused() -> None:
    order = RandomConfig().build(names(10), 1, seed=1)
    order.next(9)
    with pytest.raises(UserError, match="written with 10 training problems, the task now has 5"):
        RandomConfig().build(names(5), 1, seed=1).load_state_dict(order.state_dict())
