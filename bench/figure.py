"""Speed and memory of the peers relative to atesd as a still SVG: no dependency, light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from bench.summary import Line

NAMES, LEFT, BARS, NUMBERS, WIDTH = 12, 330, 360, 704, 980
TOP, ROW = 56, 24
STYLE = (
    "text{fill:#52514e}.strong{fill:#0b0b0b;font-weight:600}.page{fill:#fff}.grid{stroke:#e4e3df}.one{stroke:#0b0b0b}"
    ".bar{stroke:#2a78d6;stroke-width:3;stroke-linecap:round}.dot{fill:#2a78d6}"
    "@media (prefers-color-scheme:dark){text{fill:#c3c2b7}.strong{fill:#fff}.page{fill:#1a1a19}.grid{stroke:#383835}"
    ".one{stroke:#fff}.bar{stroke:#3987e5}.dot{fill:#3987e5}}"
)


def draw(lines: Sequence[Line]) -> str:
    """Return the SVG: one row a comparison, the median ratio and its quartiles on a logarithmic axis."""
    low = 2.0 ** math.floor(math.log2(min(*(line.low for line in lines), 0.99)))
    high = 2.0 ** math.ceil(math.log2(max(*(line.high for line in lines), 1.01)))
    bottom = TOP + ROW * len(lines)

    def x(value: float) -> float:
        return LEFT + BARS * math.log(value / low) / math.log(high / low)

    parts = [_text(NAMES, 24, "Peer over atesd: right of 1 atesd takes less time or memory", "strong")]
    for power in range(round(math.log2(low)), round(math.log2(high)) + 1):
        kind, place = "one" if power == 0 else "grid", x(2.0**power)
        parts.append(f'<line class="{kind}" x1="{place:.1f}" x2="{place:.1f}" y1="{TOP - 8}" y2="{bottom}"/>')
        parts.append(_text(place, bottom + 18, f"{2.0**power:g}", anchor="middle"))
    for index, line in enumerate(lines):
        parts.append(_row(line, TOP + ROW * (index + 0.5), x(line.low), x(line.middle), x(line.high)))
    height = bottom + 34
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'role="img" font-family="system-ui, sans-serif" font-size="13"><title>atesd and its peers</title>'
        f'<style>{STYLE}</style><rect class="page" width="{WIDTH}" height="{height}" rx="8"/>{"".join(parts)}</svg>\n'
    )


def _row(line: Line, y: float, low: float, middle: float, high: float) -> str:
    return (
        _text(NAMES, y + 4, f"{line.what}, {line.peer}")
        + f'<line class="bar" x1="{low:.1f}" x2="{high:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
        + f'<circle class="dot" cx="{middle:.1f}" cy="{y:.1f}" r="5"/>'
        + _text(NUMBERS, y + 4, f"{line.middle:.2f}", "strong")
        + _text(NUMBERS + 50, y + 4, f"{line.amount(line.own)} against {line.amount(line.other)}")
    )


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
