"""A `Stepper` around a tiny model, as `train/setup.py` builds it around a real one."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator

from atesd.config import TeacherConfig
from atesd.gates import Gate
from atesd.recipe import build_config
from atesd.selection import Selection
from atesd.train.forward import Student
from atesd.train.optim import build_optimizer
from atesd.train.step import Stepper
from atesd.train.teacher import Teacher

from support.models import PAD


def make_stepper(
    model: torch.nn.Module, gate: Gate | None = None, selection: Selection | None = None, /, **sections: Any
) -> tuple[Stepper, Teacher]:
    """Return a stepper that learns by plain SGD-like AdamW at a constant rate, and its teacher."""
    tree: dict[str, Any] = {
        "optim": {"lr": 1e-2, "max_grad_norm": 0.0},
        "rollout": {"temperature": 1.0},
    }
    config = build_config(tree | sections)
    teacher = Teacher(config.teacher, model)
    optimizer = build_optimizer(config.optim, model)
    accelerator = Accelerator(cpu=True)
    student, prepared = accelerator.prepare(Student(model, config.loss), optimizer)
    stepper = Stepper(
        accelerator=accelerator,
        student=student,
        teacher=teacher,
        base=Teacher(TeacherConfig(), model),
        optimizer=prepared,
        scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: 1.0),
        gate=gate or config.gate,
        selection=selection or config.selection,
        config=config,
        pad_id=PAD,
    )
    return stepper, teacher
