from __future__ import annotations

from math import inf, nan, sqrt
from statistics import stdev

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atesd.exposure.window import (
    Average,
    HoldClock,
    RunningScale,
    advantages,
    discounted_mean,
    discounted_progress,
    finite,
    is_idle,
    ramp,
    step_counts,
)

LEVELS = [2.0, 1.5, 1.75, 1.0]  # falls .5, -.25, .75


def test_progress_by_hand() -> None:
    # step: .5 + .9 * 0 + .81 * .75 = 1.1075; otherwise .5 - .9 * .25 + .81 * .75 = .8825
    assert discounted_progress(LEVELS, 0.9, "step") == pytest.approx(1.1075, abs=1e-15)
    assert discounted_progress(LEVELS, 0.9, "none") == pytest.approx(0.8825, abs=1e-15)
    assert discounted_progress(LEVELS, 0.9, "window") == pytest.approx(0.8825, abs=1e-15)


def test_rectification_of_a_rise() -> None:
    rising = LEVELS[::-1]  # falls -.75, .25, -.5: -.75 + .9 * .25 - .81 * .5 = -.93
    assert discounted_progress(rising, 0.9, "none") == pytest.approx(-0.93, abs=1e-15)
    assert discounted_progress(rising, 0.9, "window") == 0.0
    assert discounted_progress(rising, 0.9, "step") == pytest.approx(0.225, abs=1e-15)


def test_stride_discounts_by_steps_not_by_terms() -> None:
    # .5 + .9^2 * -.25 + .9^4 * .75
    assert discounted_progress(LEVELS, 0.9, "none", stride=2) == pytest.approx(0.5 - 0.2025 + 0.492075, abs=1e-15)


@given(st.lists(st.floats(0, 10), min_size=2, max_size=12), st.floats(0.1, 1.0))
def test_identity_of_the_unrectified_sum(levels: list[float], gamma: float) -> None:
    # sum = l_t0 - gamma^(L-1) l_(t0+L) - (1 - gamma) sum_{i=1..L-1} gamma^(i-1) l_(t0+i)
    last = len(levels) - 1
    inner = sum(gamma ** (index - 1) * levels[index] for index in range(1, last))
    expected = levels[0] - gamma ** (last - 1) * levels[last] - (1.0 - gamma) * inner
    assert discounted_progress(levels, gamma, "none") == pytest.approx(expected, abs=1e-9)


def test_grounded_mean_by_hand() -> None:
    # (1 + .5 * 2 + .25 * 4) / 1.75 = 12/7; with stride 2 (1 + .25 * 2 + .0625 * 4) / 1.3125 = 4/3
    assert discounted_mean([1.0, 2.0, 4.0], 0.5) == pytest.approx(12 / 7, abs=1e-15)
    assert discounted_mean([1.0, 2.0, 4.0], 0.5, stride=2) == pytest.approx(4 / 3, abs=1e-15)


def test_advantages_by_hand() -> None:
    # mean 3, deviations -2 -1 0 3, std sqrt(14/3); leaving one out multiplies the deviations by 4/3
    std = sqrt(14 / 3)
    assert advantages([1, 2, 3, 6], "batch", 1e-12) == pytest.approx([-2 / std, -1 / std, 0, 3 / std])
    others = [(1 - 11 / 3) / std, (2 - 10 / 3) / std, 0, (6 - 2) / std]
    assert advantages([1, 2, 3, 6], "leave_one_out", 1e-12) == pytest.approx(others)


@pytest.mark.parametrize("baseline", ["batch", "leave_one_out"])
def test_advantages_of_small_batches(baseline: str) -> None:
    assert advantages([5.0], baseline, 1e-8) == [0.0]  # type: ignore[arg-type]
    assert advantages([2.0, 2.0, 2.0], baseline, 1e-8) == [0.0, 0.0, 0.0]  # type: ignore[arg-type]


def test_two_rewards_give_the_same_advantage_whatever_their_sizes() -> None:
    assert advantages([1.0, 100.0], "batch", 1e-12) == pytest.approx([-sqrt(0.5), sqrt(0.5)])


def test_ramp() -> None:
    values = [ramp(progress, 0.3, 2.0) for progress in (0.0, 0.3, 0.65, 1.0, 1.2)]
    assert values == pytest.approx([0.0, 0.0, 1.0, 2.0, 2.0])


@given(st.lists(st.integers(-100_000, 100_000).map(lambda n: n / 1000), min_size=2, max_size=20))
def test_running_scale_is_the_sample_deviation(numbers: list[float]) -> None:
    """Numbers are multiples of 0.001, so a deviation is either 0 or far above the 1e-12 that counts as none."""
    scale = RunningScale()
    assert scale.std == 1.0
    for number in numbers:
        scale.add(number)
    expected = stdev(numbers)
    assert scale.std == pytest.approx(expected or 1.0, rel=1e-6)


def test_average_starts_at_its_first_value_and_skips_what_is_missing() -> None:
    average = Average(0.9)
    assert average.value is None
    assert average.relative is None
    for number in (4.0, None, 2.0):
        average.add(number)
    assert average.value == pytest.approx(0.9 * 4.0 + 0.1 * 2.0)
    assert average.relative == pytest.approx(3.8 / 4.0)
    zero = Average(0.5)
    zero.add(0.0)
    zero.add(3.0)
    assert zero.relative == 1.5


def test_finite() -> None:
    assert finite({"a": 2}, "a") == 2.0
    assert finite({"a": nan, "b": inf}, "a") is None
    assert finite({"a": nan, "b": inf}, "b") is None
    assert finite({}, "a") is None


def test_hold_clock_counts_ticks_only() -> None:
    clock = HoldClock(2)
    assert clock.ended
    clock.tick()  # nothing is open yet
    clock.start()
    assert (clock.ended, clock.may_end) == (False, False)
    clock.tick()
    assert (clock.ended, clock.may_end) == (False, True)
    clock.tick()
    assert clock.ended


@pytest.mark.parametrize(
    ("stats", "counts", "idle"),
    [
        ({}, True, False),
        ({"route/distil_groups": 4.0}, True, False),
        ({"route/distil_groups": 0.0}, False, True),
        ({"route/distil_groups": 4.0, "route/idle": 1.0, "route/paused": 1.0}, False, True),
        ({"route/distil_groups": 0.0, "route/idle": 1.0, "route/paused": 0.0}, True, True),
    ],
)
def test_a_step_counts_where_it_distilled_or_its_router_reads_the_exposure(
    stats: dict[str, float], counts: bool, idle: bool
) -> None:
    assert step_counts(stats) == counts
    assert is_idle(stats) == idle
