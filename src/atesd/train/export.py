"""A run's model for others: copied, or with its adapter merged; and the hub that it may go to."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Literal, cast

import torch
from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from atesd.config import RunConfig
from atesd.files import write_atomic
from atesd.seals import MANIFEST
from atesd.train.checkpoint import write_weights
from atesd.train.model import load
from atesd.types import UserError, first_line

Precision = Literal["float32", "bfloat16"]


def copy_model(folder: Path, out: Path, card: str) -> None:
    """Copy a model's folder, without its seals, and give it a card."""
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns(MANIFEST), dirs_exist_ok=True)
    write_atomic(out / "README.md", card)


def merge_model(config: RunConfig, folder: Path, out: Path, card: str, dtype: Precision) -> None:
    """Write the base with the folder's adapter merged, in float32, then rounded to `dtype`.

    UserError where the folder holds no adapter, or one that does not fit its base.
    """
    refuse_nothing_to_merge(folder)
    source = config.model.model_copy(
        update={"path": str(folder), "revision": None, "lora": None, "dtype": "float32", "quantization": None}
    )
    model, tokenizer = load(source, 0, config.prompt.chat_template)
    write_weights(out, cast("Any", model).to(getattr(torch, dtype)))
    tokenizer.save_pretrained(out)
    write_atomic(out / "README.md", card)


def refuse_nothing_to_merge(folder: Path) -> None:
    """UserError where a model has no adapter."""
    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"{folder} holds a whole model, without an adapter to merge: leave --merge out")


def refuse_unreachable_hub(repo: str) -> None:
    """UserError where nothing could be pushed: a name that is none, no token, no answer, a token that is refused."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(
            f"--push-to-hub {repo!r} is no name on the hub ({first_line(error)}): write OWNER/NAME"
        ) from error
    if get_token() is None:
        raise UserError(
            f"nothing can be pushed to {repo!r} without a token: log in with hf auth login, or set HF_TOKEN"
        )
    try:
        HfApi().whoami()
    except HfHubHTTPError as error:
        if error.response.status_code not in (401, 403):
            raise _silent(repo, f"it answers {error.response.status_code}") from error
        raise UserError(
            f"nothing can be pushed to {repo!r}: the hub refuses the token ({first_line(error)}); log in again with: "
            "hf auth login"
        ) from error
    except Exception as error:  # whatever a connection may fail with
        raise _silent(repo, type(error).__name__) from error


def _silent(repo: str, why: str) -> UserError:
    return UserError(
        f"nothing can be pushed to {repo!r}: the hub does not answer ({why}); export to a folder with --out, and push "
        "it later with: hf upload"
    )


def push(folder: Path, repo: str, *, private: bool, stays: bool) -> str:
    """Upload a folder, and return where it is. UserError says how to do it later, where the folder stays or not."""
    api = HfApi()
    try:
        url = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Model trained with atesd")
    except Exception as error:
        later = f"{folder}" if stays else "FOLDER, after exporting to a folder with --out"
        raise UserError(
            f"the model could not be pushed to {repo!r} ({first_line(error).rstrip('.')}): push it later with: "
            f"hf upload {repo} {later}"
        ) from error
    return str(url)
