"""The loop of a flow student: the language loop's frame (`train/loop.py`) around other phases.

Start, resume, stopping, trackers, measurements and result are inherited; what is sampled, scored and evaluated is not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from atesd.config import RunConfig
from atesd.evaluate.runner import summarise
from atesd.flow.rollout import roll
from atesd.flow.setup import FlowParts, assemble
from atesd.runlog import RunDir
from atesd.seeds import derive_seed
from atesd.train.asked import drawn, proposed
from atesd.train.checkpoint import restore_interrupted
from atesd.train.loop import Listener, Trainer, classes_of
from atesd.train.record import timings
from atesd.train.resume import (
    digests_of_code,
    newest_whole,
    open_for_resume,
    refuse_other_parts,
    resumed_config,
    warn_of_code,
)
from atesd.train.share import refuse_several
from atesd.train.track import refuse_missing
from atesd.train.world import World

DIGITS = 3
"""Decimals of the samples in evaluation files."""


@dataclass(frozen=True, slots=True)
class _Named:
    """What a controller is told of a problem."""

    id: str


class FlowTrainer(Trainer):
    """One run in one directory: `FlowTrainer.start(...)` or `FlowTrainer.resume(...)`, then `train()`."""

    # The inherited methods use what both kinds of parts have.
    parts: FlowParts  # type: ignore[assignment]

    @classmethod
    def start(
        cls,
        config: RunConfig,
        out: Path,
        *,
        listener: Listener | None = None,
        say: Callable[[str], object] | None = None,
        before: Callable[[RunConfig], None] | None = None,
    ) -> FlowTrainer:
        """Begin a run in a new directory, which is made last. UserError if it holds anything, or parts do not fit."""
        refuse_several(World.join(), "a flow")
        RunDir.check_free(out)
        refuse_missing(config.track)
        if before is not None:
            before(config)
        if say is not None:
            say(f"warm start: {config.flow.warm_steps} steps of flow matching")
        parts = assemble(config)
        sampling = f"Euler-Maruyama, {config.flow.steps} steps, eta {config.flow.eta:g}"
        env = {"sampling": sampling, "code": digests_of_code(config)}
        run = RunDir.create(out, config.model_dump(mode="json"), config.about(), env)
        return cls(config, run, parts, listener)  # type: ignore[arg-type]

    @classmethod
    def resume(
        cls,
        out: Path,
        overrides: Sequence[str] = (),
        *,
        listener: Listener | None = None,
        before: Callable[[RunConfig], None] | None = None,
        prepare: Callable[[Any], None] | None = None,
    ) -> FlowTrainer:
        """Continue a run from its newest whole checkpoint, as `Trainer.resume`; the warm start is made anew for it."""
        refuse_several(World.join(), "a flow")
        run = open_for_resume(out)
        for name in ("best", "final"):
            restore_interrupted(out / name)
        found = newest_whole(run)
        resumed = resumed_config(run, found[1]["config"] if found else None, overrides)
        config = resumed.config
        if before is not None:
            before(config)
        refuse_missing(config.track)
        parts = assemble(config)
        if prepare is not None:
            prepare(parts)
        trainer = cls(config, run, parts, listener)  # type: ignore[arg-type]
        if found:
            trainer._restore(*found)
        else:
            refuse_other_parts(run.path, classes_of(parts), run.env().get("parts", {}))
        warn_of_code(run, config)
        resumed.keep(run)
        return trainer

    def _begin(self) -> None:
        """Measure and evaluate the untrained student."""
        clock = perf_counter()
        self.run.rewind(-1, {})
        self.run.remember(parts=classes_of(self.parts))
        metrics = self._observe({}) | self._evaluate()
        self._seconds += perf_counter() - clock
        self._log(metrics | self._phases.take())

    def _one_step(self) -> None:
        """Let the student go, show its teacher the rest, update, measure."""
        clock = perf_counter()
        parts, config, phase = self.parts, self.config, self._phases.phase
        at = drawn(parts.curriculum, self.step, config.step.problems, len(parts.task.train))
        with phase("sample"):
            random = torch.Generator().manual_seed(derive_seed(config.seed, "sample", self.step))
            states, _ = roll(parts.views, parts.task.train, torch.as_tensor(at), config.flow, random, start=True)
        with phase("exposure"):
            named: Any = [_Named(parts.task.train.ids[place]) for place in at]
            ratios = proposed(parts.controller, self.step, named, [None] * len(at))
            parts.credit.keep(states, parts.levels(at), ratios)
        with phase("update"):
            metrics = parts.stepper.optimize(states, ratios)
        self.step += 1
        metrics |= self._observe(metrics)
        if self._due(config.eval.every):
            metrics |= self._evaluate()
        self._seconds += perf_counter() - clock
        self._log(metrics | timings(self._phases.take(), perf_counter() - clock, float(len(states.x_SD))))
        if self._due(config.save.every):
            self._save()

    @torch.no_grad()
    def _evaluate(self) -> dict[str, float]:
        """Draw k samples for each of the first problems, from the same noise every time; keep the nearest model."""
        config, parts = self.config, self.parts
        points, k = parts.task.evaluation, config.eval.k
        with self._phases.phase("eval"):
            chosen = torch.arange(min(config.eval.problems or len(points), len(points))).repeat_interleave(k)
            random = torch.Generator().manual_seed(derive_seed(config.seed, "eval"))
            _, x_ND = roll(parts.views, points, chosen, config.flow, random, start=False)
            label_N = torch.as_tensor(points.label_N)[chosen]
            right_N = parts.judge.right(x_ND, label_N)
            seen_N = parts.judge.probabilities(x_ND).argmax(-1)
            conditional = bool(parts.task.layout.student_C.any())
            rows = [
                {
                    "problem_id": points.ids[place],
                    "level": parts.task.labels[label] if conditional else "",
                    "sample": number % k,
                    "answer": parts.task.labels[seen],
                    "reward": float(right),
                    "stop": "eos",
                    "turns": 1,
                    "length": config.flow.steps,
                    "traits": {},
                    "point": [round(value, DIGITS) for value in x],
                }
                for number, (place, label, right, seen, x) in enumerate(
                    zip(*(each.tolist() for each in (chosen, label_N, right_N, seen_N, x_ND)), strict=True)
                )
            ]
            quality = parts.judge.quality(x_ND, label_N)
            result = summarise(parts.task.name, [rows[start : start + k] for start in range(0, len(rows), k)])
        self.run.write_rows("eval", self.step, rows)
        self._latest_eval = result.metrics | {f"quality/{name}": value for name, value in quality.items()}
        self._keep_best(-next(iter(quality.values())))
        return self._latest_eval

    def _card(self) -> str:
        """Say what the weights beside it are."""
        numbers = [f"{key}: {value:.4f}" for key, value in self._latest_eval.items() if key.startswith("quality/")]
        return (
            f"A velocity network of atesd's task `{self.parts.task.name}`, after step {self.step} "
            f"(`atesd.flow.net.VelocityNet`, sizes in config.json).\n\n" + "\n".join(numbers) + "\n"
        )
