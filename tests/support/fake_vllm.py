"""A small HTTP server that answers as vLLM does, from a real model and real adapters, and fails on demand."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from atesd.rollout.hf import HFSampler
from atesd.rollout.sampler import SamplingConfig
from atesd.train.model import resolve

from support.ports import held_port

PICO = Path(resolve("pico"))
BASE = "base-model"
_MODELS = threading.Lock()  # of all servers: transformers loads models in one thread at a time

Fault = Callable[["FakeVllm", dict[str, Any]], Any]
"""Gets the server and the whole answer to a completion request; returns what is sent instead.

That is: other JSON, a status with JSON, or a word: `reset` breaks the connection off, `hang` never answers.
"""


@dataclass
class FakeVllm:
    """Serves one folder's model; `url` says where. Use as a context."""

    folder: Path = PICO
    name: str = BASE
    max_rank: int = 16
    max_length: int = 256
    vocabulary: int | None = None
    is_processed: bool = False
    allows_updates: bool = True
    key: str = ""
    """That it wants to be shown, as vLLM's --api-key."""
    adapters: dict[str, str] = field(default_factory=dict)
    """Path of each loaded adapter, by name."""
    paths: list[str] = field(default_factory=list)
    """Path of every adapter that was ever loaded, in order."""
    faults: list[Fault] = field(default_factory=list)
    """For the next completion requests, one each."""
    load_faults: list[Fault] = field(default_factory=list)
    """For the next loads, one each."""
    asked: list[dict[str, Any]] = field(default_factory=list)
    """Every request for sampled completions."""
    most_at_once: int = 0

    def __enter__(self) -> FakeVllm:
        self._counting, self._at_once = threading.Lock(), 0
        self._models: dict[str, Any] = {}
        self._held, self.port = held_port()  # while it is stopped, too
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._held.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Begin anew, at the same address: a server that was started again knows no adapter."""
        self.adapters.clear()
        self._models.clear()
        with _MODELS:
            self._base = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()
        self._size = self.vocabulary or self._base.config.vocab_size
        self.connections: set[socket.socket] = set()
        self._http = _Http(self.connections, ("127.0.0.1", self.port), _handler(self))
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """End it with all its connections, those that a client keeps open, too, and wait for all that it computes.

        An interpreter that ends while torch computes in another thread is aborted.
        """
        self._http.shutdown()
        for connection in list(self.connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._http.server_close()

    def answer(self, method: str, path: str, body: dict[str, Any]) -> Any:
        """Return what is sent: JSON, (status, JSON), or a word."""
        if (method, path) == ("GET", "/v1/models"):
            return {"data": self._cards()}
        if path == "/v1/load_lora_adapter" and self.allows_updates:
            fault = self.load_faults.pop(0) if self.load_faults else None
            answer = self._load(body["lora_name"], body["lora_path"])
            return answer if fault is None else fault(self, answer)
        if path == "/v1/unload_lora_adapter" and self.allows_updates:
            return self._unload(body["lora_name"])
        if path == "/v1/completions":
            return self._completions(body)
        return 404, {"detail": "Not Found"}

    def _cards(self) -> list[dict[str, Any]]:
        base = {"id": self.name, "root": str(self.folder), "parent": None, "max_model_len": self.max_length}
        return [base, *({"id": name, "root": path, "parent": self.name} for name, path in self.adapters.items())]

    def _load(self, name: str, path: str) -> Any:
        rank = json.loads((Path(path) / "adapter_config.json").read_text())["r"]
        if rank > self.max_rank:
            return 500, _error(f"LoRA rank {rank} is greater than max_lora_rank {self.max_rank}.", 500)
        if name in self.adapters:
            return 400, _error(f"The lora adapter '{name}' has already been loaded.", 400)
        self.adapters[name] = path
        self.paths.append(path)
        return f"Success: LoRA adapter '{name}' added successfully."

    def _unload(self, name: str) -> Any:
        if self.adapters.pop(name, None) is None:
            return 404, _error(f"The lora adapter '{name}' cannot be found.", 404)
        return f"Success: LoRA adapter '{name}' removed successfully."

    def _completions(self, body: dict[str, Any]) -> Any:
        if "allowed_token_ids" in body:
            return self._forced(body)
        if (body["max_tokens"], body["seed"]) == (16, 0):
            return self._sampled(body)  # asked to compare the model, not for a rollout
        with self._counting:
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            fault = self.faults.pop(0) if self.faults else None
            self.asked.append(body)
        try:
            answer = self._sampled(body)
            return answer if fault is None else fault(self, answer)
        finally:
            with self._counting:
                self._at_once -= 1

    def _sampled(self, body: dict[str, Any]) -> Any:
        if body["model"] not in (self.name, *self.adapters):
            return 404, _error(f"The model `{body['model']}` does not exist.", 404)
        if body["temperature"] == 0 and body["n"] > 1:
            return 400, _error("n must be 1 when using greedy sampling", 400)
        with _MODELS:
            sampler = HFSampler(
                self._model(body["model"]), eos_ids=body["stop_token_ids"], pad_id=0, decode=lambda ids: str(list(ids))
            )
            sampling = SamplingConfig(**{key: body[key] for key in ("temperature", "top_p", "top_k")}).model_copy(
                update={"max_new_tokens": body["max_tokens"]}
            )
            seeds = [body["seed"] + index for index in range(body["n"])]
            turns = [sampler.sample([body["prompt"]], sampling, seed=seed)[0] for seed in seeds]
        choices = [
            {
                "index": index,
                "token_ids": list(turn.completion_ids),
                "prompt_token_ids": body["prompt"],
                "logprobs": {"token_logprobs": list(turn.logprobs)},
                "finish_reason": "stop" if turn.stop == "eos" else "length",
            }
            for index, turn in enumerate(turns)
        ]
        return {"model": body["model"], "choices": choices}

    def _model(self, name: str) -> Any:
        """Return the base, or the base under an adapter, as it lies in its folder now."""
        if name == self.name:
            return self._base
        if name not in self._models:
            fresh = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)
            self._models[name] = PeftModel.from_pretrained(fresh, self.adapters[name]).eval()
        return self._models[name]

    def _forced(self, body: dict[str, Any]) -> Any:
        """Score the one token behind a prompt that is allowed."""
        (token,) = body["allowed_token_ids"]
        if token >= self._size:
            return 400, _error("allowed_token_ids contains out-of-vocab token id!", 400)
        with _MODELS, torch.no_grad():
            logits = self._base(input_ids=torch.tensor([body["prompt"]])).logits[0].double()
        logprobs = (logits - logits.exp().sum(-1, keepdim=True).log()).tolist()
        last = 0.0 if self.is_processed or token >= len(logprobs[-1]) else logprobs[-1][token]
        choice = {
            "index": 0,
            "token_ids": [token],
            "logprobs": {"token_logprobs": [last]},
            "finish_reason": "length",
        }
        return {"model": body["model"], "choices": [choice]}


def _error(message: str, status: int) -> dict[str, Any]:
    return {"error": {"message": message, "code": status}}


_CLOSED = 401, {"error": "Unauthorized"}


class _Http(ThreadingHTTPServer):
    """With room for all who come while it is kept from answering; closing it waits for its threads."""

    request_queue_size = 128
    daemon_threads = False

    def __init__(self, connections: set[socket.socket], *given: Any) -> None:
        super().__init__(*given)
        self._connections = connections

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self._connections.add(connection)
        return connection, address


def _handler(fake: FakeVllm) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._reply(fake.answer("GET", self.path, {}) if self._knows_the_key() else _CLOSED)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self._reply(fake.answer("POST", self.path, body) if self._knows_the_key() else _CLOSED)

        def _knows_the_key(self) -> bool:
            return not fake.key or self.headers["Authorization"] == f"Bearer {fake.key}"

        def _reply(self, answer: Any) -> None:
            if answer == "hang":
                with suppress(OSError):
                    self.rfile.read(1)
            if answer in ("reset", "hang"):
                self.close_connection = True
                self.connection.close()
                return
            status, sent = answer if isinstance(answer, tuple) else (200, answer)
            is_text = isinstance(sent, str)
            content = (sent if is_text else json.dumps(sent)).encode()
            with suppress(BrokenPipeError, ConnectionResetError):
                self.send_response(status)
                self.send_header("Content-Type", "text/plain" if is_text else "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

        def finish(self) -> None:
            fake.connections.discard(self.connection)
            with suppress(OSError, ValueError):
                super().finish()

    return Handler


def without(*keys: str) -> Fault:
    """Leave something out of the first choice."""

    def fault(_: FakeVllm, answer: dict[str, Any]) -> dict[str, Any]:
        first = {key: value for key, value in answer["choices"][0].items() if key not in keys}
        return answer | {"choices": [first, *answer["choices"][1:]]}

    return fault


def with_first(**changed: Any) -> Fault:
    """Change something of the first choice."""
    return lambda _, answer: answer | {"choices": [answer["choices"][0] | changed, *answer["choices"][1:]]}


def sends(answer: Any) -> Fault:
    """Send something else altogether."""
    return lambda fake, whole: answer


def repeated(fault: Fault, times: int) -> Sequence[Fault]:
    return [fault] * times
