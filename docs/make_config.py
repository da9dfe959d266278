"""Write docs/config.md from the config models: every section, key, type, default and meaning.

python docs/make_config.py
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from atesd.config import RunConfig

TARGET = Path(__file__).with_name("config.md")
SCHEMA = Path(__file__).with_name("recipe.schema.json")


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """Return the models that an annotation names."""
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return [annotation]
    return list(dict.fromkeys(model for part in get_args(annotation) for model in models_in(part)))


def type_name(annotation: Any) -> str:
    """Return an annotation as a reader of TOML would say it."""
    if annotation is type(None):
        return "unset"
    if get_origin(annotation) is Literal:
        return " or ".join(f"`{value!r}`".replace("'", '"') for value in get_args(annotation))
    models = models_in(annotation)
    if models:
        return "table"
    if get_origin(annotation) in (tuple, list):
        inner = [part for part in get_args(annotation) if part is not Ellipsis]
        return f"list of {type_name(inner[0])}"
    if get_origin(annotation) is dict:
        return "table"
    if get_origin(annotation) is not None and get_origin(annotation).__name__ == "Annotated":
        return type_name(get_args(annotation)[0])
    if get_args(annotation) and (get_origin(annotation) is Union or type(annotation).__name__ == "UnionType"):
        return " or ".join(dict.fromkeys(type_name(part) for part in get_args(annotation)))
    names = {"str": "text", "int": "whole number", "float": "number", "bool": "true or false"}
    return names.get(getattr(annotation, "__name__", str(annotation)), str(annotation))


def default_text(field: FieldInfo) -> str:
    """Return a field's default as TOML would write it."""
    if field.default is PydanticUndefined:
        return "required" if field.default_factory is None else "empty"
    value = field.default
    if isinstance(value, BaseModel):
        return "see below"
    if value is None:
        return "unset"
    text = repr(value).replace("'", '"').replace("True", "true").replace("False", "false").replace("\n", " ")
    text = text if len(text) <= 60 else text[:57] + "..."
    return f"`{text}`".replace("|", "\\|")


def section(name: str, model: type[BaseModel]) -> Iterator[str]:
    """Yield the lines of one model."""
    kind = model.model_fields.get("kind")
    title = f"`[{name}]`" if kind is None else f'`[{name}]` with `kind = "{kind.default}"`'
    yield f"## {title}\n"
    yield f"{inspect.cleandoc(model.__doc__ or '')}\n"
    fields = {key: field for key, field in model.model_fields.items() if key != "kind"}
    if not fields:
        return
    yield "| key | type | default | meaning |\n|---|---|---|---|"
    for key, field in fields.items():
        meaning = " ".join((field.description or "").split()).replace("|", "\\|")
        yield f"| `{key}` | {type_name(field.annotation)} | {default_text(field)} | {meaning} |"
    yield ""
    for key, field in fields.items():
        for inner in models_in(field.annotation):
            yield from section(f"{name}.{key}" if name else key, inner)


def render() -> str:
    """Return the whole page."""
    lines = [
        "# Configuration\n",
        "Written by `make docs` from the config models. A recipe is TOML with these sections.\n",
        "Where a section has a `kind`, `package.module:Class` or `path/to/file.py:Class` names one of your own, whose "
        "fields are the section's other keys (docs/extend.md).\n",
    ]
    top = RunConfig.model_fields
    lines.append("## Top level\n\n| key | type | default | meaning |\n|---|---|---|---|")
    for key, field in top.items():
        meaning = " ".join((field.description or "").split()).replace("|", "\\|")
        lines.append(f"| `{key}` | {type_name(field.annotation)} | {default_text(field)} | {meaning} |")
    lines.append("")
    for key, field in top.items():
        for model in models_in(field.annotation):
            lines += section(key, model)
    return "\n".join(lines).rstrip() + "\n"


def schema() -> str:
    """Return the JSON schema of recipes, for editors."""
    found = {"$schema": "https://json-schema.org/draft/2020-12/schema", **RunConfig.model_json_schema()}
    return json.dumps(any_of(found) | {"title": "Recipe of atesd"}, indent=1) + "\n"


def any_of(part: Any) -> Any:
    """Return a schema in which choices that may leave out their `kind` are not asked to exclude each other."""
    if isinstance(part, list):
        return [any_of(each) for each in part]
    if not isinstance(part, dict):
        return part
    names = {"oneOf": "anyOf"} if "discriminator" not in part else {}
    return {names.get(key, key): any_of(value) for key, value in part.items()}


if __name__ == "__main__":
    TARGET.write_text(render(), encoding="utf-8")
    SCHEMA.write_text(schema(), encoding="utf-8")
    print(TARGET, SCHEMA)
