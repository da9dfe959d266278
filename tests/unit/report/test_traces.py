from __future__ import annotations

from pathlib import Path

import numpy as np

from atesd.report import traces
from atesd.report.load import load_study
from atesd.report.special import accuracy_bands
from atesd.report.traces import MAX_POINTS, line, of_no_arm, short, thin

from support.runs import write_graded


def test_long_series_are_thinned_but_keep_their_ends() -> None:
    points = np.stack([np.arange(10_000.0), np.arange(10_000.0)], axis=1)
    thinned = thin(points)
    assert len(thinned) == MAX_POINTS
    assert (thinned[0, 0], thinned[-1, 0]) == (0, 9_999)
    assert short([0.123456, 1234.56, float("nan")]) == [0.1235, 1235.0, None]
    assert line(0, "a", np.array([[27_525.0, 0.123456]]))["x"] == [27_525.0], "a step is read off"


def test_any_number_of_arms_can_be_told_apart(tmp_path: Path) -> None:
    arms = {f"arm{number:02}": {1: [[1.0]]} for number in range(24)}
    lines = accuracy_bands(load_study([write_graded(tmp_path / "cmp", arms)]))[""]["data"][1::2]
    looks = {(trace["line"]["color"], trace["line"]["dash"], trace["marker"]["symbol"]) for trace in lines}
    assert len(looks) == 24
    css = (Path(traces.__file__).parent / "page.css").read_text()
    assert all(f"--{trace['line']['color'][1:]}: #" in css for trace in lines)


def test_an_arm_name_is_no_markup_for_plotly(tmp_path: Path) -> None:
    study = load_study([write_graded(tmp_path / "cmp", {"<b>%{x}": {1: [[1.0]]}})])
    assert accuracy_bands(study)[""]["data"][1]["hovertemplate"].startswith("&lt;b>% {x}, step")


def test_a_line_of_no_arm_stays_when_the_arm_is_hidden() -> None:
    """The page hides what has the arm's index in `meta`."""
    of_arm = line(2, "name", np.array([[0.0, 1.0]]))
    taken = of_no_arm(of_arm, "@text", dash="dot")
    assert of_arm["meta"] == {"arm": 2}
    assert "meta" not in taken
    assert (taken["line"]["color"], taken["line"]["dash"], taken["marker"]["color"]) == ("@text", "dot", "@text")


def test_an_axis_of_shares_ends_near_0_and_1_whatever_it_shows(tmp_path: Path) -> None:
    """Plotly would draw equal accuracies, all 0 or all 1, on an axis from a whole below to a whole above."""
    study = load_study([write_graded(tmp_path / "cmp", {"full": {1: [[0.0]]}})])
    axis = accuracy_bands(study)[""]["layout"]["yaxis"]
    assert axis["autorangeoptions"] == {"clipmin": -0.03, "clipmax": 1.03}
