"""What lies around the program: places that take no file, terminals, pipes and environments."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from atesd.cli.main import main
from atesd.cli.progress import make_console, metrics_table
from atesd.evaluate.kept import _opened
from atesd.files import refuse_unwritable
from atesd.runlog import RunDir
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


def test_a_place_whose_name_no_file_could_state_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds bytes that are no UTF-8: choose another place with --out"):
        RunDir.check_free(tmp_path / "\udcff")


def test_a_run_that_is_there_is_named_as_a_shell_takes_it(tmp_path: Path) -> None:
    (tmp_path / "a run" / "x").mkdir(parents=True)
    with pytest.raises(UserError, match=rf"continue it with --resume '{tmp_path}/a run', or"):
        RunDir.check_free(tmp_path / "a run")


def test_a_terminal_without_a_character_shows_its_escape(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("# süß\nseed = 3\n", encoding="utf-8")
    done = atesd("recipes", str(tmp_path / "mine.toml"), env={"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "# s\\xfc\\xdf\nseed = 3\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a disk that is full")
@pytest.mark.parametrize("place", ["/dev/full", "/dev/null"])
def test_what_lasts_goes_on_where_its_output_cannot_be_written(place: str) -> None:
    code = (
        "from atesd.cli.progress import make_console\n"
        "console = make_console(lasting=True)\n"
        "for each in range(3): console.print(each)\n"
        "open('/dev/stderr', 'w').write('the end')\n"
    )
    with Path(place).open("w") as full:
        words, env = [sys.executable, "-c", code], {**os.environ, "PYTHONPATH": str(HERE / "src")}
        done = subprocess.run(words, env=env, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    warning = "warning: the output cannot be written (No space left on device); what was begun goes on\n"
    assert (done.returncode, done.stderr) == (0, f"{warning if place == '/dev/full' else ''}the end")


@pytest.mark.parametrize(("columns", "width"), [("0", 80), ("30", 80), ("100", 100), ("wide", 80)])
def test_a_file_has_room_for_numbers_whatever_columns_says(
    columns: str, width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    console = make_console()
    assert console.width == width
    console.print(metrics_table({"avg@4": 0.123456}, "x" * 40, start={"avg@4": 0.5}))
    assert "0.123" in capsys.readouterr().out


def test_a_terminal_is_as_narrow_as_it_says_but_for_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal, as rich reads it
    for columns, width in (("30", 30), ("0", 80)):
        monkeypatch.setenv("COLUMNS", columns)
        console = make_console()
        assert (console.is_terminal, console.width) == (True, width)
