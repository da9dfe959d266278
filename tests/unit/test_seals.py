"""Files that prove themselves: sizes, digests, prefixes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from atesd.seals import flaw, folder_flaw, is_manifest, seal, seal_files, seal_text


def test_a_seal_is_size_and_sha256_of_a_file_or_its_beginning(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"abcdef")
    assert seal(path) == {"size": 6, "sha256": hashlib.sha256(b"abcdef").hexdigest()}
    assert seal(path, 3) == {"size": 3, "sha256": hashlib.sha256(b"abc").hexdigest()}


def sealed(folder: Path) -> Path:
    (folder / "sub").mkdir()
    (folder / "a.bin").write_bytes(bytes(range(256)) * 10)
    (folder / "sub" / "b.json").write_text("{}")
    (folder / "manifest.json").write_text(json.dumps({"files": seal_files(folder)}))
    return folder


def test_an_untouched_folder_has_no_flaw(tmp_path: Path) -> None:
    folder = sealed(tmp_path)
    assert set(seal_files(folder)) == {"a.bin", "sub/b.json"}
    assert folder_flaw(folder) is None
    (folder / "sub" / "manifest.json").write_text("{}")
    assert set(seal_files(folder)) == {"a.bin", "sub/b.json", "sub/manifest.json"}, "only its own is left out"


@pytest.mark.parametrize("place", [0, 1279, 2559])
def test_every_flipped_byte_shows(tmp_path: Path, place: int) -> None:
    folder = sealed(tmp_path)
    content = bytearray((folder / "a.bin").read_bytes())
    content[place] ^= 1
    (folder / "a.bin").write_bytes(content)
    assert folder_flaw(folder) == "a.bin is not what was written"


def test_missing_short_and_long_files_show(tmp_path: Path) -> None:
    folder = sealed(tmp_path)
    (folder / "sub" / "b.json").write_text("{} ")
    assert folder_flaw(folder) == "sub/b.json has 3 bytes instead of 2"
    assert flaw(folder, {"sub/b.json": seal(folder / "sub" / "b.json", 2)}, prefix=True) is None
    (folder / "sub" / "b.json").unlink()
    assert folder_flaw(folder) == "sub/b.json is missing"


@pytest.mark.parametrize(
    "content", [None, "", "[]", "{}", '{"files": []}', '{"files": {"a": {"size": "1"}}}', "\udcff"]
)
def test_a_manifest_that_cannot_be_read_is_a_flaw(tmp_path: Path, content: Any) -> None:
    folder = sealed(tmp_path)
    (folder / "manifest.json").unlink()
    if content is not None:
        (folder / "manifest.json").write_text(content, errors="surrogateescape")
    assert folder_flaw(folder) == "manifest.json is missing or damaged"


def test_while_a_file_is_replaced_what_was_there_is_as_good(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    seals = {"a": {**seal_text("n\u00e9w"), "was": seal(tmp_path / "a")}}
    assert flaw(tmp_path, seals) is None
    (tmp_path / "a").write_text("n\u00e9w", encoding="utf-8")
    assert flaw(tmp_path, seals) is None
    assert seal(tmp_path / "a") == seal_text("n\u00e9w")
    (tmp_path / "a").write_text("other")
    assert flaw(tmp_path, seals) == "a has 5 bytes instead of 4"
    for was, is_one in ((3, False), ({"size": 3}, False), (seal_text("x"), True)):
        assert is_manifest({"files": {"a": {**seal_text("y"), "was": was}}}) is is_one
