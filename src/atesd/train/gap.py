"""When the sampler and the trainer no longer agree on what was sampled."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

from atesd.types import UserError


@dataclass(slots=True)
class GapRule:
    """Warns once beyond `warning`, and stops the run beyond `limit`, both in nats.

    What is judged is the mean |sampler log-prob - trainer log-prob| before the weights move, where both are of the same
    weights, at the same temperature: what is left is rounding. In float32 that is some 1e-7; in bfloat16
    SmolLM2-135M had .05 on 48 tokens.
    """

    warning: float
    limit: float
    warned: bool = False

    def heed(self, metrics: Mapping[str, float]) -> None:
        """Judge a step. UserError beyond the limit."""
        gap = metrics.get("rollout/logprob_gap", 0.0)
        told = f"sampler and trainer give the sampled tokens log-probabilities that differ by {gap:.3g} nats on average"
        remedy = 'set rollout.engine.decode = "generate" or model.dtype = "float32" to find out which of them is wrong'
        if not gap <= self.limit:
            raise UserError(
                f"{told}, more than rollout.gap_limit = {self.limit:g}: completions come of another distribution than "
                f"the one that is trained; {remedy}, or raise the limit"
            )
        if gap > self.warning and not self.warned:
            self.warned = True
            warnings.warn(f"{told}, more than rollout.gap_warning = {self.warning:g}: {remedy}", stacklevel=2)
