"""A still figure of a comparison as plain SVG, for pages that cannot run a script: no dependency, same bytes each time.

Left: Average@k over steps, mean over seeds with 95 % bands. Right: the final Average@k of every arm with its interval.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from html import escape
from importlib import resources
from pathlib import Path

from atesd.files import write_atomic
from atesd.report.checked import writable
from atesd.report.compare import accuracy, finals
from atesd.report.load import load_comparison
from atesd.report.special import accuracy_curve
from atesd.report.study import Study
from atesd.report.traces import COLOURS, SYMBOLS, band_opacity
from atesd.types import UserError

TOP, LEFT, PLOT, HEIGHT = 44, 64, 480, 250  # of the left panel, in user units
NAMES, BARS = 590, 200  # x of the arm names, width of the right panel, which begins behind them
LETTER = 8  # width of a letter
ROW = 34
VARIABLES = ("page", "surface", "text", "muted", "axis", "grid", *(f"arm{index}" for index in range(COLOURS)))

Scale = Callable[[float], float]


def write_figure(compare_dir: Path, out_svg: Path) -> Path:
    """Draw a comparison and return the file's path. UserError if no run is complete."""
    out_svg.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out_svg, writable(draw(load_comparison(compare_dir))))
    return out_svg


def draw(study: Study) -> str:
    """Return the SVG."""
    curves = [accuracy_curve(arm) for arm in study.arms]
    ends = [accuracy(finals(arm)) for arm in study.arms]
    if not any(ends):
        raise UserError(f"{study.title} holds no complete run yet: let one finish")
    shown = [found for curve in curves for _, found in curve] + [end for end in ends if end]
    low = math.floor(10 * min(found["low"] for found in shown)) / 10
    high = math.ceil(10 * max(found["high"] for found in shown)) / 10
    last = max(step for curve in curves for step, _ in curve)
    height = TOP + max(HEIGHT, ROW * len(study.arms)) + 56
    right = NAMES + max(110, LETTER * max(len(arm.name) for arm in study.arms) + 20)
    width = right + BARS + 70
    y = _scale(low, high, TOP + HEIGHT, TOP)
    parts = [
        _axes(y, _levels(low, high), _scale(0, last, LEFT, LEFT + PLOT), last, study.k),
        *(_curve(index, curve, _scale(0, last, LEFT, LEFT + PLOT), y) for index, curve in enumerate(curves) if curve),
        _ends(study, ends, _scale(low, high, right, right + BARS), _levels(low, high), right + BARS + 58),
    ]
    title = f"{study.title}: Average@{study.k}, {len(study.seeds)} seeds, 95 % intervals"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" font-family="system-ui, sans-serif" font-size="13"><title>{escape(title)}</title>'
        f"{_style(len(study.arms))}"
        f'<rect class="surface" width="{width}" height="{height}" rx="8"/>{"".join(parts)}</svg>\n'
    )


def _axes(y: Scale, levels: Sequence[float], x: Scale, last: int, k: int) -> str:
    marks = [
        _text(LEFT - 10, y(level) + 4, f"{level:.0%}", "end") + _rule(LEFT, LEFT + PLOT, y(level)) for level in levels
    ]
    marks += [_text(x(step), TOP + HEIGHT + 20, str(step), "middle") for step in _ticks(last)]
    marks.append(_text(LEFT + PLOT / 2, TOP + HEIGHT + 42, "training step", "middle"))
    marks.append(_text(LEFT - 44, 24, f"Average@{k} on held-out problems", "start", "strong"))
    return "".join(marks)


def _curve(arm: int, curve: Sequence[tuple[int, dict[str, float]]], x: Scale, y: Scale) -> str:
    upper = [f"{x(step):.1f},{y(found['high']):.1f}" for step, found in curve]
    lower = [f"{x(step):.1f},{y(found['low']):.1f}" for step, found in reversed(curve)]
    middle = [f"{x(step):.1f},{y(found['average_at_k']):.1f}" for step, found in curve]
    kind = f"arm{arm % COLOURS}"
    markers = "".join(_marker(arm, *map(float, point.split(","))) for point in middle)
    return (
        f'<polygon class="{kind} band" points="{" ".join(upper + lower)}"/>'
        f'<polyline class="{kind} line" points="{" ".join(middle)}"/>{markers}'
    )


def _ends(study: Study, ends: Sequence[dict[str, float] | None], x: Scale, levels: Sequence[float], edge: float) -> str:
    bottom = TOP + ROW * len(study.arms)
    parts = [_text(NAMES, 24, "After training", "start", "strong")]
    for level in levels[:: max(1, len(levels) // 3)]:
        parts.append(f'<line class="grid" x1="{x(level):.1f}" x2="{x(level):.1f}" y1="{TOP}" y2="{bottom}"/>')
        parts.append(_text(x(level), bottom + 18, f"{level:.0%}", "middle"))
    for index, (arm, end) in enumerate(zip(study.arms, ends, strict=True)):
        middle = TOP + ROW * (index + 0.5)
        parts.append(_text(NAMES, middle + 4, arm.name, "start", "strong"))
        if end is not None:
            parts.append(
                f'<line class="arm{index % COLOURS} bar" x1="{x(end["low"]):.1f}" x2="{x(end["high"]):.1f}" '
                f'y1="{middle}" y2="{middle}"/>{_marker(index, x(end["average_at_k"]), middle)}'
            )
            parts.append(_text(edge, middle + 4, f"{end['average_at_k']:.1%}", "end", "strong"))
    return "".join(parts)


def _marker(arm: int, x: float, y: float) -> str:
    outline = list(SYMBOLS.values())[arm % COLOURS]
    return f'<path class="arm{arm % COLOURS}" d="{outline}" transform="translate({x:.1f} {y:.1f}) scale(.9)"/>'


def _text(x: float, y: float, text: str, anchor: str, kind: str = "") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _rule(left: float, right: float, y: float) -> str:
    return f'<line class="grid" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'


def _scale(low: float, high: float, start: float, end: float) -> Scale:
    span = (high - low) or 1.0
    return lambda value: start + (end - start) * (value - low) / span


def _levels(low: float, high: float) -> list[float]:
    """Every tenth between two tenths."""
    return [tenth / 10 for tenth in range(round(low * 10), round(high * 10) + 1)]


def _ticks(last: int) -> list[int]:
    """About five round steps from 0 on."""
    rough = max(1, last) / 6
    size = 10 ** math.floor(math.log10(rough))
    unit = max(1, next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough))
    return list(range(0, last + 1, int(unit)))


def _style(arms: int) -> str:
    """The report's colours, light and dark, from its style sheet."""
    css = resources.files("atesd.report").joinpath("page.css").read_text(encoding="utf-8")
    light, dark = (_colours(part) for part in css.split("@media (prefers-color-scheme: dark)"))
    kinds = "".join(f".arm{index}{{fill:var(--arm{index});stroke:var(--arm{index})}}" for index in range(COLOURS))
    return (
        f"<style>svg{{{light}}}@media (prefers-color-scheme: dark){{svg{{{dark}}}}}{kinds}"
        "text{fill:var(--muted)}.strong{fill:var(--text);font-weight:600}.surface{fill:var(--surface)}"
        f".grid{{stroke:var(--grid)}}.band{{opacity:{band_opacity(arms)};stroke:none}}"
        ".line{fill:none;stroke-width:2.2}"
        ".bar{stroke-width:3.5;stroke-linecap:round}</style>"
    )


def _colours(css: str) -> str:
    found = dict(re.findall(r"--([a-z0-9-]+): (#[0-9a-f]{6});", css))
    return "".join(f"--{name}:{found[name]};" for name in VARIABLES)
