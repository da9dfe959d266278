"""Rebuild the pico tier's warm start from nothing: tokenizer, tiny Qwen3, supervised training on generated texts.

One set of weights plays both roles: unhinted samples make the student, hinted ones the teacher. What the samples
contain, the planted shortcut included, is `atesd.tasks.synthetic.pico.warm_sample`. About five minutes on one core;
the result depends on the seed and, in the last bits, on the machine.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn import functional
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from atesd.tasks.synthetic import pico

PAD, END, USER, ASSISTANT, UNKNOWN = SPECIAL_TOKENS = ("<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|unknown|>")
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{ '<|user|>' + message['content'] }}"
    "{%- elif message['role'] == 'assistant' -%}{{ '<|assistant|>' + message['content'] + '<|end|>' }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"
)
UNHINTED_SHARE = 0.45
SLIPS_SHARE = 0.5
DEFAULT_STEPS = 1000


@dataclass(frozen=True, slots=True)
class WarmStart:
    """What `train_warm_start` wrote, and the last training loss in nats per learned token."""

    directory: Path
    num_parameters: int
    loss: float


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return the character tokenizer: one id for each special token, then one for each of `pico.CHARACTERS`."""
    vocabulary = {token: i for i, token in enumerate((*SPECIAL_TOKENS, *pico.CHARACTERS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        additional_special_tokens=[USER, ASSISTANT],
        clean_up_tokenization_spaces=False,
        model_max_length=256,
        padding_side="left",
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen3ForCausalLM:
    """Return the untrained model: two layers, width 128, about 0.38M parameters."""
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=320,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=32,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            initializer_range=0.05,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )


def train_warm_start(
    out_dir: Path | str,
    *,
    steps: int = DEFAULT_STEPS,
    seed: int = 0,
    progress: Callable[[int, int, float], None] | None = None,
    shortcut: float = pico.SHORTCUT,
    batch_size: int = 64,
    learning_rate: float = 3e-3,
) -> WarmStart:
    """Train the warm start and write a directory that `from_pretrained` loads.

    Cross-entropy on the learned characters of `pico.warm_sample` and the closing token; AdamW, 50 steps up, constant
    until 30 % of the run, then linear to 1e-5. `shortcut` is c of the planted shortcut, 0 switches it off.
    `progress(step, steps, loss)` is called after every step. Uses the process's thread settings and restores the
    global torch generator.
    """
    state = torch.get_rng_state()
    try:
        tokenizer = build_tokenizer()
        model = build_model(tokenizer, seed)
    finally:
        torch.set_rng_state(state)
    model.train()
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01, betas=(0.9, 0.98))
    loss_value = float("nan")
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = max(learning_rate * rate(step, steps), 1e-5)
        num_unhinted = int(batch_size * UNHINTED_SHARE)
        samples = [_draw(rng, hinted=i >= num_unhinted, shortcut=shortcut) for i in range(batch_size)]
        sums = [_loss_sum(model, tokenizer, part) for part in (samples[:num_unhinted], samples[num_unhinted:]) if part]
        loss = torch.stack([nll for nll, _ in sums]).sum() / torch.stack([num for _, num in sums]).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loss_value = float(loss.detach())
        if progress is not None:
            progress(step + 1, steps, loss_value)
    directory = Path(out_dir)
    save(model, tokenizer, directory)
    return WarmStart(directory, sum(p.numel() for p in model.parameters()), loss_value)


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Write weights (float32 safetensors), configs and tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model.eval().save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def rate(step: int, steps: int) -> float:
    """Return the factor of the learning rate: 50 steps up, constant until 30 % of the run, then linear to 0."""
    return min(1.0, (step + 1) / 50) * (1 - max(0.0, step / steps - 0.3) / 0.7)


def _draw(rng: random.Random, *, hinted: bool, shortcut: float) -> pico.WarmSample:
    problem = pico.draw(rng.choice(pico.LEVELS), rng)
    while pico.split_of(problem.problem) != "train":
        problem = pico.draw(rng.choice(pico.LEVELS), rng)
    if not hinted:
        return pico.warm_sample(problem, None, rng, shortcut=shortcut, slips=False)
    num_lines = rng.randint(0, len(problem.solution.splitlines()))
    return pico.warm_sample(problem, num_lines, rng, shortcut=shortcut, slips=rng.random() < SLIPS_SHARE)


def _loss_sum(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, samples: Sequence[pico.WarmSample]
) -> tuple[Tensor, Tensor]:
    """Return the summed cross-entropy of the learned tokens and their number; prompts are left-padded."""
    prompts = [tokenizer.encode(f"{USER}{s.user}{ASSISTANT}", add_special_tokens=False) for s in samples]
    completions = [tokenizer.encode(s.completion + END, add_special_tokens=False) for s in samples]
    num_prompt, num_completion = max(map(len, prompts)), max(map(len, completions))
    ids = torch.full((len(samples), num_prompt + num_completion), tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    weight = torch.zeros(len(samples), num_completion)
    for i, (prompt, completion, sample) in enumerate(zip(prompts, completions, samples, strict=True)):
        first, last = num_prompt - len(prompt), num_prompt + len(completion)
        ids[i, first:last] = torch.tensor(prompt + completion)
        mask[i, first:last] = 1
        weight[i, : len(completion)] = torch.tensor([*sample.learned, True]).float()
    logits = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        logits_to_keep=torch.arange(num_prompt - 1, ids.shape[1] - 1),
        use_cache=False,
    ).logits
    targets = ids[:, num_prompt:].flatten()
    nll = functional.cross_entropy(logits.flatten(0, 1), targets, reduction="none").view_as(weight)
    return (nll * weight).sum(), weight.sum()
