"""The sampler behind the engine `vllm`: what it asks of the server, and when it believes it."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from time import sleep

from torch import nn

from atesd.rollout.adapters import Adapters, listed_models
from atesd.rollout.answers import Completion, HalfAnswer, Order, completions_of
from atesd.rollout.identity import Base, identify
from atesd.rollout.render import Renderer
from atesd.rollout.sampler import SamplingConfig, Weights
from atesd.rollout.server import Refused, Server
from atesd.rollout.vllm import VllmEngine
from atesd.seeds import derive_seed
from atesd.types import Message, Turn, UserError

TRIES = 3
"""How often half an answer is asked for again, and how often a server may forget the adapter, in one call."""
_TEXT = "A train leaves at 9 and travels 180 km at 60 km/h. When does it arrive? Explain each step, then say the time."


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

    def __init__(self, settings: VllmEngine, model: nn.Module, renderer: Renderer) -> None:
        self._settings = settings
        self._renderer = renderer
        self._is_adapter = hasattr(model, "peft_config")
        self._trained = 0
        self._lock = threading.Lock()
        self._server = Server(
            settings.url,
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
                self._adapters.swap(0)
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

    def sync(self, weights: Weights) -> None:
        """Swap in the weights' adapter. UserError where that fails and the one before is older than `max_lag`."""
        self._trained = weights.version
        if not self._is_adapter:
            if weights.version:
                raise UserError(_FULL_WEIGHTS)
            return
        try:
            was_known = self._adapters.swap(weights.version)
        except UserError as error:
            if self._lag > self._settings.max_lag:
                raise
            warnings.warn(f"{error}; completions are {self._lag} updates old meanwhile", stacklevel=2)
            return
        if not was_known:
            self._identify()  # started anew since it sampled, perhaps with another model

    def sample(self, prompts: Sequence[Sequence[int]], sampling: SamplingConfig, *, seed: int) -> list[Turn]:
        """Sample one completion a prompt. UserError where server or weights are not what they should be."""
        if not prompts:
            return []
        assert all(prompts), "a prompt without tokens has nothing to continue"
        self._check_context(max(map(len, prompts)), sampling.max_new_tokens)
        self._refuse_old()
        orders = _orders(prompts, seed, once=sampling.temperature == 0)
        for _ in range(TRIES):
            self._restore()
            found = self._completed(orders, sampling)
            if self._is_believed():
                break
        else:
            raise UserError(
                f"the adapter on the vLLM server at {self._server.url} was replaced by another in {TRIES} calls "
                "running: find out who else loads adapters there"
            )
        has_logprobs = self._has_logprobs(sampling)
        turns = {
            place: self._turn(prompts[place], completion, has_logprobs)
            for order, completions in zip(orders, found, strict=True)
            for place, completion in _placed(order, completions)
        }
        return [turns[place] for place in range(len(prompts))]

    @property
    def _lag(self) -> int:
        return self._trained - self._adapters.version

    @property
    def _name(self) -> str:
        """What the server calls the weights that are to sample."""
        return self._adapters.name if self._is_adapter else self._served.name

    def _has_logprobs(self, sampling: SamplingConfig) -> bool:
        """Tell whether the server gives log-probabilities of the tempered, untruncated distribution."""
        if self._served.is_processed:
            return sampling.temperature == 0 or not _is_cut(sampling)
        return sampling.temperature in (0, 1)

    def _refuse_old(self) -> None:
        if self._is_adapter and self._lag > self._settings.max_lag:
            raise UserError(
                f"the vLLM server has the weights after update {self._adapters.version}, {self._lag} behind those that "
                f"train, and rollout.engine.max_lag = {self._settings.max_lag}: sync the sampler after every update"
            )

    def _restore(self) -> None:
        """Load the adapter again where the server has it no more, or another under its name; check who answers then."""
        with self._lock:
            flaw = self._adapters.flaw(listed_models(self._server)) if self._is_adapter else ""
            if not flaw:
                return
            warnings.warn(f"the vLLM server at {self._server.url}: {flaw}; it is loaded again", stacklevel=3)
            self._identify()
            self._adapters.reload()

    def _identify(self) -> None:
        failures = self._server.failures
        self._served = identify(self._server, self._settings.model, self._base, self._path)
        self._failures = failures

    def _is_believed(self) -> bool:
        """Tell whether the weights that sampled are still there. UserError where the base is another one."""
        if self._server.failures != self._failures:
            self._identify()
        return not self._is_adapter or not self._adapters.flaw(listed_models(self._server))

    def _completed(self, orders: Sequence[Order], sampling: SamplingConfig) -> list[list[Completion]]:
        """Ask for everything, in a pool of threads; the first failure ends all that has not begun."""
        pool = ThreadPoolExecutor(min(self._settings.concurrency, len(orders)), thread_name_prefix="atesd-vllm")
        try:
            asked = [pool.submit(self._complete, order, sampling) for order in orders]
            return [each.result() for each in asked]
        except BaseException:
            self._server.give_up()
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _complete(self, order: Order, sampling: SamplingConfig) -> list[Completion]:
        """Ask for one prompt's completions, again after half an answer or where the adapter is unknown."""
        why = ""
        for attempt in range(TRIES):
            if attempt:
                sleep(0.1 * attempt)
            name = self._name
            eos_ids = self._renderer.eos_ids
            try:
                answer = self._server.post("/v1/completions", order.body(name, sampling, eos_ids))
                return completions_of(answer, order, name, sampling, eos_ids)
            except HalfAnswer as half:
                why = str(half)
            except Refused as refused:
                why = refused.words
                if refused.status != 404:
                    raise UserError(f"the vLLM server at {self._server.url} refuses to sample: {why}") from refused
                self._restore()
        raise UserError(
            f"the vLLM server at {self._server.url} gave half an answer {TRIES} times ({why}): see its log, and "
            "continue with atesd train --resume"
        )

    def _turn(self, prompt: Sequence[int], completion: Completion, has_logprobs: bool) -> Turn:
        return Turn(
            prompt_ids=tuple(prompt),
            completion_ids=completion.ids,
            logprobs=completion.logprobs if has_logprobs else (),
            text=self._renderer.decode(completion.ids),
            stop=completion.stop,
            weights_version=self._adapters.version if self._is_adapter else self._trained,
        )

    def _check_context(self, prompt: int, completion: int) -> None:
        limit = self._served.length
        if limit and prompt + completion > limit:
            raise UserError(
                f"a prompt of {prompt} tokens plus a completion of up to {completion} (max_new_tokens) exceeds the "
                f"vLLM server's context of {limit}: start it with a larger --max-model-len, lower max_new_tokens or "
                "leave out the longest problems"
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
