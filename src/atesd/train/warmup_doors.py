"""Rebuild the warm start of the pico tier's task in several turns (`tasks/synthetic/doors.py`).

It continues the packaged warm start of the pico tier, which knows how to copy from a hint, on conversations with the
doors: supervised on the student's replies alone, each closed by the end token. Kept in bfloat16, three quarters of a
megabyte. One set of weights plays both roles, as there. About two minutes on one core.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from atesd.tasks.synthetic import doors
from atesd.train.model import resolve
from atesd.train.warmup import ASSISTANT, END, USER, WarmStart, build_tokenizer, rate, save

DEFAULT_STEPS = 400
UNHINTED_SHARE = 0.35
SLIPS_SHARE = 0.4
LONGEST = 9
"""Turns of a warm-start conversation, at most."""


def train_doors_warm_start(
    out_dir: Path | str,
    *,
    steps: int = DEFAULT_STEPS,
    seed: int = 0,
    progress: Callable[[int, int, float], None] | None = None,
    shortcut: float = doors.SHORTCUT,
    batch_size: int = 20,
    learning_rate: float = 2e-3,
) -> WarmStart:
    """Train the warm start and write a directory that `from_pretrained` loads. Settings as in `train_warm_start`."""
    tokenizer = build_tokenizer()
    model = Qwen3ForCausalLM.from_pretrained(resolve("pico"), dtype=torch.float32)
    model.train()
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01, betas=(0.9, 0.98))
    loss_value = float("nan")
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = max(learning_rate * rate(step, steps), 1e-5)
        loss = _loss(model, tokenizer, [_draw(rng, shortcut) for _ in range(batch_size)])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loss_value = float(loss.detach())
        if progress is not None:
            progress(step + 1, steps, loss_value)
    directory = Path(out_dir)
    save(model.to(torch.bfloat16), tokenizer, directory)
    return WarmStart(directory, sum(p.numel() for p in model.parameters()), loss_value)


def _draw(rng: random.Random, shortcut: float) -> list[doors.WarmTurn]:
    problem = doors.draw(rng.choice(list(doors.NUM_DOORS)), rng)
    while doors.split_of(problem.problem) != "train":
        problem = doors.draw(rng.choice(list(doors.NUM_DOORS)), rng)
    if rng.random() < UNHINTED_SHARE:
        return doors.warm_conversation(problem, None, rng, LONGEST, slips=False)
    shown = rng.randint(0, len(problem.expert))
    return doors.warm_conversation(problem, shown, rng, LONGEST, shortcut=shortcut, slips=rng.random() < SLIPS_SHARE)


def _loss(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, conversations: Sequence[Sequence[doors.WarmTurn]]
) -> Tensor:
    """Return the mean cross-entropy of the learned replies' tokens; conversations are padded on the right."""
    vocabulary = tokenizer.get_vocab()
    rows = [_row(vocabulary, turns) for turns in conversations]
    width = max(len(ids) for ids, _ in rows)
    ids = torch.full((len(rows), width), tokenizer.pad_token_id)
    weight = torch.zeros(len(rows), width)
    for index, (row, learned) in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
        weight[index, : len(row)] = torch.tensor(learned)
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    nll = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return (nll * weight[:, 1:].flatten()).sum() / weight.sum()


def _row(vocabulary: Mapping[str, int], turns: Sequence[doors.WarmTurn]) -> tuple[list[int], list[float]]:
    """Return the ids of a conversation, one a character or special token, and 1.0 for each that is learned."""
    ids: list[int] = []
    learned: list[float] = []
    for turn in turns:
        read = [vocabulary[USER], *map(vocabulary.__getitem__, turn.read), vocabulary[ASSISTANT]]
        reply = [*map(vocabulary.__getitem__, turn.reply), vocabulary[END]]
        ids += read + reply
        learned += [0.0] * len(read) + [float(turn.learned)] * len(reply)
    return ids, learned
