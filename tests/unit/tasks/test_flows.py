"""The flow tasks: what a ratio shows, and their data."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from atesd.facts import RunFacts
from atesd.recipe import build_config
from atesd.tasks.flows import DigitsConfig, FlowTask, RingConfig, modes
from atesd.types import UserError


def ring(seed: int = 3) -> FlowTask:
    return RingConfig(train_size=40, probe_size=10, eval_size=20).points(RunFacts(seed=seed))


def digits(patch: int = 2) -> FlowTask:
    pytest.importorskip("sklearn")
    return DigitsConfig(patch=patch, train_size=200, probe_size=20).points(RunFacts(seed=3))


@pytest.mark.parametrize(("ratio", "shown"), [(0, 0), (0.19, 0), (0.2, 1), (0.5, 2), (0.6, 3), (0.99, 4), (1, 5)])
def test_a_ratio_of_the_ring_shows_its_share_from_the_coarsest_bit_on(ratio: float, shown: int) -> None:
    task = ring()
    visible = task.layout.visible(task.train.rank_NM[:2], [ratio, ratio])
    assert visible.tolist() == [[piece < shown for piece in range(5)]] * 2
    assert not task.layout.student_C.any()


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_a_ratio_of_a_digit_shows_exactly_its_share_of_whole_patches_and_more_never_hides(patch: int) -> None:
    task = digits(patch)
    layout, points = task.layout, task.train
    pieces = (8 // patch) ** 2
    assert layout.pieces == pieces
    ratios = [0.0, 0.1, 0.29, 0.5, 0.75, 0.999, 1.0]
    views = [layout.visible(points.rank_NM[:30], [ratio] * 30) for ratio in ratios]
    for ratio, visible in zip(ratios, views, strict=True):
        assert visible[:, :10].all(), "the class is told at every ratio"
        assert (visible[:, 10:].sum(axis=1) == int(ratio * pieces + 1e-9) * patch**2).all()
        blocks = visible[:, 10:].reshape(30, 8 // patch, patch, 8 // patch, patch)
        assert (blocks.all(axis=(2, 4)) == blocks.any(axis=(2, 4))).all(), "patches are shown whole"
    assert all((less <= more).all() for less, more in pairwise(views))
    assert len({tuple(row) for row in views[3].tolist()}) > 1 or patch == 8, "each image has an order of its own"
    mixed = layout.visible(points.rank_NM[:2], [0.0, 1.0])
    assert mixed.sum(axis=1).tolist() == [10, 74]


def test_the_ring_lies_around_its_modes_and_its_condition_says_where() -> None:
    task = ring()
    points = task.train
    assert np.abs(np.linalg.norm(modes(), axis=1) - 1).max() < 1e-12
    assert np.linalg.norm(points.x_ND - modes()[points.label_N], axis=1).max() < 0.5
    bits = (points.condition_NC[:, :3] > 0) @ np.array([4, 2, 1])
    assert bits.tolist() == points.label_N.tolist()
    assert (points.condition_NC[:, 3:] == points.x_ND).all()


def test_sets_follow_the_seed_and_the_probe_does_not() -> None:
    first, other = ring(3), ring(4)
    assert (first.train.x_ND == ring(3).train.x_ND).all()
    assert not np.isin(first.train.x_ND, other.train.x_ND).any()
    assert (first.probe.x_ND == other.probe.x_ND).all()
    assert first.train.ids[:2] == ("train-3-00000", "train-3-00001")
    assert first.evaluation.ids != other.evaluation.ids, "else a report would take them for the same"


def test_digits_are_split_without_overlap_and_scaled() -> None:
    task = digits()
    sets = (task.train, task.probe, task.evaluation)
    assert sum(map(len, sets)) == len({identity for each in sets for identity in each.ids}) == 1797
    assert task.train.x_ND.min() == -1
    assert task.train.x_ND.max() == 1
    assert (task.train.condition_NC[:, 10:] == task.train.x_ND).all()
    assert (task.train.condition_NC[:, :10].argmax(axis=1) == task.train.label_N).all()


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"kind": "digits", "patch": 0},
            "into no whole patches, which are what the teacher is shown: choose 1, 2, 4 or 8",
        ),
        ({"kind": "digits", "patch": 3}, "task.patch = 3 cuts an image of 8x8 pixels"),
        ({"kind": "digits", "train_size": 1697, "probe_size": 1}, "100 must be left"),
        ({"kind": "ring", "train_size": 0}, "greater than or equal to 1"),
    ],
)
def test_a_task_of_no_use_is_one_line(section: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        build_config({"task": section})
    assert "\n" not in str(error.value)


def test_scikit_learn_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(UserError, match=r"pip install 'atesd\[digits\]'"):
        DigitsConfig().points(RunFacts())
