from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from atesd.types import UserError

from figure import write_figure
from support.runs import write_compare, write_graded

SVG = "{http://www.w3.org/2000/svg}"


def test_the_curve_starts_and_ends_where_it_should(tmp_path: Path) -> None:
    # accuracy 0 at step 0 and 1 at step 10, always: the scale runs from 0 to 1, bottom 294 to top 44, x 64 to 544
    out = write_figure(write_graded(tmp_path / "cmp", {"a<b": {1: [[1.0]]}}), tmp_path / "deep" / "f.svg")
    root = ET.parse(out).getroot()
    line = root.find(f"{SVG}polyline")
    assert line is not None
    assert line.get("points") == "64.0,294.0 544.0,44.0"
    texts = [element.text for element in root.iter(f"{SVG}text")]
    assert "a<b" in texts
    assert "100.0%" in texts


def test_arms_are_drawn_once_each_and_the_file_is_reproducible(tmp_path: Path) -> None:
    folder = write_compare(tmp_path / "cmp", steps=6, problems=4)
    first, second = (write_figure(folder, tmp_path / name).read_bytes() for name in ("a.svg", "b.svg"))
    assert first == second
    root = ET.fromstring(first)
    assert [line.get("class") for line in root.iter(f"{SVG}polyline")] == [f"arm{index} line" for index in range(4)]
    assert [line.get("class") for line in root.iter(f"{SVG}polygon")] == [f"arm{index} band" for index in range(4)]
    assert b"http" not in first.replace(b"http://www.w3.org/2000/svg", b"")


def test_nothing_to_draw_is_said(tmp_path: Path) -> None:
    folder = write_graded(tmp_path / "cmp", {"full": {1: [[1.0]]}})
    (folder / "full" / "seed_1" / "eval" / "step_000010.jsonl").unlink()
    with pytest.raises(UserError, match="no complete run"):
        write_figure(folder, tmp_path / "f.svg")


def test_half_a_surrogate_pair_in_a_title_is_drawn(tmp_path: Path) -> None:
    folder = write_graded(tmp_path / "cmp", {"full": {1: [[1.0]]}})
    about = json.loads((folder / "compare.json").read_text())
    (folder / "compare.json").write_text(json.dumps(about | {"recipe": "\ud83d.toml"}))
    assert "<title>?: Average@1" in write_figure(folder, tmp_path / "figure.svg").read_text()
