"""Sections of a recipe that belong to no part: the model, the teacher, the optimizer and the cadences."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from atesd.types import Config

Positive = Annotated[int, Field(ge=1)]
MIN_ETA = 1e-2
_ALL_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoraConfig(Config):
    """Low-rank adapters instead of full fine-tuning; the defaults are OPSD's (2601.18734, released code)."""

    r: Annotated[int, Field(ge=1)] = 64
    """Rank."""
    alpha: Annotated[float, Field(gt=0, le=1e6)] = 128
    """Scale: the update is multiplied by alpha / r. At most a million."""
    targets: Annotated[tuple[str, ...], Field(min_length=1)] = _ALL_PROJECTIONS
    """Names of the linear layers that get an adapter, each of which the model must have; the output head cannot be one.
    The default is OPSD's seven projections, as Qwen, Llama, Mistral, Gemma and SmolLM call them."""


class ModelConfig(Config):
    """Which model learns."""

    path: str = "pico"
    """`pico`, `pico-doors` (packaged warm starts), `smollm2` (which `atesd fetch smollm2` brings), a folder, or a hub
    id. A folder of an adapter stands for its base with that adapter."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; its main branch where unset."""
    dtype: Literal["float32", "bfloat16", "auto"] = "float32"
    """Precision of the loaded weights; adapters are kept in float32 whatever this says, and take part in products in
    this precision. Where all weights train in bfloat16, the optimizer moves copies of them in float32: faster, with
    smaller activations, and as much memory for weights.
    `auto`: bfloat16 where it computes at least 1.3 times as fast, else float32; config.json says which, and a resumed
    run keeps it."""
    lora: LoraConfig | None = None
    """Adapters; leave it out to train all weights."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    compile: bool = False
    """Have torch.compile fuse what decoder layers do between their products, in all passes but sampling's: updates and
    probes some 1.3 to 1.5 times as fast on a CPU, after half a minute at their first (seconds where torch has it in its
    cache: $TORCHINDUCTOR_CACHE_DIR, else a folder for temporary files). Needs a C++ compiler on a CPU, Triton on a GPU.
    Changes results by rounding, so that a resumed run keeps it. Not with [codes], masked hints (`reveal`), gradient
    rules, `shard` or `quantization`."""
    attn_implementation: str | None = None
    """Passed to transformers where set, such as eager, sdpa or flash_attention_2; the library's choice where unset.
    With sdpa in bfloat16 on a CPU, gradients of short rows are taken by its formula (docs/performance.md)."""
    shard: bool = False
    """Of several processes each keeps a share of the weights, their gradients and Adam's averages (FSDP2), and holds
    all weights only while nothing is derived: docs/processes.md. One process alone has nothing to share.
    `accelerate launch --use_fsdp --fsdp_version 2` sets it."""
    quantization: Literal["4bit"] | None = None
    """`4bit`: the base weights in 4 bits (NF4, as in QLoRA 2305.14314), under adapters; needs bitsandbytes."""

    @model_validator(mode="after")
    def _compiled_layers_are_whole(self) -> ModelConfig:
        if self.compile and (self.shard or self.quantization is not None):
            other = "model.shard = true" if self.shard else f'model.quantization = "{self.quantization}"'
            raise ValueError(
                f"model.compile = true compiles layers as they are, and {other} gathers or unpacks their weights in "
                "every pass: remove either"
            )
        return self

    @model_validator(mode="after")
    def _only_adapters_train_over_four_bits(self) -> ModelConfig:
        if self.quantization is not None and self.lora is None:
            raise ValueError(
                f'model.quantization = "{self.quantization}" leaves nothing that could train: add model.lora = {{}}'
            )
        return self


class TeacherConfig(Config):
    """Which weights score."""

    weights: Literal["frozen", "live", "ema"] = "frozen"
    """`frozen`: the step-0 weights (OPSD). `live`: the student's own. `ema`: their moving average, from the student."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """EMA only: share of the old average kept at each optimizer step; default .999 (OPSD's code)."""

    @model_validator(mode="after")
    def _decay_belongs_to_ema(self) -> TeacherConfig:
        if self.ema_decay is not None and self.weights != "ema":
            raise ValueError(f'teacher.ema_decay has no effect with weights = "{self.weights}": remove it')
        return self


class OptimConfig(Config):
    """AdamW and its schedule. Defaults: OPSD's released recipe (2601.18734), whose rate is effectively constant."""

    lr: Annotated[float, Field(gt=0, le=10)] = 5e-6
    """Peak learning rate; Adam moves a weight by about as much in one update. At most 10."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """Decay rates of Adam's two moments."""
    eps: Annotated[float, Field(ge=1e-30, le=1)] = 1e-8
    """Adam's denominator offset: from 1e-30, below which float32 would make it 0, to 1."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay: an update takes lr times this share from every weight, which must be below 1."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Shape after the warm-up; `linear` and `cosine` would reach 0 with the update behind the last one."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Updates over which the rate rises linearly from 0."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 0.1
    """Largest gradient norm, over all trained weights; 0 switches clipping off."""

    @model_validator(mode="after")
    def _decay_leaves_weights(self) -> OptimConfig:
        share = self.lr * self.weight_decay
        if share >= 1:
            raise ValueError(
                f"optim.weight_decay = {self.weight_decay:g} takes lr times as much, a share of {share:g}, from every "
                f"weight in one update, which leaves none: lower it below 1 / lr = {1 / self.lr:g} (usual are 0 to .1)"
            )
        return self


class ProbeConfig(Config):
    """How the student's progress is measured, on fixed problems that are never trained on."""

    max_tokens: Positive = 512
    """Leading tokens of the reference solution whose log-likelihood is measured."""
    sampling_k: Positive = 1
    """Completions a probe problem for `probe_accuracy` and for contract positions."""
    credit_parameters: Literal["last_layer", "all"] = "last_layer"
    """Weights whose gradients give influence credit: those of the last decoder layer are cheap."""
    credit_problems: Positive = 16
    """Distilled problems of the latest batch, at most, on which influence and paired credit are taken."""
    credit_steps: Positive = 3
    """Steps before the latest whose graded completions say what raises the reward."""
    log_references: bool = False
    """Log in every step the NLL that the student gives to the references of the step's problems, before the update."""
    log_every: Annotated[int, Field(ge=0)] = 0
    """Steps between probe measurements taken for the log where no policy asks for them; 0 takes none."""


class StepConfig(Config):
    """How long a run is and what one step consists of."""

    num_steps: Positive = 100
    """Steps of the run: one generation batch each."""
    problems: Positive = 32
    """Problems in a generation batch."""
    updates_per_batch: Positive = 1
    """Optimizer updates into which a generation batch is split."""
    token_budget: Positive = 16384
    """Padded input positions that go through the model together: what bounds memory."""
    overlong: Literal["error", "drop"] = "error"
    """What to do with a training or probe problem whose teacher prompt plus a full completion exceeds the model's
    context, and with an evaluation problem whose own prompt does. Solutions that the probe reads behind such a
    prompt are cut to the context."""
    truncated: Literal["train", "mask"] = "train"
    """Whether completions that hit the length limit are trained on. They always grade as wrong."""


class FlowConfig(Config):
    """A flow student (tasks `ring` and `digits`): its network, its warm start and its rollouts. All sizes are ours.

    Rollouts are Euler-Maruyama steps of a rectified flow: flow/sde.py. DiffusionOPD (2605.15055) gives no schedule.
    """

    steps: Annotated[int, Field(ge=1, le=1000)] = 15
    """Transitions of a rollout."""
    eta: Annotated[float, Field(ge=0, le=10)] = 1.0
    """Noise of the rollout: its SDE has the diffusion eta sqrt(1 - t). 0 is the ODE, whose loss is the limit of the
    SDE's times its variance."""
    start: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.0, 0.0)
    """Times between which a training rollout begins, drawn evenly: at 0 from noise (the paper), later from the
    problem's own point, noised to that time. Evaluation always begins from noise."""
    width: Annotated[int, Field(ge=1, le=4096)] = 96
    """Units of a hidden layer."""
    depth: Annotated[int, Field(ge=1, le=16)] = 3
    """Hidden layers."""
    warm_steps: Annotated[int, Field(ge=0, le=1_000_000)] = 1000
    """Updates of the warm start."""
    warm_batch: Positive = 256
    """Points in each of them."""
    warm_lr: Annotated[float, Field(gt=0, le=1)] = 2e-3
    """Its learning rate, which falls linearly to 0."""
    blind: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of the warm start's samples that show what the student sees; the others show what teachers see."""

    @model_validator(mode="after")
    def _start_is_a_range(self) -> FlowConfig:
        if self.start[0] > self.start[1]:
            raise ValueError(f"flow.start = {list(self.start)} runs backwards: give the earlier time first")
        return self

    @model_validator(mode="after")
    def _noise_is_none_or_some(self) -> FlowConfig:
        if 0 < self.eta < MIN_ETA:
            raise ValueError(
                f"flow.eta = {self.eta:g} divides the loss by a variance near 0: choose 0, the ODE, or at least "
                f"{MIN_ETA:g}"
            )
        return self


class TrackConfig(Config):
    """Experiment trackers, through accelerate. None by default: the run directory holds everything."""

    to: tuple[Literal["tensorboard", "trackio", "wandb"], ...] = ()
    """`tensorboard` (files in RUN/track), `trackio`, `wandb`; each needs `pip install 'atesd[NAME]'`."""
    project: Annotated[str, Field(min_length=1)] = "atesd"
    """Project under which trackio and wandb show the run, by the name of its directory."""
    online: bool = False
    """Let wandb send data; unless this is true it runs offline, and `wandb sync` sends later. The others never send."""


class SaveConfig(Config):
    """What is written while training."""

    every: Positive = 25
    """Steps between checkpoints; one is always written at the end and on an interrupt."""
    keep: Positive = 2
    """How many of the latest checkpoints to keep. `final` and `best` are kept apart from them."""
    rollouts_every: Positive = 10
    """Steps between rollout files."""
    rollouts: Annotated[int, Field(ge=0)] = 4
    """Completions written to a rollout file."""
