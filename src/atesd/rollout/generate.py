"""Sampling with transformers' `generate`: for any model that it knows.

B prompts of one call, L prompt positions, T sampled positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from atesd.codes.steer import Codes
from atesd.rollout.decode import Complete, Completion
from atesd.rollout.sampler import SamplingConfig
from atesd.rollout.weights import why_no_distribution
from atesd.types import NonFiniteError


@contextmanager
def generating(
    model: Any,
    sampling: SamplingConfig,
    *,
    eos_ids: Collection[int],
    pad_id: int,
    seed: int,
    codes: Codes | None = None,
) -> Iterator[Complete]:
    """Yield what completes one batch of prompts after the other, padded on the left and masked by length.

    A part of a batch takes as long as all of it, since the draws of one prompt follow from those of the others.
    `codes` steer a completion, which may go on behind its first end token. `generate` fills whatever a call leaves
    unset from `model.generation_config`, so that is put aside meanwhile, and it draws from the global random state,
    which is put back. NonFiniteError where the logits leave no distribution.
    """

    def complete(
        prompts: Sequence[Sequence[int]],
        part: Sequence[int] | None = None,
        references: Sequence[Sequence[int]] = (),  # noqa: ARG001 - `generate` guesses nothing
    ) -> list[Completion]:
        width = max(len(prompt) for prompt in prompts)
        ids_BL = torch.tensor([[pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts])
        start_B1 = torch.tensor([width - len(prompt) for prompt in prompts])[:, None]
        recorder = _Recorder(sampling.temperature or 1.0, model)
        with nullcontext() if codes is None else codes.generating(model):
            sequences_BL = model.generate(
                input_ids=ids_BL.to(model.device),
                attention_mask=(torch.arange(width) >= start_B1).long().to(model.device),
                generation_config=_settings(sampling, eos_ids, pad_id),
                logits_processor=LogitsProcessorList([recorder]),
                synced_gpus=False,  # else sharded models would be read until the last process is done
            )
        logprobs_BT = recorder.finish(sequences_BL).tolist()
        completions = list(zip(sequences_BL[:, width:].tolist(), logprobs_BT, strict=True))
        return completions if part is None else [completions[place] for place in part]

    own_settings = model.generation_config
    on_gpu = model.device.type == "cuda"
    with torch.random.fork_rng([model.device] if on_gpu else []):
        torch.default_generator.manual_seed(seed)
        if on_gpu:
            with torch.cuda.device(model.device):
                torch.cuda.manual_seed(seed)
        model.generation_config = GenerationConfig()
        try:
            yield complete
        finally:
            model.generation_config = own_settings


def _settings(sampling: SamplingConfig, eos_ids: Collection[int], pad_id: int) -> GenerationConfig:
    """Build the call's settings. On a CPU the default, growing cache is no slower than a static one."""
    greedy = sampling.temperature == 0
    chosen = {} if greedy else {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
    return GenerationConfig(
        do_sample=not greedy,
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=list(eos_ids),
        pad_token_id=pad_id,
        use_cache=True,
        **chosen,
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
            raise NonFiniteError(why_no_distribution(self._model, scores, self._temperature))
        return scores

    def finish(self, sequences_BL: Tensor) -> Tensor:
        """Return the log-probabilities of all sampled tokens, [B, T]."""
        self._gather(sequences_BL)
        return torch.stack(self._sampled, dim=1)

    def _gather(self, ids_BL: Tensor) -> None:
        if self._latest_BV is not None:
            self._sampled.append(self._latest_BV.gather(-1, ids_BL[:, -1:]).squeeze(-1))
