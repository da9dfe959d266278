"""The embedded engine: transformers' `generate` on the very weights that train.

B prompts of one call, L prompt positions, T sampled positions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from atesd.rollout.render import Renderer
from atesd.rollout.sampler import EngineMethod, Sampler, SamplingConfig, Weights
from atesd.rollout.weights import SHRINK, largest_weight
from atesd.types import NonFiniteError, StopReason, Turn, UserError


class HFEngine(EngineMethod):
    """transformers' `generate` in the training process, on the very weights that train."""

    kind: Literal["hf"] = "hf"

    def describe(self) -> str:
        """Nothing to say."""
        return ""

    def build(self, model: nn.Module, renderer: Renderer) -> Sampler:
        """Return the sampler."""
        return HFSampler(model, eos_ids=renderer.eos_ids, pad_id=renderer.pad_id, decode=renderer.decode)


class HFSampler:
    """Samples with `generate`, padding prompts on the left and masking by length.

    Log-probabilities are those of the tempered, untruncated distribution, whatever `top_p` and `top_k` cut; at
    temperature 0 they are those of temperature 1. Completions end at the first of `eos_ids`, which is kept; the pad id
    may be one of them. Nothing of the model's own generation_config is used, so that a repetition penalty shipped with
    a model cannot make its samples off-policy. The samples depend on weights, prompts, settings and seed alone, and
    the global random state is left untouched. An adapter samples as it stands, switched on or off.
    """

    def __init__(
        self, model: nn.Module, *, eos_ids: Sequence[int], pad_id: int, decode: Callable[[Sequence[int]], str]
    ) -> None:
        # An adapter lives inside the base model's layers, and the wrapper's `generate` only adds its own settings.
        self._model = cast("Any", model.get_base_model() if hasattr(model, "get_base_model") else model)  # type: ignore[operator]
        self._eos_ids = list(eos_ids)
        self._pad_id = pad_id
        self._decode = decode
        self._version = 0

    def sync(self, weights: Weights) -> None:
        """Note the weights' version: the weights themselves are shared."""
        self._version = weights.version

    def sample(self, prompts: Sequence[Sequence[int]], sampling: SamplingConfig, *, seed: int) -> list[Turn]:
        """Sample one completion a prompt. UserError if prompt and completion exceed the model's context.

        NonFiniteError where the model's logits leave no distribution to sample from.
        """
        if not prompts:
            return []
        assert all(prompts), "a prompt without tokens has nothing to continue"
        self._check_context(max(len(prompt) for prompt in prompts), sampling.max_new_tokens)
        turns: dict[int, Turn] = {}
        with _sampling_mode(self._model, seed):
            for chunk in _chunks([len(prompt) for prompt in prompts], sampling):
                turns |= zip(chunk, self._generate([prompts[index] for index in chunk], sampling), strict=True)
        return [turns[index] for index in range(len(prompts))]

    def _generate(self, prompts: Sequence[Sequence[int]], sampling: SamplingConfig) -> list[Turn]:
        """Run one call of `generate`."""
        width = max(len(prompt) for prompt in prompts)
        device = self._model.device
        ids_BL = torch.tensor([[self._pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts])
        start_B1 = torch.tensor([width - len(prompt) for prompt in prompts])[:, None]
        recorder = _Recorder(sampling.temperature or 1.0, self._model)
        sequences_BL = self._model.generate(
            input_ids=ids_BL.to(device),
            attention_mask=(torch.arange(width) >= start_B1).long().to(device),
            generation_config=self._settings(sampling),
            logits_processor=LogitsProcessorList([recorder]),
        )
        logprobs_BT = recorder.finish(sequences_BL).tolist()
        completions = sequences_BL[:, width:].tolist()
        return [self._turn(*row) for row in zip(prompts, completions, logprobs_BT, strict=True)]

    def _turn(self, prompt: Sequence[int], completion: Sequence[int], logprobs: Sequence[float]) -> Turn:
        """Cut a row behind its first end token."""
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

    def _settings(self, sampling: SamplingConfig) -> GenerationConfig:
        """Build the call's settings. On a CPU the default, growing cache is no slower than a static one."""
        greedy = sampling.temperature == 0
        chosen = (
            {} if greedy else {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
        )
        return GenerationConfig(
            do_sample=not greedy,
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=self._eos_ids,
            pad_token_id=self._pad_id,
            use_cache=True,
            **chosen,
        )

    def _check_context(self, prompt: int, completion: int) -> None:
        limit = getattr(self._model.config, "max_position_embeddings", None)
        if limit and prompt + completion > limit:
            raise UserError(
                f"a prompt of {prompt} tokens plus a completion of up to {completion} (max_new_tokens) exceeds the "
                f"model's context of {limit}: lower max_new_tokens or leave out the longest problems"
            )


class _Recorder(LogitsProcessor):  # type: ignore[misc]
    """Keeps the log-probability of each sampled token, and of the distributions only the latest, [B, V].

    `generate` runs custom processors before temperature, top-k and top-p, so they see the model's logits; what was
    sampled shows at the next call, and for the last token in `finish`.
    """

    def __init__(self, temperature: float, model: nn.Module) -> None:
        self._temperature = temperature
        self._model = model
        self._latest_BV: Tensor | None = None
        self._sampled: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._gather(input_ids)
        self._latest_BV = (scores / self._temperature).log_softmax(-1)
        # One NaN or +inf makes a whole row NaN; entries of probability 0 are allowed.
        if not bool(self._latest_BV.amax(-1).isfinite().all()):
            raise NonFiniteError(_why_no_distribution(self._model, scores, self._temperature))
        return scores

    def finish(self, sequences_BL: Tensor) -> Tensor:
        """Return the log-probabilities of all sampled tokens, [B, T]."""
        self._gather(sequences_BL)
        return torch.stack(self._sampled, dim=1)

    def _gather(self, ids_BL: Tensor) -> None:
        if self._latest_BV is not None:
            self._sampled.append(self._latest_BV.gather(-1, ids_BL[:, -1:]).squeeze(-1))


def _why_no_distribution(model: nn.Module, scores: Tensor, temperature: float) -> str:
    """Say where the first number that is not finite comes from: weights, activations or the temperature."""
    name, size = largest_weight(model)
    if not math.isfinite(size):
        return f"nothing can be sampled, as the model's weights are not finite (first {name}): {SHRINK}"
    if bool(scores.isfinite().all()):
        return f"nothing can be sampled, as logits divided by a temperature of {temperature:g} overflow: raise it"
    largest = f"though the weights are (largest {size:.3g} in {name})"
    return f"nothing can be sampled, as the model's logits are not finite, {largest}: {SHRINK}"


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
def _sampling_mode(model: Any, seed: int) -> Iterator[None]:
    """Evaluation mode, no gradient, no generation settings of the model's own, and a random state of its own.

    `generate` fills whatever a call leaves unset from `model.generation_config`, so that is put aside meanwhile.
    """
    was_training, own_settings = model.training, model.generation_config
    on_gpu = model.device.type == "cuda"
    with torch.random.fork_rng([model.device] if on_gpu else []), torch.no_grad():
        torch.default_generator.manual_seed(seed)
        if on_gpu:
            with torch.cuda.device(model.device):
                torch.cuda.manual_seed(seed)
        model.eval()
        model.generation_config = GenerationConfig()
        try:
            yield
        finally:
            model.generation_config = own_settings
            model.train(was_training)
