"""Where a model is: a folder, or an id on the Hugging Face hub, asked for once, so that a wrong one fails at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import HfApi, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from atesd.types import UserError, first_line

ADAPTER = "adapter_config.json"
_PATIENCE_S = 10.0


class Base(NamedTuple):
    """The model that an adapter was trained on."""

    path: str
    revision: str | None = None
    """Branch, tag or commit of a hub id; None for a folder."""


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
        if _cached(path, revision) is not None:
            return {**named, "local_files_only": True}
        reason = f"it answers {error.response.status_code}" if isinstance(error, HfHubHTTPError) else "no connection"
        if reason == "it answers 401":
            raise UserError(
                f"{path!r} is no folder here, and the hub refuses the token: log in again with hf auth login, or unset "
                "HF_TOKEN"
            ) from error
        raise UserError(
            f"{path!r} is no folder here, and the hub cannot be asked for a model of that name ({reason}): give a "
            f"folder, or download the model first where there is a connection, with: hf download {path}"
        ) from error
    return named


def _ask(path: str, revision: str | None) -> None:
    """Ask the hub for a model, without the retries of a download."""
    api = HfApi()
    if api.model_info(path, revision=revision, timeout=_PATIENCE_S).gated:
        api.auth_check(path)


def commit_of(path: str, revision: str | None = None) -> str | None:
    """Return the commit that was loaded of a hub id, as the cache knows it; None for a folder."""
    if Path(path).is_dir():
        return None
    found = _cached(path, revision)
    return None if found is None else found.parent.name


def fetched(path: str, revision: str | None = None) -> tuple[str, str | None]:
    """Return the folder that an adapter on the hub is downloaded to, without a revision; all else as it is."""
    if Path(path).is_dir():
        return path, revision
    where = locate(path, revision)
    try:
        hf_hub_download(path, ADAPTER, **where)
        return snapshot_download(path, ignore_patterns=["*.bin", "*.pt"], **where), None
    except EntryNotFoundError:  # a whole model
        return path, revision
    except Exception as error:  # whatever a connection may fail with
        raise UserError(
            f"{path!r} could not be downloaded ({first_line(error)}): try again, or download it with: "
            f"hf download {path}"
        ) from error


def cached_in_part(path: str) -> UserError:
    """Return the error for a model of which the cache lacks files while the hub cannot be asked."""
    return UserError(
        f"the hub cannot be asked for {path!r}, of which the cache holds a part only: download it where there is a "
        f"connection, with: hf download {path}"
    )


def _cached(path: str, revision: str | None) -> Path | None:
    """Return the config of a hub id that lies in the cache: a model's, or an adapter's."""
    found = (try_to_load_from_cache(path, name, revision=revision) for name in ("config.json", ADAPTER))
    return next((Path(each) for each in found if isinstance(each, str)), None)


def base_of_adapter(folder: str) -> Base | None:
    """Return the model that an adapter's folder names as its base; None where the folder holds no adapter.

    UserError where it names none.
    """
    config = Path(folder) / ADAPTER
    if not config.is_file():
        return None
    try:
        told = json.loads(config.read_text(encoding="utf-8"))
        base, revision = told.get("base_model_name_or_path"), told.get("revision")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{str(config)!r} is damaged ({error}): save the adapter again") from error
    if not base:
        raise UserError(f"{str(config)!r} does not name the adapter's base model: set base_model_name_or_path in it")
    if str(base).startswith(("/", "./", "../")) and not Path(base).is_dir():
        raise UserError(
            f"{str(config)!r} names the adapter's base model {base!r}, where there is no folder: set "
            "base_model_name_or_path in it to where the base is now, or to its hub id"
        )
    return Base(str(base), None if Path(base).is_dir() else revision)
