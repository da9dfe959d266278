"""The engine `vllm`: completions from a vLLM server, over its OpenAI-compatible HTTP API."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, cast
from urllib.parse import urlsplit

from pydantic import Field, field_validator
from torch import nn

from atesd.rollout.render import Renderer
from atesd.rollout.sampler import EngineMethod, Sampler, SamplingConfig, Team

if TYPE_CHECKING:
    from atesd.rollout.served import VllmSampler

Url = Annotated[str, Field(pattern=r"^https?://\S+$")]
Seconds = Annotated[float, Field(gt=0, le=1e6)]


class VllmEngine(EngineMethod):
    """A vLLM server, started beside the trainer, that gets the adapter after every update (docs/vllm.md)."""

    kind: Literal["vllm"] = "vllm"
    url: Url | Annotated[tuple[Url, ...], Field(min_length=1)] = "http://127.0.0.1:8000"
    """Where the server listens. Its key, if it wants one, is read from VLLM_API_KEY. A list: servers of the same
    model, of which process r of several asks number r modulo their number."""
    model: str | None = None
    """Name under which the server serves the base of the model that trains; unset, the only one that it serves. That it
    is the same model is checked either way, by log-probabilities."""
    max_lag: Annotated[int, Field(ge=0)] = 0
    """By how many updates the weights on the server may be behind those that train, where a new adapter could not be
    loaded; older ones are not sampled from."""
    concurrency: Annotated[int, Field(ge=1, le=1024)] = 64
    """Most requests of a process under way; one asks for all attempts at a problem."""
    timeout_s: Seconds = 600.0
    """Seconds after which a request without an answer has failed."""
    wait_s: Annotated[float, Field(ge=0, le=1e6)] = 600.0
    """Seconds for which a server that does not answer is asked again, at the start and whenever it goes away."""
    adapters: str | None = None
    """Folder for the adapters, which the server must see, too; unset, a temporary one of this machine."""
    adapters_there: str | None = None
    """That folder's path on the server's side, where it is another one."""

    samples_ahead: ClassVar[bool] = True
    samples_parts: ClassVar[bool] = True
    meets: ClassVar[bool] = True

    @field_validator("url", mode="before")
    @classmethod
    def _is_named(cls, value: object) -> object:
        if isinstance(value, list | tuple) and not value:
            raise ValueError('a list of no server: name one, such as "http://127.0.0.1:8000"')
        for each in value if isinstance(value, list | tuple) else [value]:
            if isinstance(each, str) and not _is_address(each):
                raise ValueError(f'{each!r} is no address of a server, such as "http://127.0.0.1:8000"')
        return value

    @property
    def urls(self) -> tuple[str, ...]:
        """The address of every server."""
        return (self.url,) if isinstance(self.url, str) else self.url

    def describe(self) -> str:
        """Say what samples."""
        return "Completions come from a vLLM server, log-probabilities of the sampler included"

    def path(self, model: nn.Module, length: int) -> str:  # noqa: ARG002
        """Say which server samples."""
        several = len(self.urls) > 1
        return f"the vLLM server{'s' * several} at {', '.join(self.urls)}"

    def build(self, model: nn.Module, renderer: Renderer, team: Team | None = None) -> Sampler:
        """Wait for the server, check it, and return the sampler. UserError where it does not come, or does not fit."""
        from atesd.rollout.served import VllmSampler

        return VllmSampler(self, model, renderer, team)

    def refuse_training(self, sampler: Sampler, sampling: SamplingConfig) -> None:
        """UserError where the server cannot follow the weights, or give log-probabilities that correct a loss."""
        cast("VllmSampler", sampler).refuse_training(sampling)

    def room(self, sampler: Sampler) -> int | None:
        """Return the server's context, --max-model-len."""
        return cast("VllmSampler", sampler).room


def _is_address(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and text == text.strip()
    except ValueError:  # of a port, or of brackets
        return False
