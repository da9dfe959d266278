"""One update: the divergence between both roles' transitions, on states that the student visited."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from atesd.flow.judge import Judge
from atesd.flow.rollout import States, Views
from atesd.flow.sde import mean_of, sigma_of, transition_kl
from atesd.rollout.weights import SHRINK
from atesd.train.teacher import Teacher
from atesd.types import NonFiniteError


class FlowStepper:
    """Moves the student towards what its teacher would do."""

    def __init__(
        self,
        views: Views,
        teacher: Teacher,
        judge: Judge,
        *,
        optimizer: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LRScheduler,
        eta: float,
        max_grad_norm: float,
    ) -> None:
        self._views = views
        self._teacher = teacher
        self._judge = judge
        self._optimizer = optimizer
        self._scheduler = scheduler
        self._eta = eta
        self._most = max_grad_norm or math.inf

    def optimize(self, states: States, ratios: Sequence[float]) -> dict[str, float]:
        """Take one update and return what there is to log. NonFiniteError before the weights move."""
        teacher_SD = self.teacher_velocity(states, ratios)
        student_SD = self.student_velocity(states)
        kl_S = self.divergence(states, student_SD, teacher_SD)
        loss = kl_S.mean()
        if not bool(loss.isfinite()):
            raise NonFiniteError(f"the divergence of {_wrong(states, kl_S)} is not finite: {SHRINK}")
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        norm = float(nn.utils.clip_grad_norm_(self._views.net.parameters(), self._most))
        if not math.isfinite(norm):
            raise NonFiniteError(f"the gradient is not finite, though the divergence is ({float(loss):.3g}): {SHRINK}")
        rate = float(self._optimizer.param_groups[0]["lr"])
        self._optimizer.step()
        self._scheduler.step()
        self._teacher.update()
        return {
            "loss/total": float(loss.detach()),
            "loss/distil": float(loss.detach()),
            "divergence/mean": float(kl_S.detach().mean()),
            "divergence/p99": float(kl_S.detach().quantile(0.99)),
            "optim/grad_norm": norm,
            "optim/lr": rate,
            **self._described(states, student_SD.detach(), teacher_SD),
            **_exposure(ratios),
        }

    def teacher_velocity(self, states: States, ratios: Sequence[float], teacher: Teacher | None = None) -> Tensor:
        """Return what a teacher, its own where unset, would do in each state, with a ratio for each trajectory.

        Without gradient.
        """
        by_state = [ratios[trajectory] for trajectory in states.trajectory_S.tolist()]
        with (teacher or self._teacher).in_place():
            return self._views.teacher(states.points, states.at_S, states.x_SD, states.t_S1, by_state)

    def student_velocity(self, states: States) -> Tensor:
        """Return what the student does in each state."""
        return self._views.student(states.points, states.at_S, states.x_SD, states.t_S1)

    def divergence(self, states: States, student_SD: Tensor, teacher_SD: Tensor) -> Tensor:
        """Return the divergence of each transition, [S]; the states are held still."""
        own, teachers = (
            mean_of(states.x_SD, each, states.t_S1, states.dt_S1, self._eta) for each in (student_SD, teacher_SD)
        )
        return transition_kl(own, teachers, sigma_of(states.t_S1, states.dt_S1, self._eta))

    @torch.no_grad()
    def _described(self, states: States, student_SD: Tensor, teacher_SD: Tensor) -> dict[str, float]:
        """Compare where both think that a trajectory ends: x + (1 - t) v."""
        ends = [states.x_SD + (1.0 - states.t_S1) * each for each in (student_SD, teacher_SD)]
        student_SK, teacher_SK = (self._judge.probabilities(each) for each in ends)
        disagree_S = student_SK.argmax(-1) != teacher_SK.argmax(-1)
        gap = (student_SD - teacher_SD).square().sum() / teacher_SD.square().sum().clamp(min=1e-30)
        return {
            "mismatch/top1": float(disagree_S.double().mean()),
            "mismatch/velocity": float(gap),
            "student/confidence": float(student_SK.max(-1).values.double().mean()),
        }


def _wrong(states: States, kl_S: Tensor) -> str:
    """Name the first transition whose divergence is not finite."""
    trajectories = int(states.trajectory_S.max()) + 1
    number = int((~kl_S.isfinite()).nonzero()[0]) if not bool(kl_S.isfinite().all()) else 0
    return f"transition {number // trajectories + 1} of {len(kl_S) // trajectories}"


def _exposure(ratios: Sequence[float]) -> dict[str, float]:
    return {
        "exposure/ratio": sum(ratios) / len(ratios),
        "exposure/ratio_min": min(ratios),
        "exposure/ratio_max": max(ratios),
        "route/distil_groups": float(len(ratios)),
        "route/idle": 0.0,
        "route/paused": 0.0,
    }
