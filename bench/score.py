"""Scoring and backward pass of full-vocabulary self-distillation: atesd against dense PyTorch, and TRL where installed.

One pass is what an update does with a batch at hand: the teacher's decoder on its longer prompt, the student's decoder,
the mean forward KL(teacher || student) over all completion tokens, and the gradient of all that trains. Models are
random Qwen3; before anything is timed, all arms must agree on the loss and on the gradient.

Shapes: B sequences, L input positions, T completion tokens of each, N = B T, V vocabulary, H hidden.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn
from torch.nn import functional
from transformers import Qwen3Config, Qwen3ForCausalLM

from atesd.losses.divergence import LossConfig, Scored, token_streams
from atesd.losses.target import Plain
from atesd.train.lora import AdaptedLinear, in_fewer_passes
from bench.timing import interleaved, progress, ratio

HEAD_SIZE = 64
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
Loss = Callable[[], Tensor]


@dataclass(frozen=True)
class Case:
    """The size of a scoring pass. With `lora` only adapters of the decoder train, else all, the tied head too."""

    name: str
    hidden: int
    vocabulary: int
    sequences: int
    tokens: int
    layers: int = 2
    lora: bool = False
    prompt: int = 16
    hint: int = 48


CASES = (
    Case("full", 256, 151_936, 8, 64),
    Case("frozen_head", 256, 151_936, 8, 64, lora=True),
    Case("wide", 512, 49_152, 4, 64),
)
QUICK_CASES = (
    Case("full", 64, 4_096, 2, 16),
    Case("frozen_head", 64, 4_096, 2, 16, lora=True),
    Case("wide", 128, 2_048, 2, 16),
)


@dataclass(frozen=True)
class Batch:
    """Ids of both roles, without padding."""

    student_BL: Tensor
    teacher_BL: Tensor
    tokens: int

    @property
    def labels_BT(self) -> Tensor:  # noqa: N802 (a tensor)
        """The completion tokens."""
        return self.student_BL[:, -self.tokens :]


@dataclass
class Pair:
    """The model that learns and the frozen one that teaches: the same module, adapters switched off, with LoRA."""

    student: nn.Module
    teacher: nn.Module

    @contextmanager
    def teaching(self) -> Iterator[nn.Module]:
        """Give the teacher, without gradient."""
        with torch.no_grad():
            if self.teacher is self.student:
                with self.student.disable_adapter():
                    yield self.teacher
            else:
                yield self.teacher


def write_model(case: Case, folder: Path) -> Path:
    """Write a random model whose logits spread by about 1.6, so that divergences are far from rounding errors."""
    heads = max(1, case.hidden // HEAD_SIZE)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=case.vocabulary,
        hidden_size=case.hidden,
        intermediate_size=3 * case.hidden,
        num_hidden_layers=case.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),
        head_dim=HEAD_SIZE,
        tie_word_embeddings=True,
        initializer_range=1.6 / case.hidden**0.5,
        pad_token_id=0,
        eos_token_id=1,
    )
    path = folder / case.name
    Qwen3ForCausalLM(config).save_pretrained(path)
    return path


def load_student(case: Case, path: Path) -> nn.Module:
    """Load the model in training form. Both halves of an adapter are random, as after some steps."""
    model: nn.Module = Qwen3ForCausalLM.from_pretrained(path, dtype=torch.float32)
    if case.lora:
        torch.manual_seed(1)
        model = get_peft_model(
            model, LoraConfig(r=16, lora_alpha=32, target_modules=list(PROJECTIONS), task_type="CAUSAL_LM")
        )
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(weight, std=0.02)
    return model.eval()


def load_pair(case: Case, path: Path) -> Pair:
    """Load student and teacher."""
    student = load_student(case, path)
    if case.lora:
        return Pair(student, student)
    return Pair(student, Qwen3ForCausalLM.from_pretrained(path, dtype=torch.float32).requires_grad_(False).eval())


def random_batch(case: Case) -> Batch:
    """Draw prompts and completions; the teacher's prompts are longer."""
    generator = torch.Generator().manual_seed(2)

    def ids(length: int) -> Tensor:
        return torch.randint(2, case.vocabulary, (case.sequences, length), generator=generator)

    completion_BT = ids(case.tokens)
    student_BL, teacher_BL = (torch.cat([ids(length), completion_BT], 1) for length in (case.prompt, case.hint))
    return Batch(student_BL, teacher_BL, case.tokens)


def states(model: nn.Module, ids_BL: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Return the hidden states that predict the completion, [N, H], and the head."""
    causal: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden_BLH = causal.model(input_ids=ids_BL[:, :-1], use_cache=False).last_hidden_state
    return hidden_BLH[:, -tokens:].flatten(0, 1), causal.lm_head.weight


@contextmanager
def fewer_passes(model: nn.Module) -> Iterator[None]:
    """Within the block LoRA layers compute as atesd's runs have them, on the very weights that peers take peft's on."""
    in_fewer_passes(model)
    yield
    for layer in model.modules():
        if type(layer) is AdaptedLinear:
            layer.__class__ = PeftLinear


def atesd_loss(pair: Pair, batch: Batch) -> Tensor:
    """Score as atesd's update does: hidden states, then tiles."""
    with fewer_passes(pair.student):
        with pair.teaching() as teacher:
            view = Scored(*states(teacher, batch.teacher_BL, batch.tokens))
        student = Scored(*states(pair.student, batch.student_BL, batch.tokens))
    labels_N = batch.labels_BT.flatten()
    streams = token_streams(student, [view], labels_N, LossConfig(), target=Plain(), temperature=1.0)
    return streams.divergence_N.mean()


def dense_loss(pair: Pair, batch: Batch) -> Tensor:
    """Score by hand: whole logits of both roles, two log-softmaxes, one KL."""
    with pair.teaching() as teacher:
        hidden_NH, head_VH = states(teacher, batch.teacher_BL, batch.tokens)
        log_p_NV = (hidden_NH @ head_VH.T).log_softmax(-1)
    hidden_NH, head_VH = states(pair.student, batch.student_BL, batch.tokens)
    log_q_NV = (hidden_NH @ head_VH.T).log_softmax(-1)
    return functional.kl_div(log_q_NV, log_p_NV, reduction="none", log_target=True).sum(-1).mean()


def gradient(student: nn.Module, loss: Loss) -> tuple[float, Tensor]:
    """Return a loss and its gradient with respect to all that trains, flat; leave no gradient behind."""
    value = loss()
    torch.autograd.backward(value)
    trained = [weight for weight in student.parameters() if weight.requires_grad]
    flat = torch.cat(
        [(torch.zeros_like(weight) if weight.grad is None else weight.grad).flatten() for weight in trained]
    )
    student.zero_grad(set_to_none=True)
    return float(value.detach()), flat


def disagreement(student: nn.Module, arms: Mapping[str, Loss]) -> dict[str, dict[str, float]]:
    """Return how far loss and gradient are from the dense ones, relatively. AssertionError beyond 1e-5 and 1e-4."""
    value, exact = gradient(student, arms["dense"])
    assert value > 1e-3, f"a divergence of {value} says nothing"
    found = {"dense": {"loss": value}}
    for name in arms.keys() - {"dense"}:
        other, flat = gradient(student, arms[name])
        apart = {"loss": abs(other / value - 1), "gradient": float((flat - exact).norm() / exact.norm())}
        assert apart["loss"] < 1e-5, f"{name}: loss {other}, dense {value}"
        assert apart["gradient"] < 1e-4, f"{name}: gradient differs by {apart['gradient']}"
        found[name] = apart
    return found


def own_arms(pair: Pair, batch: Batch) -> dict[str, Loss]:
    """Return the arms that need nothing but the package."""
    return {"atesd": lambda: atesd_loss(pair, batch), "dense": lambda: dense_loss(pair, batch)}


def all_arms(case: Case, path: Path) -> tuple[Pair, dict[str, Loss]]:
    """Return the arms, TRL's among them, all on the very same weights."""
    from bench import peers

    batch = random_batch(case)
    trainer = peers.score_trainer(load_student(case, path))
    pair = Pair(trainer.model, trainer.teacher_model)
    return pair, own_arms(pair, batch) | peers.score_arms(trainer, pair, batch)


def one_pass(student: nn.Module, loss: Loss) -> Callable[[], None]:
    """Return a forward and backward pass that leaves no gradient behind."""

    def run() -> None:
        torch.autograd.backward(loss())
        student.zero_grad(set_to_none=True)

    return run


def measure(case: Case, folder: Path, rounds: int) -> dict[str, Any]:
    """Return samples and ratios of one case."""
    pair, arms = all_arms(case, write_model(case, folder))
    apart = disagreement(pair.student, arms)
    samples = interleaved({name: one_pass(pair.student, loss) for name, loss in arms.items()}, rounds)
    ratios = {f"{name}_over_atesd": ratio(samples[name], samples["atesd"]) for name in samples if name != "atesd"}
    return {"case": asdict(case), "disagreement": apart, "seconds": samples, "ratios": ratios}


def measure_all(folder: Path, *, quick: bool) -> dict[str, Any]:
    """Return every case's results by name."""
    rounds = 3 if quick else 5
    found = {}
    for case in QUICK_CASES if quick else CASES:
        found[case.name] = measure(case, folder, rounds)
        progress(f"score {case.name}")
    return found


def as_json(result: Mapping[str, Any]) -> str:
    """Return raw results as the files hold them."""
    return json.dumps(result, indent=1, sort_keys=True) + "\n"
