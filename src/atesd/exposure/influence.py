"""Influence credit: exposure by what each candidate ratio's gradient would do to the probe, to first order, no delay.

    credit(alpha_k) = s_k <g_probe, P g_k> / sqrt(<g_probe, P g_probe>),     s_k = min(1, max_grad_norm / ||g_k||)

g_probe is the gradient of the student's hint-free probe NLL, g_k that of the distillation loss with the teacher at
alpha_k on the completions of the latest step, P Adam's preconditioner: the update -eta P s_k g_k lowers the probe NLL
by eta s_k <g_probe, P g_k> to first order. At every window boundary the credits enter moving averages c_k; the next
ratio is

    alpha = sum_k softmax(z_k / temperature) alpha_k,   z_k = (c_k - mean c) / std c.

Ours. Standardising makes the temperature the same for every model; it also makes as much of noise as of a difference.
`play = "best"` plays the candidate that is most probably the best by credits over their errors (exposure/aligned.py).
Measured by `train/credit.py` on `probe.credit_parameters`. With `reference = "reward"` graded rollouts take the probe's
place, with "both" they stand beside it: each window of either counts by its own error. Neither mixes candidates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from atesd.alignment import Credits, Source
from atesd.exposure.aligned import AlignedController
from atesd.exposure.controller import Controller
from atesd.exposure.held import Held, HeldMethod, Ratio
from atesd.exposure.window import is_idle, step_counts
from atesd.facts import RunFacts
from atesd.types import Measurement, Observation


class Influence(HeldMethod):
    """Exposure by first-order credit of candidate ratios at each hold window (ours)."""

    kind: Literal["influence"] = "influence"
    grid: tuple[Ratio, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Candidate ratios; each costs a teacher pass and a partial backward pass a window."""
    start: Ratio = 0.5
    """Exposure ratio before the first credit."""
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.8
    """Decay of the credits' moving averages, per window."""
    temperature: Annotated[float, Field(ge=1e-3, le=1e3)] = 0.2
    """Softness of the choice between ratios; towards 0 it takes the best one. From .001 to 1000."""

    reference: Literal["probe", "reward", "both"] = "probe"
    """What a step is asked for: a lower NLL of the probe's references, the reward of earlier graded completions, or
    both, by their precision."""
    play: Literal["mixture", "best"] | None = None
    """A mixture of candidates by their credits (the probe's default), or the one that is most probably the best, by
    credits over their errors (always so with rewards)."""
    by: Literal["none", "level"] = "none"
    """Whether each level of problems has a ratio of its own; not with a mixture."""

    measured: ClassVar[bool] = True
    reads_length: ClassVar[bool] = False

    def describe(self) -> str:
        """Name the credit."""
        what = {"probe": "the probe", "reward": "the reward of graded rollouts", "both": "probe and reward"}
        how = "mixed by" if self.mixes else "chosen by"
        return f"a learned share: candidates {how} what their gradients would do to {what[self.reference]}"

    @property
    def mixes(self) -> bool:
        """Whether candidates are mixed."""
        return self.reference == "probe" and self.play != "best"

    @model_validator(mode="after")
    def _check_grid(self) -> Influence:
        if len(self.grid) < 2 or list(self.grid) != sorted(set(self.grid)):
            raise ValueError("exposure.grid needs at least two ratios, rising, each once")
        return self

    @model_validator(mode="after")
    def _check_reference(self) -> Influence:
        if self.mixes and self.by != "none":
            raise ValueError(
                f'exposure.by = "{self.by}" needs candidates that are not mixed: set exposure.play = "best" or '
                'exposure.reference = "reward", or remove exposure.by'
            )
        if self.reference != "probe" and self.play == "mixture":
            raise ValueError(
                f'exposure.play = "mixture" goes with exposure.reference = "probe" alone, not "{self.reference}": '
                "remove exposure.play"
            )
        if not self.mixes and self.temperature != type(self).model_fields["temperature"].default:
            raise ValueError(
                f"exposure.temperature = {self.temperature:g} mixes candidates, which are played as they are with "
                'exposure.reference = "reward" or exposure.play = "best": remove exposure.temperature'
            )
        return self

    def build(self, run: RunFacts) -> Controller:
        """Return the controller."""
        if self.mixes:
            return InfluenceController(self)

        def credits(*sources: Source) -> Credits:
            return Credits(self.grid, decay=self.decay, by=self.by, levels=run.levels, sources=sources)

        asked: tuple[Source, ...] = ("reward", "probe") if self.reference == "both" else (self.reference,)
        instead = credits("probe") if self.reference == "reward" and run.has_probe else None
        return AlignedController(self.grid, credits(*asked), start=self.start, hold=self.hold, instead=instead)


class InfluenceController(Held):
    """Averages credits and mixes the candidate ratios by them."""

    def __init__(self, config: Influence) -> None:
        super().__init__(config.hold, config.start)
        self._config = config
        self._credits: list[float] | None = None
        self._latest: dict[str, float] = {}

    def _renewed(self) -> float:
        if self._credits is None:
            return self._ratio
        return mixed_ratio(self._credits, self._config.grid, self._config.temperature)

    def wants(self, step: int) -> Sequence[Measurement]:
        """Ask for the credits of all candidates where the window may end."""
        if step == 0 or not self._clock.may_end:
            return []
        return [Measurement("influence", ratio) for ratio in self._config.grid]

    def observe(self, observation: Observation) -> None:
        """Average the credits in; a candidate without one spoils the whole set, which is then left out."""
        self._latest = {}
        wanted = self.wants(observation.step) if step_counts(observation.stats) else ()
        found = [observation.number(measurement) for measurement in wanted]
        known = [credit for credit in found if credit is not None]
        if wanted and len(known) == len(wanted):
            decay, before = self._config.decay, self._credits or known
            self._credits = [decay * old + (1 - decay) * new for old, new in zip(before, known, strict=True)]
            self._latest = {
                f"exposure/credit/{ratio:g}": credit
                for ratio, credit in zip(self._config.grid, self._credits, strict=True)
            }
        elif wanted and not is_idle(observation.stats):
            self._latest = {"exposure/discarded": 1.0}
        self._count(observation)

    def metrics(self) -> Mapping[str, float]:
        """Return the averaged credits where they were renewed."""
        return self._latest

    def state_dict(self) -> dict[str, Any]:
        """Return credits and open window."""
        return {"credits": self._credits, "held": self._clock.held, "ratio": self._ratio, "latest": self._latest}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._credits, self._ratio, self._latest = state["credits"], state["ratio"], dict(state["latest"])
        self._clock.held = state["held"]


def mixed_ratio(credits: Sequence[float], grid: Sequence[float], temperature: float) -> float:
    """Return the softmax-weighted mean of the grid by standardised credits; its plain mean where all are equal."""
    values = np.asarray(credits, dtype=float)
    spread = values.std()
    scores = (values - values.mean()) / spread / temperature if spread > 0 else np.zeros_like(values)
    weights = np.exp(scores - scores.max())
    return float(np.clip(weights @ np.asarray(grid) / weights.sum(), 0.0, 1.0))
