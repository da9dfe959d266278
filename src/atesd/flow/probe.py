"""Progress without any hint, on held-out pairs of data and noise that never change.

    nll(roles) = mean over pairs and times of ||v(x_t, t) - (x_1 - z)||^2 / 2

the negative log-likelihood, but for a constant, of the straight path's velocity under a normal of unit variance.
P pairs, each at every one of TIMES.
"""

from __future__ import annotations

import torch
from torch import Tensor

from atesd.flow.judge import Judge
from atesd.flow.rollout import States, Views, roll
from atesd.flow.sde import interpolate
from atesd.flow.step import FlowStepper
from atesd.sections import FlowConfig
from atesd.seeds import derive_seed
from atesd.tasks.flows import FlowTask, Points
from atesd.train.teacher import Teacher

TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)


class FlowProbe:
    """Measures the student, and what its teacher knows. The states behind `kl` are those of the untrained student."""

    def __init__(
        self,
        task: FlowTask,
        views: Views,
        teacher: Teacher,
        judge: Judge,
        stepper: FlowStepper,
        config: FlowConfig,
        seed: int,
        base: Teacher | None = None,
    ) -> None:
        self.problems = task.probe.ids
        self._task = task
        self._views = views
        self._teacher = teacher
        self._base = base or teacher
        self._judge = judge
        self._stepper = stepper
        self._config = config
        self._seed = seed
        self._states: States | None = None
        if self.problems:
            self._states, _ = roll(views, task.probe, self._all, config, self._random("kl"), start=True)

    def forget(self) -> None:
        """Nothing is kept between measurements."""

    @torch.no_grad()
    def nll(self) -> float:
        """Return the student's."""
        return float(self.loss_of(self._all))

    def loss_of(self, at_P: Tensor) -> Tensor:
        """Return the student's nll on some of the pairs, with its gradient where one is recorded."""
        return _squares(self._views, self._task.probe, at_P).mean()

    @torch.no_grad()
    def teacher_log_likelihood(self, ratio: float) -> float:
        """Return minus the nll of the teacher at a ratio."""
        points = self._task.probe
        x_BD, t_B1, at_B, velocity_BD = _pairs(points, self._all)
        with self._teacher.in_place():
            found_BD = self._views.teacher(points, at_B, x_BD, t_B1, [ratio] * len(at_B))
        return -float((found_BD - velocity_BD).square().sum(-1).mean() / 2)

    @torch.no_grad()
    def kl(self) -> float:
        """Return the mean divergence from the fully informed teacher on the untrained student's states.

        The teacher is that of step 0 where its weights are kept.
        """
        assert self._states is not None
        ratios = [1.0] * len(self.problems)
        teacher_SD = self._stepper.teacher_velocity(self._states, ratios, self._base)
        student_SD = self._stepper.student_velocity(self._states)
        return float(self._stepper.divergence(self._states, student_SD, teacher_SD).mean())

    @torch.no_grad()
    def accuracy(self) -> float:
        """Return the share of right samples, one a problem, from the same noise every time."""
        points = self._task.probe
        _, x_BD = roll(self._views, points, self._all, self._config, self._random("accuracy"), start=False)
        return float(self._judge.right(x_BD, torch.as_tensor(points.label_N)).double().mean())

    @torch.no_grad()
    def nll_of_training(self) -> dict[str, float]:
        """Return the nll of every training point, by id."""
        points = self._task.train
        found = _squares(self._views, points, torch.arange(len(points))).reshape(len(TIMES), -1).mean(0)
        return dict(zip(points.ids, found.tolist(), strict=True))

    @property
    def _all(self) -> Tensor:
        return torch.arange(len(self.problems))

    def _random(self, purpose: str) -> torch.Generator:
        return torch.Generator().manual_seed(derive_seed(self._seed, f"flow probe {purpose}"))


def _squares(views: Views, points: Points, at_P: Tensor) -> Tensor:
    """Return half the student's squared error of each pair and time, [len(TIMES) P], time by time."""
    x_BD, t_B1, at_B, velocity_BD = _pairs(points, at_P)
    return (views.student(points, at_B, x_BD, t_B1) - velocity_BD).square().sum(-1) / 2


def _pairs(points: Points, at_P: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return states, times, places and velocities of the straight paths; a point's noise is always the same."""
    x1_ND = torch.as_tensor(points.x_ND)
    random = torch.Generator().manual_seed(derive_seed(0, f"flow pairs {points.name}"))
    z_ND = torch.randn(x1_ND.shape, generator=random)
    count = len(TIMES)
    t_B1 = torch.tensor(TIMES).repeat_interleave(len(at_P))[:, None]
    z_BD, x1_BD = z_ND[at_P].repeat(count, 1), x1_ND[at_P].repeat(count, 1)
    return interpolate(z_BD, x1_BD, t_B1), t_B1, at_P.repeat(count), x1_BD - z_BD
