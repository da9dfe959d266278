"""Random seeds derived from (run seed, purpose, step), so that no generator's state has to be saved."""

from __future__ import annotations

import zlib

import numpy as np


def derive_seed(seed: int, purpose: str, step: int = 0) -> int:
    """Return a 63-bit seed; different purposes and steps give independent streams."""
    sequence = np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), step])
    return int(sequence.generate_state(1, np.uint64)[0] >> 1)
