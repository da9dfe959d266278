"""Read a recipe: one TOML file plus dotted overrides, validated into a `RunConfig`.

    atesd train recipes/pico.toml step.num_steps=50 'exposure={kind="beta"}' loss.clip=token model.lora=

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
from atesd.own import named_class
from atesd.packaged import find_recipe, recipe_text
from atesd.tree import ONE, SEVERAL
from atesd.types import UserError, one_line, shown

# What to write instead of a kind that is one of another section: (section, kind) -> remedy.
_ELSEWHERE = {
    (
        "exposure",
        "overlap",
    ): 'exposure.kind = "overlap" is a kind of reveal: write reveal = {kind = "overlap", ...} with '
    'its n, extra and unit, and exposure = {kind = "fixed"}'
}

_DEEPEST = 20
"""Levels of keys that no recipe reaches."""
_LONGEST_WORD = 100
"""Longest text of a user's that is compared with known words."""


def load_config(recipe: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a recipe, by path or by its packaged name, and apply overrides.

    UserError with file, key and remedy for everything that is wrong with it.
    """
    path = find_recipe(recipe)
    text = recipe_text(path)
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(one_line(f"recipe {path} is not TOML: {error}")) from error
    except ValueError as error:  # int's own
        raise UserError(f"recipe {path} holds a number of thousands of digits: write one that can be meant") from error
    except RecursionError as error:
        raise UserError(f"recipe {path} is nested too deeply: a section lies three levels deep at most") from error
    merged = apply_overrides(tree, overrides, source=f"recipe {path}")
    return build_config(merged, source=f"{path}, with the overrides" if overrides else str(path))


def build_config(tree: Mapping[str, Any], *, source: str = "config") -> RunConfig:
    """Validate a tree of plain values."""
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise UserError(one_line(f"{source}: " + "; ".join(_explain(error)))) from error


def with_overrides(config: RunConfig, overrides: Sequence[str], *, source: str = "override") -> RunConfig:
    """Return the config with overrides applied; `source` says in errors where they stand."""
    return build_config(apply_overrides(config.model_dump(mode="json", exclude_unset=True), overrides), source=source)


def apply_overrides(tree: Mapping[str, Any], overrides: Iterable[str], *, source: str = "the recipe") -> dict[str, Any]:
    """Return a copy of the tree with each `dotted.key=value` set, or removed where the value is empty."""
    try:
        result = deepcopy(dict(tree))
    except RecursionError as error:
        raise UserError(f"{source} is nested too deeply: a section lies three levels deep at most") from error
    for override in overrides:
        key, equals, text = override.partition("=")
        names = key.strip().split(".")
        if not equals or not all(names):
            raise UserError(f"override {shown(override)} is not of the form section.key=value")
        if len(names) > _DEEPEST:
            raise UserError(f"override {shown(override)} is nested too deeply: no key lies {_DEEPEST} levels deep")
        section: Any = result
        for name in names[:-1]:
            section = section.setdefault(name, {}) if text.strip() else section.get(name, {})
            if not isinstance(section, dict):
                raise UserError(f"override {shown(override)}: {shown(name)} is a value, not a section")
        if text.strip():
            section[names[-1]] = _parse_value(one_line(key.strip()), text.strip())
        else:
            section.pop(names[-1], None)
    return result


def _parse_value(key: str, text: str) -> Any:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError) as error:
        is_word = isinstance(error, tomllib.TOMLDecodeError)  # else a number or a depth that cannot be read
        if not is_word or text[0] in "{[\"'" or text[0].isdigit():
            raise UserError(
                f"override {key}: value {shown(text)} is not valid TOML: quote it, or mend the brackets"
            ) from None
        return text
    if len(parsed) > 1:
        raise UserError(f"override {key}: value {shown(text)} holds several lines: give one override for each key")
    return parsed["value"]


def _explain(error: ValidationError) -> list[str]:
    """Turn pydantic's findings into one clause each, with the nearest known key or kind where one is unknown."""
    clauses = []
    for finding in error.errors():
        finding["loc"] = tuple(part for part in finding["loc"] if part not in (ONE, SEVERAL))
        where = ".".join(str(part) for part in finding["loc"])
        elsewhere = _ELSEWHERE.get((where, str(finding.get("ctx", {}).get("tag"))))
        if elsewhere:
            clauses.append(elsewhere)
        elif finding["type"] in ("union_tag_invalid", "union_tag_not_found"):
            clauses.append(_explain_kind(where, finding))
        elif finding["type"] == "extra_forbidden":
            clauses.append(f"unknown key {shown(where)}{_suggest(finding['loc'])}")
        elif finding["type"] == "value_error":
            clauses.append(f"{where}: {finding['ctx']['error']}" if where else str(finding["ctx"]["error"]))
        else:
            given = "" if isinstance(finding["input"], Mapping) else f" (given: {shown(finding['input'])})"
            clauses.append(f"{where}: {finding['msg']}{_as_section(where, finding)}{given}")
    return clauses


def _explain_kind(where: str, finding: Mapping[str, Any]) -> str:
    """Say what kinds a section has, and which is nearest to the given one, or knows the given keys."""
    models, kind = _models_at(finding["loc"]), finding.get("ctx", {}).get("tag")
    kinds = [kind for model in models for kind in _kinds(model)]
    known = f"known are {', '.join(kinds)}, and package.module:Class or file.py:Class of your own"
    if kind is None:
        owners = {
            key: [kind for model in models if key in model.model_fields for kind in _kinds(model)]
            for key in finding["input"]
        }
        owned = "".join(f"; {key!r} belongs to {', '.join(map(repr, each))}" for key, each in owners.items() if each)
        return f'{where} lacks its kind: write {where} = {{kind = "{kinds[0]}"}}; {known}{owned}'
    near = difflib.get_close_matches(kind[:_LONGEST_WORD], kinds, n=1, cutoff=0.5)
    meant = f": did you mean {near[0]!r}? " if near else ": "
    return f"{where}.kind = {shown(kind)} is unknown{meant}{known}"


def _as_section(where: str, finding: Mapping[str, Any]) -> str:
    """Say how a section with kinds is written where a value stands in its place; nothing where none does."""
    kinds = [kind for model in _models_at(finding["loc"]) for kind in _kinds(model)]
    if finding["type"] != "model_attributes_type" or not kinds or where != ".".join(map(str, finding["loc"])):
        return ""
    near = difflib.get_close_matches(str(finding["input"])[:_LONGEST_WORD], kinds, n=1)
    return f': write {where} = {{kind = "{near[0] if near else kinds[0]}"}}; known are {", ".join(kinds)}'


def _suggest(location: Sequence[str | int]) -> str:
    known = [name for model in _models_at(location[:-1]) for name in model.model_fields]
    elsewhere = _of_other_kinds(location)
    near = difflib.get_close_matches(str(location[-1])[:_LONGEST_WORD], known, n=1)
    if near and not elsewhere:
        return f": did you mean {near[0]!r}?"
    return f": known here are {', '.join(sorted(known))}{elsewhere}" if known else ""


def _of_other_kinds(location: Sequence[str | int]) -> str:
    """Say which other kinds of a section know a key, or nearly, and how to take one; nothing where none does."""
    if len(location) < 3:
        return ""
    *section, kind, given = location
    if ":" in str(kind):
        return ""  # of the user's own
    names = {name for model in _models_at(section) for name in model.model_fields}
    near = difflib.get_close_matches(str(given)[:_LONGEST_WORD], names, n=1)
    if not near:
        return ""
    key = near[0]
    models = [model for model in _models_at(section) if key in model.model_fields]
    others = [other for model in models for other in _kinds(model)]
    if not others or kind in others:
        return ""
    where, named = ".".join(map(str, section)), ", ".join(map(repr, others[:3])) + ", ..." * (len(others) > 3)
    return f'; {key!r} belongs to the kind {named}: replace the section, {where}={{kind="{others[0]}", {key}=...}}'


def _models_at(location: Sequence[str | int]) -> list[type[BaseModel]]:
    """Return the models at a location: of a section with kinds all of them, unless the location contains its kind."""
    models: list[type[BaseModel]] = [RunConfig]
    for part in location:
        following: list[type[BaseModel]] = []
        for model in models:
            if part in model.model_fields:
                following += _models_in(model.model_fields[str(part)].annotation)
        own = named_class(part)
        if own is not None:
            following = [own]
        models = following or [model for model in models if part in _kinds(model)] or models
    return models


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    found = [model for part in getattr(annotation, "__args__", ()) for model in _models_in(part)]
    return list(dict.fromkeys(found))


def _kinds(model: type[BaseModel]) -> tuple[Any, ...]:
    field = model.model_fields.get("kind")
    return () if field is None else get_args(field.annotation)
