"""What lies around the program: places that take no file, terminals, pipes and environments."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from atesd.cli.main import main
from atesd.evaluate.kept import _opened
from atesd.runlog import RunDir, refuse_unwritable
from atesd.types import UserError

HERE = Path(__file__).parents[3]


def atesd(*words: str, env: Mapping[str, str] | None = None, **options: object) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "atesd", *words],
        env={**os.environ, "PYTHONPATH": str(HERE / "src"), **(env or {})},
        capture_output="stdout" not in options,
        text=True,
        timeout=300,
        check=False,
        **options,  # type: ignore[call-overload]
    )


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc, where no folder can be made")
@pytest.mark.parametrize(
    "words",
    [
        ("recipes", "pico", "--out", "/proc/x/mine.toml"),
        ("report", "nowhere", "--out", "/proc/x/report.html"),
        ("train", "pico", "--out", "/proc/x"),
        ("compare", "pico", "--out", "/proc/x"),
        ("warmup", "--steps", "1", "--out", "/proc/x"),
        ("eval", "nowhere", "--out", "/proc/x/rows.jsonl"),
    ],
    ids=lambda words: words[0],
)
def test_a_place_where_no_folder_can_be_made_is_told_before_the_work(
    words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["atesd", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert (
        error == f"error: {words[-1]} cannot be written (No such file or directory): choose another place with --out\n"
    )


def test_a_place_is_tried_in_the_nearest_folder_above_and_nothing_is_left_there(tmp_path: Path) -> None:
    refuse_unwritable(tmp_path / "a" / "b")
    RunDir.check_free(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    for tried in (lambda path: refuse_unwritable(path, "--results"), lambda path: _opened(path, {})):
        with pytest.raises(UserError, match=r"file/a cannot be written \(Not a directory\): .* with --results$"):
            tried(tmp_path / "file" / "a")


def test_a_terminal_without_a_character_shows_its_escape(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("# süß\nseed = 3\n", encoding="utf-8")
    done = atesd("recipes", str(tmp_path / "mine.toml"), env={"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "# s\\xfc\\xdf\nseed = 3\n"
