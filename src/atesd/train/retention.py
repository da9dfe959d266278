"""How retention gates learn: the teacher with a fading hint against the teacher that sees all of it.

    loss = (1/N) sum_t [ KL(p_full || p_gated) - ntp log p_gated(y_t) ] + cap * (mean over rows of the excess)

on the N completion tokens of the step's distilled groups, at most `probe.credit_problems` of them, with the teacher's
weights in place, at temperature 1, each row at its own ratio; the excess is `capacity_excess`'s at M = ceil(ratio *
|hint|). Only gates move. Make Each Token Count 2605.09649 and 2512.03324, whose next-token loss is on a corpus. Ours:
1. the completions are the student's own, and so is the next-token loss; 2. one update a step, after the student's.

Several processes share out the rows, and add up gradients and losses: all move the same gates.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from atesd.exposure.retention_gates import Gates, capacity_excess
from atesd.exposure.revealer import Masker
from atesd.losses.divergence import Scored, Use
from atesd.losses.target import Plain
from atesd.routing.route import Route
from atesd.train.batch import Passage
from atesd.train.credit import Credit
from atesd.train.rows import Rows
from atesd.train.scorer import Scorer
from atesd.train.teacher import Teachers
from atesd.train.veils import Remembered, Veils
from atesd.types import NonFiniteError


class Learning:
    """Moves the gates by one update on the latest step's completions."""

    def __init__(
        self,
        masker: Masker,
        *,
        scorer: Scorer,
        veils: Veils,
        teachers: Teachers,
        rows: Rows,
        credit: Credit,
    ) -> None:
        self._masker = masker
        self._gates: Gates = masker.gates
        self._scorer = scorer
        self._veils = veils
        self._teachers = teachers
        self._rows = rows
        self._credit = credit

    def update(self) -> float | None:
        """Take one step and return the loss before it; None where no hint of the step was veiled.

        NonFiniteError stops before the gates move.
        """
        passages = self._passages()
        if not passages:
            return None
        gates, world = self._gates, self._scorer.world
        own = world.share(passages)
        self._scorer.model.eval()
        totals = [torch.zeros_like(weight) for weight in gates.weights]
        parts = torch.zeros(4, dtype=torch.float64, device=self._scorer.device)
        with self._teachers.own.in_place():
            for members in self._scorer.batches(own):
                chosen = [own[member] for member in members]
                plain = [passage._replace(veil=None) for passage in chosen]
                full = self._scorer.hidden(plain).detached()
                with self._recording(), self._veils.remembering() as remembered:
                    found = self._losses(chosen, full, remembered, passages)
                    loss = found[0] + gates.ntp * found[1] + gates.cap * found[2]
                    for total, part in zip(totals, torch.autograd.grad(loss, gates.weights), strict=True):
                        total.add_(part)
                parts += torch.stack(found).detach().double()
        world.sum(totals)
        kl, ntp, cap, beta = (sum(each) for each in zip(*world.collect(parts.tolist()), strict=True))
        whole = kl + gates.ntp * ntp + gates.cap * cap
        if not math.isfinite(whole) or not bool(torch.stack([total.isfinite().all() for total in totals]).all()):
            raise NonFiniteError(
                f"the loss of the retention gates is {whole:g} or its gradient not finite: lower reveal.learning_rate, "
                "or its weights reveal.ntp and reveal.cap"
            )
        gates.update(totals)
        self._masker.learned({"kl": kl, "ntp": ntp, "cap": cap, "beta": beta})
        return float(whole)

    def _passages(self) -> list[Passage]:
        """Return what the teacher read of the step's distilled completions, where a hint was veiled."""
        batch = self._credit.distilled
        if batch is None:
            return []
        built = self._rows.build(batch.groups, [Route.DISTIL] * len(batch.groups), batch.ratios, ("teacher",))
        passages = [row.view("teacher") for row in built if row.components]
        return [passage for passage in passages if passage.veil is not None]

    def _losses(
        self, chosen: Sequence[Passage], full: Scored, remembered: Sequence[Remembered], every: Sequence[Passage]
    ) -> list[Tensor]:
        """Return the shares of some passages in KL, next-token loss, excess and mean beta."""
        count = sum(len(passage.completion) for passage in every)
        gated = self._scorer.hidden(chosen)
        streams = self._scorer.against(gated, [full], chosen, Plain(), plain=True, use=Use(logprob=True))
        excess, betas = [], []
        for each in remembered:
            for row, passage in each.veiled.items():
                veil = passage.veil
                assert veil is not None
                for log_beta_BHL in each.log_beta:
                    log_beta_HI = log_beta_BHL[row, :, veil.start : veil.stop]
                    excess.append(capacity_excess(log_beta_HI, passage.cost - veil.start, veil.keep))
                    betas.append(log_beta_HI.detach().exp().mean())
        share = len(chosen) / len(every)
        return [
            streams.divergence_N.sum() / count,
            -streams.logprob_N.sum() / count,
            torch.stack(excess).mean() * share,
            torch.stack(betas).mean() * share,
        ]

    @contextmanager
    def _recording(self) -> Iterator[None]:
        """Record gradients for the gates alone: the model's weights need none."""
        frozen: list[nn.Parameter] = [each for each in self._scorer.model.parameters() if each.requires_grad]
        try:
            for weight in frozen:
                weight.requires_grad_(False)
            with torch.enable_grad():
                yield
        finally:
            for weight in frozen:
                weight.requires_grad_(True)
