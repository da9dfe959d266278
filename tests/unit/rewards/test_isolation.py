"""The verifier process: what it imports, when it ends, and what happens where it does not start."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
import venv
from pathlib import Path

import math_verify
import psutil
import pytest

import atesd
from atesd.rewards import math
from atesd.rewards.math import MathReward
from atesd.types import UserError

SRC = Path(atesd.__file__).parents[1]
PACKAGES = Path(math_verify.__file__).parents[1]
GRADE = """
import os, sys
from atesd.rewards.math import MathReward
{late}
reward = MathReward()
print(reward(["p"] * 3, [r"\\boxed{{0.5}}", r"\\boxed{{3}}", r"\\boxed{{x+1}}"], answer=["1/2", "4", "1+x"]))
"""
LATE = """
sys.path[:0] = ["", os.getcwd()]
os.environ["PYTHONPATH"] = os.getcwd()
"""
STANDARD = ["random", "types", "dataclasses"]
INSTALLED = ["math_verify", "sympy", "gmpy2", "antlr4", "latex2sympy2_extended"]
FORGED = """
from pathlib import Path
Path(__file__).with_name("executed").open("a").write(__name__ + " ")
parse = verify = LatexExtractionConfig = lambda *arguments, **options: True
"""


def hostile_folder(folder: Path, names: list[str]) -> Path:
    folder.mkdir()
    for name in names:
        (folder / f"{name}.py").write_text(FORGED)
    return folder


def run(*command: str | Path, cwd: Path, pythonpath: list[Path]) -> str:
    path = os.pathsep.join(map(str, pythonpath))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, check=False, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python whose environment holds no package at all."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, symlinks=True)
    return folder / "bin" / "python"


@pytest.mark.parametrize("late", ["", LATE], ids=["as an entry point", "folder joins the path later"])
def test_the_working_directory_is_not_imported_from(tmp_path: Path, late: str) -> None:
    folder = hostile_folder(tmp_path / "here", STANDARD + INSTALLED)
    script = tmp_path / "start.py"
    script.write_text(GRADE.format(late=late))
    assert run(sys.executable, script, cwd=folder, pythonpath=[SRC]) == "[1.0, 0.0, 1.0]"
    assert not (folder / "executed").exists()


def test_nor_where_python_puts_it_on_the_path_itself(tmp_path: Path) -> None:
    """As `python -m` does. What the parent itself imports is then beyond protection, so no standard names here."""
    folder = hostile_folder(tmp_path / "here", INSTALLED)
    (tmp_path / "start.py").write_text(GRADE.format(late=""))
    output = run(sys.executable, "-m", "start", cwd=folder, pythonpath=[folder, SRC, tmp_path])
    assert output == "[1.0, 0.0, 1.0]"
    assert not (folder / "executed").exists()


def test_an_environment_without_the_package_is_helped_by_the_import_path_but_not_by_the_working_directory(
    tmp_path: Path, bare_python: Path
) -> None:
    here, beside = (hostile_folder(tmp_path / name, INSTALLED) for name in ("here", "beside"))
    script = beside / "start.py"
    script.write_text(GRADE.format(late=""))
    assert run(bare_python, script, cwd=here, pythonpath=[here, SRC, PACKAGES]) == "[1.0, 0.0, 1.0]"
    assert not (here / "executed").exists()
    assert not (beside / "executed").exists()


STUB = """
VALUES = {r"\\frac{1}{2}": "h", "0.5": "h", "1/2": "h", r"\\{1,2\\}": "s", r"\\{2,1\\}": "s"}
VALUES["x^2+1"] = VALUES["1+x^2"] = "p"
LatexExtractionConfig = dict
def parse(text, *arguments, **options):
    print("true", flush=True)
    return VALUES.get(text[7:-1], text)
def verify(gold, given, **options):
    return %s
"""


def test_what_a_library_prints_is_no_reply(tmp_path: Path, bare_python: Path) -> None:
    (tmp_path / "start.py").write_text(GRADE.format(late=""))
    (tmp_path / "stub").mkdir()
    (tmp_path / "stub" / "math_verify.py").write_text(STUB % "gold == given")
    output = run(bare_python, tmp_path / "start.py", cwd=Path("/"), pythonpath=[tmp_path / "stub", SRC, PACKAGES])
    assert output == "[1.0, 0.0, 0.0]"  # the stub knows the halves only


def test_a_verifier_that_errs_is_refused(tmp_path: Path, bare_python: Path) -> None:
    (tmp_path / "start.py").write_text(
        GRADE.format(late="").replace("print(", "try:\n  print(") + "except ValueError as error: print(error)"
    )
    (tmp_path / "stub").mkdir()
    stub = tmp_path / "stub" / "math_verify.py"
    stub.write_text(STUB % "True")
    output = run(bare_python, tmp_path / "start.py", cwd=Path("/"), pythonpath=[stub.parent, SRC, PACKAGES])
    assert output.startswith(f"the answer verifier does not start ({stub} gives wrong answers): ")


def test_a_verifier_that_does_not_start_is_explained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    slow = tmp_path / "slow"
    slow.write_text("#!/bin/sh\nexec sleep 600\n")
    slow.chmod(0o755)
    for program, start_s, reason in [
        ("/bin/true", 300.0, "it ended with code 0"),
        ("/no/such/python", 300.0, r"\[Errno 2\] No such file or directory: '/no/such/python'"),
        (str(slow), 0.3, r"no sign of life for 0\.3 s"),
    ]:
        monkeypatch.setattr("sys.executable", program)
        monkeypatch.setattr(math, "_START_S", start_s)
        message = rf"^the answer verifier does not start \({reason}\): .* or set reward\.kind = \"exact\"$"
        with pytest.raises(UserError, match=message):
            MathReward()(["p"], [r"\boxed{0.25}"], answer=["1/4"])


def test_a_missing_package_is_named(bare_python: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", str(bare_python))
    monkeypatch.setattr("sys.path", [])
    with pytest.raises(UserError, match=r"\(ModuleNotFoundError: No module named 'math_verify'\)"):
        MathReward()(["p"], [r"\boxed{0.25}"], answer=["1/4"])


def test_workers_end_with_their_graders() -> None:
    graders = [MathReward() for _ in range(3)]
    assert [grader(["p"], [r"\boxed{0.25}"], answer=["1/4"]) for grader in graders] == [[1.0]] * 3
    processes = [grader._worker.process for grader in graders if grader._worker is not None]
    assert [process.poll() for process in processes] == [None] * 3
    del graders[:2]
    gc.collect()
    assert [process.poll() for process in processes] == [-signal.SIGKILL] * 2 + [None]
    graders.clear()
    gc.collect()
    assert processes[2].poll() == -signal.SIGKILL


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:  # it may go between two looks
        return False


def wait_for_end(pid: int) -> None:
    deadline = time.monotonic() + 300
    while is_running(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


WAITS = """
import sys, time
from atesd.rewards import math
read = math._Worker._read
def reading(self, wall_s):
    print("asked", flush=True)
    return read(self, wall_s)
math._Worker._read = reading
print(reward._worker.process.pid, flush=True)
sys.stdin.readline()
"""


@pytest.mark.parametrize(
    "last", ['print("asked", flush=True); time.sleep(600)', r'reward(["p"], [r"\boxed{9^{9^{9^9}}}"], answer=["3"])']
)
def test_a_worker_ends_when_its_parent_is_killed(tmp_path: Path, last: str) -> None:
    """Idle, it finds the end of its input; over a bomb, its own time limit ends it."""
    script = tmp_path / "start.py"
    script.write_text(GRADE.format(late="").replace("MathReward()", "MathReward(1.0)") + WAITS + last)
    environment = {**os.environ, "PYTHONPATH": str(SRC)}
    with subprocess.Popen(
        [sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as parent:
        assert parent.stdin is not None
        assert parent.stdout is not None
        assert parent.stdout.readline() == "[1.0, 0.0, 1.0]\n"
        pid = int(parent.stdout.readline())
        assert is_running(pid)
        parent.stdin.write("go\n")
        parent.stdin.flush()
        assert parent.stdout.readline() == "asked\n"
        parent.kill()
    wait_for_end(pid)


def test_a_fork_takes_a_worker_of_its_own(tmp_path: Path) -> None:
    script = tmp_path / "start.py"
    script.write_text(
        GRADE.format(late="")
        + """
before = reward._worker.process.pid
child = os.fork()
right = reward(["p"], [r"\\boxed{0.5}"], answer=["1/2"]) == [1.0]
own = reward._worker.process.pid != before
if not child:
    sys.exit(0 if right and own else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), right, own)
print(reward(["p"], [r"\\boxed{0.5}"], answer=["1/2"]), reward._worker.process.pid == before)
"""
    )
    output = run(sys.executable, script, cwd=tmp_path, pythonpath=[SRC])
    assert output.splitlines()[1:] == ["0 True False", "[1.0] True"]
