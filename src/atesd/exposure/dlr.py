"""Exposure by search, selection and update: a router over candidate ratios that learns what credit has chosen.

B problems of a step, N draws, K candidate ratios (arms), F features of a problem.

    p(a | x) = softmax(W f(x) + b)                                   the router, one distribution a problem
    search:   a_1 ... a_N ~ p(. | x), for every problem x of every step
    select:   a*(x) = argmax over the drawn of z_a(level of x)       z: credit over its error, summed over windows
    update:   one step on  -(1/B) sum_x log p(a*(x) | x) + kl KL(p_mean || prior)      at every window's end

p_mean(a) is the mean of p(a | x) over the B problems, prior(a) is proportional to 1 / (place of a in `grid`). The
teacher shows x at a*(x). z are the credits of `influence` with `reference = "reward"` (alignment.py), the probe's while
rewards say nothing. The step is on the problems whose completions were credited last, with the winners of their own
draws by the renewed credits. With N = 1 nothing is selected: the router is sampled from and learns its own draws.

Dynamic Latent Routing, arXiv 2605.14323, draws N sequences of latent codes, takes the likeliest and trains on it
(codes.py has that); this is its search, selection and update for exposure. Deviations, all ours: 1. arms are
exposure ratios, scored by first-order credit instead of likelihood; 2. a plain Zipf prior stands for the paper's
bi-Zipf, which is unknown; 3. cross-entropy weighs 1, not .5; 4. a plain gradient step on a linear router, which
begins uniform; 5. before any credit is known, the first draw is shown and nothing is learned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from atesd.alignment import By, Credits
from atesd.exposure.aligned import AlignedController
from atesd.exposure.beta_config import BetaSettings
from atesd.exposure.controller import Controller
from atesd.exposure.features import TrainingState
from atesd.exposure.held import HeldMethod, Ratio
from atesd.facts import RunFacts
from atesd.types import Measurement, Observation

Array = NDArray[np.float64]
StateFeature = Literal["progress", "ratio_ema", "loss_ema", "mismatch_ema", "confidence", "reward_margin"]
ProblemFeature = Literal["level", "reference_ppl", "pass_rate"]
_REFERENCES = Measurement("reference_nll")
_OF_PROBLEM = ("level", "reference_ppl", "pass_rate")
_BOUND = 3.0
_TINY = 1e-300


class Dlr(HeldMethod):
    """Exposure by search, selection and update of a router over candidate ratios (after DLR 2605.14323)."""

    kind: Literal["dlr"] = "dlr"
    grid: tuple[Ratio, ...] = (0.5, 0.25, 0.75, 1.0, 0.0)
    """Candidate ratios in the order of the prior, whose first is the likeliest; each costs a teacher pass and a partial
    backward pass a window."""
    draws: Annotated[int, Field(ge=1, le=1000)] = 4
    """N: ratios drawn for a problem, of which the one with the highest credit is shown. 1 selects nothing."""
    features: tuple[StateFeature | ProblemFeature, ...] = ("level", "reference_ppl", "progress", "confidence")
    """What the router reads: of the problem its level, its reference's log-perplexity at step 0 (one pass over all
    training references) and the mean reward of its attempts in the step; of training what `beta` reads."""
    learning_rate: Annotated[float, Field(ge=0, le=100)] = 0.5
    """Size of the router's gradient steps; 0 keeps it uniform."""
    kl_coef: Annotated[float, Field(ge=0, le=100)] = 0.1
    """Weight of the KL divergence of the router's mean distribution from the prior."""
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.8
    """Decay of the credits' sums, per window; 0 lets each window speak alone."""
    by: By = "level"
    """Whether each level of problems has credits of its own."""

    measured: ClassVar[bool] = True

    @property
    def reads_length(self) -> bool:
        """Where the router reads how much of the run is done."""
        return "progress" in self.features

    @property
    def reads_rewards(self) -> bool:
        """Where the router reads the pass rate."""
        return "pass_rate" in self.features

    @property
    def without_rewards(self) -> str:
        """Leave the pass rate out."""
        return 'take "pass_rate" out of exposure.features'

    def describe(self) -> str:
        """Name search and selection."""
        chosen = f"the best of {self.draws} draws" if self.draws > 1 else "a draw"
        return f"a learned share: {chosen} of a router that learns what the credit of graded rollouts selects (DLR)"

    @model_validator(mode="after")
    def _check(self) -> Dlr:
        if len(self.grid) < 2 or len(set(self.grid)) != len(self.grid):
            raise ValueError("exposure.grid needs at least two ratios, each once; their order is the prior's")
        if len(set(self.features)) != len(self.features):
            raise ValueError("exposure.features name one twice; list each once")
        return self

    def build(self, run: RunFacts) -> Controller:
        """Return the controller."""
        return DlrController(self, run)


class DlrController(AlignedController):
    """Draws arms for every problem, shows the best one, and moves the router towards what won."""

    def __init__(self, config: Dlr, run: RunFacts) -> None:
        def credits(source: Literal["reward", "probe"]) -> Credits:
            return Credits(config.grid, decay=config.decay, by=config.by, levels=run.levels, sources=(source,))

        instead = credits("probe") if run.has_probe else None
        super().__init__(config.grid, credits("reward"), start=config.grid[0], hold=config.hold, instead=instead)
        self._config = config
        self._seed = run.seed_for("exposure")
        self._features = Features(config, run)
        self._router = Router(self._features.count, len(config.grid))
        self._prior = zipf(len(config.grid))
        self._shown: list[str] = []  # the step's problems, for the router's step
        self._read: list[list[float]] = []  # their features
        self._drawn: list[list[int]] = []  # and draws
        self._mean: float | None = None  # of the ratios shown

    def propose(
        self, step: int, problem_ids: Sequence[str], pass_rates: Sequence[float | None] = ()
    ) -> Sequence[float]:
        """Return the best of N drawn ratios for every problem; draws depend on seed, step and place alone."""
        if self._clock.ended:
            self._clock.start()
        features_BF = self._features.of(problem_ids, pass_rates or [None] * len(problem_ids))
        random = np.random.default_rng([self._seed, step])
        drawn_BN = drawn(self._router.probabilities(features_BF), random.random((len(features_BF), self._config.draws)))
        self._shown, self._read, self._drawn = list(problem_ids), features_BF.tolist(), drawn_BN.tolist()
        ratios = [self._grid[arm] for arm in self._winners()]
        self._mean = float(np.mean(ratios))
        return ratios

    def wants(self, step: int) -> Sequence[Measurement]:
        """Ask for all candidates' credits where the window may end, and once for the references' perplexity."""
        references = [_REFERENCES] if step == 0 and "reference_ppl" in self._config.features else []
        return [*references, *super().wants(step)]

    def observe(self, observation: Observation) -> None:
        """Add the window's credits up and move the router; follow the training state."""
        super().observe(observation)
        self._features.observe(observation, self._mean)

    def _renewed(self) -> None:
        """Take one step towards the winners, if their draws could be told apart."""
        scored = [place for place, problem in enumerate(self._shown) if self._z(problem) is not None]
        if not scored:
            return
        winners = self._winners()
        features_BF = np.asarray([self._read[place] for place in scored])
        winners_B = np.asarray([winners[place] for place in scored])
        found = self._router.step(
            features_BF, winners_B, self._prior, kl_coef=self._config.kl_coef, rate=self._config.learning_rate
        )
        self._latest |= {f"exposure/router/{name}": value for name, value in found.items()}
        mean_K = self._router.probabilities(features_BF).mean(0)
        won_K = np.bincount(winners_B, minlength=len(self._grid)) / len(winners_B)
        for ratio, share, won in zip(self._grid, mean_K, won_K, strict=True):
            self._latest |= {f"exposure/arm/{ratio:g}": float(share), f"exposure/won/{ratio:g}": float(won)}

    def _winners(self) -> list[int]:
        """Return each problem's best drawn arm by the credits so far; its first draw where they say nothing."""
        return [
            arms[0] if (z := self._z(problem)) is None else winner(arms, z)
            for problem, arms in zip(self._shown, self._drawn, strict=True)
        ]

    def _z(self, problem: str) -> Array | None:
        """Return the arms' credits over their errors at a problem's level; None while nothing is known."""
        for credits in (self._credits, self._instead):
            own = dict(credits or ()).get(self._credits.of(problem))
            if own is not None and own.known:
                return own.z
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return credits, router, features and the step under way."""
        return super().state_dict() | {
            "seed": self._seed,
            "router": self._router.state_dict(),
            "features": self._features.state_dict(),
            "step": {"shown": self._shown, "read": self._read, "drawn": self._drawn, "mean": self._mean},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        super().load_state_dict(state)
        self._seed = state["seed"]
        self._router.load_state_dict(state["router"])
        self._features.load_state_dict(state["features"])
        step = state["step"]
        self._shown, self._read, self._drawn = list(step["shown"]), list(step["read"]), list(step["drawn"])
        self._mean = step["mean"]


class Features:
    """What the router reads of a problem: [level one by one, reference_ppl, pass_rate, training state].

    Log-perplexities are standardised over the training problems and cut to [-3, 3]; a pass rate becomes 2 rate - 1.
    What is not known is 0.
    """

    def __init__(self, config: Dlr, run: RunFacts) -> None:
        self._names = config.features
        self._levels = run.levels
        self._known_levels = sorted(set(run.levels.values())) if "level" in config.features else []
        of_state = [name for name in config.features if name not in _OF_PROBLEM]
        self._has_state = bool(of_state)
        settings = {"features": of_state} if of_state else {}
        self._state = TrainingState(BetaSettings.model_validate(settings), run.total_steps)
        self._scores: dict[str, float] = {}
        self.count = (
            len(self._known_levels)
            + sum(name in self._names for name in ("reference_ppl", "pass_rate"))
            + len(of_state)
        )

    def of(self, problem_ids: Sequence[str], pass_rates: Sequence[float | None]) -> Array:
        """Return [B, F]."""
        shared = self._state.vector() if self._has_state else []
        rows = [[*self._own(problem, rate), *shared] for problem, rate in zip(problem_ids, pass_rates, strict=True)]
        return np.asarray(rows, dtype=float).reshape(len(rows), self.count)

    def _own(self, problem: str, rate: float | None) -> list[float]:
        own = [float(self._levels.get(problem) == level) for level in self._known_levels]
        if "reference_ppl" in self._names:
            own.append(self._scores.get(problem, 0.0))
        if "pass_rate" in self._names:
            own.append(0.0 if rate is None else min(1.0, max(-1.0, 2.0 * rate - 1.0)))
        return own

    def observe(self, observation: Observation, ratio: float | None) -> None:
        """Follow the training state; keep the references' perplexities when they come."""
        self._state.observe(observation, ratio)
        scores = observation.table(_REFERENCES)
        if scores and not self._scores and "reference_ppl" in self._names:
            values = np.asarray(list(scores.values()), dtype=float)
            spread = float(values.std()) or 1.0
            standard = np.clip((values - values.mean()) / spread, -_BOUND, _BOUND)
            self._scores = dict(zip(scores, standard.tolist(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Return everything as JSON-able values."""
        return {"state": self._state.state_dict(), "scores": self._scores}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._state.load_state_dict(state["state"])
        self._scores = dict(state["scores"])


class Router:
    """softmax(W f + b) over K arms, from W = 0, b = 0, and its gradient step."""

    def __init__(self, features: int, arms: int) -> None:
        self.weight_KF = np.zeros((arms, features))
        self.bias_K = np.zeros(arms)

    def logits(self, features_BF: Array) -> Array:
        """Return log p(a | x), [B, K]."""
        scores_BK = features_BF @ self.weight_KF.T + self.bias_K
        scores_BK = scores_BK - scores_BK.max(axis=1, keepdims=True)
        return np.asarray(scores_BK - np.log(np.exp(scores_BK).sum(axis=1, keepdims=True)))

    def probabilities(self, features_BF: Array) -> Array:
        """Return p(a | x), [B, K]."""
        return np.asarray(np.exp(self.logits(features_BF)))

    def step(
        self, features_BF: Array, winners_B: NDArray[np.int64], prior_K: Array, *, kl_coef: float, rate: float
    ) -> dict[str, float]:
        """Take one gradient step; return cross-entropy, KL and mean entropy before it, in nats."""
        log_BK = self.logits(features_BF)
        p_BK = np.exp(log_BK)
        gradient_BK = logit_gradient(p_BK, winners_B, prior_K, kl_coef)
        self.weight_KF = self.weight_KF - rate * gradient_BK.T @ features_BF
        self.bias_K = self.bias_K - rate * gradient_BK.sum(axis=0)
        return {
            "cross_entropy": float(-log_BK[np.arange(len(p_BK)), winners_B].mean()),
            "kl": divergence(p_BK.mean(axis=0), prior_K),
            "entropy": float(-(p_BK * log_BK).sum(axis=1).mean()),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return weights and biases."""
        return {"weight": self.weight_KF.tolist(), "bias": self.bias_K.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.weight_KF = np.asarray(state["weight"], dtype=float).reshape(self.weight_KF.shape)
        self.bias_K = np.asarray(state["bias"], dtype=float)


def zipf(count: int) -> Array:
    """Return p_k = (1 / k) / sum_j (1 / j), k = 1 ... count."""
    weights_K = 1.0 / np.arange(1, count + 1)
    return np.asarray(weights_K / weights_K.sum())


def divergence(p_K: Array, prior_K: Array) -> float:
    """Return KL(p || prior) in nats; an arm of probability 0 adds nothing."""
    held = p_K > 0
    return float((p_K[held] * np.log(p_K[held] / prior_K[held])).sum())


def logit_gradient(p_BK: Array, winners_B: NDArray[np.int64], prior_K: Array, kl_coef: float) -> Array:
    """Return the gradient of -(1/B) sum log p(a*) + c KL(p_mean || prior) with respect to the logits, [B, K].

    (p - onehot(a*)) / B + c p (g - <p, g>) / B with g = log(p_mean / prior), whose constant 1 drops out.
    """
    won_BK = np.eye(p_BK.shape[1])[winners_B]
    g_K = np.log(np.maximum(p_BK.mean(axis=0), _TINY) / prior_K)
    pull_BK = p_BK * (g_K - (p_BK @ g_K)[:, None])
    return np.asarray((p_BK - won_BK + kl_coef * pull_BK) / len(p_BK))


def drawn(p_BK: Array, uniform_BN: Array) -> NDArray[np.int64]:
    """Return N independent draws a row, [B, N], by inverting its distribution function."""
    edges_BK = p_BK.cumsum(axis=1)
    beyond_BNK = uniform_BN[:, :, None] * edges_BK[:, None, -1:] >= edges_BK[:, None, :]
    return np.asarray(np.minimum(beyond_BNK.sum(axis=2), p_BK.shape[1] - 1))


def winner(arms: Sequence[int], z_K: Array) -> int:
    """Return the drawn arm of the highest credit; the one drawn first of equals."""
    return max(arms, key=lambda arm: float(z_K[arm]))
