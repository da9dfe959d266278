"""Building blocks of the figures: layout, lines, bands, intervals and clouds as plain plotly dictionaries.

Colours are names such as `@arm0` or `@arm0/0.2` (with opacity): `page.js` looks them up among the style sheet's
variables, so that light and dark follow the reader's setting and an arm has one colour everywhere. A trace that belongs
to an arm carries its index in `meta`, by which the page shows and hides it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from atesd.report.study import Floats

Figure = dict[str, Any]

MAX_POINTS = 300  # of one line or cloud: bounds the file
SYMBOLS = {  # plotly's name of the marker, and its outline for the legend in a box from -6 to 6
    "circle": "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0-10 0",
    "square": "M-4.5-4.5h9v9h-9z",
    "diamond": "M0-6 6 0 0 6-6 0z",
    "triangle-up": "M0-5.5 5.5 4.5h-11z",
    "cross": "M-2-5.5h4v3.5h3.5v4h-3.5v3.5h-4v-3.5h-3.5v-4h3.5z",
    "triangle-down": "M0 5.5 5.5-4.5h-11z",
    "x": "M-3-5.5 0-2.5 3-5.5 5.5-3 2.5 0 5.5 3 3 5.5 0 2.5-3 5.5-5.5 3-2.5 0-5.5-3z",
    "pentagon": "M0-5.8 5.5-1.8 3.4 4.7-3.4 4.7-5.5-1.8z",
    "hourglass": "M-5-5.5h10l-10 11h10z",
    "star": "M0-6 1.6-1.9 6-1.9 2.5.8 3.8 5.2 0 2.6-3.8 5.2-2.5.8-6-1.9-1.6-1.9z",
}
# Of a y axis: an axis of equal values, all 0 say, would else reach from -100 % to 100 %.
SHARES = {"tickformat": ".0%", "autorangeoptions": {"clipmin": -0.03, "clipmax": 1.03}}
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
COLOURS = len(SYMBOLS)


def colour(arm: int) -> str:
    """Return the colour name of an arm; from the eleventh arm on, colours repeat and dashes tell arms apart."""
    return f"@arm{arm % COLOURS}"


def symbol(arm: int) -> str:
    """Return the marker of an arm, which tells arms apart where colours do not."""
    return list(SYMBOLS)[arm % COLOURS]


def thin(points: Floats, most: int = MAX_POINTS) -> Floats:
    """Keep at most so many rows, evenly spread, first and last included."""
    if len(points) <= most:
        return points
    kept: Floats = points[np.linspace(0, len(points) - 1, most).round().astype(int)]
    return kept


def short(values: Iterable[float]) -> list[float | None]:
    """Round to four significant digits, what a figure can show, but for whole numbers: steps are read off.

    None, a gap, stands where there is no number.
    """

    def one(value: float) -> float:
        return value if value.is_integer() else float(f"{value:.4g}")

    return [None if math.isnan(value) else one(float(value)) for value in values]


def band_opacity(arms: int) -> float:
    """Fainter bands where many arms overlap."""
    return round(min(0.14, 0.56 / arms), 3)


def axis(title: str) -> Figure:
    """An axis without zoom: dragging scrolls the page."""
    return {
        **({"title": {"text": title, "standoff": 8}} if title else {}),
        "gridcolor": "@grid",
        "linecolor": "@axis",
        "zeroline": False,
        "automargin": True,
        "fixedrange": True,
        "ticks": "",
    }


def figure(traces: Sequence[Figure], x: str, y: str, *, percent: bool = False, **yaxis: Any) -> Figure:
    """Traces with their axes, `yaxis` in plotly's words. Without a legend: the page shows one for all figures."""
    frame = {
        "xaxis": axis(x) | {"showgrid": False, "showline": True},
        "yaxis": axis(y) | (SHARES if percent else {}) | yaxis,
        "font": {"color": "@muted", "size": 12.5},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "hoverlabel": {"bgcolor": "@surface", "bordercolor": "@axis", "font": {"color": "@text"}},
        "margin": {"l": 8, "r": 14, "t": 10, "b": 8},
        "hovermode": "closest",
        "showlegend": False,
        "dragmode": False,
    }
    return {"data": list(traces), "layout": frame}


def with_legend(drawn: Figure, **layout: Any) -> Figure:
    """Give a figure whose lines are not arms a legend of its own above it, and settings of its layout."""
    place = {"orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"}
    legend = place | {"itemclick": False, "itemdoubleclick": False, "font": {"color": "@text"}}
    return drawn | {"layout": drawn["layout"] | {"showlegend": True, "legend": legend} | layout}


def line(
    arm: int, name: str, points: Floats, *, markers: bool = False, shape: str = "linear", width: float = 2.2
) -> Figure:
    """A line through `points`, [n, 2]."""
    points = thin(points)
    mode, dash = "lines+markers" if markers else "lines", DASHES[arm // COLOURS % len(DASHES)]
    style = {"color": colour(arm), "width": width, "dash": dash, "shape": shape}
    return _of_arm(arm, name, points, 7, "<br>step %{x}: %{y:.4~g}") | {"mode": mode, "line": style}


def of_no_arm(trace: Figure, shade: str, **style: Any) -> Figure:
    """Take a line from its arm, so that it stays when the arm is hidden: its colour and line settings are its own."""
    kept = {key: value for key, value in trace.items() if key != "meta"}
    own = {"line": trace["line"] | {"color": shade} | style, "marker": trace["marker"] | {"color": shade}}
    return kept | own


def banded(arm: int, name: str, points: Sequence[tuple[int, Mapping[str, float]]], *, opacity: float) -> list[Figure]:
    """A line through interval means, under it the band of the intervals."""
    steps = [step for step, _ in points]
    lows, highs = short(found["low"] for _, found in points), short(found["high"] for _, found in points)
    band = {
        "type": "scatter",
        "mode": "lines",
        "x": steps + steps[::-1],
        "y": highs + lows[::-1],
        "fill": "toself",
        "fillcolor": f"{colour(arm)}/{opacity}",
        "line": {"width": 0},
        "hoverinfo": "skip",
        "meta": {"arm": arm},
    }
    middle = line(arm, name, np.array([[step, found["average_at_k"]] for step, found in points]), markers=True)
    middle["customdata"] = [list(pair) for pair in zip(lows, highs, strict=True)]
    middle["hovertemplate"] = _hover(name, ", step %{x}<br>%{y:.1%} (%{customdata[0]:.1%} to %{customdata[1]:.1%})")
    return [band, middle]


def intervals(arm: int, name: str, points: Mapping[str, Mapping[str, float]], places: Sequence[float]) -> Figure:
    """Means with error bars by label, at their places on the x axis."""
    low, mean, high = (np.array([found[key] for found in points.values()]) for key in ("low", "average_at_k", "high"))
    trace = _of_arm(arm, name, np.stack([places, mean], axis=1), 10, ", %{customdata}<br>%{y:.1%}")
    return trace | {"customdata": list(points), "error_y": _bars(low, mean, high, colour(arm), 1.8)}


def cloud(arm: int, name: str, points: Floats, *, percent: bool) -> Figure:
    """One point a step of an arm; `points` are [n, 3]: step, exposure ratio, value."""
    points, number = thin(points), "%{y:.1%}" if percent else "%{y:.3~g}"
    trace = _of_arm(arm, name, points[:, 1:], 6, f", step %{{customdata}}<br>ratio %{{x:.2f}}: {number}")
    trace["marker"]["color"] += "/0.45"
    return trace | {"customdata": points[:, 0].astype(int).tolist()}


def binned(points: Floats) -> Figure:
    """Median and quartiles over steps in tenths of the exposure ratio."""
    bins = np.clip(points[:, 1] * 10, 0, 9).astype(int)
    rows = [
        (points[bins == b, 1].mean(), *np.quantile(points[bins == b, 2], [0.25, 0.5, 0.75])) for b in np.unique(bins)
    ]
    x, low, median, high = np.array(rows).T
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": "median",
        "x": short(x),
        "y": short(median),
        "error_y": _bars(low, median, high, "@text", 1.4),
        "line": {"color": "@text", "width": 1.6},
        "marker": {"color": "@text", "size": 5},
        "hovertemplate": "median of the steps near ratio %{x:.2f}: %{y:.3~g}<extra></extra>",
    }


def plain(name: str) -> str:
    """Keep plotly from reading a name as markup or as a place-holder."""
    return name.replace("&", "&amp;").replace("<", "&lt;").replace("%{", "% {")


def _of_arm(arm: int, name: str, points: Floats, size: int, hover: str) -> Figure:
    """The markers of an arm at `points`, [n, 2]."""
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": short(points[:, 0]),
        "y": short(points[:, 1]),
        "marker": {"symbol": symbol(arm), "size": size, "color": colour(arm)},
        "hovertemplate": _hover(name, hover),
        "meta": {"arm": arm},
    }


def _hover(name: str, text: str) -> str:
    return f"{plain(name)}{text}<extra></extra>"


def _bars(low: Floats, middle: Floats, high: Floats, shade: str, thickness: float) -> Figure:
    """Error bars without caps."""
    ends = {"array": short(high - middle), "arrayminus": short(middle - low)}
    return {"type": "data", **ends, "color": shade, "thickness": thickness, "width": 0}
