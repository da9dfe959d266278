from __future__ import annotations

import pytest
from pydantic import ValidationError

from atesd.exposure.beta_config import BetaSettings, WarmStart


def test_defaults_are_the_documented_ones() -> None:
    config = BetaSettings()
    assert (config.hold, config.look_ahead, config.gamma, config.lambda_gt) == (5, 10, 0.9, 0.25)
    assert (config.decisions_per_update, config.eps, config.hidden, config.ema_decay) == (4, 1e-8, 32, 0.9)
    assert (config.entropy_target, config.entropy_start, config.entropy_coef) == (-0.5, 0.3, 1.0)
    assert (config.alpha_min, config.alpha_max, config.clock) == (0.0, 1.0, "pipelined")
    assert config.features == ("progress", "ratio_ema", "loss_ema", "mismatch_ema", "probe_ema", "confidence")
    assert config.warm_start.parameters == (3.0, 3.0)
    assert config.gt_grid == (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)


@pytest.mark.parametrize(
    ("reward", "span", "weight"),
    [("immediate", 1, 0.0), ("short_delay", 5, 0.0), ("lookahead", 10, 0.0), ("full", 10, 0.25)],
)
def test_reward_variants(reward: str, span: int, weight: float) -> None:
    config = BetaSettings(reward=reward)  # type: ignore[arg-type]
    assert (config.span, config.grounded_weight) == (span, weight)


def test_learning_rate_depends_on_the_length_of_the_run_unless_set() -> None:
    assert [BetaSettings().rate(steps) for steps in (100, 199, 200, 1500)] == [0.03, 0.03, 0.01, 0.01]
    assert BetaSettings(learning_rate=0.5).rate(100) == 0.5


def test_bounds_clip_or_stretch() -> None:
    clip = BetaSettings(alpha_min=0.2, alpha_max=0.8)
    affine = BetaSettings(alpha_min=0.2, alpha_max=0.8, bounds="affine")
    assert [clip.bounded(draw) for draw in (0.1, 0.5, 0.9)] == [0.2, 0.5, 0.8]
    assert [affine.bounded(draw) for draw in (0.0, 0.5, 1.0)] == pytest.approx([0.2, 0.5, 0.8])


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"progress_metric": "train_kd"}, "force_train_kd"),
        ({"progress_metric": "train_kd", "look_ahead": 5}, "look-ahead of 5 >= hold 5"),
        ({"progress_metric": "train_kd", "reward": "short_delay"}, "force_train_kd"),
        ({"probe_every": 3}, "no multiple of probe_every 3"),
        ({"probe_every": 5, "reward": "immediate"}, "no multiple"),
        ({"alpha_min": 0.9, "alpha_max": 0.1}, "must lie below"),
        ({"alpha_min": 0.5, "alpha_max": 0.5, "bounds": "affine"}, "must lie below"),
        ({"alpha_min": 0.5, "alpha_max": 0.5}, 'for a ratio that stays, set exposure = {kind = "fixed"}'),
        ({"features": ("progress", "progress")}, "list each once"),
        ({"features": ()}, "at least 1"),
        ({"gt_grid": (0.5,)}, "at least two"),
        ({"gt_grid": (0.5, 0.2)}, "rising"),
        ({"warm_start": {"mean": 0.1, "concentration": 6.0}}, "raise concentration above 10"),
        ({"entropy_start": 1.0}, "less than 1"),
        ({"alpha_max": 1.5}, "less than or equal to 1"),
    ],
)
def test_nonsense_is_refused(fields: dict[str, object], match: str) -> None:
    with pytest.raises(ValidationError, match=match):
        BetaSettings(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "fields",
    [
        {"progress_metric": "train_kd", "look_ahead": 4},
        {"progress_metric": "train_kd", "reward": "immediate"},
        {"progress_metric": "train_kd", "force_train_kd": True},
        {"alpha_min": 0.5, "alpha_max": 0.51},
        {"probe_every": 5},
    ],
)
def test_sense_is_accepted(fields: dict[str, object]) -> None:
    BetaSettings(**fields)  # type: ignore[arg-type]


def test_a_probe_is_measured_where_progress_or_a_feature_reads_it() -> None:
    own = {"progress_metric": "train_kd", "look_ahead": 4}
    assert BetaSettings(progress_metric="probe_kl").probe_kind == "probe_kl"
    assert BetaSettings(**own).probe_kind == "probe_nll"  # type: ignore[arg-type]
    assert BetaSettings(**own, features=("progress", "loss_ema")).probe_kind is None  # type: ignore[arg-type]


def test_warm_start_is_mean_times_concentration() -> None:
    assert WarmStart(mean=0.75, concentration=8.0).parameters == (6.0, 2.0)
