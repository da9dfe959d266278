"""TRL 1.16 as the peer: its self-distillation trainer on our models, problems and prompts. Needs the extra `bench`.

`trl.experimental` may change in any release, hence the pin. What is switched off is what atesd does not do either:
gradient checkpointing and bfloat16 (both on by default there), importance clipping, cutting of prompts. The loss is
its `full_logits` with alpha 0, which is forward KL(teacher || student), averaged by completion.

Its DistillationTrainer has a tiled kernel, which runs on a CPU too; that trainer knows no privileged context, so the
kernel is called on the hidden states of both roles (arm `trl_tiles`). Liger's kernels need Triton, hence a GPU.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor, nn
from transformers import PrinterCallback, TrainerCallback

from atesd.train.model import resolve
from atesd.train.tokens import load_tokenizer
from bench.score import PROJECTIONS, Batch, Loss, Pair, states

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

from trl.experimental.sdft import SDFTConfig, SDFTTrainer
from trl.trainer.distillation_trainer import _chunked_divergence_loss


def settings(**own: Any) -> SDFTConfig:
    """Return a configuration that computes what atesd computes."""
    return SDFTConfig(
        output_dir=tempfile.gettempdir(),
        distillation_mode="full_logits",
        distillation_alpha=0.0,
        distillation_is_clip=None,
        teacher_model_kind="base",
        max_prompt_length=None,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **own,
    )


class CountingTrainer(SDFTTrainer):
    """SDFTTrainer that keeps the number of tokens it has sampled in every step."""

    def _prepare_training_batch(self, inputs: Any) -> Any:
        batch = super()._prepare_training_batch(inputs)
        self.sampled = [*getattr(self, "sampled", []), int(batch["raw_completion_lengths"].sum())]
        return batch


def score_trainer(student: nn.Module) -> SDFTTrainer:
    """Return a trainer around a model, for its loss alone; the tokenizer is never used."""
    rows = Dataset.from_list([{"prompt": "0", "privileged_context": "0"}] * 2)
    args = settings(per_device_train_batch_size=2, num_generations=2)
    tokenizer = load_tokenizer(resolve("pico"))
    trainer = SDFTTrainer(model=student, args=args, train_dataset=rows, processing_class=tokenizer)
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.eval()
    return trainer


def score_arms(trainer: SDFTTrainer, pair: Pair, batch: Batch) -> dict[str, Loss]:
    """Return TRL's own loss on a batch, and its tiled kernel on the same hidden states."""
    prompt_BL, completion_BT = batch.student_BL[:, : -batch.tokens], batch.labels_BT
    inputs = {
        "prompt_ids": prompt_BL,
        "prompt_mask": torch.ones_like(prompt_BL),
        "completion_ids": completion_BT,
        "completion_mask": torch.ones_like(completion_BT),
        "teacher_input_ids": batch.teacher_BL,
        "teacher_attention_mask": torch.ones_like(batch.teacher_BL),
    }

    def tiles() -> Tensor:
        with pair.teaching() as teacher:
            view_NH, view_head_VH = states(teacher, batch.teacher_BL, batch.tokens)
        hidden_NH, head_VH = states(pair.student, batch.student_BL, batch.tokens)
        ones_1N = torch.ones(1, len(hidden_NH))
        return _chunked_divergence_loss(hidden_NH[None], view_NH[None], head_VH, view_head_VH, ones_1N, beta=0.0)[0]

    return {"trl": lambda: trainer.compute_loss(trainer.model, inputs), "trl_tiles": tiles}


class Turns(TrainerCallback):
    """Times every step of TRL's loop, sampling included, and gives others their turn before it."""

    def __init__(self, before: Callable[[], None]) -> None:
        self.seconds: list[float] = []
        self._before = before
        self._start = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Let the others go first."""
        self._before()
        self._start = perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Stop the clock after the optimizer's step."""
        self.seconds.append(perf_counter() - self._start)


def step_trainer(
    path: Path,
    rows: Sequence[dict[str, Any]],
    turns: Turns,
    *,
    batch: int,
    template: str,
    lora: bool,
    dtype: str,
    **own: Any,
) -> CountingTrainer:
    """Return a trainer that samples, scores and steps on the rows; `template` is the teacher's prompt."""
    args = settings(
        per_device_train_batch_size=batch,
        teacher_prompt_template=template,
        lr_scheduler_type="constant",
        model_init_kwargs={"dtype": dtype},
        **own,
    )
    adapter = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=list(PROJECTIONS), task_type="CAUSAL_LM")
    trainer = CountingTrainer(
        model=str(path),
        args=args,
        train_dataset=Dataset.from_list(list(rows)),
        processing_class=load_tokenizer(str(path)),
        peft_config=adapter if lora else None,
        callbacks=[turns],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer
