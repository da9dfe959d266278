"""Load a causal language model and its tokenizer, optionally with LoRA, from the package, a folder or the hub."""

from __future__ import annotations

import math
import os
import re
import warnings
from collections.abc import Callable
from importlib import import_module, resources, util
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase
from transformers.utils import logging

from atesd.codes.model import FILE as CODES
from atesd.codes.model import attach, load_codes
from atesd.rollout.weights import largest_weight
from atesd.sections import LoraConfig, ModelConfig
from atesd.train.attention import use_short_rows
from atesd.train.heads import beside_text, decoder, kind_of, output_layer, refuse_router_loss
from atesd.train.hub import Base, base_of_adapter, cached_in_part, commit_of, fetched, locate
from atesd.train.smollm2 import smollm2_folder
from atesd.train.tokens import load_tokenizer
from atesd.types import UserError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel  # two seconds, which only loading a model is worth

    from atesd.config import RunConfig

_DAMAGED = (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError, StrictDataclassError)

_LINEAR = ("Conv1D", "Linear4bit")  # beside torch's own

_WORTH_BFLOAT16 = 1.3
"""A precision lost for less speed than this, which might be noise, is lost for nothing."""


def decide_dtype(config: RunConfig, say: Callable[[str], object] | None = None) -> RunConfig:
    """Return the recipe with `model.dtype = "auto"` made a precision, after saying which and why in one line."""
    if config.model.dtype != "auto":
        return config
    set_threads(config.threads)
    dtype, why = choose_dtype()
    if say is not None:
        say(f"model.dtype = {dtype}: {why}")
    return config.model_copy(update={"model": config.model.model_copy(update={"dtype": dtype})})


def choose_dtype() -> tuple[str, str]:
    """Return the faster precision, and why; float32 where nothing is known of the device.

    A GPU that only emulates bfloat16 does not count as one that computes in it.
    """
    if torch.cuda.is_available():
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bfloat16", "the GPU computes in it"
        return "float32", "the GPU does not compute in bfloat16"
    if has_accelerator():
        return "float32", "bfloat16 is chosen on CUDA and on CPUs alone"
    speed = bfloat16_speed()
    why = f"a matrix product in bfloat16 is {speed:.2g} times as fast as in float32; {_WORTH_BFLOAT16} are worth it"
    return "bfloat16" if speed >= _WORTH_BFLOAT16 else "float32", why


def bfloat16_speed(clock: Callable[[], float] = perf_counter) -> float:
    """Return how many times as fast as in float32 a matrix product is in bfloat16 on the CPU, with torch's threads.

    The least of seven each, in turn, after one that warms up, as whatever else runs only adds to them: a third of a
    second where bfloat16 is only emulated.
    """
    seconds: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}
    for _ in range(8):
        for dtype, taken in seconds.items():
            inputs, weights = torch.ones(128, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
            begin = clock()
            nn.functional.linear(inputs, weights)
            taken.append(clock() - begin)
    in_float32, in_bfloat16 = (min(taken[1:]) for taken in seconds.values())
    return in_float32 / max(in_bfloat16, 1e-9)


def load(
    config: ModelConfig, seed: int, template: str | None = None, *, merges: bool = True
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the model in training form and its tokenizer.

    `seed` fixes the random half of LoRA's initialisation; `template` is the recipe's chat template. A folder that holds
    an adapter gives its base with the adapter merged, or beside it where nothing trains and half precision would round
    the merge away, or `merges` is false: an engine with a copy of the base takes adapters alone. Latent codes in the
    folder become part of the model, frozen. UserError if the folder lacks a model, tokenizer or chat template, if its
    weights are pickled, damaged or not finite, or if an adapter, codes or the tokenizer do not fit the model.
    """
    assert config.dtype != "auto", "decide_dtype comes first: the run must know what it was"
    path, revision = fetched(resolve(config.path), config.revision)
    base = base_of_adapter(path)
    tokenizer = load_tokenizer(path, revision, template)
    if base is None:
        model = _read(path, config, revision)
    else:
        merged = config.lora is not None or (merges and config.dtype == "float32")
        model = _with_saved_adapter(_whole(base, config), path, base.path, merged=merged)
    _check_vocabulary(model, tokenizer, path)
    name, size = largest_weight(model)
    if not math.isfinite(size):
        raise UserError(
            f"the weights in {path!r} are not finite (first {name}): take an earlier checkpoint of the model"
        )
    refuse_router_loss(model)
    _freeze_what_text_never_reaches(model)
    if not has_accelerator():
        use_short_rows(model)
    if config.gradient_checkpointing:
        enable_checkpointing(model)
    if config.lora is not None:
        named = resolve(config.path)
        cast("Any", model).name_or_path = named  # what adapters name as their base: of a merged one, its folder
        model = add_lora(model, config.lora, seed, commit_of(named, config.revision))
    if hasattr(model, "peft_config"):
        from atesd.train.lora import in_fewer_passes

        in_fewer_passes(model)
    if (Path(path) / CODES).is_file():
        attach(model, load_codes(path))
    return cast("PreTrainedModel", model), tokenizer


def _whole(base: Base, config: ModelConfig) -> nn.Module:
    """Read the base of an adapter, which may itself be the folder of one."""
    path, revision = fetched(resolve(base.path), base.revision)
    below = base_of_adapter(path)
    if below is None:
        return _read(path, config, revision)
    whole = _with_saved_adapter(_whole(below, config), path, below.path, merged=True)
    cast("Any", whole).name_or_path = base.path
    return whole


def _read(path: str, config: ModelConfig, revision: str | None) -> nn.Module:
    """Read a model's weights."""
    _refuse_pickles(Path(path))
    settings: dict[str, Any] = locate(path, revision) | _in_four_bits(config)
    if config.attn_implementation is not None:
        settings["attn_implementation"] = config.attn_implementation
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=getattr(torch, config.dtype),
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **settings,
        )
    except SafetensorError as error:
        raise UserError(
            f"the weights in {path!r} are damaged ({first_line(error)}): copy or download them again"
        ) from error
    except (ImportError, *_DAMAGED) as error:
        if "local_files_only" in settings and isinstance(error, OSError):
            raise cached_in_part(path) from error
        raise UserError(_why_not_read(path, config, error)) from error
    if found["missing_keys"]:
        named = ", ".join(sorted(found["missing_keys"])[:3])
        raise UserError(
            f"the weights in {path!r} lack {len(found['missing_keys'])} tensors ({named}), which would be random: "
            "save the whole model again"
        )
    return cast("nn.Module", model)


def _why_not_read(path: str, config: ModelConfig, error: Exception) -> str:
    if config.attn_implementation is not None and re.search("attention|attn", str(error), re.IGNORECASE):
        return (
            f"model.attn_implementation = {config.attn_implementation!r} does not work here ({first_line(error)}): "
            "remove it, which leaves the choice to transformers, or install what it needs"
        )
    if "ignore_mismatched_sizes" in str(error):
        return (
            f"the weights in {path!r} have other shapes than its config.json says, as with another vocabulary: take "
            "both from the same model"
        )
    return (
        f"no causal language model could be loaded from {path!r} ({first_line(error)}): "
        "give a folder with config.json and safetensors weights, or a hub id"
    )


def _in_four_bits(config: ModelConfig) -> dict[str, Any]:
    """Return what makes the base weights 4-bit, as in QLoRA (2305.14314): NF4, its constants quantised too."""
    if config.quantization is None:
        return {}
    if util.find_spec("bitsandbytes") is None:
        raise UserError('model.quantization = "4bit" needs bitsandbytes: pip install bitsandbytes')
    from transformers import BitsAndBytesConfig

    device = torch.accelerator.current_accelerator() if has_accelerator() else torch.device("cpu")
    chosen = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, config.dtype),
    )
    return {"quantization_config": chosen, "device_map": {"": device}}


def _with_saved_adapter(model: nn.Module, folder: str, base: str, *, merged: bool) -> nn.Module:
    """Put an adapter's folder on its base. UserError where it does not fit it, or is damaged."""
    from peft import PeftConfig, get_peft_model, set_peft_model_state_dict

    remedy = f"it needs the model it was trained on, and its adapter_config.json names {base!r}"
    try:
        adapted = get_peft_model(cast("Any", model), PeftConfig.from_pretrained(folder))
        found = set_peft_model_state_dict(adapted, load_file(Path(folder) / "adapter_model.safetensors"))
    except _DAMAGED as error:
        why = " ".join(str(error).split())[:200]
        raise UserError(f"the adapter in {folder!r} cannot be put on its base ({why}): {remedy}") from error
    wrong = [name for name in found.missing_keys if ".lora_" in name] + list(found.unexpected_keys)
    if wrong:
        raise UserError(f"the adapter in {folder!r} does not fit its base (first at {wrong[0]}): {remedy}")
    return cast("nn.Module", cast("Any", adapted).merge_and_unload().requires_grad_(True) if merged else adapted)


def _check_vocabulary(model: nn.Module, tokenizer: Any, path: str) -> None:
    """UserError where the tokenizer knows tokens that the model has no embedding of."""
    rows = cast("Any", model).get_input_embeddings().weight.shape[0]
    largest = max(tokenizer.get_vocab().values())
    if largest >= rows:
        raise UserError(
            f"the tokenizer in {path!r} has ids up to {largest}, but the model embeds {rows} tokens: take both from "
            "the same model"
        )


def enable_checkpointing(model: Any) -> None:
    """Recompute activations in the backward pass; before adapters are added, whose inputs must then need gradients.

    Layers are recomputed in training mode alone, which must not bring dropout back: it is set to 0 in the modules, and
    stays in the model's config.
    """
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def set_threads(count: int) -> None:
    """Give torch that many CPU threads, unless it is 0; warn where the machine has fewer cores."""
    cores = os.cpu_count() or count
    if count > cores:
        warnings.warn(
            f"threads = {count}, but the machine has {cores} cores, which makes every step slower: lower it",
            stacklevel=2,
        )
    if count:
        torch.set_num_threads(count)


def has_accelerator() -> bool:
    """Tell whether runs use a GPU or its like."""
    return torch.accelerator.is_available()


def preload() -> None:
    """Import what loading a model and sampling from it would import, and no more: no thread starts, no file is read."""
    for name in ("modeling_utils", "generation.utils"):
        import_module(f"transformers.{name}")


def disable_progress_bars() -> None:
    """Switch off the progress bars of loading and saving."""
    logging.disable_progress_bar()


def resolve(path: str) -> str:
    """Turn the names `pico`, `pico-doors` and `smollm2` into folders; leave anything else as it is."""
    if path in ("pico", "pico-doors"):
        return str(resources.files("atesd") / "assets" / path)
    if path == "smollm2":
        return str(smollm2_folder())
    return path


def context_length(model: nn.Module) -> int | None:
    """Return the largest number of positions the model takes, or None where its config names none."""
    length = getattr(cast("Any", model).config.get_text_config(), "max_position_embeddings", None)
    return int(length) if length else None


def _freeze_what_text_never_reaches(model: nn.Module) -> None:
    """Leave the other senses of a multimodal model as they are, and say so: no gradient could ever reach them."""
    idle = beside_text(model)
    for weight in idle:
        weight.requires_grad_(False)
    if idle:
        warnings.warn(
            f"{kind_of(model)} reads more than text: only its text part trains, and "
            f"{sum(weight.numel() for weight in idle):,} weights of the rest stay as they are",
            stacklevel=3,
        )


def add_lora(model: nn.Module, config: LoraConfig, seed: int, commit: str | None = None) -> nn.Module:
    """Return the model with adapters, which remember the commit of a base that came from the hub.

    UserError where a target is no layer, or the output head.
    """
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model

    _refuse_adapters_on_the_head(model, config)
    _refuse_unmatched_targets(model, config)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            adapted = get_peft_model(
                cast("Any", model),
                PeftLoraConfig(
                    r=config.r,
                    lora_alpha=cast("int", config.alpha),
                    lora_dropout=0.0,
                    target_modules=list(config.targets),
                    exclude_modules=_linear_beside_text(model) or None,
                    task_type="CAUSAL_LM",
                    revision=commit,
                ),
            )
        except ValueError as error:
            raise UserError(
                f"LoRA does not fit this model ({first_line(error)}): name its layers in model.lora.targets"
            ) from error
    return cast("nn.Module", adapted)


def _refuse_adapters_on_the_head(model: nn.Module, config: LoraConfig) -> None:
    """Refuse an adapter that nothing would read. A target is a layer's name or the end of it, as in peft."""
    output = output_layer(model)
    for name, layer in model.named_modules():
        if layer is output and any(f".{name}".endswith(f".{target}") for target in config.targets):
            raise UserError(
                f"model.lora.targets names the output head {name}, whose adapter would never be read, as losses take "
                "the head's own weights: remove it"
            )


def _refuse_unmatched_targets(model: nn.Module, config: LoraConfig) -> None:
    """Refuse a target that is no layer's name, nor the end of one: it would be ignored."""
    within = decoder(model)
    names = [f".{name}" for name, _ in within.named_modules()]
    unmatched = [each for each in config.targets if not any(name.endswith(f".{each}") for name in names)]
    if unmatched:
        kinds = {
            name.rsplit(".", 1)[-1]
            for name, layer in within.named_modules()
            if isinstance(layer, nn.Linear) or type(layer).__name__ in _LINEAR
        }
        raise UserError(
            f"model.lora.targets names {', '.join(unmatched)}, but {kind_of(model)} has no such layer: name some of "
            f"its own, {', '.join(sorted(kinds))}"
        )


def _linear_beside_text(model: nn.Module) -> list[str]:
    """Return the names of layers outside the text part, whose adapters would never train."""
    idle = {id(weight) for weight in beside_text(model)}
    return [name for name, layer in model.named_modules() if any(id(w) in idle for w in layer.parameters(False))]


def _refuse_pickles(folder: Path) -> None:
    """Refuse a folder whose only weights are pickled: loading them could run any code."""
    pickled = sorted(path.name for path in folder.glob("pytorch_model*.bin")) if folder.is_dir() else []
    if pickled and not any(folder.glob("*.safetensors")):
        raise UserError(
            f"the weights in {str(folder)!r} are pickled ({pickled[0]}), and loading them could run any code: convert "
            "them, if you trust them, with transformers' from_pretrained(...).save_pretrained(...), which writes "
            "safetensors"
        )
