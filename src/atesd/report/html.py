"""Write the report: one HTML file that holds everything it needs and asks nobody for anything.

The file carries plotly.js, its style, its script and its data. A Content-Security-Policy allows exactly the two
scripts by their hashes and no request at all, so text that a model wrote cannot run even if an escape were missed.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from plotly.offline import get_plotlyjs

from atesd.files import write_atomic
from atesd.report.checked import writable
from atesd.report.compare import find
from atesd.report.load import load_study
from atesd.report.plots import Shown
from atesd.report.sections import Section, page_header, sections
from atesd.report.study import Study


def write_report(paths: Sequence[Path], out: Path) -> Path:
    """Write the report of one comparison, or of several runs, and return its path."""
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, writable(render(load_study(paths))))
    return out


def render(study: Study) -> str:
    """Return the whole file."""
    findings = find(study)
    parts = sections(study, findings)
    panels = [panel for part in parts for panel in part.panels]
    plotly, script = _script(get_plotlyjs()), _script(_asset("page.js"))
    data = {
        "figures": {panel.name: list(panel.choices.values()) for panel in panels},
        "rollouts": next((part.rollouts for part in parts if part.rollouts), None),
    }
    return Template(_asset("page.html")).substitute(
        policy=escape(_policy(plotly, script)),
        title=escape(f"{study.title}: exposure report"),
        style=_asset("page.css"),
        header=page_header(study, findings, parts),
        body="\n".join(_section(part) for part in parts),
        footer="<footer>Written by <code>atesd report</code> from run directories alone. "
        "This file works offline and makes no request.</footer>",
        data=embed_json(data),
        plotly=plotly,
        script=script,
    )


def embed_json(value: Any) -> str:
    """Serialise for a script element: no `<` remains, so nothing in it can close the element or open a comment."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _section(part: Section) -> str:
    body = part.missing if part.missing else part.html + _figures(part.panels)
    css = ' class="missing"' if part.missing else ""
    return (
        f'<section id="{part.name}"{css} aria-labelledby="{part.name}-title">'
        f'<h2 id="{part.name}-title">{escape(part.title)}</h2>{body}</section>'
    )


def _figures(panels: Sequence[Shown]) -> str:
    choices = any(any(panel.choices) for panel in panels)
    figures = "".join(_figure(panel, spaced=choices) for panel in panels)
    return f'<div class="figures">{figures}</div>' if panels else ""


def _figure(panel: Shown, *, spaced: bool) -> str:
    """A place for a figure, under a choice where there are several, the label of the only one, or a space in a row."""
    choice = '<div class="choice space"></div>' if spaced else ""
    if len(panel.choices) > 1:
        options = "".join(
            f"<option value={index}>{escape(label)}</option>" for index, label in enumerate(panel.choices)
        )
        choice = f'<label class="choice">Show <select data-figure="{panel.name}">{options}</select></label>'
    elif only := next(iter(panel.choices)):
        choice = f'<div class="choice">Shown: {escape(only)}</div>'
    label = escape(panel.description, quote=True)
    return (
        f'<figure>{choice}<div class="plot" id="figure-{panel.name}" role="img" aria-label="{label}"></div>'
        f"<figcaption>{panel.caption}</figcaption></figure>"
    )


def _policy(*scripts: str) -> str:
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in scripts
    )
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )


def _script(text: str) -> str:
    """Return a script that can stand inside HTML unchanged: its hash is of exactly these characters."""
    text = text.replace("\r\n", "\n")
    assert "</script" not in text.lower()
    assert "<!--" not in text
    return text


def _asset(name: str) -> str:
    return resources.files("atesd.report").joinpath(name).read_text(encoding="utf-8")
