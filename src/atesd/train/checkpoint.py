"""Whole states on disk: atomic, without pickle.

    step_000100/  config.json model.safetensors tokenizer...   loads with `from_pretrained` (adapters: with peft)
                  codes.safetensors                             latent codes, where the model has some
                  optimizer.safetensors  teacher.safetensors    tensors by parameter name; of sharded weights each
                                                                process writes its shares, optimizer-00001-of-00002...
                  state.json                                    everything else
                  manifest.json                                 size and digest of every file

A checkpoint is written under another name and renamed when complete, so an interrupted one is never taken for a whole
one; one that is damaged later does not match its manifest. No random state needs saving: every generator is derived
from (seed, purpose, step).
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from atesd.codes.model import codes_of, load_codes, save_codes, taken_off
from atesd.files import dump_json, settle
from atesd.runlog import step_name
from atesd.seals import MANIFEST, read_manifest, seal_files
from atesd.train.optim import MASTER
from atesd.train.shard import Whole, local, piece, shared_as
from atesd.types import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_PARTIAL = ".partial"
_ASIDE = ".old"
_NAME = re.compile(r"step_\d{6,}")


def save_model(
    folder: Path,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    beside: Mapping[str, str] = MappingProxyType({}),
    about: Mapping[str, float] = MappingProxyType({}),
) -> None:
    """Write a model folder (adapters only, with LoRA); an old folder of that name stays until the new is complete.

    `beside` holds further files, such as the model's card: their texts by name; `about` numbers for its manifest.
    """
    partial = _fresh_partial(folder)
    try:
        _write_model(partial, model, tokenizer)
        generation = getattr(model, "generation_config", None)
        if generation is not None:  # which adapters do not save themselves
            generation.save_pretrained(partial)
        for name, text in beside.items():
            (partial / name).write_text(text, encoding="utf-8")
        _seal(partial, about)
        _replace(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def save_checkpoint(
    checkpoints: Path,
    step: int,
    *,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    optimizer: torch.optim.Optimizer,
    teacher: Mapping[str, Tensor],
    state: Mapping[str, Any],
    keep: int,
    shards: Whole | None = None,
) -> Path:
    """Write the checkpoint of `step` and remove all but the latest `keep`. Earlier ones stay intact if this fails.

    Of several processes the first writes it; with `shards` all take part, each with files of its own.
    """
    shards = shards or Whole()
    world = shards.world
    folder = checkpoints / step_name(step)
    if not (world.is_main or shards.is_sharded):
        return folder
    partial = _fresh_partial(folder) if world.is_main else _partial_of(folder)
    try:
        if shards.is_sharded:
            world.barrier()
        masters = {f"{name}/{MASTER}": share.contiguous() for name, share in shards.masters().items()}
        save_file(_optimizer_tensors(model, optimizer) | masters, partial / f"optimizer{shards.mark}.safetensors")
        if teacher:
            save_file(
                {name: local(value).contiguous() for name, value in teacher.items()},
                partial / f"teacher{shards.mark}.safetensors",
            )
        if shards.is_sharded:
            world.barrier()
        if not world.is_main:
            return folder
        _write_model(partial, model, tokenizer)
        (partial / "state.json").write_text(dump_json(state, indent=None), encoding="utf-8")  # a line a token else
        _seal(partial)
        _replace(partial, folder)
    except BaseException:
        if world.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    for old in find_checkpoints(checkpoints)[:-keep]:
        shutil.rmtree(old)
    return folder


def find_checkpoints(checkpoints: Path) -> list[Path]:
    """Return the checkpoints, oldest first; what an interruption left half written goes, half replaced returns."""
    for left_over in checkpoints.glob(f"*{_PARTIAL}"):
        shutil.rmtree(left_over, ignore_errors=True)
    for aside in checkpoints.glob(f"*{_ASIDE}"):
        restore_interrupted(aside.with_name(aside.name.removesuffix(_ASIDE)))
        shutil.rmtree(aside, ignore_errors=True)
    found = [path for path in checkpoints.glob("step_*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def restore_interrupted(folder: Path) -> None:
    """Bring back a model folder that had stepped aside when its replacement was interrupted."""
    aside = folder.with_name(folder.name + _ASIDE)
    if aside.is_dir() and not folder.exists():
        aside.rename(folder)


def kept_best(folder: Path, step: int) -> dict[str, float] | None:
    """Return step and score of a best model that is of a later step than `step`; None for any other.

    A run that was killed behind its checkpoint left it. What comes of these steps when they are made again may differ
    by rounding: then the model is still there, and this is what it was.
    """
    found = read_manifest(folder) or {}
    later, score = found.get("step"), found.get("score")
    if isinstance(later, int) and isinstance(score, int | float) and later > step:
        return {"step": later, "score": score}
    return None


def load_state(folder: Path) -> dict[str, Any]:
    """Return a checkpoint's `state.json`."""
    try:
        loaded: dict[str, Any] = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(
            f"checkpoint {folder} is damaged ({error}): delete that folder and resume from the one before"
        ) from error
    return loaded


def load_weights(folder: Path, model: nn.Module) -> None:
    """Put a checkpoint's weights (or adapters) and codes into the model."""
    codes = codes_of(model)
    if codes is not None:
        codes.load_state_dict(load_codes(folder).state_dict())
    if hasattr(model, "peft_config"):
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(cast("Any", model), load_file(folder / "adapter_model.safetensors"))
        return
    with taken_off(model):
        missing, unexpected = model.load_state_dict(_all_shards(folder), strict=False)
    tied = set(getattr(model, "_tied_weights_keys", None) or ())
    if unexpected or set(missing) - tied:
        raise UserError(f"checkpoint {folder} does not fit the model of config.json: it was written by another run")


def load_optimizer(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, shards: Whole | None = None
) -> None:
    """Restore the optimizer's moments, parameter by parameter name, or this process's shares of them, and masters."""
    shards = shards or Whole()
    tensors = _tensors(folder, "optimizer", shards)
    for name, share in shards.masters().items():
        share.copy_(tensors.pop(f"{name}/{MASTER}"))
    names = [name for name, weight in model.named_parameters() if weight.requires_grad]
    trained = optimizer.param_groups[0]["params"]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, slot = key.rsplit("/", 1)
        index = names.index(name)
        state.setdefault(index, {})[slot] = shared_as(trained[index], value) if value.dim() else value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def load_teacher(folder: Path, shards: Whole | None = None) -> dict[str, Tensor]:
    """Return the teacher's tensors, or this process's shares; none for teachers that need no checkpoint."""
    return _tensors(folder, "teacher", shards or Whole())


def _tensors(folder: Path, name: str, shards: Whole) -> dict[str, Tensor]:
    """Read what one process wrote, or several their shares of, however many: whole, or this process's shares."""
    paths = sorted(folder.glob(f"{name}-*-of-*.safetensors"))
    if shards.is_sharded and len(paths) == shards.world.size:
        own: dict[str, Tensor] = load_file(paths[shards.world.rank])
        return own
    whole: dict[str, Tensor] = {}
    if (folder / f"{name}.safetensors").is_file():
        whole = load_file(folder / f"{name}.safetensors")
    elif paths:
        parts = [load_file(path) for path in paths]
        whole = {
            key: torch.cat([part[key] for part in parts]) if value.dim() else value for key, value in parts[0].items()
        }
    if not shards.is_sharded:
        return whole
    return {key: piece(value, shards.world) if value.dim() else value for key, value in whole.items()}


def _write_model(folder: Path, model: nn.Module, tokenizer: PreTrainedTokenizerBase | None) -> None:
    write_weights(folder, model)
    if tokenizer is not None:  # flow students have none
        tokenizer.save_pretrained(folder)


def write_weights(folder: Path, model: nn.Module) -> None:
    """Write a model's weights (adapters only, with LoRA) as it loads without its codes, and these beside it."""
    with taken_off(model):
        more = {"save_embedding_layers": False} if hasattr(model, "peft_config") else {}  # else peft asks the hub
        cast("PreTrainedModel", model).save_pretrained(folder, safe_serialization=True, **more)
    codes = codes_of(model)
    if codes is not None:
        save_codes(folder, codes)


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    names = [name for name, weight in model.named_parameters() if weight.requires_grad]
    return {
        f"{names[index]}/{slot}": local(value).contiguous()
        for index, slots in optimizer.state_dict()["state"].items()
        for slot, value in slots.items()
    }


def _all_shards(folder: Path) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        weights |= load_file(path)
    return weights


def _seal(folder: Path, about: Mapping[str, float] = MappingProxyType({})) -> None:
    (folder / MANIFEST).write_text(dump_json({"files": seal_files(folder), **about}), encoding="utf-8")


def _fresh_partial(folder: Path) -> Path:
    partial = _partial_of(folder)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def _partial_of(folder: Path) -> Path:
    return folder.with_name(folder.name + _PARTIAL)


def _replace(partial: Path, folder: Path) -> None:
    """Give a complete folder its name; a folder of that name steps aside first and is removed last."""
    for path in partial.rglob("*"):
        if path.is_file():
            settle(path)
    aside = folder.with_name(folder.name + _ASIDE)
    shutil.rmtree(aside, ignore_errors=True)
    with suppress(FileNotFoundError):
        folder.rename(aside)
    partial.rename(folder)
    shutil.rmtree(aside, ignore_errors=True)
