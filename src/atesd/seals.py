"""Seals: sizes and digests by which files prove that they are what was written.

    FOLDER/manifest.json   {"files": {NAME: {"size": bytes, "sha256": hex}}, ...}

While a file is replaced its seal has a further key, "was": the seal of what was there before, which is as good.

A folder is sealed when all else in it is written, and before it gets its name. A seal tells accidental damage; it does
not tell who wrote the files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
Seal = Mapping[str, Any]
"""{"size": bytes, "sha256": hex}"""

_BLOCK = 1 << 20


def seal(path: Path, size: int | None = None) -> dict[str, Any]:
    """Return the seal of a file, or of its first `size` bytes."""
    digest, left = hashlib.sha256(), path.stat().st_size if size is None else size
    total = left
    with path.open("rb") as file:
        while left > 0 and (block := file.read(min(_BLOCK, left))):
            digest.update(block)
            left -= len(block)
    return {"size": total - left, "sha256": digest.hexdigest()}


def seal_text(text: str) -> dict[str, Any]:
    """Return the seal of the file that will hold a text."""
    return {"size": len(text.encode()), "sha256": hashlib.sha256(text.encode()).hexdigest()}


def seal_files(folder: Path) -> dict[str, Any]:
    """Return the seals of all files below a folder, but for its manifest, by name."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    return {path.relative_to(folder).as_posix(): seal(path) for path in files}


def flaw(folder: Path, seals: Mapping[str, Seal], *, prefix: bool = False) -> str | None:
    """Say what is wrong with the first file that is not as sealed; None where all are.

    With `prefix` a file may have grown since: only what was sealed of it must be there.
    """
    for name, expected in seals.items():
        found = _flaw(folder / name, name, expected, prefix)
        if found and _flaw(folder / name, name, expected.get("was", expected), prefix):
            return found
    return None


def _flaw(path: Path, name: str, expected: Seal, prefix: bool) -> str | None:
    if not path.is_file():
        return f"{name} is missing"
    size = path.stat().st_size
    if size < expected["size"] or (size != expected["size"] and not prefix):
        return f"{name} has {size} bytes instead of {expected['size']}"
    if seal(path, expected["size"])["sha256"] != expected["sha256"]:
        return f"{name} is not what was written"
    return None


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return a folder's manifest; None where there is none, or none that can be read."""
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if is_manifest(found) else None


def folder_flaw(folder: Path) -> str | None:
    """Say what is wrong with a sealed folder; None where everything is as sealed."""
    manifest = read_manifest(folder)
    if manifest is None:
        return f"{MANIFEST} is missing or damaged"
    return flaw(folder, manifest["files"])


def is_manifest(found: Any) -> bool:
    """Tell whether something read is a manifest."""
    files = found.get("files") if isinstance(found, dict) else None
    return isinstance(files, dict) and all(
        isinstance(each, dict) and _is_seal(each) and _is_seal(each.get("was", each)) for each in files.values()
    )


def _is_seal(found: Any) -> bool:
    return isinstance(found, dict) and isinstance(found.get("size"), int) and isinstance(found.get("sha256"), str)
