"""What a run will need: bytes on its device and seconds a step, from the model's config alone. No weight is loaded.

    memory = weights + copies for the teacher + optimizer + the larger of
             sampling: key-value cache + rows of logits + one pass over the prompts
             update:   gradients + activations kept for the backward pass + tiles of logits, or what a layer needs

The model is built without storage (torch's meta device), with its adapters, and one student pass over a micro-batch of
the recipe's size is traced: what autograd keeps is counted, storage by storage. The rest is arithmetic on shapes.

    seconds = operations / (rate x share reached), and for every decoded token at least bytes of weights and cache /
              (bandwidth x share reached)
    operations a token: 2 P forward, 2 P backward, 2 P again with checkpointing, 2 P_trained for gradients of weights,
                        4 x heads x head size x context for attention, 2 V H for the head and each of its gradients

P counts the decoder's weights without embeddings. Not counted: the probe, credit, codes, graders, and what an allocator
loses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from atesd.config import RunConfig
from atesd.losses.tiles import WIDENED
from atesd.recipe import with_overrides
from atesd.rollout.guess import LARGEST_LOGITS
from atesd.train.heads import decoder, output_layer
from atesd.train.model import context_length
from atesd.train.traced import activations, skeleton

GIB = 2**30
_FOUR_BITS = 0.516
"""Bytes a weight in NF4 whose constants are quantised, too."""


@dataclass(frozen=True, slots=True)
class Device:
    """What a run trains on. Rates are those of dense bfloat16 products, as vendors state them."""

    name: str
    memory: float
    """Bytes."""
    flops: float
    """Operations a second in bfloat16."""
    bandwidth: float
    """Bytes a second between memory and cores."""
    is_gpu: bool = True
    share: float = 0.4
    """Share of both rates that training and decoding are taken to reach."""
    context: float = 0.7 * GIB
    """Bytes that libraries and context take."""


DEVICES = {
    name: Device(name, gib * GIB, tera * 1e12, gigabytes * 1e9)
    for name, gib, tera, gigabytes in (
        ("h100", 79.6, 989, 3350),
        ("h200", 140, 989, 4800),
        ("b200", 178, 2250, 8000),
        ("a100", 79.2, 312, 2039),
        ("a100-40gb", 39.4, 312, 1555),
        ("l40s", 44.4, 362, 864),
        ("rtx4090", 23.5, 165, 1008),
        ("rtx3090", 23.6, 71, 936),
    )
}


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens that the data would tell; the defaults are a guess for mathematics."""

    prompt: int = 200
    solution: int = 1000

    def within(self, context: int | None, completion: int) -> Lengths:
        """Return what of them a model can read before a completion: both in proportion, where that is less."""
        both = self.prompt + self.solution
        if context is None or both + completion <= context:
            return self
        prompt = max(1, self.prompt * max(0, context - completion) // both)
        return Lengths(prompt, max(0, context - completion - prompt))


@dataclass(frozen=True, slots=True)
class Plan:
    """Bytes by part, seconds by part, and what they were computed from."""

    always: dict[str, float]
    phases: dict[str, dict[str, float]]
    """What each phase holds besides."""
    seconds: dict[str, float]
    parameters: int
    trained: int
    rows: int
    """Rows of a micro-batch."""
    lengths: Lengths
    """What was reckoned with."""

    def total(self, phase: str) -> float:
        """Return all bytes of a phase."""
        return sum(self.always.values()) + sum(self.phases[phase].values())

    @property
    def worst(self) -> str:
        """The phase with the most bytes."""
        return max(self.phases, key=self.total)

    @property
    def peak(self) -> float:
        """Bytes at the worst moment."""
        return self.total(self.worst)

    @property
    def step_s(self) -> float:
        """Seconds a step."""
        return sum(self.seconds.values())


def make_plan(config: RunConfig, device: Device, lengths: Lengths) -> Plan:
    """Compute what a run will need. UserError where the model's config cannot be had or followed."""
    model = skeleton(config.model)
    shape = _Shape(model, config)
    lengths = lengths.within(context_length(model), config.rollout.max_new_tokens)
    student, teacher = _rows(config, lengths)
    views = len(config.target.views) if config.routing.distils else 0
    sequences = config.step.problems * config.rollout.group_size
    budget = max(1, config.step.token_budget // max(student, 1))  # the update is cut by what the student reads
    rows = min(budget, -(-sequences // config.step.updates_per_batch))
    always = {"libraries": device.context, "weights": shape.weights, **_copies(config, shape)}
    always["optimizer"] = shape.optimizer_bytes
    phases = {
        "sampling": _sampling(config, shape, lengths.prompt, sequences, config.rollout.max_new_tokens),
        "update": _update(config, shape, model, device, rows, student, teacher if views else 0, views),
    }
    if config.routing.source == "reference":
        del phases["sampling"]
    completion = config.eval.max_new_tokens or config.rollout.max_new_tokens
    size = getattr(config.task, "eval_size", None)
    evaluated = config.eval.k * (config.eval.problems or (size if isinstance(size, int) and size else 10**6))
    phases["evaluation"] = _sampling(config, shape, lengths.prompt, evaluated, completion)
    seconds = _seconds(config, shape, device, student, teacher, sequences, views)
    return Plan(always, phases, seconds, shape.parameters, shape.trained, rows, lengths)


class _Shape:
    """Sizes of a model that the arithmetic needs."""

    def __init__(self, model: nn.Module, config: RunConfig) -> None:
        settings = cast("Any", model).config.get_text_config()
        head = cast("nn.Module", output_layer(model))
        self.vocabulary, self.hidden = cast("Tensor", head.weight).shape
        self.layers = int(settings.num_hidden_layers)
        self.heads = int(settings.num_attention_heads)
        self.head_size = int(getattr(settings, "head_dim", None) or settings.hidden_size // self.heads)
        self.key_heads = int(getattr(settings, "num_key_value_heads", None) or self.heads)
        weights = dict(model.named_parameters())
        self.parameters = sum(weight.numel() for weight in weights.values())
        own = [weight for weight in weights.values() if weight.requires_grad]
        self.trained = sum(weight.numel() for weight in own)
        self.trained_bytes = float(sum(weight.nbytes for weight in own))
        self.gradient_bytes = 4.0 * self.trained
        masters = sum(weight.numel() for weight in own if weight.element_size() < 4)
        self.optimizer_bytes = 8.0 * self.trained + 4.0 * masters
        self.element = cast("Tensor", head.weight).element_size()
        self.trains_head = bool(cast("Tensor", head.weight).requires_grad)
        linear = [each for each in decoder(model).modules() if isinstance(each, nn.Linear | Conv1D)]
        self.width = max((max(each.weight.shape) for each in linear), default=self.hidden)
        self.body = sum(each.weight.numel() for each in linear)
        self.weights = float(sum(weight.nbytes for weight in weights.values()))
        if config.model.quantization is not None:
            frozen = [each.weight for each in linear if not each.weight.requires_grad]
            self.weights -= sum(weight.nbytes - _FOUR_BITS * weight.numel() for weight in frozen)


def _rows(config: RunConfig, lengths: Lengths) -> tuple[int, int]:
    """Return input positions of a student's and of a teacher's row with a completion of full length."""
    student = lengths.prompt + config.rollout.max_new_tokens - 1
    return student, student + lengths.solution


def _copies(config: RunConfig, shape: _Shape) -> dict[str, float]:
    """Return copies of weights: a teacher's that adapters do not give, and the step-0 ones where they are read."""
    own = config.teacher.weights if config.routing.distils else "live"
    adapters = config.model.lora is not None
    teacher = own == "ema" or (own == "frozen" and not adapters)
    base = own != "frozen" and config.needs_base and not adapters
    average = shape.gradient_bytes if own == "ema" else shape.trained_bytes  # averages are in float32
    return {"teacher copies": teacher * average + base * shape.trained_bytes}


def _sampling(config: RunConfig, shape: _Shape, prompt: int, sequences: int, completion: int) -> dict[str, float]:
    """Return what one engine call holds: cache of all rows at full length, logits of a token, a pass over prompts."""
    rows = min(sequences, max(1, config.rollout.batch_tokens // (prompt + completion)))
    cache = rows * (prompt + completion) * shape.layers * 2 * shape.key_heads * shape.head_size * shape.element
    guessed = min(rows * (1 + getattr(config.rollout.engine, "guess", 0)), LARGEST_LOGITS // shape.vocabulary)
    logits = max(rows, guessed) * shape.vocabulary * (shape.element + 4 * 4)
    reading = rows * prompt * (3 * shape.width + 4 * shape.hidden) * shape.element
    return {"key-value cache": float(cache), "logits": float(logits), "reading prompts": float(reading)}


def _update(
    config: RunConfig,
    shape: _Shape,
    model: nn.Module,
    device: Device,
    rows: int,
    student: int,
    teacher: int,
    views: int,
) -> dict[str, float]:
    """Return what the worst moment of an update holds.

    The moments: a teacher's pass; the loss, with all that the student's pass kept; the backward pass through a layer,
    which checkpointing recomputes first; AdamW. Gradients are there from the second micro-batch on.
    """
    tokens = rows * config.rollout.max_new_tokens
    kept, layer = activations(model, rows, student)
    if config.model.gradient_checkpointing:
        kept += shape.layers * (rows * student * shape.hidden * shape.element - layer)
    else:
        layer = 0.0
    tile = min(config.loss.tile_logits or (2**27 if device.is_gpu else 2**24), tokens * shape.vocabulary)
    tiles = 4.0 * (1 + views) * max(tile, shape.vocabulary)
    widened = min(WIDENED, shape.vocabulary) if shape.element < 4 and not device.is_gpu else 0
    sums = 4.0 * shape.hidden * (tokens + shape.vocabulary * shape.trains_head + widened)
    scored = float((1 + views) * tokens * shape.hidden * shape.element)
    position = (2 * shape.width + 4 * shape.hidden) * shape.element
    taught = min(rows * teacher, max(config.step.token_budget, teacher))  # a pass of its own budget
    several = rows * config.step.updates_per_batch < config.step.problems * config.rollout.group_size
    gradients = {"gradients": shape.gradient_bytes * several}
    moments = (
        {**gradients, "teacher's pass": float(position * taught) + scored},
        {**gradients, "activations": kept + scored, "tiles of logits": tiles + sums},
        {**gradients, "activations": kept + scored, "one layer": layer + position * rows * student},
        {
            "gradients": shape.gradient_bytes,
            "AdamW": shape.gradient_bytes * device.is_gpu,
        },  # a temporary list of tensors
    )
    return max(moments, key=lambda moment: sum(moment.values()))


def _seconds(
    config: RunConfig, shape: _Shape, device: Device, student: int, teacher: int, sequences: int, views: int
) -> dict[str, float]:
    """Return the seconds of a step's phases, with completions of full length."""
    completion, prompt = config.rollout.max_new_tokens, student - config.rollout.max_new_tokens + 1
    rate, bandwidth = device.flops * device.share, device.bandwidth * device.share

    def forward(positions: int, length: int, scored: int) -> float:
        attention = 2.0 * length * shape.layers * shape.heads * shape.head_size  # half of 4: causal
        return positions * (2.0 * shape.body + attention) + 2.0 * scored * shape.vocabulary * shape.hidden

    rows = min(sequences, max(1, config.rollout.batch_tokens // (prompt + completion)))
    calls = -(-sequences // rows)
    cached = 2 * shape.layers * shape.key_heads * shape.head_size * shape.element * (prompt + completion / 2)
    read = shape.body * shape.element + shape.vocabulary * shape.hidden * shape.element
    token = max(forward(rows, prompt + completion // 2, rows) / rate, (read + rows * cached) / bandwidth)
    sample = calls * (completion * token + forward(rows * prompt, prompt, rows) / rate)
    scored = sequences * completion
    own = forward(sequences * student, student, scored)
    again = own if config.model.gradient_checkpointing else 0.0
    weights = 2.0 * shape.trained * sequences * student
    update = (2 * own + again + weights) / rate
    teachers = views * forward(sequences * teacher, teacher, scored) / rate
    beforehand = _beforehand(config, own / rate, teachers)
    phases = {"sampling": sample, "teacher": teachers, "scores beforehand": beforehand, "update": update}
    if config.routing.source == "reference":
        del phases["sampling"]
    return phases


def _beforehand(config: RunConfig, student_s: float, teachers_s: float) -> float:
    """Return the seconds of passes before those with gradient, from those of the student's and the teachers' passes.

    A selection over the batch scores everything; of several updates the first weights' log-probabilities are kept where
    a loss reads them; and a KL term reads those of step 0.
    """
    chosen = student_s + teachers_s if config.selection.needs_batch and config.routing.distils else 0.0
    old = student_s if config.step.updates_per_batch > 1 and config.reads_old else 0.0
    reference = student_s if config.routing.reinforces and config.rl.kl_coef > 0 else 0.0
    return chosen + old + reference


@dataclass(frozen=True, slots=True)
class Remedy:
    """Overrides with which a run fits, and its plan; `plan` still does not fit where nothing is left to lower."""

    overrides: tuple[str, ...]
    plan: Plan
    fits: bool


def lower_until_it_fits(config: RunConfig, device: Device, lengths: Lengths, limit: float) -> Remedy:
    """Lower what the worst phase is made of, the cheapest first, until the peak is within `limit` bytes."""
    chosen: dict[str, str] = {}
    plan = make_plan(config, device, lengths)
    while plan.peak > limit:
        change = _next(config, plan)
        if change is None:
            return Remedy(_written(chosen), plan, fits=False)
        chosen |= change
        config = with_overrides(config, _written(change))
        plan = make_plan(config, device, lengths)
    return Remedy(_written(chosen), plan, fits=True)


def _written(chosen: dict[str, str]) -> tuple[str, ...]:
    return tuple(f"{key}={value}" for key, value in chosen.items())


def _next(config: RunConfig, plan: Plan) -> dict[str, str] | None:
    model, (student, _) = config.model, _rows(config, plan.lengths)
    if plan.worst != "update":
        batch, row = config.rollout.batch_tokens, student + 1
        if plan.worst == "evaluation":
            row = plan.lengths.prompt + (config.eval.max_new_tokens or config.rollout.max_new_tokens)
        rows = batch // row
        if rows > 1:
            return {"rollout.batch_tokens": str(rows // 2 * row)}
    elif plan.rows > 1:
        return {"step.token_budget": str(plan.rows // 2 * student)}
    elif not model.gradient_checkpointing:
        return {"model.gradient_checkpointing": "true"}
    if model.lora is None:
        return {"model.lora": "{}"}
    if model.dtype == "float32":
        return {"model.dtype": "bfloat16"}
    if model.quantization is None:
        return {"model.quantization": '"4bit"'}
    return None
