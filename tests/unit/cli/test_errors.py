"""Which errors end in one line."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from io import BytesIO, TextIOWrapper
from pathlib import Path

import pytest

from atesd.cli.errors import fail, prepare_streams, user_line
from atesd.recipe import build_config
from atesd.types import NonFiniteError, UserError


def system_error(number: int, filename: str | None = None) -> OSError:
    return OSError(number, os.strerror(number), filename)


def test_a_user_error_is_its_own_line() -> None:
    assert user_line(UserError("give a recipe")) == "give a recipe"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_names_the_file_and_how_to_go_on(number: int) -> None:
    error = system_error(number, "runs/a/state.json")
    error.add_note("continue with: atesd train --resume runs/a")
    line = user_line(error)
    assert line is not None
    assert line.startswith("disk full while writing runs/a/state.json: what was complete before is untouched")
    assert line.endswith("continue with: atesd train --resume runs/a")


@pytest.mark.parametrize("error", [
    system_error(errno.EFBIG, "x.jsonl"), RuntimeError("I/O error: File too large (os error 27)"),
])  # fmt: skip
def test_a_limit_on_files_is_told(error: Exception) -> None:
    what = getattr(error, "filename", None) or "the output"
    assert user_line(error) == f"{what} is larger than files may be here (File too large): raise the limit, ulimit -f"


@pytest.mark.parametrize("kind", [Exception, RuntimeError])
def test_a_full_disk_is_recognised_in_errors_of_rust_libraries(kind: type[Exception]) -> None:
    line = user_line(kind("Error while serializing: I/O error: No space left on device (os error 28)"))
    assert line is not None
    assert "disk full" in line


def test_refused_and_misplaced_writes_name_another_place() -> None:
    assert "no permission to write /x (Permission denied)" in str(user_line(system_error(errno.EACCES, "/x")))
    assert "/x cannot be written (Not a directory)" in str(user_line(system_error(errno.ENOTDIR, "/x")))


def test_a_cache_that_cannot_be_made_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    error = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "/proc/x")
    assert user_line(error) is None
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/proc/x")
    why = "(No such file or directory): let TORCHINDUCTOR_CACHE_DIR name another place"
    assert user_line(error) == f"/proc/x cannot be written {why}"


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENOTDIR])
def test_torchs_own_cache_is_not_what_out_moves(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/cache")
    assert str(user_line(system_error(number, "/cache/x"))).endswith("let TORCHINDUCTOR_CACHE_DIR name another place")
    assert str(user_line(system_error(number, "/run/x"))).endswith("choose another place with --out")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    assert str(user_line(system_error(number, "/cache/x"))).endswith("choose another place with --out")


@pytest.mark.parametrize(
    "error", [ValueError("shapes differ"), system_error(errno.EIO), FileNotFoundError(errno.ENOENT, "no", "a.py")]
)
def test_our_own_errors_keep_their_traceback(error: Exception) -> None:
    assert user_line(error) is None


OWN = """
import json
from typing import ClassVar
from atesd.exposure.controller import ExposureMethod

class Half(ExposureMethod):
    measured: ClassVar[bool] = False
    reads_length: ClassVar[bool] = False
    def describe(self) -> str:
        return json.loads("")
    def build(self, run):
        return None
"""


def test_an_error_of_a_method_of_ones_own_is_one_line_that_names_the_place(tmp_path: Path) -> None:
    (tmp_path / "half.py").write_text(OWN)
    section = build_config({"exposure": {"kind": f"{tmp_path}/half.py:Half"}}).exposure
    with pytest.raises(ValueError, match="Expecting value") as raised:
        section.describe()
    raised.value.add_note("continue with: atesd train --resume runs/a")
    assert user_line(raised.value) == (
        "code of yours raised JSONDecodeError: Expecting value: line 1 column 1 (char 0) "
        f"({tmp_path}/half.py, line 10, in describe): mend it; continue with: atesd train --resume runs/a"
    )
    with pytest.raises(TypeError) as raised_here:
        section.describe(1)  # type: ignore[call-arg]
    assert user_line(raised_here.value) is None, "raised by who calls it"


def test_fail_prints_one_line_for_each_of_the_message(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        fail("first\nsecond", 2)
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: first\nerror: second\n"


def test_fail_sends_no_control_characters_to_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        fail("a\rb\x1b[31m\u2028ü→", 2)
    assert capsys.readouterr().err == "error: a\\rb\\x1b[31m\\u2028ü→\n"


def test_a_number_that_is_not_finite_is_the_users_to_mend() -> None:
    assert user_line(NonFiniteError("lower optim.lr")) == "lower optim.lr"


def test_a_full_disk_is_told_by_what_copies_a_folder(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("x")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "weights")

    with pytest.raises(shutil.Error) as caught:
        shutil.copytree(tmp_path / "model", tmp_path / "out", copy_function=full)
    assert user_line(caught.value) == (
        "disk full while writing the output: what was complete before is untouched; free some space"
    )


@pytest.mark.parametrize(("asked", "kept"), [("strict", "backslashreplace"), ("replace", "replace")])
def test_a_stream_does_what_the_user_asked_of_it(asked: str, kept: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """PYTHONIOENCODING=ascii:replace, for one."""
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, TextIOWrapper(BytesIO(), "ascii", errors=asked))
    prepare_streams()
    found = (sys.stdout.errors, sys.stderr.errors)
    monkeypatch.undo()
    assert found == (kept, kept)
