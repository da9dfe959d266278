"""How a generation batch is divided among its updates."""

from __future__ import annotations

import pytest

from atesd.train.batch import Row
from atesd.train.micro import updates_of


def row(group: int, length: int = 1, components: tuple[str, ...] = ("distil",)) -> Row:
    return Row((1,), (2,) * length, components, group=group, ratio=1.0)


@pytest.mark.parametrize(
    ("groups", "updates", "expected"),
    [
        ([0, 1, 2, 3], 2, [[0, 1], [2, 3]]),
        ([0, 0, 1, 1], 2, [[0, 1], [2, 3]]),
        ([0, 0, 0, 1, 2, 3], 4, [[0, 1, 2], [3], [4], [5]]),  # an attempt of three turns: its group is not split
        ([0, 0, 0, 0, 0, 0, 0, 0, 1], 2, [[0, 1, 2, 3, 4, 5, 6, 7], [8]]),
        ([], 2, [[], []]),
    ],
)
def test_every_update_has_as_many_groups(groups: list[int], updates: int, expected: list[list[int]]) -> None:
    assert updates_of([row(group) for group in groups], updates, 100) == expected


def test_rows_stand_in_the_order_of_their_micro_batches_and_silent_ones_are_left_out() -> None:
    rows = [row(0, 2), row(0, 5), row(1, 3, ()), row(1, 4)]
    assert updates_of(rows, 1, 100) == [[1, 3, 0]]
    assert updates_of(rows, 2, 100) == [[1, 0], [3]]
