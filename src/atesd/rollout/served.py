"""The sampler behind the engine `vllm`: what it asks of the server, and when it believes it."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

from atesd.rollout.adapters import Adapter, Adapters, listed_models
from atesd.rollout.answers import Completion, Order
from atesd.rollout.identity import Base, identify
from atesd.rollout.render import Renderer
from atesd.rollout.requests import TRIES, Requests
from atesd.rollout.sampler import Alone, SamplingConfig, Submitted, Team, Weights, refuse_beyond
from atesd.rollout.server import Server
from atesd.rollout.vllm import VllmEngine
from atesd.seeds import derive_seed
from atesd.types import Message, Turn, UserError

_TEXT = "A train leaves at 9 and travels 180 km at 60 km/h. When does it arrive? Explain each step, then say the time."


@dataclass(slots=True)
class _Call:
    """What was asked for together, and from which weights: those of an adapter, or the base alone."""

    orders: Sequence[Order]
    sampling: SamplingConfig
    adapter: Adapter | None
    requests: Requests = field(init=False)


class VllmSampler:
    """Samples on a vLLM server, from the adapter of the model that trains, or from that very model where it has none.

    The server is waited for and checked when the sampler is made (`identity.py`), whenever it does not know the adapter
    any more, and after every call in which a request failed. The adapter's name and path are looked up before and after
    each call: completions of anything else are thrown away. Log-probabilities are those of the tempered, untruncated
    distribution where the server can give them, which are raw ones at temperature 1 or processed ones without a cut;
    elsewhere turns carry none, which only evaluation may (`refuse_training`).

    One request asks for all completions of a prompt, with a seed that depends on the call's and on the prompt's place
    alone. At temperature 0 a prompt is completed once.
    """

    def __init__(self, settings: VllmEngine, model: nn.Module, renderer: Renderer, team: Team | None = None) -> None:
        self._settings = settings
        self._team = team or Alone()
        urls = settings.urls
        if len(urls) > self._team.size:
            raise UserError(
                f"rollout.engine.url names {len(urls)} servers, of which each process asks one, and there are "
                f"{self._team.size}: start as many processes (docs/processes.md), or name fewer"
            )
        self._leader = self._team.rank % len(urls)
        self._renderer = renderer
        self._is_adapter = hasattr(model, "peft_config")
        self._trained = 0
        self._server = Server(
            urls[self._leader],
            timeout_s=settings.timeout_s,
            wait_s=settings.wait_s,
            connections=settings.concurrency,
        )
        self._adapters = Adapters(self._server, model, settings.adapters, settings.adapters_there)
        self._base = Base(model, tuple(renderer.student_ids([Message(role="user", content=_TEXT)])))
        # Where there is no adapter to load, nothing but the path tells a model from what it was trained from.
        self._path = None if self._is_adapter or settings.model else str(getattr(model, "name_or_path", ""))
        leave = weakref.finalize(self, _leave, self._adapters, self._server)
        try:
            self._identify()
            if self._is_adapter:
                self._swap(0)
        except BaseException:
            leave()
            raise

    def refuse_training(self, sampling: SamplingConfig) -> None:
        """UserError unless the server can take every update and give the log-probabilities of what it samples."""
        if not self._is_adapter:
            raise UserError(_FULL_WEIGHTS)
        if self._has_logprobs(sampling):
            return
        if sampling.temperature == 1 or not _is_cut(sampling):
            mode = "raw" if _is_cut(sampling) else "processed"
            given = "processed" if self._served.is_processed else "raw"
            raise UserError(
                f"the vLLM server at {self._server.url} gives {given} log-probabilities, and {_spelt(sampling)} needs "
                f"{mode} ones: start it with --logprobs-mode {mode}_logprobs"
            )
        raise UserError(
            f"{_spelt(sampling)}: no vLLM server gives the log-probabilities of a distribution with a temperature and "
            "without its cuts: set rollout.temperature = 1, or rollout.top_p = 1 and rollout.top_k = 0"
        )

    @property
    def room(self) -> int | None:
        """Most tokens of a prompt and its completion."""
        return self._served.length

    def sync(self, weights: Weights) -> None:
        """Swap in the weights' adapter. UserError where that fails and the one before is older than `max_lag`."""
        self._trained = weights.version
        if not self._is_adapter:
            if weights.version:
                raise UserError(_FULL_WEIGHTS)
            return
        self._swap(weights.version)

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingConfig,
        *,
        seed: int,
        part: Sequence[int] | None = None,
    ) -> list[Turn]:
        """Sample one completion a prompt. UserError where server or weights are not what they should be.

        With `part`, only for the prompts at these places, in their order: the completions that they have among all.
        """
        return self.submit(prompts, sampling, seed=seed, part=part).result()

    def submit(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingConfig,
        *,
        seed: int,
        part: Sequence[int] | None = None,
    ) -> Submitted:
        """Ask for the same without waiting for it: from the weights of now, whatever is synced before the answer."""
        if not prompts:
            return Submitted(list)
        assert all(prompts), "a prompt without tokens has nothing to continue"
        refuse_beyond(self.room, max(map(len, prompts)), sampling.max_new_tokens)
        self._refuse_old()
        wanted = range(len(prompts)) if part is None else part
        orders = _orders(prompts, seed, once=sampling.temperature == 0)
        own_places = set(wanted)
        orders = [order for order in orders if not own_places.isdisjoint(order.places)]
        if not orders:
            return Submitted(list)
        adapter = self._adapters.current if self._is_adapter else None
        self._restore(adapter)
        if adapter is not None:
            self._adapters.keep(adapter)
        call = _Call(orders, sampling, adapter)
        call.requests = self._asked(call, call.orders)

        def result() -> list[Turn]:
            try:
                found = self._completed(call)
            finally:
                if adapter is not None:
                    self._adapters.release(adapter)
            has_logprobs = self._has_logprobs(sampling)
            turns = {
                place: self._turn(prompts[place], completion, has_logprobs, adapter)
                for order, completions in zip(call.orders, found, strict=True)
                for place, completion in _placed(order, completions)
            }
            return [turns[place] for place in wanted]

        return Submitted(result, call.requests.give_up, lambda: call.requests.seconds)

    def _swap(self, version: int) -> None:
        """Swap in the present weights. Of the processes that ask one server the first one does, the others wait."""
        was_known = True
        if self._team.rank == self._leader:
            try:
                was_known = self._adapters.swap(version)
            except UserError as error:
                if not version or self._lag > self._settings.max_lag:
                    raise
                warnings.warn(f"{error}; completions are {self._lag} updates old meanwhile", stacklevel=3)
        told = self._team.collect(self._adapters.current if self._team.rank == self._leader else None)
        adapter = told[self._leader]
        assert adapter is not None
        if self._team.rank != self._leader:
            self._adapters.follow(adapter)
        if not was_known:
            self._identify()  # started anew since it sampled, perhaps with another model

    @property
    def _lag(self) -> int:
        return self._trained - self._adapters.current.version

    def _has_logprobs(self, sampling: SamplingConfig) -> bool:
        """Tell whether the server gives log-probabilities of the tempered, untruncated distribution."""
        if self._served.is_processed:
            return sampling.temperature == 0 or not _is_cut(sampling)
        return sampling.temperature in (0, 1)

    def _refuse_old(self) -> None:
        if self._is_adapter and self._lag > self._settings.max_lag:
            raise UserError(
                f"the vLLM server has the weights after update {self._adapters.current.version}, {self._lag} behind "
                f"those that train, and rollout.engine.max_lag = {self._settings.max_lag}: sync the sampler after "
                "every update"
            )

    def _restore(self, adapter: Adapter | None) -> None:
        """Load an adapter again where the server has it no more, or another under its name; check who answers then."""
        flaw = "" if adapter is None else self._adapters.flaw(adapter, listed_models(self._server))
        if adapter is None or not flaw:
            return
        warnings.warn(f"the vLLM server at {self._server.url}: {flaw}; it is loaded again", stacklevel=3)
        self._identify()
        self._adapters.reload(adapter)

    def _identify(self) -> None:
        failures = self._server.failures
        self._served = identify(self._server, self._settings.model, self._base, self._path)
        self._failures = failures

    def _is_believed(self, adapter: Adapter | None) -> bool:
        """Tell whether the weights that sampled are still there. UserError where the base is another one."""
        if self._server.failures != self._failures:
            self._identify()
        return adapter is None or not self._adapters.flaw(adapter, listed_models(self._server))

    def _asked(self, call: _Call, orders: Sequence[Order]) -> Requests:
        name = self._served.name if call.adapter is None else call.adapter.name
        return Requests(
            self._server,
            orders,
            name,
            call.sampling,
            self._renderer.eos_ids,
            concurrency=self._settings.concurrency,
        )

    def _completed(self, call: _Call) -> list[list[Completion]]:
        """Wait for a call. What the server could not answer, as it was started anew, is asked again from the same
        weights, and all of it where they were replaced meanwhile.

        All that needs the model is done here, not in the threads that wait for answers.
        """
        found: dict[Order, list[Completion]] = {}
        why = ""
        for attempt in range(TRIES):
            missing = [order for order in call.orders if order not in found]
            if attempt:
                self._restore(call.adapter)
                if call.adapter is None:
                    self._identify()
                call.requests = self._asked(call, missing)
            answers = zip(missing, call.requests.answers(), strict=True)
            found |= {order: answer for order, answer in answers if answer is not None}
            if len(found) < len(call.orders):
                why = "was forgotten, as in a restart,"
            elif self._is_believed(call.adapter):
                return [found[order] for order in call.orders]
            else:
                found, why = {}, "was replaced by another"
        raise UserError(
            f"the adapter on the vLLM server at {self._server.url} {why} in {TRIES} calls running: find out who else "
            "loads adapters there, or starts it again"
        )

    def _turn(self, prompt: Sequence[int], completion: Completion, has_logprobs: bool, adapter: Adapter | None) -> Turn:
        return Turn(
            prompt_ids=tuple(prompt),
            completion_ids=completion.ids,
            logprobs=completion.logprobs if has_logprobs else (),
            text=self._renderer.decode(completion.ids),
            stop=completion.stop,
            weights_version=self._trained if adapter is None else adapter.version,
        )


_FULL_WEIGHTS = (
    'rollout.engine.kind = "vllm" follows adapters, and here all weights train, which vLLM takes over no route of its '
    'HTTP API (/update_weights wants NCCL or CUDA IPC): add model.lora = {}, or set rollout.engine.kind = "hf"'
)


def _leave(adapters: Adapters, server: Server) -> None:
    adapters.forget()
    server.close()


def _is_cut(sampling: SamplingConfig) -> bool:
    return sampling.top_p < 1 or sampling.top_k > 0


def _spelt(sampling: SamplingConfig) -> str:
    return f"temperature = {sampling.temperature:g} with top_p = {sampling.top_p:g} and top_k = {sampling.top_k}"


def _orders(prompts: Sequence[Sequence[int]], seed: int, *, once: bool) -> list[Order]:
    """Put equal prompts into one request. `once`: completions of equal prompts are equal, so that one is enough."""
    places: dict[tuple[int, ...], list[int]] = {}
    for place, prompt in enumerate(prompts):
        places.setdefault(tuple(prompt), []).append(place)
    return [
        Order(prompt, tuple(found), derive_seed(seed, "request", found[0]) >> 1, once and len(found) > 1)
        for prompt, found in places.items()
    ]


def _placed(order: Order, completions: Sequence[Completion]) -> list[tuple[int, Completion]]:
    given = list(completions) * len(order.places) if order.once else list(completions)
    return list(zip(order.places, given, strict=True))
