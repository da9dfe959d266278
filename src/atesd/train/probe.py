"""Measurements that policies ask for, taken on the probe set without gradient.

    probe_nll             token-mean NLL of the reference under the student, without any hint
    probe_kl              mean KL(teacher at ratio 1 || student) on completions stored at step 0
    probe_accuracy        mean reward of hint-free completions
    gt_solution@r         token-mean log-probability that the teacher at ratio r gives the reference solution
    gt_answer@r           the same of the final answer alone
    gt_hidden_only@r      the same of the segments that ratio r does not reveal: no credit for copying

Probe problems are never trained on, so the exposure can reach these numbers only through learning (METHOD 2.4).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from atesd.config import RunConfig
from atesd.exposure.prompt import student_messages, teacher_messages
from atesd.exposure.reveal import reveal
from atesd.losses.divergence import LossConfig, label_logprobs, token_streams
from atesd.losses.target import PlainConfig
from atesd.rollout.driver import Driver
from atesd.rollout.render import Renderer
from atesd.seeds import derive_seed
from atesd.train.batch import Row, labels, micro_batches, view_input
from atesd.train.step import scored_hidden
from atesd.train.teacher import Teacher
from atesd.types import Measurement, Problem, UserError

_NATS_LOSS = LossConfig(temperature_student=1.0, temperature_teacher=1.0)


@dataclass(slots=True)
class Probe:
    """The probe set, the model, and how to measure the one with the other."""

    problems: Sequence[Problem]
    model: nn.Module
    teacher: Teacher
    renderer: Renderer
    driver: Driver
    config: RunConfig
    pad_id: int

    def measure(self, wanted: Iterable[Measurement]) -> dict[str, float]:
        """Take each distinct measurement once; UserError if there is no probe set or no such measurement."""
        taken: dict[str, float] = {}
        for measurement in wanted:
            if measurement.key in taken:
                continue
            if not self.problems:
                raise UserError(
                    f"the exposure controller measures {measurement.kind} but the task has no probe problems: "
                    "set task.probe_size"
                )
            value = _TABLE[measurement.kind](self, measurement.ratio)
            if value is not None:
                taken[measurement.key] = value
        return taken
