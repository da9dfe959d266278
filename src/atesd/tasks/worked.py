"""Worked solutions of our own for reasoning-gym data sets that come with answers alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from atesd.types import UserError


def chain_sum(metadata: Mapping[str, Any]) -> str:
    """Write a sum out from left to right, one operation a line, then `#### answer`.

    `8 - 15 + 4` becomes `8 - 15 = -7`, `-7 + 4 = -3`, `#### -3`.
    """
    first, *rest = metadata["expression"].split()
    total, lines = int(first), []
    for sign, number in zip(rest[::2], rest[1::2], strict=True):
        if sign not in "+-":
            raise UserError(f"chain_sum has the operator {sign!r} in {metadata['expression']!r}, known are + and -")
        following = total + int(number) if sign == "+" else total - int(number)
        lines.append(f"{total} {sign} {number} = {following}")
        total = following
    return "\n".join([*lines, f"#### {total}"])


RENDERERS: Mapping[str, Callable[[Mapping[str, Any]], str]] = {"chain_sum": chain_sum}
"""By the name of the data set: from an entry's metadata to its worked solution."""
