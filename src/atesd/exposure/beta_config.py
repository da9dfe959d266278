"""Settings of ATESD's learned exposure controller.

ATESD, arXiv 2605.11458. The paper publishes the form of the controller but not its settings: every default below is
our choice unless it says otherwise, and each is a field.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from atesd.exposure.held import Ratio
from atesd.exposure.window import Baseline, Rectify
from atesd.types import Config

Feature = Literal[
    "progress", "ratio_ema", "loss_ema", "mismatch_ema", "probe_ema", "confidence", "improvement", "reward_margin"
]
PAPER_FEATURES: tuple[Feature, ...] = (
    "progress",
    "ratio_ema",
    "loss_ema",
    "mismatch_ema",
    "probe_ema",
    "confidence",
)


class WarmStart(Config):
    """The Beta policy before its first update: Beta(mean * concentration, (1 - mean) * concentration)."""

    mean: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    """Mean exposure."""
    concentration: float = 6.0
    """Sum of both parameters; 6 with mean 0.5 is Beta(3, 3)."""

    @property
    def parameters(self) -> tuple[float, float]:
        """Both Beta parameters."""
        return self.mean * self.concentration, (1.0 - self.mean) * self.concentration

    @model_validator(mode="after")
    def _check_unimodal(self) -> Self:
        if min(self.parameters) <= 1.0:
            raise ValueError(
                f"warm start Beta{self.parameters} is not unimodal; raise concentration above "
                f"{1.0 / min(self.mean, 1.0 - self.mean):g}"
            )
        return self


class BetaSettings(Config):
    """What the controller and its parts read."""

    features: tuple[Feature, ...] = Field(default=PAPER_FEATURES, min_length=1)
    """State of the policy. The first six are the paper's; `improvement` (fall of the progress metric since the last
    decision, over its first value) and `reward_margin` (mean reward minus its moving average) are optional."""
    hidden: int = Field(default=32, ge=1)
    """Hidden tanh units of the policy network."""
    warm_start: WarmStart = WarmStart()
    """The policy before its first update."""
    alpha_min: Ratio = 0.0
    """Smallest exposure ratio."""
    alpha_max: Ratio = 1.0
    """Largest exposure ratio."""
    bounds: Literal["clip", "affine"] = "clip"
    """How a draw meets the bounds: cut off at them, or stretched between them. The unclipped draw is scored."""

    hold: int = Field(default=5, ge=1)
    """H: updates that share one decision. A step without a distilled group counts where the router reads the ratio."""
    look_ahead: int = Field(default=10, ge=1)
    """L: steps over which a decision is scored, from its first update on."""
    clock: Literal["pipelined", "serial"] = "pipelined"
    """A new decision every H steps, or every H + L steps (its ratio stays until the next one)."""
    gamma: float = Field(default=0.9, gt=0.0, le=1.0)
    """Discount per step within a look-ahead."""
    probe_every: int = Field(default=1, ge=1)
    """E: steps between measurements within a look-ahead; must divide the look-ahead. Real models: the hold window."""

    reward: Literal["immediate", "short_delay", "lookahead", "full", "aligned"] = "full"
    """The paper's ablation. `immediate`, `short_delay` and `lookahead` score progress alone over 1, H and L steps;
    `full` scores it over L steps and adds the teacher-grounded term. `aligned` (ours) scores the first step by its
    credit from graded rollouts (alignment.py) over that credit's error."""
    progress_metric: Literal["probe_nll", "probe_kl", "probe_accuracy", "train_kd"] = "probe_nll"
    """What progress means: the student's hint-free NLL of reference solutions, its divergence from the fully informed
    frozen teacher, or its error rate, each on the probe set; or the training loss, which rewards falling exposure."""
    force_train_kd: bool = False
    """Allow `train_kd` although the look-ahead leaves the hold window; exposure then rises whatever is best."""
    rectify: Rectify = "step"
    """Where negative progress becomes 0: at each step (the paper), in the sum, or nowhere."""
    lambda_gt: float = Field(default=0.25, ge=0.0)
    """Weight of the teacher-grounded term; it works as a bonus for exposure. 0 leaves it out."""
    gt_target: Literal["solution", "answer", "hidden_only"] = "solution"
    """What the teacher must find likely on the probe set: the solution, the answer, or the segments not revealed."""
    gt_grid: tuple[Ratio, ...] = tuple(index / 8 for index in range(9))
    """Ratios at which a frozen teacher's grounded term is tabulated before the first update."""
    reward_norm: bool = True
    """Divide each reward term by its standard deviation over all decisions so far."""

    decisions_per_update: int = Field(default=4, ge=1)
    """B: scored decisions per controller update. 1 never moves the policy by reward: its advantage is 0."""
    baseline: Baseline = "batch"
    """Mean of all B rewards, or of the other B - 1."""
    eps: float = Field(default=1e-8, gt=0.0)
    """Added to the standard deviation of the B rewards."""
    importance_clip: float | None = Field(default=None, gt=0.0)
    """Unset: no correction for decisions drawn before the last controller update. A number: weigh each by its
    probability now over that at the draw, at most this much."""
    learning_rate: float | None = Field(default=None, ge=0.0)
    """Adam's rate; unset, 0.01, or 0.03 in runs of fewer than 200 steps. 0 never moves the policy: the prior alone."""
    ema_decay: float = Field(default=0.9, ge=0.0, lt=1.0)
    """Decay of the features' moving averages, per step (per measurement for the probe)."""
    entropy_target: float = -0.5
    """Entropy in nats above which the policy is penalised; Beta(5, 5) has -0.48, and no Beta is above 0."""
    entropy_coef: float = Field(default=1.0, ge=0.0)
    """Weight of that penalty at the end of the run."""
    entropy_start: float = Field(default=0.3, ge=0.0, lt=1.0)
    """Share of the run before the penalty begins; its weight then rises linearly."""

    @property
    def span(self) -> int:
        """Steps over which a decision is scored, after the reward variant."""
        return {"immediate": 1, "aligned": 1, "short_delay": self.hold}.get(self.reward, self.look_ahead)

    @property
    def grounded_weight(self) -> float:
        """Weight of the teacher-grounded term, after the reward variant."""
        return self.lambda_gt if self.reward == "full" else 0.0

    @property
    def period(self) -> int:
        """Updates between two decisions."""
        return self.hold if self.clock == "pipelined" else self.hold + self.span

    @property
    def asks_rewards(self) -> bool:
        """Tell whether graded rollouts score a decision instead of progress."""
        return self.reward == "aligned"

    @property
    def scores_training_loss(self) -> bool:
        """Tell whether l is the training loss, which every step brings, instead of a probe measurement."""
        return self.progress_metric == "train_kd"

    @property
    def stride(self) -> int:
        """Steps between two values of l."""
        return 1 if self.scores_training_loss else self.probe_every

    @property
    def probe_kind(self) -> str | None:
        """The probe measurement in use; None if neither progress nor a feature needs one."""
        if not self.scores_training_loss:
            return self.progress_metric
        return "probe_nll" if "probe_ema" in self.features else None

    @property
    def gt_kind(self) -> str:
        """The measurement of the teacher-grounded term."""
        return f"gt_{self.gt_target}"

    def rate(self, total_steps: int) -> float:
        """Return Adam's learning rate in a run of that length."""
        short = 0.03 if total_steps < 200 else 0.01
        return short if self.learning_rate is None else self.learning_rate

    def bounded(self, draw: float) -> float:
        """Return the exposure that a draw of the policy means."""
        if self.bounds == "affine":
            return self.alpha_min + (self.alpha_max - self.alpha_min) * draw
        return min(self.alpha_max, max(self.alpha_min, draw))

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.scores_training_loss and self.span >= self.hold and not self.force_train_kd:
            raise ValueError(
                f"progress_metric 'train_kd' with a look-ahead of {self.span} >= hold {self.hold} compares losses at "
                "different exposures, which drives exposure up whatever is best; use 'probe_nll', shorten the "
                "look-ahead, or set force_train_kd = true"
            )
        if self.span % self.probe_every:
            raise ValueError(
                f"the look-ahead of {self.span} steps is no multiple of probe_every {self.probe_every}; change either"
            )
        if self.alpha_min >= self.alpha_max:
            raise ValueError(
                f"alpha_min {self.alpha_min} must lie below alpha_max {self.alpha_max}: for a ratio that stays, set "
                'exposure = {kind = "fixed"}'
            )
        if len(set(self.features)) != len(self.features):
            raise ValueError("features name one twice; list each once")
        if len(self.gt_grid) < 2 or list(self.gt_grid) != sorted(set(self.gt_grid)):
            raise ValueError("gt_grid needs at least two ratios, rising, each once")
        return self
