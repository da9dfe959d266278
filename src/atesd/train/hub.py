"""Where a model is: a folder, or an id on the Hugging Face hub, asked for once, so that a wrong one fails at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from atesd.types import UserError

_PATIENCE_S = 10.0


def locate(path: str, revision: str | None = None) -> dict[str, Any]:
    """Return what `from_pretrained` must know besides the path. UserError where nothing can be loaded from there.

    A hub that cannot be reached is no matter where the model lies in the cache: then nothing more is asked of it.
    """
    if Path(path).is_dir():
        if revision is not None:
            raise UserError(
                f"model.revision = {revision!r} has no effect on the folder {path!r}: remove it, or give a hub id"
            )
        return {}
    if Path(path).parts[:1] == ("runs",):  # a place of ours, not an owner on the hub
        raise UserError(
            f"there is no folder {path!r} yet: a run or a warm-up writes it; the head of the recipe says how"
        )
    named = {} if revision is None else {"revision": revision}
    try:
        _ask(path, revision)
    except HFValidationError as error:
        raise UserError(f"{path!r} is neither a folder here nor an id on the hub, such as Qwen/Qwen3-1.7B") from error
    except GatedRepoError as error:
        raise UserError(
            f"the model {path!r} is gated: accept its terms on its page, and log in with: hf auth login"
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{path!r} is neither a folder here nor a model on the hub that you may read: mend the name, or log in "
            "with: hf auth login"
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(
            f"the model {path!r} has no revision {revision!r}: give a branch, a tag or a commit that its page lists"
        ) from error
    except Exception as error:  # whatever a connection may fail with
        if isinstance(try_to_load_from_cache(path, "config.json", revision=revision), str):
            return {**named, "local_files_only": True}
        reason = f"it answers {error.response.status_code}" if isinstance(error, HfHubHTTPError) else "no connection"
        raise UserError(
            f"{path!r} is no folder here, and the hub cannot be asked for a model of that name ({reason}): give a "
            "folder, or download the model first where there is a connection, with: hf download"
        ) from error
    return named


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, for one-line messages."""
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__


def _ask(path: str, revision: str | None) -> None:
    """Ask the hub for a model, without the retries of a download."""
    api = HfApi()
    if api.model_info(path, revision=revision, timeout=_PATIENCE_S).gated:
        api.auth_check(path)


def base_of_adapter(folder: str) -> str | None:
    """Return the model that an adapter's folder names as its base; None where the folder holds no adapter.

    UserError where it names none.
    """
    config = Path(folder) / "adapter_config.json"
    if not config.is_file():
        return None
    try:
        base = json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{str(config)!r} is damaged ({error}): save the adapter again") from error
    if not base:
        raise UserError(f"{str(config)!r} does not name the adapter's base model: set base_model_name_or_path in it")
    if str(base).startswith(("/", "./", "../")) and not Path(base).is_dir():
        raise UserError(
            f"{str(config)!r} names the adapter's base model {base!r}, where there is no folder: set "
            "base_model_name_or_path in it to where the base is now, or to its hub id"
        )
    return str(base)
