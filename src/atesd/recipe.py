"""Read a recipe: one TOML file plus dotted overrides, validated into a `RunConfig`.

    atesd train recipes/pico.toml exposure.ratio=0.5 'exposure={kind="beta"}' loss.clip=token model.lora=

An override's value is TOML (a bare word counts as a string); an empty value removes the key. A table replaces the
whole section; changing only `kind` over keys of another kind fails and says so.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from atesd.config import RunConfig
from atesd.types import UserError

# What to write instead of a kind that is one of another section: (section, kind) -> remedy.
_ELSEWHERE = {
    (
        "exposure",
        "overlap",
    ): 'exposure.kind = "overlap" is a kind of reveal: write reveal = {kind = "overlap", ...} with '
    'its n, extra and unit, and exposure = {kind = "fixed"}'
}


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a recipe and apply overrides. UserError with file, key and remedy for everything that is wrong with it."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {path} cannot be read ({error}): give the path of a TOML file") from error
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"recipe {path} is not TOML: {error}") from error
    return build_config(apply_overrides(tree, overrides), source=str(path))


def build_config(tree: Mapping[str, Any], *, source: str = "config") -> RunConfig:
    """Validate a tree of plain values."""
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{source}: " + "; ".join(_explain(error))) from error


def with_overrides(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """Return the config with overrides applied."""
    return build_config(
        apply_overrides(config.model_dump(mode="json", exclude_unset=True), overrides), source="override"
    )


def apply_overrides(tree: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Return a copy of the tree with each `dotted.key=value` set, or removed where the value is empty."""
    result = deepcopy(dict(tree))
    for override in overrides:
        key, equals, text = override.partition("=")
        names = key.strip().split(".")
        if not equals or not all(names):
            raise UserError(f"override {override!r} is not of the form section.key=value")
        section: Any = result
        for name in names[:-1]:
            section = section.setdefault(name, {}) if text.strip() else section.get(name, {})
            if not isinstance(section, dict):
                raise UserError(f"override {override!r}: {name!r} is a value, not a section")
        if text.strip():
            section[names[-1]] = _parse_value(text.strip())
        else:
            section.pop(names[-1], None)
    return result


def _parse_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        if text[0] in "{[\"'" or text[0].isdigit():
            raise UserError(f"override value {text!r} is not valid TOML: quote it, or mend the brackets") from None
        return text


def _explain(error: ValidationError) -> list[str]:
    """Turn pydantic's findings into one clause each, with the nearest known key where one is unknown."""
    clauses = []
    for finding in error.errors():
        where = ".".join(str(part) for part in finding["loc"])
        elsewhere = _ELSEWHERE.get((where, str(finding.get("ctx", {}).get("tag"))))
        if elsewhere:
            clauses.append(elsewhere)
        elif finding["type"] == "extra_forbidden":
            clauses.append(f"unknown key {where!r}{_suggest(finding['loc'])}")
        elif finding["type"] == "value_error":
            clauses.append(f"{where}: {finding['ctx']['error']}" if where else str(finding["ctx"]["error"]))
        else:
            given = "" if isinstance(finding["input"], Mapping) else f" (given: {finding['input']!r})"
            clauses.append(f"{where}: {finding['msg']}{given}")
    return clauses


def _suggest(location: Sequence[str | int]) -> str:
    known = _known_keys(location[:-1])
    near = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
    if near:
        return f": did you mean {near[0]!r}?"
    return f": known here are {', '.join(sorted(known))}" if known else ""


def _known_keys(location: Sequence[str | int]) -> list[str]:
    """Return the fields of the model at a location; a tagged section's location contains its kind."""
    models: list[type[BaseModel]] = [RunConfig]
    for part in location:
        following: list[type[BaseModel]] = []
        for model in models:
            if part in model.model_fields:
                following += _models_in(model.model_fields[str(part)].annotation)
        models = following or [model for model in models if part in _kinds(model)] or models
    return [name for model in models for name in model.model_fields]


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in getattr(annotation, "__args__", ()) for model in _models_in(part)]


def _kinds(model: type[BaseModel]) -> tuple[Any, ...]:
    field = model.model_fields.get("kind")
    return () if field is None else get_args(field.annotation)
