"""Methods of a user's own: a section whose `kind` is an import path is of the class that stands there.

    exposure = { kind = "mypackage.mymodule:Sawtooth", high = 0.9 }
    exposure = { kind = "path/to/mine.py:Sawtooth", high = 0.9 }

The class derives from the part's base, as the package's own methods do: it declares the same, its fields check the
section's other keys, and it is built, logged and checkpointed like them. `kind` is added to its fields here, so that a
run's config.json names the place and a resumed run finds the class again. A section given as an object, in Python, is
named by its class's module and name; one that could not be found again is refused.

The code runs with the user's rights. Whoever reads a recipe that others may have written asks first: `before_import`.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from hashlib import sha256
from importlib import import_module, util
from pathlib import Path
from traceback import walk_tb
from types import ModuleType
from typing import Annotated, Any, Literal, cast, get_args

from pydantic import Field, TypeAdapter, create_model
from pydantic.errors import PydanticUserError
from pydantic_core import core_schema

from atesd.types import Method, UserError, first_line, shown

PATTERN = r"^.+:[A-Za-z_]\w*$"
"""A `kind` that is an import path."""

_OWN = "atesd_own_"
_asked: ContextVar[Callable[[str], object] | None] = ContextVar("_asked", default=None)
_named: dict[str, type[Method]] = {}  # by place
_places: dict[type, str] = {}  # by class, as found and as named


class Own:
    """Opens a union of kinds to a part's own classes: the last annotation of the union."""

    def __init__(self, base: type[Method]) -> None:
        self._base = base
        self._members: tuple[type, ...] = ()

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        self._members = tuple(_classes(source))
        known = handler(source)
        dumped = core_schema.wrap_serializer_function_ser_schema(self._dumped, info_arg=True, schema=known)
        return core_schema.no_info_wrap_validator_function(self._validated, known, serialization=dumped)

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> Any:
        known = handler(schema)
        own = {
            "title": "A class of your own",
            "type": "object",
            "properties": {
                "kind": {
                    "type": "string",
                    "pattern": PATTERN,
                    "description": f"package.module:Class or path/to/file.py:Class, derived from {self._base.__name__}",
                }
            },
            "required": ["kind"],
        }
        return {**known, "oneOf": [*known["oneOf"], own]} if "oneOf" in known else {"anyOf": [known, own]}

    def _validated(self, given: Any, handler: Callable[[Any], Any]) -> Any:
        """Validate what is of the user's own; leave all else to the union."""
        if isinstance(given, self._base) and type(given) not in self._members:
            return self._as_named(given)
        place = given.get("kind") if isinstance(given, Mapping) else None
        if not isinstance(place, str) or ":" not in place:
            return handler(given)
        return _adapter(load_method(place, self._base)).validate_python(given)

    def _as_named(self, section: Method) -> Method:
        """Return a section that was given as an object under the place of its class."""
        kind = type(section)
        place = _places.get(kind, f"{kind.__module__}:{kind.__qualname__}")
        if _named.get(place) is kind:
            return section
        if "." in kind.__qualname__:
            raise UserError(
                f"{shown(kind.__qualname__)} is defined inside a function or class, where a resumed run cannot find "
                "it: move it to the top of a module"
            )
        if _found(place) is not kind:
            raise UserError(f"{place} is another class than the one given: give an object of that one")
        fields = {name: getattr(section, name) for name in section.model_fields_set}
        return cast("Method", _adapter(load_method(place, self._base)).validate_python({**fields, "kind": place}))

    def _dumped(self, section: Any, handler: Callable[[Any], Any], info: Any) -> Any:
        if type(section) in self._members or not isinstance(section, self._base):
            return handler(section)
        return self._as_named(section).model_dump(
            mode=info.mode,
            exclude_unset=info.exclude_unset,
            exclude_defaults=info.exclude_defaults,
            exclude_none=info.exclude_none,
        )


@contextmanager
def before_import(ask: Callable[[str], object]) -> Iterator[None]:
    """Within the block, call `ask` with the place of every class that a recipe names, before it is imported.

    A UserError that it raises becomes the recipe's.
    """
    token = _asked.set(ask)
    try:
        yield
    finally:
        _asked.reset(token)


def places_in(tree: object) -> list[str]:
    """Return the import paths that a recipe's tree of plain values names as kinds, each once."""
    if isinstance(tree, Mapping):
        own = [kind] if isinstance(kind := tree.get("kind"), str) and ":" in kind else []
        return list(dict.fromkeys([*own, *(place for part in tree.values() for place in places_in(part))]))
    parts = tree if isinstance(tree, list | tuple) else ()
    return list(dict.fromkeys(place for part in parts for place in places_in(part)))


def named_class(place: object) -> type[Method] | None:
    """Return the class behind an import path, where it was loaded before."""
    return _named.get(place) if isinstance(place, str) else None


def file_of(place: str) -> Path | None:
    """Return the file of the code at `package.module:name` or `path/to/file.py:name`; None where there is none."""
    source = place.rpartition(":")[0]
    if source.endswith(".py"):
        return Path(source)
    try:
        spec = util.find_spec(source) if source else None
    except (ImportError, ValueError):
        return None
    return None if spec is None or spec.origin is None else Path(spec.origin)


def raised_in(error: BaseException) -> str | None:
    """Return where code of a method of the user's own raised an error, or had a library raise it; None for ours."""
    modules = {kind.__module__ for kind in _named.values()}
    for frame, line in reversed(list(walk_tb(error.__traceback__))):
        name = str(frame.f_globals.get("__name__"))
        if name in modules:
            return f"{frame.f_code.co_filename}, line {line}, in {frame.f_code.co_name}"
        if name.partition(".")[0] == "atesd":
            return None
    return None


def without_folder(kind: str) -> str:
    """Return the name of a class without what tells two files of one name in different folders apart."""
    return re.sub(rf"^{_OWN}(\w+)_[0-9a-f]{{8}}\.", r"\1.", kind)


def load_method(place: str, base: type[Method]) -> type[Method]:
    """Return the class at `package.module:Class` or `path/to/file.py:Class`, with its place as its `kind`.

    UserError where it cannot be imported, is not there, or is no complete method of the part that `base` stands for.
    """
    ask = _asked.get()
    if ask is not None:
        ask(place)
    if place in _named and issubclass(_named[place], base):
        return _named[place]
    found = _found(place)
    if not isinstance(found, type) or not issubclass(found, base):
        raise UserError(
            f"kind = {shown(place)} is no {base.__name__}: derive it from {base.__module__}.{base.__name__} "
            "(docs/extend.md)"
        )
    try:
        named = cast(
            "type[Method]",
            create_model(
                found.__name__,
                __base__=found,
                __module__=found.__module__,
                __doc__=found.__doc__,
                kind=(cast("Any", Literal[place]), place),
            ),
        )
    except (TypeError, NameError, PydanticUserError) as error:
        raise UserError(f"kind = {shown(place)}: {first_line(error)}") from error
    _named[place] = named
    _places[found] = _places[named] = place
    return named


def _found(place: str) -> object:
    """Import what stands at a place. UserError says what is missing, and where it was looked for."""
    source, _, name = place.rpartition(":")
    if not source or not name.isidentifier():
        raise UserError(f"kind = {shown(place)} names no class: write package.module:Class or path/to/file.py:Class")
    module = _module(place, source)
    if not hasattr(module, name):
        near = difflib.get_close_matches(name, vars(module), n=1, cutoff=0.5)
        meant = f"did you mean {near[0]!r}?" if near else "mend the name"
        raise UserError(f"kind = {shown(place)}: {shown(source)} has no {name!r}: {meant}")
    return getattr(module, name)


def _module(place: str, source: str) -> ModuleType:
    path = Path(source)
    if source.endswith(".py") and not path.is_file():
        raise UserError(
            f"kind = {shown(place)}: there is no file {shown(str(path.absolute()))}: mend the path, or go to the "
            "folder that a relative one begins at"
        )
    try:
        return _from_file(path) if source.endswith(".py") else import_module(source)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{source}.".startswith(f"{error.name}."):
            raise _broken(place, error) from error
        raise UserError(
            f"kind = {shown(place)}: there is no module {error.name}: install it, set PYTHONPATH, or name the file, as "
            "path/to/file.py:Class (the working directory is not searched)"
        ) from error
    except (Exception, SystemExit) as error:  # a module is anybody's code
        raise _broken(place, error) from error


def _from_file(path: Path) -> ModuleType:
    """Import a file, once."""
    whole = str(path.absolute())
    name = f"{_OWN}{path.stem}_{sha256(whole.encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = util.spec_from_file_location(name, whole)
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    sys.modules[name] = module  # annotations are looked up by it
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _broken(place: str, error: BaseException) -> UserError:
    return UserError(
        f"kind = {shown(place)} cannot be imported ({type(error).__name__}: {first_line(error)}): mend its module"
    )


def _adapter(kind: type[Method]) -> TypeAdapter[Any]:
    """Return what validates a section of a class, with the place in front of the keys that it complains of."""
    return TypeAdapter(cast("Any", Annotated[cast("Any", kind), Field(discriminator="kind")]))


def _classes(annotation: Any) -> Iterator[type]:
    if isinstance(annotation, type):
        yield annotation
    for part in get_args(annotation):
        yield from _classes(part)
