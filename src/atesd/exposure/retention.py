"""Exposure by content: the teacher's prompt holds the whole solution, and its attention reaches the kept tokens alone.

M = ceil(ratio * |hint|) tokens of the hint are kept, in every layer and head, or as many on average:

    gates            learned per layer and head, under one budget for all of them (exposure/retention_gates.py)
                     after `warmup` updates; `prefix` before
    prefix           the first M
    random_tokens    M by chance
    random_segments  whole segments in a random order, the last of them cut, until M tokens are reached

Make Each Token Count, arXiv 2605.09649. Ours: 1. the gates stand over a teacher's hint, not over a cache that grows;
they learn by self-distillation from the teacher that sees all of it, on the student's completions (train/retention.py);
2. nobody attends to a dropped token but the token itself, the rest of the prompt included: in the paper a prompt is
read in full first, so that what stands behind a token would still tell of it; 3. the other three choices, as controls.

The final answer is never dropped. Where a solution ends by stating it, that statement is no part of |hint| and stays,
so that the prompt is OPSD's at every ratio above 0; elsewhere the answer stands behind the whole solution, as other
partial hints have it. At ratio 1 nothing is dropped; at ratio 0 the hint is the answer alone, as with any revealer.
Positions stay those of the whole prompt.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from itertools import accumulate
from math import ceil
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from atesd.exposure.reveal import Reveal, Unit, check_ratio, reveal, split_segments
from atesd.exposure.revealer import Budget, Masker, ModelSize, RevealMethod
from atesd.facts import RunFacts
from atesd.types import Measurement, Observation, Problem, Trajectory

if TYPE_CHECKING:
    from atesd.exposure.retention_gates import Gates

_OF_GATES = ("hidden", "bias", "learning_rate", "weight_decay", "ntp", "cap", "warmup")


class Retention(RevealMethod):
    """The tokens of the whole solution that a teacher's attention reaches (Make Each Token Count 2605.09649)."""

    kind: Literal["retention"] = "retention"
    choose: Literal["gates", "prefix", "random_tokens", "random_segments"] = "gates"
    """How tokens are chosen: by gates that learn, or, at an equal budget, the first ones, some by chance, or segments
    in a random order; the last two are fixed by run and problem."""
    unit: Unit = "auto"
    """What a segment is, for `random_segments`; as in reveal `segments`."""
    hidden: Annotated[int, Field(ge=1, le=65536)] = 512
    """Hidden units of the gates' networks, one network a layer."""
    bias: Annotated[float, Field(ge=-30, le=30)] = 10.0
    """Start of the gates' last bias: beta is sigmoid(10) = .99995, so that next to nothing is forgotten."""
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 2e-4
    """AdamW's rate for the gates."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.01
    """AdamW's weight decay for the gates."""
    ntp: Annotated[float, Field(ge=0, le=1e6)] = 1.0
    """Weight of the gated teacher's NLL of the completions beside its divergence from the full one."""
    cap: Annotated[float, Field(ge=0, le=1e6)] = 1.0
    """Weight of what the gates remember beyond the budget."""
    warmup: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    """Updates of the gates before the teacher reads by them; until then it reads the first M tokens."""

    reads_rollout: ClassVar[bool] = False
    masks: ClassVar[bool] = True

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> Self:
        read = {"gates": _OF_GATES, "random_segments": ("unit",)}.get(self.choose, ())
        fields = type(self).model_fields
        for name in ("unit", *_OF_GATES):
            if name not in read and getattr(self, name) != fields[name].default:
                raise ValueError(f'reveal.{name} has no effect with choose = "{self.choose}": remove it')
        return self

    def describe(self) -> str:
        """Name the choice."""
        chosen = {
            "gates": "the tokens of the solution that learned gates keep (Make Each Token Count)",
            "prefix": "the solution's first tokens",
            "random_tokens": "tokens of the solution by chance",
            "random_segments": "segments of the solution by chance",
        }
        return f"{chosen[self.choose]}, the others hidden from its attention"

    def build(self, run: RunFacts) -> Masker:
        """Return the revealer."""
        return Retainer(self, run.seed_for("retention"))


class Retainer:
    """Says how many tokens are kept, and which, unless gates do. Its state is the gates'."""

    def __init__(self, section: Retention, seed: int) -> None:
        self.section = section
        self._seed = seed
        self.gates: Gates | None = None
        self._latest: dict[str, float] = {}

    def prepare(self, size: ModelSize) -> None:
        """Make the gates, where there are any."""
        if self.section.choose != "gates":
            return
        from atesd.exposure.retention_gates import Gates

        section = self.section
        self.gates = Gates(
            layers=size.layers,
            heads=size.key_heads,
            width=size.width,
            hidden=section.hidden,
            bias=section.bias,
            learning_rate=section.learning_rate,
            weight_decay=section.weight_decay,
            ntp=section.ntp,
            cap=section.cap,
            seed=self._seed % 2**63,
            device=size.device,
        )

    def reveal(self, problem: Problem, ratio: float, rollout: Trajectory | None = None) -> Reveal:  # noqa: ARG002
        """Show the whole solution, masked between the ratios 0 and 1."""
        check_ratio(ratio)
        if ratio in (0.0, 1.0):
            return reveal(problem.solution, ratio, unit="token")
        split_segments(problem.solution, "token")  # which refuses an empty one
        return Reveal(problem.solution, ratio, 0, 1, masked=True)

    def kept(self, problem: Problem, ratio: float, pieces: Sequence[str]) -> Budget:
        """Return M and which M tokens, by their place in the hint; `pieces` are the texts of its tokens."""
        count = len(pieces)
        keep = min(count, ceil(ratio * count - 1e-9))
        if self.section.choose == "gates" and not self._is_warming_up:
            return Budget(keep, None)
        order = list(range(count))
        if self.section.choose == "random_tokens":
            self._chance(problem).shuffle(order)
        elif self.section.choose == "random_segments":
            order = self._by_segment(problem, pieces)
        return Budget(keep, tuple(sorted(order[:keep])))

    @property
    def _is_warming_up(self) -> bool:
        return self.gates is not None and self.gates.updates < self.section.warmup

    def _by_segment(self, problem: Problem, pieces: Sequence[str]) -> list[int]:
        """Return the tokens, segments in a random order; a token belongs where its first character stands."""
        segments = split_segments("".join(pieces), self.section.unit)
        ends = list(accumulate(map(len, segments)))
        starts = [0, *accumulate(map(len, pieces))][:-1]
        owner = [min(sum(end <= start for end in ends), len(ends) - 1) for start in starts]
        order = list(range(len(segments)))
        self._chance(problem).shuffle(order)
        return [token for segment in order for token, own in enumerate(owner) if own == segment]

    def _chance(self, problem: Problem) -> random.Random:
        return random.Random(f"{self._seed} {problem.id}")

    def learned(self, numbers: Mapping[str, float]) -> None:
        """Take in what the gates' latest update gave, for the log."""
        self._latest = {f"retention/{name}": value for name, value in numbers.items()}

    def wants(self, step: int) -> Sequence[Measurement]:
        """Ask for an update of the gates after every step."""
        return [Measurement("retention")] if step and self.section.choose == "gates" else []

    def observe(self, observation: Observation) -> None:
        """Forget the numbers of an earlier step where this one had none."""
        if observation.number(Measurement("retention")) is None:
            self._latest = {}

    def metrics(self) -> Mapping[str, float]:
        """Return the parts of the gates' loss, and their mean beta."""
        return self._latest

    def state_dict(self) -> dict[str, Any]:
        """Return the gates with their optimizer."""
        return {"gates": None if self.gates is None else self.gates.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned, into gates that `prepare` made."""
        if self.gates is not None:
            self.gates.load_state_dict(state["gates"])
