"""The run directory: its files, a writer and a reader.

    RUN/config.json             the resolved recipe
    RUN/about.json              what the run is, in words: format, exposure, controls, distils, reinforces
    RUN/env.json                versions, platform, commit, what samples
    RUN/metrics.jsonl           one object a step: {"step": n, KEY: number, ...}
    RUN/groups.jsonl            one object a group and step: problem, route, exposure, lambda, rewards
    RUN/rollouts/step_*.jsonl   sampled completions with the hint that the teacher saw and per-token streams
    RUN/eval/step_*.jsonl       every evaluated sample
    RUN/checkpoints/step_*/     whole states (train/checkpoint.py)
    RUN/final/  RUN/best/       models that load with `from_pretrained`
    RUN/track/                  what trackers keep (train/track.py)
    RUN/result.json             written once, when the run is complete
    RUN/manifest.json           seals of the files above that are written once (seals.py)
    RUN/.lock                   held by the process that writes

`exposure` in about.json ends the sentence "The teacher sees ..."; `controls` are sentences without a full stop, neutral
controls left out; `distils` and `reinforces` tell which losses the run may take. Run directories of version 1 have no
about.json.

Reports read only these files. Keys under `time/` and `memory/` differ between two runs of one recipe; all others are
reproducible.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
import shutil
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from shlex import quote
from time import perf_counter
from typing import Any

from atesd.files import dump_json, read_jsonl, refuse_unwritable, settle, write_atomic
from atesd.provenance import environment
from atesd.seals import MANIFEST, flaw, read_manifest, seal, seal_text
from atesd.types import UserError

FORMAT = 2  # of the run directory
ROWS = ("rollouts", "eval")
FOLDERS = (*ROWS, "checkpoints")
WRITTEN = (*FOLDERS, "best", "final", "metrics.jsonl", "groups.jsonl")
_PARTIAL_FILE = re.compile(r"\.(.+)\.\d+\.partial")  # of `write_atomic`
_STEP_FILE = re.compile(r"step_\d{6,}\.jsonl")


def step_name(step: int) -> str:
    """Return the name of a step's file or folder: `step_000042`."""
    return f"step_{step:06d}"


class RunDir:
    """One run's folder. Creating refuses a folder that already holds a run; opening refuses one that holds none."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics_path = path / "metrics.jsonl"
        self.groups_path = path / "groups.jsonl"
        self.checkpoints = path / "checkpoints"
        self._lock: Any = None
        self._known: dict[Path, tuple[tuple[int, ...], dict[str, Any]]] = {}
        """The seals of files as they stood, which are read again only where they have changed since."""

    @staticmethod
    def check_free(path: Path) -> None:
        """UserError unless a run can begin here: nothing lies there, or an earlier start that came to no step."""
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            raise UserError(f"{path} is no folder and is left as it is: choose another place with --out")
        if path.exists() and any(path.iterdir()) and not _never_began(path):
            raise UserError(
                f"run directory {path} already exists and is not empty: "
                f"continue it with --resume {quote(str(path))}, or choose another with --out"
            )
        refuse_unwritable(path)

    @classmethod
    def create(
        cls,
        path: Path,
        config: Mapping[str, Any],
        about: Mapping[str, Any] | None = None,
        env: Mapping[str, Any] | None = None,
    ) -> RunDir:
        """Make the folder, take its lock, and write what the run is, sealed. UserError as `check_free`.

        `env` joins the record of the environment.
        """
        cls.check_free(path)
        path.mkdir(parents=True, exist_ok=True)
        run = cls(path)
        run.lock()
        for folder in FOLDERS:
            shutil.rmtree(path / folder, ignore_errors=True)
            (path / folder).mkdir()
        (path / "config.json").unlink(missing_ok=True)  # of an earlier start; the last to be written, it makes a run
        run._replace(
            {
                "env.json": dump_json(environment() | dict(env or {})),
                "about.json": dump_json({"format": FORMAT, **(about or {})}),
                "config.json": dump_json(config),
            }
        )
        return run

    @classmethod
    def open(cls, path: Path) -> RunDir:
        """Open an existing run, for reading; `lock` before writing."""
        if not (path / "config.json").is_file():
            raise UserError(f"{path} is not a run directory: it has no config.json; give the folder that `train` wrote")
        return cls(path)

    def lock(self) -> None:
        """Become the only writer, until `unlock` or the end of the process. UserError if there is another one."""
        if self._lock is not None:
            return
        linked = [name for name in WRITTEN if (self.path / name).is_symlink()]
        if linked:
            raise UserError(f"{self.path / linked[0]} is a link and is not written through: put a folder in its place")
        try:
            file = os.open(self.path / ".lock", os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be written: .lock: {error.strerror}; let this user write there, or copy the "
                "folder to where it can be written"
            ) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            raise UserError(f"another process is writing {self.path}: wait for it, or stop it first") from None
        self._lock = weakref.finalize(self, os.close, file)

    def unlock(self) -> None:
        """Let others write."""
        if self._lock is not None:
            self._lock()
            self._lock = None

    def seal(self, *names: str) -> None:
        """Add files to the run's manifest, as they are now."""
        manifest = read_manifest(self.path) or {"files": {}}
        kept = {name: each for name, each in manifest["files"].items() if (self.path / name).is_file()}
        manifest["files"] = kept | {name: seal(self.path / name) for name in names}
        write_atomic(self.path / MANIFEST, dump_json(manifest))

    def _replace(self, texts: Mapping[str, str], without: str | None = None) -> None:
        """Write files with their seals, in order, and forget the seal of another.

        The manifest vouches for what was there, too, until all are written: a run that is killed meanwhile is whole.
        """
        manifest = read_manifest(self.path) or {"files": {}}
        there = {name: {"was": seal(self.path / name)} for name in texts if (self.path / name).is_file()}
        coming = {name: {**seal_text(text), **there.get(name, {})} for name, text in texts.items()}
        kept = {name: each for name, each in manifest["files"].items() if name != without}
        write_atomic(self.path / MANIFEST, dump_json({**manifest, "files": kept | coming}))
        for name, text in texts.items():
            write_atomic(self.path / name, text)
        self.seal(*texts)

    def flaw(self, *names: str) -> str | None:
        """Say what is wrong with the named files that were sealed; None where nothing is."""
        manifest = read_manifest(self.path)
        if manifest is None:
            return f"{MANIFEST} is missing or damaged"
        return flaw(self.path, {name: each for name, each in manifest["files"].items() if name in names})

    def amend(self, config: Mapping[str, Any], changes: Iterable[tuple[str, Any, Any]]) -> None:
        """Go on with a recipe that was changed under way; env.json remembers key, old and new value."""
        env = self._json("env.json") or {}
        env["amended"] = [*env.get("amended", []), *({"key": k, "from": was, "to": now} for k, was, now in changes)]
        self._replace({"env.json": dump_json(env), "config.json": dump_json(config)}, without="result.json")
        (self.path / "result.json").unlink(missing_ok=True)

    def remember(self, **facts: Any) -> None:
        """Add to the record of the environment."""
        self._replace({"env.json": dump_json((self._json("env.json") or {}) | facts)})

    def env(self) -> dict[str, Any]:
        """Return the record of the environment."""
        return self._json("env.json") or {}

    def config(self) -> dict[str, Any]:
        """Return the resolved recipe."""
        return self._json("config.json") or {}

    def about(self) -> dict[str, Any]:
        """Return what the run said of itself; {} for a run directory of version 1."""
        return self._json("about.json") or {}

    def metrics(self) -> list[dict[str, Any]]:
        """Return the logged steps in order."""
        return list(read_jsonl(self.metrics_path))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one step. Non-finite numbers are left out: a missing key says "not measured"."""
        finite = {key: value for key, value in metrics.items() if math.isfinite(value)}
        line = json.dumps({"step": step, **finite}, allow_nan=False)
        with self.metrics_path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def groups(self) -> list[dict[str, Any]]:
        """Return what was logged of every group, in order."""
        return list(read_jsonl(self.groups_path))

    def log_groups(self, step: int, groups: Iterable[Mapping[str, Any]]) -> None:
        """Append the groups of one step."""
        with self.groups_path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps({"step": step, **group}, allow_nan=False) + "\n" for group in groups)

    def written(self) -> dict[str, Any]:
        """Return the seals of logs, rollouts and evaluations as they are now: what a checkpoint remembers of them.

        They are on disk then: a checkpoint that outlives a machine's crash is believed only with what it remembers.
        """
        logs = [path for path in (self.metrics_path, self.groups_path) if path.exists()]
        for path in logs:
            settle(path)
        paths = [*logs, *(path for folder in ROWS for path in self._step_files(folder))]
        return {path.relative_to(self.path).as_posix(): self._seal_of(path) for path in paths}

    def _seal_of(self, path: Path) -> dict[str, Any]:
        stat = path.stat()
        mark = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
        if path not in self._known or self._known[path][0] != mark:
            self._known[path] = (mark, seal(path))
        return self._known[path][1]

    def written_flaw(self, seals: Mapping[str, Any]) -> str | None:
        """Say which of the files in `written` is no longer what it was, but for what came after."""
        return flaw(self.path, seals, prefix=True)

    def rewind(self, step: int, seals: Mapping[str, Any]) -> None:
        """Forget what was logged after `written` returned `seals`, at `step`, so that it is written again."""
        for path in (self.metrics_path, self.groups_path):
            kept = seals.get(path.name, {"size": 0})["size"]
            if path.exists():
                os.truncate(path, kept)
        for folder in ROWS:
            for path in self._step_files(folder):
                if int(path.stem.removeprefix("step_")) > step:
                    path.unlink()

    def write_rows(self, folder: str, step: int, rows: Iterable[Mapping[str, Any]]) -> Path:
        """Write `folder`/step_N.jsonl at once."""
        path = self.path / folder / f"{step_name(step)}.jsonl"
        path.parent.mkdir(exist_ok=True)
        write_atomic(path, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))
        return path

    def finish(self, result: Mapping[str, Any]) -> None:
        """Mark the run as complete, and seal its logs."""
        write_atomic(self.path / "result.json", dump_json(result))
        self.seal("result.json", *self.written())

    def result(self) -> dict[str, Any] | None:
        """Return what `finish` wrote, or None while the run is not complete."""
        return self._json("result.json")

    def _step_files(self, folder: str) -> list[Path]:
        """Return the files that this module wrote there; strays are nobody's business."""
        return sorted(path for path in (self.path / folder).glob("step_*.jsonl") if _STEP_FILE.fullmatch(path.name))

    def _json(self, name: str) -> dict[str, Any] | None:
        """Return an object from a file; None where there is none. UserError where it cannot be read."""
        path = self.path / name
        if not path.is_file():
            return None
        try:
            loaded = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is damaged ({error}): restore it from a copy, or start a new run") from error
        if not isinstance(loaded, dict):
            raise UserError(f"{path} is damaged (no object): restore it from a copy, or start a new run")
        return loaded


class ReadRunDir(RunDir):
    """A run that another process writes: what is to be written is left to it."""

    @staticmethod
    def check_free(path: Path) -> None:
        """Leave it to the writer."""

    @classmethod
    def create(
        cls,
        path: Path,
        config: Mapping[str, Any],  # noqa: ARG003
        about: Mapping[str, Any] | None = None,  # noqa: ARG003
        env: Mapping[str, Any] | None = None,  # noqa: ARG003
    ) -> RunDir:
        """Return the folder that the writer makes."""
        return cls(path)

    def lock(self) -> None:
        """Stay a reader."""

    def seal(self, *names: str) -> None:
        """Leave it to the writer."""

    def amend(self, config: Mapping[str, Any], changes: Iterable[tuple[str, Any, Any]]) -> None:
        """Leave it to the writer."""

    def remember(self, **facts: Any) -> None:
        """Leave it to the writer."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Leave it to the writer."""

    def log_groups(self, step: int, groups: Iterable[Mapping[str, Any]]) -> None:
        """Leave it to the writer."""

    def written(self) -> dict[str, Any]:
        """Leave it to the writer."""
        return {}

    def rewind(self, step: int, seals: Mapping[str, Any]) -> None:
        """Leave it to the writer."""

    def write_rows(self, folder: str, step: int, rows: Iterable[Mapping[str, Any]]) -> Path:  # noqa: ARG002
        """Leave it to the writer."""
        return self.path / folder

    def finish(self, result: Mapping[str, Any]) -> None:
        """Leave it to the writer."""


def _never_began(path: Path) -> bool:
    """Tell whether a folder holds nothing but what `create` writes: a start that came to no step."""
    names = {_PARTIAL_FILE.sub(r"\1", entry.name) for entry in path.iterdir()}
    made = {"config.json", "about.json", "env.json", MANIFEST, ".lock", "track", *FOLDERS}
    return ".lock" in names and names <= made and not any(entry for f in FOLDERS for entry in (path / f).glob("*"))


class Phases:
    """Seconds spent in named phases since the last `take`."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a block."""
        start = perf_counter()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + perf_counter() - start

    def take(self) -> dict[str, float]:
        """Return `time/NAME_s` for every phase and start again."""
        taken = {f"time/{name}_s": seconds for name, seconds in self._seconds.items()}
        self._seconds = {}
        return taken
