"""The adapter that a vLLM server samples with: written to a folder, loaded under a new name, unloaded when replaced."""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import nn

from atesd.rollout.requests import TRIES
from atesd.rollout.server import Refused, Server
from atesd.types import UserError

_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM can be told to take at most
LOAD, UNLOAD, MODELS = "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/models"


@dataclass(slots=True, eq=False)
class Adapter:
    """Weights of one version, written, and loaded under a name; a server that was started anew does not know it."""

    version: int
    path: str
    """Where the server finds its files."""
    name: str = ""
    """Under which the server has it."""
    folder: Path | None = None
    """Where this process wrote it; None in those that did not."""
    is_ours: bool = False
    """Whether this process loaded it under that name, and is to unload it."""


class Adapters:
    """A process's adapters on a server: the present one, and those that requests still wait on.

    A version is written as peft writes it, in a folder of its own, and never changed. Each loading has a name of its
    own, which nobody else uses: a server keys its prefix cache by the name, so that under an old one it would continue
    what other weights have read. A server that was started anew knows no name of ours. Of several processes one swaps,
    and the others follow.
    """

    def __init__(self, server: Server, model: nn.Module, folder: str | None, folder_there: str | None) -> None:
        self._server = server
        self._model = cast("Any", model)
        self._is_own = folder is None
        self._folder = Path(tempfile.mkdtemp(prefix="atesd-vllm-") if folder is None else folder).absolute()
        self._there = folder_there
        self._token = uuid.uuid4().hex[:8]
        self._loads = 0
        self._current: Adapter | None = None
        self._before: list[Adapter] = []
        self._kept: list[Adapter] = []
        self._last: Path | None = None

    @property
    def current(self) -> Adapter:
        """The one that was swapped in last."""
        assert self._current is not None
        return self._current

    def swap(self, version: int) -> bool:
        """Write the model's adapter, load it, and unload the one before; tell whether the server still knew that one.

        Where it did not, it was started anew. One that is kept stays. UserError where the server does not take the
        adapter, and keeps the one before.
        """
        self._clear()
        folder = self._folder / f"{self._token}-{self._loads + 1}-v{version}"
        path = str(Path(self._there, folder.name) if self._there else folder)
        adapter = Adapter(version, path, folder=folder)
        try:
            folder.mkdir(parents=True)
        except OSError as error:
            raise UserError(
                f"the adapter cannot be written to {folder} ({error.strerror}): name another folder in "
                "rollout.engine.adapters, which the vLLM server sees, too"
            ) from error
        try:
            # Unless told what to save, peft asks the hub for the base's config each time.
            self._model.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)
            listed = self._load(adapter)
        except Exception:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        was_known = self._current is None or self._current.name in listed
        self._put(adapter)
        return was_known

    def follow(self, adapter: Adapter) -> None:
        """Take over what another process has swapped in."""
        if self._current is None or self._current.path != adapter.path:  # else it could load no newer one
            self._put(Adapter(adapter.version, adapter.path, adapter.name))

    def keep(self, adapter: Adapter) -> None:
        """Leave an adapter loaded until it is released, as often as it was kept."""
        self._kept.append(adapter)

    def release(self, adapter: Adapter) -> None:
        """Let an adapter that was kept go with the next swap, by when every process has waited for its requests."""
        self._kept.remove(adapter)

    def flaw(self, adapter: Adapter, listed: Mapping[str, str]) -> str:
        """Say what is wrong with an adapter of ours among those that a server lists by name and path; else ""."""
        path = listed.get(adapter.name)
        if path is None:
            return "it no longer knows the adapter, as after a restart"
        return "" if path == adapter.path else f"under the adapter's name it has other weights, of {path}"

    def reload(self, adapter: Adapter) -> None:
        """Load the same files again, under a new name."""
        name = adapter.name
        self._load(adapter)
        self._unload(name)

    def forget(self) -> None:
        """Leave nothing behind, as far as the server can be reached."""
        for adapter in {*self._before, *filter(None, [self._current])}:
            if adapter.is_ours:
                self._server.mention(UNLOAD, {"lora_name": adapter.name})
            self._remove(adapter.folder)
        self._remove(self._last)
        if self._is_own:
            self._remove(self._folder)

    def _put(self, adapter: Adapter) -> None:
        if self._current is not None:
            self._before.append(self._current)
        self._current = adapter
        self._clear()

    def _clear(self) -> None:
        """Unload what nobody waits for. The files of the last one stay: a server may read them again for a request that
        it still works on.
        """
        for adapter in [each for each in self._before if each not in self._kept]:
            if adapter.is_ours:
                self._unload(adapter.name)
            self._before.remove(adapter)
            self._remove(self._last)
            self._last = adapter.folder

    @staticmethod
    def _remove(folder: Path | None) -> None:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)

    def _load(self, adapter: Adapter) -> dict[str, str]:
        """Load an adapter under a new name; return what the server lists then.

        One that is not listed is loaded again: the server may have been started anew between the two questions.
        """
        path = adapter.path
        for _ in range(TRIES):
            self._loads += 1
            name = f"atesd-{self._token}-{self._loads}-v{adapter.version}"
            try:
                self._server.post(LOAD, {"lora_name": name, "lora_path": path}, refuses=(500,))
            except Refused as refused:
                # A load whose answer was lost was asked for again, and is refused as done already.
                if listed_models(self._server).get(name) != path:
                    raise UserError(_remedy(self._server.url, path, refused, self._rank)) from refused
            listed = listed_models(self._server)
            if listed.get(name) == path:
                adapter.name, adapter.is_ours = name, True
                return listed
            self._unload(name)  # what is listed under another path holds a place
        raise UserError(
            f"the vLLM server at {self._server.url} took the adapter in {path} {TRIES} times, but does not list it: "
            "start a server as repro/vllm_server.sh does"
        )

    def _unload(self, name: str) -> None:
        """Unload an adapter, if the server knows it."""
        with suppress(Refused):
            self._server.post(UNLOAD, {"lora_name": name})

    @property
    def _rank(self) -> int:
        return max(int(config.r) for config in self._model.peft_config.values())


def listed_models(server: Server) -> dict[str, str]:
    """Return the path of every model and adapter that a server lists, by name."""
    return {str(card["id"]): str(card.get("root")) for card in model_cards(server)}


def model_cards(server: Server) -> list[Mapping[str, Any]]:
    """Return what a server lists. UserError where it is no such list, or kept from us."""
    try:
        found = server.get(MODELS)
    except Refused as refused:
        raise UserError(_unlisted(server.url, refused)) from refused
    cards = found.get("data") if isinstance(found, Mapping) else None
    if not isinstance(cards, list) or not all(isinstance(card, Mapping) and "id" in card for card in cards):
        raise UserError(
            f"{server.url} answers, but lists no models at {MODELS}: rollout.engine.url must be that of a vLLM server"
        )
    return cards


def _unlisted(url: str, refused: Refused) -> str:
    """Say why a server lists no models, and what helps."""
    if refused.status in (401, 403):
        given = "is not the one that it wants" if os.environ.get("VLLM_API_KEY") else "is not set"
        return (
            f"the vLLM server at {url} wants a key, and VLLM_API_KEY {given} ({refused.words}): let it hold what the "
            "server was started with (--api-key)"
        )
    return (
        f"{url} answers with status {refused.status} at {MODELS} ({refused.words[:80]}): rollout.engine.url must be "
        "that of a vLLM server, without /v1"
    )


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
