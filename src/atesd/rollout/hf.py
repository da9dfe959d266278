"""The embedded engine: completions from the very weights that train."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Annotated, Any, ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import nn

from atesd.codes.model import codes_of
from atesd.codes.steer import Codes
from atesd.rollout.decode import Complete, decoding
from atesd.rollout.eager import uncompiled
from atesd.rollout.generate import generating
from atesd.rollout.known import distance, why_unknown
from atesd.rollout.render import Renderer
from atesd.rollout.sampler import EngineMethod, Sampler, SamplingConfig, Weights
from atesd.types import StopReason, Turn, UserError


class HFEngine(EngineMethod):
    """A transformers model in the training process, on the very weights that train."""

    kind: Literal["hf"] = "hf"
    decode: Literal["auto", "generate"] = "auto"
    """`auto`: a faster loop of our own where the architecture is known (Llama, Mistral, Qwen2, Qwen3, with or without
    LoRA), transformers' `generate` elsewhere. `generate`: always that. Equal seeds sample differently in the two."""
    guess: Annotated[int, Field(ge=0, le=64)] = 8
    """Most tokens of the reference solution that are read at once, ahead of what is sampled; each pass takes as many as
    pay. Changes no sample but by rounding; 0 guesses nothing, as do `generate` and a model with codes."""

    samples_in_place: ClassVar[bool] = True
    samples_parts: ClassVar[bool] = True
    guesses: ClassVar[bool] = True

    def describe(self) -> str:
        """Nothing to say."""
        return ""

    def build(self, model: nn.Module, renderer: Renderer) -> Sampler:
        """Return the sampler."""
        return HFSampler(
            model,
            eos_ids=renderer.eos_ids,
            pad_id=renderer.pad_id,
            decode=renderer.decode,
            always_generate=self.decode == "generate",
            guess=self.guess,
        )

    def path(self, model: nn.Module, length: int) -> str:
        """Say which of the two loops samples, and why."""
        if self.decode == "generate":
            return "transformers' generate, as rollout.engine.decode asks"
        why = why_unknown(_beneath(model), length)
        return "atesd's own loop" if why is None else f"transformers' generate, which is slower: {why}"


class HFSampler:
    """Samples with a loop of our own where the model is known to it (`known.py`), else with `generate`.

    Log-probabilities are those of the tempered, untruncated distribution, whatever `top_p` and `top_k` cut; at
    temperature 0 they are those of temperature 1. Completions end at the first of `eos_ids`, which is kept; the pad id
    may be one of them. Nothing of the model's own generation_config is used, so that a repetition penalty shipped with
    a model cannot make its samples off-policy. The samples depend on weights, prompts, settings and seed alone, and
    the global random state is left untouched. An adapter samples as it stands, switched on or off. The codes of a model
    steer its samples, unless they are switched off.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        eos_ids: Sequence[int],
        pad_id: int,
        decode: Callable[[Sequence[int]], str],
        always_generate: bool = False,
        guess: int = 0,
    ) -> None:
        # An adapter lives inside the base model's layers, and the wrapper's `generate` only adds its own settings.
        self._whole = model
        self._model = _beneath(model)
        self._eos_ids = list(eos_ids)
        self._pad_id = pad_id
        self._decode = decode
        self._guess = guess
        self._version = 0
        self._agrees: bool | None = False if always_generate else None
        """Whether our loop gives this model's own logits: None until compared."""

    def sync(self, weights: Weights) -> None:
        """Note the weights' version: the weights themselves are shared."""
        self._version = weights.version

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingConfig,
        *,
        seed: int,
        part: Sequence[int] | None = None,
        references: Sequence[Sequence[int]] = (),
    ) -> list[Turn]:
        """Sample one completion a prompt. UserError if prompt and completion exceed the model's context.

        With `part`, only for the prompts at these places, in their order: the completions that they have among all.
        `references`, what each completion might be, save time where they are near, and change no sample.
        NonFiniteError where the model's logits leave no distribution to sample from.
        """
        if not prompts:
            return []
        assert all(prompts), "a prompt without tokens has nothing to continue"
        longest = max(len(prompt) for prompt in prompts)
        self._check_context(longest, sampling.max_new_tokens)
        wanted = range(len(prompts)) if part is None else part
        if not wanted:
            return []
        turns, own_places = dict[int, Turn](), set(wanted)
        with (
            uncompiled(self._model),
            _evaluating(self._model),
            self._path(prompts[0], longest, sampling, seed) as complete,
        ):
            for chunk in _chunks([len(prompt) for prompt in prompts], sampling):
                asked = [prompts[index] for index in chunk]
                own = [place for place, index in enumerate(chunk) if index in own_places]
                known = [references[index] for index in chunk] if references else ()
                completed = complete(asked, None if part is None else own, known)
                for place, each in zip(own, completed, strict=True):
                    turns[chunk[place]] = self._turn(asked[place], each)
        return [turns[index] for index in wanted]

    def _path(
        self, prompt: Sequence[int], longest: int, sampling: SamplingConfig, seed: int
    ) -> AbstractContextManager[Complete]:
        """Choose what samples."""
        if self._may_decode(prompt, longest + sampling.max_new_tokens):
            return decoding(
                self._model, sampling, eos_ids=self._eos_ids, seed=seed, codes=self._codes, guess=self._guess
            )
        return generating(
            self._model, sampling, eos_ids=self._eos_ids, pad_id=self._pad_id, seed=seed, codes=self._codes
        )

    @property
    def _codes(self) -> Codes | None:
        """What steers at present: looked up anew, as codes may join a model later."""
        codes = codes_of(self._whole)
        return codes if codes is not None and codes.active else None

    def _may_decode(self, prompt: Sequence[int], length: int) -> bool:
        """Whether our loop knows the model and gives its logits; warn if it does not. Broken weights decide nothing."""
        if self._agrees is False or why_unknown(self._model, length) is not None:
            return False
        found = None if self._agrees else distance(self._model, prompt)
        if found is None:
            return True
        self._agrees = found <= 1
        if not self._agrees:
            warnings.warn(
                f"atesd's own decoding gives {type(self._model).__name__} other logits than its forward pass "
                f"({found:.3g} times the tolerance), so transformers' generate samples instead, which is slower; "
                'rollout.engine.decode = "generate" asks for that without this warning',
                stacklevel=4,
            )
        return self._agrees

    def _turn(self, prompt: Sequence[int], completed: tuple[list[int], list[float]]) -> Turn:
        """Cut a row behind its first end token."""
        completion, logprobs = completed
        end = next((place for place, token in enumerate(completion) if token in self._eos_ids), None)
        length = len(completion) if end is None else end + 1
        ids = tuple(completion[:length])
        return Turn(
            prompt_ids=tuple(prompt),
            completion_ids=ids,
            logprobs=tuple(logprobs[:length]),
            text=self._decode(ids),
            stop=StopReason.LENGTH if end is None else StopReason.EOS,
            weights_version=self._version,
        )

    def _check_context(self, prompt: int, completion: int) -> None:
        limit = getattr(self._model.config, "max_position_embeddings", None)
        if limit and prompt + completion > limit:
            raise UserError(
                f"a prompt of {prompt} tokens plus a completion of up to {completion} (max_new_tokens) exceeds the "
                f"model's context of {limit}: lower max_new_tokens or leave out the longest problems"
            )


def _beneath(model: nn.Module) -> Any:
    """Return the model inside adapters' wrapper."""
    return cast("Any", model).get_base_model() if hasattr(model, "get_base_model") else model


def _chunks(lengths: Sequence[int], sampling: SamplingConfig) -> Iterator[list[int]]:
    """Cut prompt indices into calls whose padded size stays within `batch_tokens`, longest prompts first.

    Prompts of similar length go together: a call lasts as long as its longest completion, and long problems tend to
    have long answers.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    start = 0
    while start < len(order):
        size = max(1, sampling.batch_tokens // (lengths[order[start]] + sampling.max_new_tokens))
        yield order[start : start + size]
        start += size


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradient."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
