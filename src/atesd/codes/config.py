"""The section of latent codes."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from atesd.types import Config


class CodesConfig(Config):
    """Latent codes that steer the student, chosen by search and trained with it. Defaults: DLR (2605.14323)."""

    count: Annotated[int, Field(ge=2, le=65536)] = 32
    """C: codes."""
    chunk: Annotated[int, Field(ge=1)] = 4
    """K: tokens that share a code."""
    draws: Annotated[int, Field(ge=1, le=1024)] = 8
    """N: code sequences drawn for a completion, of which the one nearest to the teacher is trained on. Each costs a
    pass without gradient; 1 selects nothing, and costs none."""
    layer: Annotated[int, Field(ge=0)] | None = None
    """Number of the decoder layer behind which vectors are added, from 0; unset, the last of the first half."""
    scale: Annotated[float, Field(gt=0, le=1e4)] = 1.0
    """Factor of the vectors."""
    router_coef: Annotated[float, Field(ge=0, le=1e4)] = 0.5
    """Weight of the chosen sequence's log-probability under the router."""
    prior_coef: Annotated[float, Field(ge=0, le=1e4)] = 0.1
    """Weight of the KL divergence of the codes' mean distribution from a Zipf prior."""

    def describe(self) -> str:
        """Name sizes and choice."""
        chosen = f"the best of {self.draws} draws" if self.draws > 1 else "a draw"
        return f"Every chunk of {self.chunk} tokens is steered by one of {self.count} latent codes, {chosen} (DLR)"
