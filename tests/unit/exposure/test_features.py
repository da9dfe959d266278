from __future__ import annotations

import json
from math import nan

import pytest

from atesd.exposure.beta_config import BetaSettings, Feature
from atesd.exposure.features import TrainingState

from support.exposure_toy import seen

ALL: tuple[Feature, ...] = (
    "progress",
    "ratio_ema",
    "loss_ema",
    "mismatch_ema",
    "probe_ema",
    "confidence",
    "improvement",
    "reward_margin",
)


def stats(loss: float, mismatch: float, confidence: float, reward: float) -> dict[str, float]:
    return {
        "loss/distil": loss,
        "mismatch/top1": mismatch,
        "student/confidence": confidence,
        "reward/mean": reward,
    }


def test_nothing_known_is_all_zeros() -> None:
    assert TrainingState(BetaSettings(features=ALL), 20).vector() == [0.0] * 8


def test_features_by_hand() -> None:
    state = TrainingState(BetaSettings(features=ALL), 20)
    state.observe(seen(0, {}, {"probe_nll": 2.0}), None)
    state.mark_boundary()
    state.observe(seen(1, stats(0.4, 0.3, 0.6, 0.5), {"probe_nll": 1.8}), 0.8)
    state.observe(seen(2, stats(0.2, 0.1, 0.7, 0.9), {"probe_nll": 1.6}), 0.6)
    assert state.vector() == pytest.approx(
        [
            2 / 20,
            0.9 * 0.8 + 0.1 * 0.6,
            (0.9 * 0.4 + 0.1 * 0.2) / 0.4,
            0.9 * 0.3 + 0.1 * 0.1,
            (0.9 * (0.9 * 2.0 + 0.1 * 1.8) + 0.1 * 1.6) / 2.0,
            0.7,
            (2.0 - 1.6) / 2.0,
            0.9 - 0.5,
        ]
    )
    assert state.level == 1.6


def test_missing_and_not_finite_numbers_leave_the_averages_alone() -> None:
    state = TrainingState(BetaSettings(features=ALL), 20)
    state.observe(seen(0, {}, {"probe_nll": 2.0}), None)
    state.observe(seen(1, stats(0.4, 0.3, 0.6, 0.5), {"probe_nll": 1.8}), 0.8)
    before = state.vector()
    state.observe(seen(2, stats(nan, nan, nan, nan)), 0.8)
    assert state.vector()[1:6] == pytest.approx(before[1:6])
    assert state.level is None
    assert state.vector()[6] == 0.0


def test_accuracy_counts_as_an_error_rate() -> None:
    state = TrainingState(BetaSettings(progress_metric="probe_accuracy"), 20)
    state.observe(seen(0, {}, {"probe_accuracy": 0.3, "probe_nll": 9.0}), None)
    assert state.level == pytest.approx(0.7)


def test_training_loss_as_progress_keeps_the_probe_as_a_feature() -> None:
    config = BetaSettings(progress_metric="train_kd", look_ahead=4, features=("loss_ema", "probe_ema"))
    state = TrainingState(config, 20)
    state.observe(seen(0, {}, {"probe_nll": 2.0}), None)
    state.observe(seen(1, {"loss/distil": 0.4}, {"probe_nll": 1.0}), 0.5)
    assert state.level == 0.4
    assert state.vector() == pytest.approx([1.0, 0.95])


def test_features_are_bounded() -> None:
    state = TrainingState(BetaSettings(features=("loss_ema",), ema_decay=0.0), 20)
    state.observe(seen(1, {"loss/distil": 1e-6}), 0.5)
    state.observe(seen(2, {"loss/distil": 5.0}), 0.5)
    assert state.vector() == [10.0]


def test_state_survives_json() -> None:
    state, copy = (TrainingState(BetaSettings(features=ALL), 20) for _ in range(2))
    for step in range(3):
        state.observe(seen(step, stats(0.4, 0.3, 0.6, 0.1 * step), {"probe_nll": 2.0 - step}), 0.1 * step)
        state.mark_boundary()
    copy.load_state_dict(json.loads(json.dumps(state.state_dict())))
    last = seen(3, stats(0.1, 0.2, 0.3, 0.4), {"probe_nll": 0.5})
    state.observe(last, 0.9)
    copy.observe(last, 0.9)
    assert copy.vector() == state.vector()
