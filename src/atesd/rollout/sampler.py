"""What samples completions: the settings and the protocol of every rollout engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Protocol

from pydantic import Field

from atesd.types import Config, Turn


class SamplingConfig(Config):
    """How completions are sampled. Defaults: OPSD's released recipe."""

    temperature: Annotated[float, Field(ge=0)] = 1.1
    """Divides the logits; 0 takes the most probable token (evaluation only)."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Sample from the smallest set of tokens with this mass; 1 switches the cut off."""
    top_k: Annotated[int, Field(ge=0)] = 20
    """Sample from this many most probable tokens; 0 switches the cut off."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 1024
    """Longest completion; one that reaches it without an end token counts as truncated and grades as wrong."""
    group_size: Annotated[int, Field(ge=1)] = 1
    """Completions a problem and step."""
    batch_tokens: Annotated[int, Field(ge=1)] = 262_144
    """Padded positions (prompt and completion) that one engine call may hold: what bounds the memory of its cache."""


class Sampler(Protocol):
    """An engine that samples from the student's weights."""

    def sample(self, prompts: Sequence[Sequence[int]], sampling: SamplingConfig, *, seed: int) -> list[Turn]:
        """Sample one completion a prompt, in order; the same weights, prompts and seed give the same completions."""
        ...

    def sync(self, version: int) -> None:
        """Take over the student's weights after `version` steps."""
        ...
