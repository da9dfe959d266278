"""On-policy self-distillation of LLM reasoners with learned exposure (ATESD). Public names load on first use."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "BetaConfig": "exposure.beta_controller",
    "Controller": "exposure.controller",
    "Curriculum": "curriculum",
    "Difference": "evaluate.metrics",
    "Fixed": "exposure.schedules",
    "Gate": "gates.gate",
    "GradientRule": "gradients.rule",
    "LossConfig": "losses.divergence",
    "Measurement": "types",
    "Observation": "types",
    "Problem": "types",
    "PromptConfig": "exposure.prompt",
    "Revealer": "exposure.revealer",
    "Router": "routing.route",
    "RunConfig": "config",
    "RunDir": "runlog",
    "RunFacts": "facts",
    "Sampler": "rollout.sampler",
    "Segments": "exposure.segments",
    "Strength": "strength",
    "Target": "losses.target",
    "Task": "tasks.base",
    "TokenStats": "losses.stats",
    "Trainer": "train.loop",
    "UserError": "types",
    "evaluate_model": "train.inspect",
    "extract_answer": "rewards.answer",
    "load_codes": "codes.model",
    "load_config": "recipe",
    "paired_difference": "evaluate.metrics",
    "resume_run": "trainers",
    "reveal": "exposure.reveal",
    "start_run": "trainers",
    "token_streams": "losses.divergence",
    "write_report": "report.html",
}

__all__ = sorted(_HOME)  # noqa: PLE0605 (one table serves both)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'atesd' has no attribute {name!r}")
    return getattr(import_module(f"atesd.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
