"""An imitation of the Hugging Face hub on 127.0.0.1: repositories of several commits, what may be read, and pushes.

It answers what huggingface_hub 2 asks when a model or a data set is looked for, downloaded or pushed, with the hub's
headers and error codes. `Session` runs atesd's commands in a process whose hub it is, since the library reads its
address once.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

from support.ports import held_port

TOKEN = "hf_known"
Files = dict[str, bytes]


@dataclass
class Repository:
    """Commits by their hash, and the branches that name some of them."""

    gated: bool = False
    private: bool = False
    commits: dict[str, Files] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, files: Mapping[str, bytes], branch: str = "main") -> str:
        """Put files on a branch and return the commit's hash."""
        digest = hashlib.sha1(branch.encode())
        for name in sorted(files):
            digest.update(name.encode() + files[name])
        sha = digest.hexdigest()
        self.commits[sha], self.branches[branch] = dict(files), sha
        return sha

    def find(self, revision: str) -> str | None:
        """Return the hash that a branch or a hash means."""
        return self.branches.get(revision, revision if revision in self.commits else None)


class Hub:
    """Serves repositories, named `models/owner/name` or `datasets/owner/name`, and takes pushes."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.asked: list[str] = []
        self.failing: int | None = None
        self.failing_pushes = False
        self._server: ThreadingHTTPServer | None = None
        self._held, self._port = held_port()  # while it is gone, too

    @property
    def url(self) -> str:
        """Where it is."""
        return f"http://127.0.0.1:{self._port}"

    def add(self, name: str, folder: Path, branch: str = "main", **kind: bool) -> str:
        """Commit a folder's files to a repository, made where it is new, and return the commit."""
        repository = self.repositories.setdefault(name, Repository(**kind))
        return repository.commit(
            {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}, branch
        )

    def files(self, name: str, branch: str = "main") -> Files:
        """Return the files of a branch."""
        repository = self.repositories[name]
        return repository.commits[repository.branches[branch]]

    def taken(self) -> list[str]:
        """Return what was asked since the last time."""
        taken, self.asked = self.asked, []
        return taken

    def __enter__(self) -> Self:
        """Begin to answer."""
        self.come()
        return self

    def __exit__(self, *_: object) -> None:
        """Answer no more."""
        self.go()
        self._held.close()

    def come(self) -> None:
        """Answer, at the same address as before."""
        hub = self

        class Bound(_Handler):
            """Knows its hub."""

            served = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), Bound)
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def go(self) -> None:
        """Refuse connections."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None


class _Refused(Exception):  # noqa: N818 (it is an answer)
    """An answer that is an error."""

    def __init__(self, status: int, code: str | None = None, message: str = "") -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


class _Handler(BaseHTTPRequestHandler):
    """One request. HTTP/1.0: no connection outlives its answer, so that a hub that goes is gone."""

    served: Hub

    def log_message(self, *_: object) -> None:
        """Keep quiet."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            body = b"".join(iter(self._chunk, b""))
        where = urlsplit(self.path)
        self.served.asked.append(f"{self.command} {unquote(where.path)}")
        with suppress(BrokenPipeError, ConnectionResetError):
            try:
                if self.served.failing is not None:
                    raise _Refused(self.served.failing)
                self._route([unquote(part) for part in where.path.strip("/").split("/")], body)
            except _Refused as refused:
                self._send(json.dumps({"error": refused.message}).encode(), refused.status, code=refused.code,
                           message=refused.message)  # fmt: skip

    def _chunk(self) -> bytes:
        size = int(self.rfile.readline().strip() or b"0", 16)
        chunk = self.rfile.read(size)
        self.rfile.readline()
        return chunk

    def _route(self, parts: list[str], body: bytes) -> None:
        if self._token not in (None, TOKEN):
            raise _Refused(401, message="Invalid credentials in Authorization header")
        match parts:
            case ["api", "whoami-v2"]:
                if self._token is None:
                    raise _Refused(401, message="Invalid username or password.")
                self._json({"type": "user", "name": "me", "auth": {"type": "access_token"}})
            case ["api", "validate-yaml"]:
                self._json({"errors": [], "warnings": []})
            case ["api", "repos", "create"]:
                self._create(json.loads(body))
            case ["api", "models" | "datasets" as kind, owner, name, *rest]:
                self._api(f"{kind}/{owner}/{name}", rest, body)
            case ["datasets", owner, name, "resolve", revision, *path]:
                self._file(f"datasets/{owner}/{name}", revision, "/".join(path))
            case [owner, name, "resolve", revision, *path]:
                self._file(f"models/{owner}/{name}", revision, "/".join(path))
            case _:
                raise _Refused(404)

    def _api(self, name: str, rest: list[str], body: bytes) -> None:
        repository = self._repository(name)
        match rest:
            case ["auth-check"]:
                self._refuse_gated(repository)
                self._json({})
            case [] | ["revision", _]:
                sha, files = self._files(repository, rest[1] if rest else "main")
                self._json({
                    "id": name.partition("/")[2], "sha": sha, "private": repository.private, "tags": [], "downloads": 0,
                    "gated": "manual" if repository.gated else False, "disabled": False, "likes": 0,
                    "lastModified": "2026-01-01T00:00:00.000Z",
                    "siblings": [{"rfilename": path} for path in sorted(files)],
                })  # fmt: skip
            case ["tree", revision, *path]:
                self._refuse_gated(repository)
                self._json(self._tree(self._files(repository, revision)[1], "/".join(path)))
            case ["paths-info", revision]:
                self._refuse_gated(repository)
                files = self._files(repository, revision)[1]
                found = [self._entry(files, path.strip("/")) for path in parse_qs(body.decode())["paths"]]
                self._json([entry for entry in found if entry is not None])
            case ["preupload", _]:
                self._refuse_strangers()
                given = [each["path"] for each in json.loads(body)["files"]]
                self._json({
                    "files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in given]
                })  # fmt: skip
            case ["commit", branch]:
                self._refuse_strangers()
                if self.served.failing_pushes:
                    raise _Refused(403, message="You have no right to write here.")
                sha = repository.commit(self._pushed(repository, branch, body), branch)
                self._json({
                    "success": True, "commitOid": sha, "commitUrl": f"{self.served.url}/{name}/commit/{sha}",
                })  # fmt: skip
            case _:
                raise _Refused(404)

    def _create(self, asked: dict[str, Any]) -> None:
        self._refuse_strangers()
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        key = f"{asked.get('type') or 'model'}s/{name}"
        if key in self.served.repositories:
            raise _Refused(409, message="You already created this model repo")
        repository = self.served.repositories[key] = Repository(private=asked.get("visibility") == "private")
        repository.commit({".gitattributes": b""})
        self._json({"url": f"{self.served.url}/{name}", "name": name})

    def _pushed(self, repository: Repository, branch: str, body: bytes) -> Files:
        files = dict(repository.commits[repository.branches[branch]])
        for line in body.splitlines():
            operation = json.loads(line)
            if operation["key"] == "file":
                files[operation["value"]["path"]] = base64.b64decode(operation["value"]["content"])
        return files

    def _file(self, name: str, revision: str, path: str) -> None:
        repository = self._repository(name)
        self._refuse_gated(repository)
        sha, files = self._files(repository, revision)
        if path not in files:
            self._send(b"", 404, code="EntryNotFound", message="Entry not found", commit=sha)
            return
        content, status = files[path], 200
        asked = self.headers.get("Range", "").removeprefix("bytes=")
        if asked:
            begin, _, end = asked.partition("-")
            content, status = content[int(begin) : int(end) + 1 if end else None], 206
        self._send(content, status, commit=sha, etag=f'"{hashlib.sha1(files[path]).hexdigest()}"')

    def _tree(self, files: Files, folder: str) -> list[dict[str, Any]]:
        prefix = f"{folder}/" if folder else ""
        if folder and not any(path.startswith(prefix) for path in files):
            raise _Refused(404, "EntryNotFound")
        within = [path.removeprefix(prefix) for path in files if path.startswith(prefix)]
        deep = parse_qs(urlsplit(self.path).query).get("recursive", ["False"])[0].lower() in ("true", "1")
        folders = {str(parent) for path in within for parent in Path(path).parents if str(parent) != "."}
        names = sorted([*within, *folders]) if deep else sorted({path.split("/")[0] for path in within})
        return [entry for name in names if (entry := self._entry(files, prefix + name)) is not None]

    @staticmethod
    def _entry(files: Files, path: str) -> dict[str, Any] | None:
        if path in files:
            oid = hashlib.sha1(files[path]).hexdigest()
            return {"type": "file", "path": path, "size": len(files[path]), "oid": oid}
        if any(each.startswith(f"{path}/") for each in files):
            return {"type": "directory", "path": path, "oid": hashlib.sha1(path.encode()).hexdigest()}
        return None

    @property
    def _token(self) -> str | None:
        return self.headers.get("Authorization", "").removeprefix("Bearer ") or None

    def _repository(self, name: str) -> Repository:
        found = self.served.repositories.get(name)
        if found is None or (found.private and self._token is None):
            raise _Refused(401 if self._token is None else 404, "RepoNotFound", "Repository not found")
        return found

    def _files(self, repository: Repository, revision: str) -> tuple[str, Files]:
        sha = repository.find(revision)
        if sha is None:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha, repository.commits[sha]

    def _refuse_gated(self, repository: Repository) -> None:
        if repository.gated:
            raise _Refused(401 if self._token is None else 403, "GatedRepo", "Access to it is restricted")

    def _refuse_strangers(self) -> None:
        if self._token is None:
            raise _Refused(401, message="Invalid username or password.")

    def _json(self, answer: object) -> None:
        self._send(json.dumps(answer).encode())

    def _send(
        self, body: bytes, status: int = 200, *, code: str | None = None, message: str | None = None,
        commit: str | None = None, etag: str | None = None,
    ) -> None:  # fmt: skip
        self.send_response(status)
        told = {"X-Error-Code": code, "X-Error-Message": message, "X-Repo-Commit": commit, "ETag": etag}
        for header, value in told.items():
            if value:
                self.send_header(header, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@dataclass(frozen=True)
class Done:
    """What a command ended with."""

    code: int
    out: str
    err: str
    slept_s: float


class Session:
    """A process that runs one command of atesd after another, as a shell would, with a hub and a cache of its own."""

    def __init__(self, hub: Hub, cache: Path, cwd: Path) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        told = {"HF_ENDPOINT": hub.url, "HF_HOME": str(cache), "HF_HUB_DISABLE_TELEMETRY": "1",
                "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "1000"}  # fmt: skip
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("hub_child.py"))],
            env={**kept, **told}, cwd=cwd, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(self, *arguments: str, token: str | None = None) -> Done:
        """Run `atesd ARGUMENTS`."""
        return Done(**self._ask({"arguments": list(arguments), "token": token}))

    def load(self, model: Mapping[str, Any]) -> dict[str, Any]:
        """Load as a run does; return the weights' sums, the chat template, and what an adapter names as its base."""
        return self._ask({"model": dict(model)})

    def _ask(self, asked: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def __enter__(self) -> Self:
        """Use it."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the process."""
        with self._process:  # which keeps nothing that is worth its end
            self._process.kill()
