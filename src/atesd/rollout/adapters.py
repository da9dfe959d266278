"""The adapter that a vLLM server samples with: written to a folder, loaded under a new name, unloaded when replaced."""

from __future__ import annotations

import shutil
import tempfile
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from torch import nn

from atesd.rollout.server import Refused, Server
from atesd.types import UserError

_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM can be told to take at most
LOAD, UNLOAD, MODELS = "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/models"


class Adapters:
    """At most one adapter at a time is ours on the server.

    A version is written as peft writes it, in a folder of its own, and never changed. Each loading has a name of its
    own, which nobody else uses: a server keys its prefix cache by the name, so that under an old one it would continue
    what other weights have read. A server that was started anew knows no name of ours.
    """

    def __init__(self, server: Server, model: nn.Module, folder: str | None, folder_there: str | None) -> None:
        self._server = server
        self._model = cast("Any", model)
        self._is_own = folder is None
        self._folder = Path(tempfile.mkdtemp(prefix="atesd-vllm-") if folder is None else folder).absolute()
        self._there = folder_there
        self._token = uuid.uuid4().hex[:8]
        self._loads = 0
        self._written: Path | None = None
        self._last: Path | None = None
        self.name = ""
        """Under which the server has it; "" where none was loaded."""
        self.version = 0
        """Of the weights that are loaded."""

    def swap(self, version: int) -> bool:
        """Write the model's adapter, load it, and unload the one before; tell whether the server still knew that one.

        Where it did not, it was started anew. UserError where it does not take the adapter, and keeps the one before.
        """
        folder = self._folder / f"{self._token}-{self._loads + 1}-v{version}"
        self._model.save_pretrained(folder, safe_serialization=True)
        name, before, outdated = self.name, self._written, self._last
        self._written = folder
        try:
            self._load()
        except UserError:
            self._written = before
            shutil.rmtree(folder, ignore_errors=True)
            raise
        self.version = version
        was_known = self._unload(name)
        # The one before stays: a server may read it again for a request that it still works on.
        self._last = before
        if outdated is not None:
            shutil.rmtree(outdated, ignore_errors=True)
        return was_known

    def flaw(self, listed: Mapping[str, str]) -> str:
        """Say what is wrong with our adapter among those that a server lists, by name and path; "" where nothing is."""
        path = listed.get(self.name)
        if path is None:
            return "it no longer knows the adapter, as after a restart"
        wanted = self._path()
        return "" if path == wanted else f"under the adapter's name it has other weights, of {path}"

    def reload(self) -> None:
        """Load the present version again, under a new name."""
        name = self.name
        self._load()
        self._unload(name)

    def forget(self) -> None:
        """Leave nothing behind, as far as the server can be reached."""
        if self.name:
            self._server.mention(UNLOAD, {"lora_name": self.name})
        for folder in (self._written, self._last):
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
        if self._is_own:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _path(self) -> str:
        """Return where the server finds the present version."""
        assert self._written is not None
        return str(Path(self._there, self._written.name) if self._there else self._written)

    def _load(self) -> None:
        self._loads += 1
        version = cast("Path", self._written).name.rpartition("-")[2]
        name, path = f"atesd-{self._token}-{self._loads}-{version}", self._path()
        try:
            self._server.post(LOAD, {"lora_name": name, "lora_path": path}, refuses=(500,))
        except Refused as refused:
            # A load whose answer was lost was asked for again, and is refused as done already.
            if listed_models(self._server).get(name) != path:
                raise UserError(_remedy(self._server.url, path, refused, self._rank)) from refused
        if listed_models(self._server).get(name) != path:
            raise UserError(
                f"the vLLM server at {self._server.url} took the adapter in {path}, but does not list it: start a "
                "server as repro/vllm_server.sh does"
            )
        self.name = name

    def _unload(self, name: str) -> bool:
        """Unload an adapter; tell whether the server knew it."""
        if not name:
            return True
        try:
            self._server.post(UNLOAD, {"lora_name": name})
        except Refused:
            return False
        return True

    @property
    def _rank(self) -> int:
        return max(int(config.r) for config in self._model.peft_config.values())


def listed_models(server: Server) -> dict[str, str]:
    """Return the path of every model and adapter that a server lists, by name."""
    return {str(card["id"]): str(card.get("root")) for card in model_cards(server)}


def model_cards(server: Server) -> list[Mapping[str, Any]]:
    """Return what a server lists. UserError where it is no such list."""
    found = server.get(MODELS)
    cards = found.get("data") if isinstance(found, Mapping) else None
    if not isinstance(cards, list) or not all(isinstance(card, Mapping) and "id" in card for card in cards):
        raise UserError(
            f"{server.url} answers, but lists no models at {MODELS}: rollout.engine.url must be that of a vLLM server"
        )
    return cards


def _remedy(url: str, path: str, refused: Refused, rank: int) -> str:
    """Say why a server does not take an adapter, and what helps."""
    said = f"({refused.words})"
    if "rank" in refused.words.lower():
        room = next((each for each in _RANKS if each >= rank), rank)
        return f"the vLLM server at {url} takes no adapter of rank {rank} {said}: start it with --max-lora-rank {room}"
    if refused.status == 404 and "adapter" not in refused.words.lower():
        return (
            f"the vLLM server at {url} has no {LOAD} {said}: start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and "
            "--enable-lora, as repro/vllm_server.sh does"
        )
    if "lora is not enabled" in refused.words.lower() or "lora" not in refused.words.lower():
        return f"the vLLM server at {url} takes no adapter {said}: start it with --enable-lora"
    return (
        f"the vLLM server at {url} does not take the adapter in {path} {said}: where it sees that folder elsewhere, "
        "say where in rollout.engine.adapters_there"
    )
