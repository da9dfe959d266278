"""What controllers may ask about a flow student: the language loop's table, as far as it has a meaning here.

probe_nll, probe_kl, probe_accuracy     of the student on held-out pairs (flow/probe.py)
gt_solution@r                           minus the nll of the teacher at ratio r on the same pairs
influence@r, probe_influence@r          credit of a ratio: the formulas of train/credit.py, with the probe's nll, on all
probe_influence_by_level@r, virtual_nll@r   weights and the latest rollouts
reference_nll                           nll of every training point, by id
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn

from atesd.flow.probe import FlowProbe
from atesd.flow.rollout import States, Views
from atesd.flow.step import FlowStepper
from atesd.sections import OptimConfig
from atesd.train.asked import wanted
from atesd.train.credit import Credit
from atesd.train.directions import FOLDS, Batch, Directions, Gradient
from atesd.train.measure import Measurer, Taker
from atesd.types import Policy, UserError


@dataclass(frozen=True, slots=True)
class FlowBatch:
    """Rollouts of a step, the level of each, and the ratios at which their teacher saw the condition."""

    states: States
    levels: Sequence[str]
    ratios: Sequence[float]

    def at(self, ratio: float) -> FlowBatch:
        """Return the batch at one ratio for all trajectories."""
        return replace(self, ratios=[ratio] * len(self.levels))


class FlowDirections:
    """Gradients that credit compares; the interface is that of `train/directions.py`."""

    def __init__(self, probe: FlowProbe, stepper: FlowStepper) -> None:
        self._probe = probe
        self._stepper = stepper

    def of_references(self, references: Sequence[int], weights: Sequence[nn.Parameter]) -> Gradient:
        """Return the gradient of the probe's nll."""
        with torch.enable_grad():
            return list(torch.autograd.grad(self._probe.loss_of(torch.as_tensor(references)), weights))

    def of_references_by_fold(self, references: Sequence[int], weights: Sequence[nn.Parameter]) -> list[Gradient]:
        """Return each fold's gradient, whose mean over folds is that of all."""
        folds = min(FOLDS, len(references))
        scale = folds / len(references)
        parts = [references[fold::folds] for fold in range(folds)]
        return [[scale * len(part) * each for each in self.of_references(part, weights)] for part in parts]

    def of_distillation(
        self, candidates: Sequence[FlowBatch], weights: Sequence[nn.Parameter], *, by_level: bool = False
    ) -> list[dict[str, Gradient]]:
        """Return each candidate's gradient of the distillation loss, as the sum of its levels' parts."""
        found = []
        for batch in candidates:
            states, levels = batch.states, batch.levels if by_level else [""] * len(batch.levels)
            teacher_SD = self._stepper.teacher_velocity(states, batch.ratios)
            with torch.enable_grad():
                kl_S = self._stepper.divergence(states, self._stepper.student_velocity(states), teacher_SD)
                names = sorted(set(levels))
                parts = {
                    name: kl_S[torch.tensor([levels[each] == name for each in states.trajectory_S.tolist()])].sum()
                    / len(kl_S)
                    for name in names
                }
                last = names[-1]
                found.append(
                    {
                        name: list(torch.autograd.grad(part, weights, retain_graph=name != last))
                        for name, part in parts.items()
                    }
                )
        return found


@dataclass(frozen=True, slots=True)
class _Scored:
    """What credit reads of a scorer."""

    model: nn.Module


class FlowCredit(Credit):
    """Credit on at most `problems` trajectories of the latest rollouts."""

    def __init__(
        self, probe: FlowProbe, stepper: FlowStepper, views: Views, optimizer: Any, optim: OptimConfig, problems: int
    ) -> None:
        super().__init__(
            scorer=cast("Any", _Scored(views.net)),
            directions=cast("Directions", FlowDirections(probe, stepper)),
            outcomes=cast("Any", None),  # nothing is graded
            optimizer=optimizer,
            optim=optim,
            references=cast("Any", range(len(probe.problems))),
            parameters="all",
            problems=problems,
        )

    def keep(self, states: States, levels: Sequence[str], ratios: Sequence[float]) -> None:
        """Keep the step's rollouts for the measurements after the update."""
        count = min(self._problems, len(levels))
        batch = FlowBatch(states.of(torch.arange(count)), levels[:count], ratios[:count])
        self._every = self._distilled = cast("Batch", batch)


class FlowMeasurer(Measurer):
    """Takes measurements by kind."""

    def __init__(self, probe: FlowProbe, credit: FlowCredit) -> None:
        self._probe = cast("Any", probe)
        self._table = {
            "influence": Taker(credit.influence, "credit"),
            "probe_influence": Taker(lambda ratios: credit.probe_influence(ratios, by_level=False), "credit"),
            "probe_influence_by_level": Taker(lambda ratios: credit.probe_influence(ratios, by_level=True), "credit"),
            "virtual_nll": Taker(lambda ratios: credit.virtual(ratios, probe.nll), "credit"),
            "reference_nll": Taker(lambda ratios: [probe.nll_of_training() for _ in ratios], needs_probe=False),
            "probe_nll": Taker(lambda ratios: [probe.nll() for _ in ratios]),
            "probe_kl": Taker(lambda ratios: [probe.kl() for _ in ratios]),
            "probe_accuracy": Taker(lambda ratios: [probe.accuracy() for _ in ratios]),
            "gt_solution": Taker(lambda ratios: [probe.teacher_log_likelihood(ratio) for ratio in ratios]),
        }

    def refuse_unserved(self, section: str, policy: Policy) -> None:
        """UserError where a policy that has seen nothing yet asks, or will ask, for what cannot be measured here."""
        asked = {each.kind for step in (0, 1) for each in wanted(policy, step)}
        unknown = sorted(asked - set(self._table))
        if unknown:
            raise UserError(
                f"{section} asks for the measurement {unknown[0]}, which a flow task does not serve: it has no graded "
                f"text, and serves {', '.join(self._table)}"
            )
