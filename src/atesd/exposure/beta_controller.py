"""ATESD's learned exposure controller: a Beta policy with a delayed, discounted learning-progress reward.

    one alpha ~ pi_phi(. | s) per hold window of H updates
    R(t0) = G_lp(t0) + lambda_gt G_gt(t0), over the L steps after t0; a policy update per B scored decisions

arXiv 2605.11458. Ours: 1. progress is the student's hint-free probe NLL, not the training loss;
2. each reward term is divided by its standard deviation so far; 3. decisions overlap (pipelined clock) and those drawn
before the last policy update are not corrected; 4. a frozen teacher's grounded term is tabulated over the ratio.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, ClassVar, Literal

import numpy as np

from atesd.alignment import credit_at, over_error
from atesd.exposure.beta import BetaPolicy, Draw
from atesd.exposure.beta_config import BetaSettings
from atesd.exposure.controller import Controller, ExposureMethod
from atesd.exposure.features import TrainingState
from atesd.exposure.window import (
    Decision,
    HoldClock,
    RunningScale,
    advantages,
    discounted_mean,
    discounted_progress,
    is_idle,
    ramp,
    step_counts,
)
from atesd.facts import RunFacts
from atesd.types import Measurement, Observation


class BetaConfig(ExposureMethod, BetaSettings):
    """ATESD's learned exposure: a Beta policy on training-state features, one draw per hold window (2605.11458)."""

    kind: Literal["beta"] = "beta"

    measured: ClassVar[bool] = True
    reads_length: ClassVar[bool] = True

    @property
    def reads_hidden(self) -> bool:
        """By its grounded term, where that is of what a ratio hides."""
        return self.gt_target == "hidden_only"

    @property
    def reads_base(self) -> bool:
        """By its progress, where that is the divergence from the teacher."""
        return self.probe_kind == "probe_kl"

    def describe(self) -> str:
        """Name policy and reward."""
        return "a learned share: a Beta policy, rewarded for the student's progress (ATESD)"

    def build(self, run: RunFacts) -> Controller:
        """Return the controller. A frozen teacher's grounded term depends on the ratio alone and is tabulated."""
        return BetaController(self, run.total_steps, run.seed_for("exposure"), run.teacher_frozen)


class BetaController:
    """The controller on its two clocks: a ratio per hold window, a policy update per B scored decisions.

    A decision opened before update t0 governs the updates of its window and is scored when theta_(t0 + L) has been
    measured (with `train_kd`, when update t0 + L has been taken, whose loss is l_(t0 + L)). It is discarded, and
    counted, if its look-ahead contains a step without a distilled group or lacks a finite measurement.
    """

    def __init__(self, config: BetaSettings, total_steps: int, seed: int, teacher_frozen: bool) -> None:
        self._config = config
        self._grounded = config.grounded_weight > 0.0
        self._frozen = teacher_frozen
        self._random = np.random.default_rng([seed, 1])
        start, rate = config.warm_start.parameters, config.rate(total_steps)
        self._policy = BetaPolicy(len(config.features), config.hidden, start, seed, rate)
        self._clock = HoldClock(config.period)
        self._state = TrainingState(config, total_steps)
        self._scales = {"lp": RunningScale(), "gt": RunningScale()}
        self._counts = dict.fromkeys(("matured", "discarded", "updates"), 0)
        self._open: list[Decision] = []
        self._ready: list[Decision] = []
        self._table: dict[str, list[float]] = {"ratios": [], "values": []}
        self._step = -1
        self._ratio: float | None = None
        self._decision_log: dict[str, float] = {}
        self._step_log: dict[str, float] = {}

    def propose(
        self,
        step: int,
        problem_ids: Sequence[str],
        pass_rates: Sequence[float | None] = (),  # noqa: ARG002
    ) -> Sequence[float]:
        """Return the held ratio for every problem; at a window boundary, draw a new one first."""
        assert step == self._step, f"update {step} was proposed for after observing theta_{self._step}"
        if self._clock.ended:
            self._decide()
        assert self._ratio is not None
        return [self._ratio] * len(problem_ids)

    def wants(self, step: int) -> Sequence[Measurement]:
        """Name the probe measurements of open decisions and window boundaries, and the grounded ones."""
        config, wanted = self._config, []
        due = [decision for decision in self._open if self._due(decision, step)]
        if config.probe_kind is not None and (self._clock.may_end or (due and not config.scores_training_loss)):
            wanted.append(Measurement(config.probe_kind))
        if self._grounded and self._frozen and not self._table["ratios"]:
            wanted += [Measurement(config.gt_kind, ratio) for ratio in config.gt_grid]
        elif self._grounded and not self._frozen:
            wanted += [Measurement(config.gt_kind, ratio) for ratio in sorted({decision.ratio for decision in due})]
        if config.asks_rewards:
            wanted += [credit_at(decision.ratio) for decision in due]
        return wanted

    def observe(self, observation: Observation) -> None:
        """Advance the clock, the features and the open decisions; update the policy when B decisions are scored.

        Measurements that this controller did not ask for are ignored, so that logging more changes nothing.
        """
        assert observation.step == self._step + 1, f"step {observation.step} observed after step {self._step}"
        asked = set(self.wants(observation.step))
        measured = {measurement: value for measurement, value in observation.measured.items() if measurement in asked}
        observation = replace(observation, measured=measured)
        self._step = observation.step
        self._step_log = {}
        if self._step > 0:
            if step_counts(observation.stats):
                self._clock.tick()
            if is_idle(observation.stats):
                self._discard(self._open)
        self._state.observe(observation, self._ratio)
        self._tabulate(observation)
        for decision in list(self._open):
            if not self._collect(decision, observation):
                self._discard([decision])
            elif len(decision.progress) > self._config.span // self._config.stride:
                self._finish(decision)
        if len(self._ready) >= self._config.decisions_per_update:
            self._learn()

    def metrics(self) -> Mapping[str, float]:
        """Return the decision in force, what matured at this step, and the counts."""
        counts = {f"exposure/{name}": float(count) for name, count in self._counts.items()}
        return {**self._decision_log, **self._step_log, **counts, "exposure/open": float(len(self._open))}

    def state_dict(self) -> dict[str, Any]:
        """Return everything, the random generator and the open windows included."""
        return {
            "policy": self._policy.state_dict(),
            "random": self._random.bit_generator.state,
            "held": self._clock.held,
            "state": self._state.state_dict(),
            "scales": {name: asdict(scale) for name, scale in self._scales.items()},
            "counts": dict(self._counts),
            "open": [asdict(decision) for decision in self._open],
            "ready": [asdict(decision) for decision in self._ready],
            "table": {name: list(values) for name, values in self._table.items()},
            "step": self._step,
            "ratio": self._ratio,
            "decision_log": dict(self._decision_log),
            "step_log": dict(self._step_log),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._policy.load_state_dict(state["policy"])
        self._random.bit_generator.state = state["random"]
        self._clock.held = state["held"]
        self._state.load_state_dict(state["state"])
        self._scales = {name: RunningScale(**row) for name, row in state["scales"].items()}
        self._counts = dict(state["counts"])
        self._open = [Decision(**row) for row in state["open"]]
        self._ready = [Decision(**row) for row in state["ready"]]
        self._table = {name: list(values) for name, values in state["table"].items()}
        self._step, self._ratio = state["step"], state["ratio"]
        self._decision_log, self._step_log = dict(state["decision_log"]), dict(state["step_log"])

    def _decide(self) -> None:
        """Draw the ratio of a new window and open its decision."""
        features = self._state.vector()
        draw = self._policy.draw(features, self._random)
        self._ratio = self._config.bounded(draw.value)
        self._decision_log = self._describe(draw, features)
        self._clock.start()
        self._state.mark_boundary()
        decision = Decision(self._step, draw.value, self._ratio, features, draw.logprob)
        self._open.append(decision)
        if self._config.scores_training_loss:
            return
        if self._state.level is None:
            self._discard([decision])
        else:
            decision.progress.append(self._state.level)

    def _describe(self, draw: Draw, features: Sequence[float]) -> dict[str, float]:
        """Return the log entries of a decision."""
        named = zip(self._config.features, features, strict=True)
        return {
            "exposure/ka": draw.ka,
            "exposure/kb": draw.kb,
            "exposure/mean": draw.ka / (draw.ka + draw.kb),
            "exposure/entropy": draw.entropy,
            **{f"exposure/feature/{name}": value for name, value in named},
        }

    def _due(self, decision: Decision, step: int) -> bool:
        """Tell whether theta_step is a measuring point inside a decision's look-ahead."""
        since = step - decision.start
        return 0 < since <= self._config.span and since % self._config.probe_every == 0

    def _collect(self, decision: Decision, observation: Observation) -> bool:
        """Take a decision's due values; return False if one of them is missing."""
        due = self._due(decision, self._step)
        if due or self._config.scores_training_loss:
            if self._state.level is None:
                return False
            decision.progress.append(self._state.level)
        if due and self._grounded and not self._frozen:
            grounded = observation.number(Measurement(self._config.gt_kind, decision.ratio))
            if grounded is None:
                return False
            decision.grounded.append(grounded)
        if due and self._config.asks_rewards:
            credits = list(observation.table(credit_at(decision.ratio)).values())
            if not credits:
                return False
            decision.credit = over_error(credits)
        return True

    def _tabulate(self, observation: Observation) -> None:
        """Keep the grounded term of a frozen teacher over the ratio; a ratio that cannot be measured is left out."""
        if not self._grounded or not self._frozen or self._table["ratios"]:
            return
        grid = self._config.gt_grid
        found = [(ratio, observation.number(Measurement(self._config.gt_kind, ratio))) for ratio in grid]
        known = [(ratio, value) for ratio, value in found if value is not None]
        if len(known) >= 2:
            self._table = {"ratios": [ratio for ratio, _ in known], "values": [value for _, value in known]}

    def _finish(self, decision: Decision) -> None:
        """Score a decision whose look-ahead is complete."""
        config = self._config
        progress = discounted_progress(decision.progress, config.gamma, config.rectify, config.stride)
        decision.lp = decision.credit if config.asks_rewards else progress
        if self._grounded:
            grounded = self._grounded_term(decision)
            if grounded is None:
                self._discard([decision])
                return
            decision.gt = self._step_log["exposure/reward_gt"] = grounded
        self._open.remove(decision)
        self._ready.append(decision)
        self._counts["matured"] += 1
        for name, value in (("lp", decision.lp), ("gt", decision.gt)):
            self._scales[name].add(value)
        self._step_log |= {"exposure/reward_lp": decision.lp, "exposure/reward": self._reward(decision)}

    def _grounded_term(self, decision: Decision) -> float | None:
        """Return G_gt: from the table at the decision's own ratio, or averaged over its measurements."""
        if not self._frozen:
            return discounted_mean(decision.grounded, self._config.gamma, self._config.probe_every)
        ratios, values = self._table["ratios"], self._table["values"]
        return float(np.interp(decision.ratio, ratios, values)) if ratios else None

    def _reward(self, decision: Decision) -> float:
        """Return R = G_lp + lambda_gt G_gt, each over its standard deviation so far where configured."""
        lp, gt = decision.lp, decision.gt
        if self._config.reward_norm:
            lp, gt = lp / self._scales["lp"].std, gt / self._scales["gt"].std
        return lp + self._config.grounded_weight * gt

    def _learn(self) -> None:
        """Update the policy from the decisions that are ready."""
        config = self._config
        rewards = [self._reward(decision) for decision in self._ready]
        self._step_log["exposure/loss"] = self._policy.update(
            self._ready,
            advantages(rewards, config.baseline, config.eps),
            entropy_coef=ramp(self._state.progress, config.entropy_start, config.entropy_coef),
            entropy_target=config.entropy_target,
            importance_clip=config.importance_clip,
        )
        self._ready = []
        self._counts["updates"] += 1

    def _discard(self, decisions: Sequence[Decision]) -> None:
        """Drop open decisions that cannot be scored, and count them."""
        self._counts["discarded"] += len(decisions)
        dropped = {decision.start for decision in decisions}
        self._open = [decision for decision in self._open if decision.start not in dropped]
