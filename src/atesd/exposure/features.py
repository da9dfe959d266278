"""The training state that the learned controller reads: seven moving numbers and the clock of the run.

ATESD's six features and two optional ones (2605.11458). Ours: 1. progress is step over total steps; loss
and probe averages are divided by their first value; what is missing is 0; 2. the probe feature averages the progress
metric (the probe NLL where progress is the training loss); 3. all features are cut to [-10, 10].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from atesd.exposure.beta_config import BetaSettings
from atesd.exposure.window import Average, finite
from atesd.types import Measurement, Observation

FEATURE_BOUND = 10.0


class TrainingState:
    """Follows the observations of a run; `level` is the latest l, as a loss."""

    def __init__(self, config: BetaSettings, total_steps: int) -> None:
        self._config = config
        self._total = max(1, total_steps)
        self._averages = {name: Average(config.ema_decay) for name in ("ratio", "loss", "mismatch", "probe", "reward")}
        self._confidence: float | None = None
        self._margin: float | None = None
        self._boundary: float | None = None
        self._step = 0
        self.level: float | None = None

    @property
    def progress(self) -> float:
        """Share of the run that is done."""
        return self._step / self._total

    def observe(self, observation: Observation, ratio: float | None) -> None:
        """Take in one step; `ratio` is the exposure of its update, None before the first."""
        self._step = observation.step
        stats, averages = observation.stats, self._averages
        loss, probe = finite(stats, "loss/distil"), self._probe_level(observation)
        confidence, reward = finite(stats, "student/confidence"), finite(stats, "reward/mean")
        if confidence is not None:
            self._confidence = confidence
        if reward is not None:
            usual = averages["reward"].value
            self._margin = 0.0 if usual is None else reward - usual
        numbers = {
            "ratio": ratio,
            "loss": loss,
            "mismatch": finite(stats, "mismatch/top1"),
            "probe": probe,
            "reward": reward,
        }
        for name, number in numbers.items():
            averages[name].add(number)
        self.level = loss if self._config.progress_metric == "train_kd" else probe

    def vector(self) -> list[float]:
        """Return the features in the configured order."""
        averages = self._averages
        values = {
            "progress": self.progress,
            "ratio_ema": averages["ratio"].value,
            "loss_ema": averages["loss"].relative,
            "mismatch_ema": averages["mismatch"].value,
            "probe_ema": averages["probe"].relative,
            "confidence": self._confidence,
            "improvement": self._improvement(),
            "reward_margin": self._margin,
        }
        chosen = [values[name] or 0.0 for name in self._config.features]
        return [min(FEATURE_BOUND, max(-FEATURE_BOUND, value)) for value in chosen]

    def mark_boundary(self) -> None:
        """Remember the present l as that of the latest decision."""
        self._boundary = self.level

    def state_dict(self) -> dict[str, Any]:
        """Return everything as JSON-able values."""
        return {
            "averages": {name: asdict(average) for name, average in self._averages.items()},
            "confidence": self._confidence,
            "margin": self._margin,
            "boundary": self._boundary,
            "step": self._step,
            "level": self.level,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._averages = {name: Average(**row) for name, row in state["averages"].items()}
        self._confidence, self._margin = state["confidence"], state["margin"]
        self._boundary, self._step, self.level = state["boundary"], state["step"], state["level"]

    def _probe_level(self, observation: Observation) -> float | None:
        """Return the probe measurement as a loss: an accuracy becomes an error rate."""
        kind = self._config.probe_kind
        value = observation.number(Measurement(kind)) if kind is not None else None
        return 1.0 - value if value is not None and kind == "probe_accuracy" else value

    def _improvement(self) -> float | None:
        """Return the fall of l since the latest decision, over the first l."""
        name = "loss" if self._config.progress_metric == "train_kd" else "probe"
        first = self._averages[name].first
        if self._boundary is None or self.level is None or not first:
            return None
        return (self._boundary - self.level) / first
