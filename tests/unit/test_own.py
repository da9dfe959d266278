"""Classes of a user's own as kinds: found again by their place, validated like the package's, asked about first."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest

from atesd import own
from atesd.config import RunConfig
from atesd.exposure.controller import Controller, ExposureMethod
from atesd.exposure.schedules import Fixed, Schedule
from atesd.facts import RunFacts
from atesd.gates.gate import OpenGate
from atesd.own import before_import, load_method, places_in
from atesd.recipe import build_config, with_overrides
from atesd.selection import SelectAll
from atesd.types import UserError

MODULE = """
from __future__ import annotations
from typing import ClassVar
from atesd.exposure.controller import ExposureMethod
from atesd.exposure.schedules import Fixed, Schedule
from atesd.rollout.sampler import EngineMethod

class Half(ExposureMethod):
    share: float = 0.5
    measured: ClassVar[bool] = False
    reads_length: ClassVar[bool] = False
    def describe(self) -> str:
        return f"{self.share:g} of it"
    def build(self, run):
        return Schedule(lambda step: self.share)

class Silent(ExposureMethod):
    measured: ClassVar[bool] = False

class Other:
    pass

class Named(Half):
    kind: str = "named"

class Bare(Half):
    def build(self):
        return Schedule(lambda step: self.share)

class Greedy(Half):
    def build(self, run, more):
        return Schedule(lambda step: more)

class Wordy(Half):
    def describe(self, unit):
        return unit

class Open(Half):
    def build(self, *given, share=0.25, **known):
        return Schedule(lambda step: share)

class Engine(EngineMethod):
    def describe(self) -> str:
        return "mine"
    def build(self, run):
        return None

number = 3
"""


class Third(ExposureMethod):
    """A class of this module."""

    share: float = 1 / 3
    measured: ClassVar[bool] = False
    reads_length: ClassVar[bool] = False

    def describe(self) -> str:
        """Say so."""
        return "a third"

    def build(self, run: RunFacts) -> Controller:
        """Return the controller."""
        return Schedule(lambda step: self.share)


class Faster(Fixed):
    """A class derived from one of the package's kinds."""

    more: float = 1.0


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget classes afterwards."""
    monkeypatch.setattr(own, "_named", {})
    monkeypatch.setattr(own, "_places", {})


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(MODULE)
    return path


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the name of a module in a package that can be imported."""
    folder = tmp_path / "lib" / "package_of_mine"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / "kinds.py").write_text(MODULE)
    (folder / "broken.py").write_text("import json\nraise RuntimeError('two\\nlines')")
    (folder / "lacking.py").write_text("import library_that_is_not_there")
    (folder / "leaving.py").write_text("raise SystemExit(3)")
    monkeypatch.syspath_prepend(str(tmp_path / "lib"))
    return "package_of_mine.kinds"


def exposure(**section: Any) -> Any:
    return build_config({"exposure": section}).exposure


def test_a_class_of_a_file_or_package_is_validated_kept_and_built(file: Path, package: str) -> None:
    for place in (f"{file}:Half", f"{package}:Half"):
        config = build_config({"exposure": {"kind": place, "share": 0.25}})
        section: Any = config.exposure
        assert (section.kind, section.share, section.describe()) == (place, 0.25, "0.25 of it")
        assert section.build(config.facts()).propose(0, ["a", "b"]) == [0.25, 0.25]
        assert config.model_dump(mode="json")["exposure"] == {"kind": place, "share": 0.25}
        assert build_config(config.model_dump(mode="json")) == config
        assert with_overrides(config, ["exposure.share=0.75"]).exposure.share == 0.75  # type: ignore[union-attr]
        assert with_overrides(config, ["seed=1"]).exposure == section
    assert build_config({"exposure": {"kind": f"{file}:Half"}}).model_dump(exclude_unset=True) == {
        "exposure": {"kind": f"{file}:Half"}
    }
    assert exposure(kind=f"{file}:Named").kind == f"{file}:Named", "a kind of its own gives way to the place"


def test_a_build_may_take_more_than_it_is_given_where_it_can_do_without(file: Path) -> None:
    section: Any = exposure(kind=f"{file}:Open")
    assert section.build(RunFacts()).propose(0, ["a"]) == [0.25]


def test_an_engine_is_built_with_a_model_and_a_renderer(file: Path) -> None:
    with pytest.raises(UserError, match=r"method Engine must define build\(self, model, renderer\)"):
        build_config({"rollout": {"engine": {"kind": f"{file}:Engine"}}})


def test_every_part_is_open(tmp_path: Path) -> None:
    from atesd import kinds

    sections = [name.removesuffix("Section").lower() for name in vars(kinds) if name.endswith("Section")]
    assert len(sections) == 12
    for part in sections:
        tree: dict[str, Any] = {part: {"kind": f"{tmp_path}/none.py:Mine"}}
        with pytest.raises(UserError, match="there is no file"):
            build_config({"rollout": tree} if part == "engine" else tree)
    with pytest.raises(UserError, match="there is no file"):
        build_config({"reward": [{"kind": "exact"}, {"kind": f"{tmp_path}/none.py:Mine"}]})


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("{file}:Haf", "has no 'Haf': did you mean 'Half'?"),
        ("{file}:Xyz", "has no 'Xyz': mend the name"),
        ("{file}:Other", "is no ExposureMethod: derive it from atesd.exposure.controller.ExposureMethod"),
        ("{file}:number", "is no ExposureMethod"),
        ("atesd.gates.gate:OpenGate", "is no ExposureMethod"),
        ("{file}:Silent", "method Silent does not declare reads_length, describe, build: see ExposureMethod"),
        ("{file}:Bare", "method Bare must define build(self, run)"),
        ("{file}:Greedy", "method Greedy must define build(self, run)"),
        ("{file}:Wordy", "method Wordy must define describe(self)"),
        ("{file}x.py:Half", "there is no file"),
        ("{file}:", "names no class: write package.module:Class or path/to/file.py:Class"),
        (":Half", "names no class"),
        ("{file}:Half()", "names no class"),
        ("no_such_package.kinds:Half", "there is no module no_such_package: install it, set PYTHONPATH, or name the"),
        ("package_of_mine.kind:Half", "there is no module package_of_mine.kind: install it"),
        ("package_of_mine.broken:Half", "cannot be imported (RuntimeError: two): mend its module"),
        ("package_of_mine.leaving:Half", "cannot be imported (SystemExit: 3): mend its module"),
        ("package_of_mine.lacking:Half", "(ModuleNotFoundError: No module named 'library_that_is_not_there'): mend"),
    ],
)
@pytest.mark.usefixtures("package")
def test_what_is_no_such_class_is_refused_in_one_line(place: str, says: str, file: Path) -> None:
    with pytest.raises(UserError) as caught:
        exposure(kind=place.format(file=file))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("config: exposure: kind = ")


def test_a_wrong_setting_is_named_with_its_place(file: Path) -> None:
    place = f"{file}:Half"
    with pytest.raises(UserError, match=r"unknown key .*mine\.py:Half\.shar': did you mean 'share'\?"):
        exposure(kind=place, shar=1)
    with pytest.raises(UserError, match=r"unknown key .*mine\.py:Half\.ratio': known here are kind, share$"):
        exposure(kind=place, ratio=1)
    with pytest.raises(UserError, match=r"exposure\..*mine\.py:Half\.share: Input should be a valid number.*'much'"):
        exposure(kind=place, share="much")
    with pytest.raises(UserError, match=r"share: Input should be a number, not true or false"):
        exposure(kind=place, share=True)


def test_an_unknown_kind_tells_that_there_are_own_ones() -> None:
    with pytest.raises(
        UserError, match=r"did you mean 'beta'\? known are fixed, .*, and package\.module:Class or file"
    ):
        exposure(kind="betta")


def test_an_object_is_named_by_its_class_and_found_again() -> None:
    config = RunConfig(exposure=Third(share=0.3))  # type: ignore[arg-type]
    place = f"{__name__}:Third"
    assert config.model_dump(mode="json")["exposure"] == {"kind": place, "share": 0.3}
    assert isinstance(config.exposure, Third)
    assert build_config(config.model_dump(mode="json")) == config
    assert RunConfig(exposure=config.exposure).exposure is config.exposure
    assert RunConfig(exposure=Third()).model_dump(exclude_unset=True)["exposure"] == {"kind": place}  # type: ignore[arg-type]
    slipped_in = RunConfig().model_copy(update={"exposure": Third(share=0.3)})  # validated by nobody
    assert slipped_in.model_dump(mode="json")["exposure"] == {"kind": place, "share": 0.3}


def test_an_object_of_a_file_keeps_the_place_of_the_file(file: Path) -> None:
    place = f"{file}:Half"
    load_method(place, ExposureMethod)
    found: Any = own._found(place)
    assert RunConfig(exposure=found(share=0.1)).model_dump()["exposure"] == {"kind": place, "share": 0.1}


def test_a_class_derived_from_a_kind_of_the_package_is_not_taken_for_it() -> None:
    config = RunConfig(exposure=Faster(ratio=0.5, more=2.0))
    dumped = config.model_dump(mode="json")["exposure"]
    assert dumped == {"kind": f"{__name__}:Faster", "ratio": 0.5, "more": 2.0}
    assert config.exposure.kind == dumped["kind"], "in messages, too"
    assert isinstance(build_config({"exposure": dumped}).exposure, Faster)


def test_an_object_that_no_resumed_run_could_find_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Inner(Third):
        """Nobody finds it."""

    with pytest.raises(ValueError, match=r"is defined inside a function or class.*: move it to the top of a module"):
        RunConfig(exposure=Inner())  # type: ignore[arg-type]
    given = Third()
    monkeypatch.setitem(globals(), "Third", type("Third", (Third,), {"__module__": __name__}))
    with pytest.raises(ValueError, match=r":Third is another class than the one given"):
        RunConfig(exposure=given)  # type: ignore[arg-type]


def test_the_packages_own_kinds_are_what_they_were() -> None:
    given = Fixed(ratio=0.5)
    assert RunConfig(exposure=given).exposure is given
    config = build_config({"exposure": {"kind": "fixed", "ratio": 0.5}})
    assert config.model_dump(exclude_unset=True) == {"exposure": {"kind": "fixed", "ratio": 0.5}}
    assert (type(config.gate), type(config.selection)) == (OpenGate, SelectAll)


def test_who_asks_first_hears_of_every_place_before_its_import(tmp_path: Path) -> None:
    mark = tmp_path / "imported"
    path = tmp_path / "loud.py"
    path.write_text(f"{MODULE}\nopen({str(mark)!r}, 'w').close()")
    place = f"{path}:Half"

    def refuse(given: str) -> None:
        assert not mark.exists()
        raise UserError(f"not {given}")

    with before_import(refuse), pytest.raises(UserError, match=f"exposure: not {path}:Half"):
        exposure(kind=place)
    assert not mark.exists()
    heard: list[str] = []
    with before_import(heard.append):
        exposure(kind=place)
        exposure(kind=place)
        exposure(kind="fixed")
    assert heard == [place, place], "the second time, too, though the class is loaded"
    exposure(kind=place)
    assert len(heard) == 2, "outside the block nobody asks"


def test_places_are_found_wherever_kinds_stand() -> None:
    tree = {
        "exposure": {"kind": "a:B"},
        "rollout": {"engine": {"kind": "c.py:D"}, "kind": 3},
        "reward": [{"kind": "exact"}, {"kind": "a:B"}, {"kind": "e:F"}],
        "prompt": {"student": "x:y"},
    }
    assert places_in(tree) == ["a:B", "c.py:D", "e:F"]


def test_two_files_of_one_name_are_two_modules(tmp_path: Path) -> None:
    for name, share in (("a", 0.1), ("b", 0.2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.py").write_text(MODULE.replace("share: float = 0.5", f"share: float = {share}"))
    first, second = (exposure(kind=f"{tmp_path}/{name}/mine.py:Half") for name in "ab")
    assert (first.share, second.share) == (0.1, 0.2)


@pytest.mark.parametrize(
    ("section", "fits"),
    [
        ({"kind": "mine.py:Half", "share": 0.5}, True),
        ({"kind": "a.b:Half"}, True),
        ({"kind": "fixed", "ratio": 0.5}, True),
        ({"kind": "fixed", "ratoi": 0.5}, False),
        ({"kind": "fixd"}, False),
        ({"kind": "mine.py:"}, False),
    ],
)
def test_the_schema_for_editors_knows_own_kinds_and_still_tells_mistakes(section: dict[str, Any], fits: bool) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(RunConfig.model_json_schema())
    assert validator.is_valid({"exposure": section}) == fits


def test_a_file_that_could_not_be_imported_is_read_again_once_mended(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("raise RuntimeError('not yet')")
    with pytest.raises(UserError, match="not yet"):
        exposure(kind=f"{path}:Half")
    path.write_text(MODULE + "\n# mended\n")
    assert exposure(kind=f"{path}:Half").share == 0.5
