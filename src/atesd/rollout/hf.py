"""The embedded engine: transformers' `generate` on the very weights that train.

B prompts of one call, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from atesd.rollout.sampler import SamplingConfig
from atesd.types import StopReason, Turn, UserError


class HFSampler:
    """Samples with `generate`, padding prompts on the left and masking by length.

    Log-probabilities are those of the tempered, untruncated distribution, whatever `top_p` and `top_k` cut; at
    temperature 0 they are those of temperature 1. Nothing of the model's own generation_config is used, so that a
    repetition penalty shipped with a model cannot make its samples off-policy. The samples depend on weights, prompts
    and seed alone, and the global random state is left untouched.
    """

    def __init__(
        self, model: nn.Module, *, eos_ids: Sequence[int], pad_id: int, decode: Callable[[Sequence[int]], str]
    ) -> None:
        self._model = model
        self._eos_ids = list(eos_ids)
        self._pad_id = pad_id
        self._decode = decode
        self._version = 0

    def sync(self, version: int) -> None:
        """Note the weights' version: the weights themselves are shared."""
        self._version = version

    def sample(self, prompts: Sequence[Sequence[int]], sampling: SamplingConfig, *, seed: int) -> list[Turn]:
        """Sample one completion a prompt. UserError if prompt and completion exceed the model's context."""
        if not prompts:
            return []
        self._check_context(max(len(prompt) for prompt in prompts), sampling.max_new_tokens)
        turns: list[Turn] = []
        with _sampling_mode(self._model, seed):
            for chunk in _chunks(prompts, sampling):
                turns += self._generate(chunk, sampling)
        return turns

    def _generate(self, prompts: Sequence[Sequence[int]], sampling: SamplingConfig) -> list[Turn]:
        """Run one call of `generate`."""
        width = max(len(prompt) for prompt in prompts)
        device = next(self._model.parameters()).device
        ids_BL = torch.tensor([[self._pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts])
        start_B1 = torch.tensor([width - len(prompt) for prompt in prompts])[:, None]
        recorder = _Recorder(sampling.temperature or 1.0)
        sequences_BL = cast("Any", self._model).generate(
            input_ids=ids_BL.to(device),
            attention_mask=(torch.arange(width) >= start_B1).long().to(device),
            generation_config=self._settings(sampling),
            logits_processor=LogitsProcessorList([recorder.processor]),
            stopping_criteria=StoppingCriteriaList([recorder.criterion]),
        )
        logprobs_BT = torch.stack(recorder.logprobs, dim=1).tolist()
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
        limit = getattr(cast("Any", self._model).config, "max_position_embeddings", None)
        if limit and prompt + completion > limit:
            raise UserError(
                f"a prompt of {prompt} tokens plus rollout.max_new_tokens = {completion} exceeds the model's context "
                f'of {limit}: shorten the completion, or drop long problems with step.overlong = "drop"'
            )


class _Recorder:
    """Keeps the log-probability of each sampled token while holding the logits of one step only."""

    def __init__(self, temperature: float) -> None:
        self.logprobs: list[Tensor] = []
        self._logits_BV: Tensor | None = None
        recorder = self

        class Processor(LogitsProcessor):  # type: ignore[misc]
            """Sees the raw logits: custom processors run before temperature, top-k and top-p."""

            def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # noqa: ARG002
                recorder._logits_BV = scores
                return scores

        class Criterion(StoppingCriteria):  # type: ignore[misc]
            """Sees the token just appended; stops nothing."""

            def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:  # noqa: ARG002
                assert recorder._logits_BV is not None
                log_probs_BV = (recorder._logits_BV / temperature).log_softmax(-1)
                recorder.logprobs.append(log_probs_BV.gather(-1, input_ids[:, -1:]).squeeze(-1))
                return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

        self.processor = Processor()
        self.criterion = Criterion()


def _chunks(prompts: Sequence[Sequence[int]], sampling: SamplingConfig) -> Iterator[Sequence[Sequence[int]]]:
    """Cut the prompts, in order, so that a call's padded size stays within `batch_tokens`."""
    width = max(len(prompt) for prompt in prompts) + sampling.max_new_tokens
    size = max(1, sampling.batch_tokens // width)
    for start in range(0, len(prompts), size):
        yield prompts[start : start + size]


@contextmanager
def _sampling_mode(model: nn.Module, seed: int) -> Iterator[None]:
    """Evaluation mode, no gradient, and a random state of its own."""
    was_training = model.training
    devices = list(range(torch.cuda.device_count()))
    with torch.random.fork_rng(devices), torch.no_grad():
        torch.manual_seed(seed)
        model.eval()
        try:
            yield
        finally:
            model.train(was_training)
