"""The table of kinds: every entry says of itself what its part declares, and one that does not is refused."""

from __future__ import annotations

from collections import Counter
from types import UnionType
from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin

import pytest

from atesd import kinds
from atesd.config import RunConfig
from atesd.curriculum import CurriculumMethod
from atesd.envs.base import EnvMethod
from atesd.exposure.controller import ExposureMethod
from atesd.exposure.revealer import RevealMethod
from atesd.exposure.segments import Segments
from atesd.facts import RunFacts
from atesd.gates.gate import GateMethod
from atesd.gradients.rule import GradientMethod
from atesd.losses.target import TargetMethod
from atesd.rewards.kinds import RewardMethod
from atesd.rollout.sampler import EngineMethod
from atesd.routing.route import RoutingMethod
from atesd.selection import SelectionMethod
from atesd.tasks.base import TaskMethod
from atesd.types import Method

BASES: dict[str, type[Method]] = {
    "exposure": ExposureMethod,
    "reveal": RevealMethod,
    "gate": GateMethod,
    "selection": SelectionMethod,
    "target": TargetMethod,
    "routing": RoutingMethod,
    "curriculum": CurriculumMethod,
    "gradient": GradientMethod,
    "reward": RewardMethod,
    "task": TaskMethod,
    "env": EnvMethod,
    "engine": EngineMethod,
}
NESTED = {"engine": "rollout"}  # the section that holds one that is no section of its own
REQUIRED: dict[str, dict[str, Any]] = {
    "steps": {"values": [0.5]},
    "jsonl": {"path": "a"},
    "dataset": {"path": "a"},
    "benchmark": {"name": "aime24"},
    "python": {"function": "a:b"},
    "skills": {"folder": "a"},
    "episodes": {"text": "a"},
    "textarena": {"game": "a"},
    "gymnasium": {"make": "a"},
    "trl": {"factory": "a:b"},
}


def methods(part: str) -> list[type[Method]]:
    """Return the entries of a part's union."""
    section = getattr(kinds, f"{part.capitalize()}Section")
    union = get_args(section)[0]
    members = get_args(union) if isinstance(union, UnionType) or get_origin(union) else [union]
    return [get_args(member)[0] if get_origin(member) is Annotated else member for member in members]


def kinds_of(method: type[Method]) -> tuple[str, ...]:
    return get_args(method.model_fields["kind"].annotation)


def sections(part: str) -> list[Any]:
    """Return an instance of every kind."""
    return [
        method.model_validate({"kind": kind, **REQUIRED.get(kind, {})})
        for method in methods(part)
        for kind in kinds_of(method)
    ]


def test_every_union_is_here() -> None:
    assert {name.removesuffix("Section").lower() for name in vars(kinds) if name.endswith("Section")} == set(BASES)


@pytest.mark.parametrize("part", BASES)
def test_every_entry_is_a_method_of_its_part_under_a_name_of_its_own(part: str) -> None:
    assert all(issubclass(method, BASES[part]) for method in methods(part))
    counts = Counter(kind for method in methods(part) for kind in kinds_of(method))
    assert set(counts.values()) == {1}


@pytest.mark.parametrize("part", BASES)
def test_every_section_reads_its_kind_and_is_documented(part: str) -> None:
    for section in sections(part):
        assert type(section).__doc__
        tree: dict[str, Any] = {"rollout": {"group_size": 2}} if getattr(section, "is_text", True) else {}
        holder = tree.setdefault(NESTED[part], {}) if part in NESTED else tree
        holder[part] = section.model_dump()
        if section.kind in ("cliff", "closed_form"):
            tree["target"] = {"kind": "extrapolate"}
        again = RunConfig.model_validate(tree)
        assert getattr(getattr(again, NESTED[part]) if part in NESTED else again, part) == section


@pytest.mark.parametrize("part", [part for part in BASES if "describe" in BASES[part].declares])
def test_every_section_describes_itself_in_a_phrase(part: str) -> None:
    for section in sections(part):
        words = section.describe()
        assert isinstance(words, str)
        assert not words.endswith("."), "a phrase that others put into sentences"
        assert words == words.strip()


@pytest.mark.parametrize("part", BASES)
def test_the_default_is_the_first_entry(part: str) -> None:
    holder = RunConfig.model_fields[NESTED[part]].annotation if part in NESTED else RunConfig
    assert isinstance(holder, type)
    default = holder.model_fields[part].default
    assert default is None or type(default) is methods(part)[0]


@pytest.mark.parametrize("part", BASES)
def test_a_method_that_forgets_what_its_part_declares_is_refused(part: str) -> None:
    base = BASES[part]
    missing = [name for name in base.declares if not hasattr(base, name)]
    assert missing
    with pytest.raises(TypeError, match=f"method New does not declare {', '.join(missing)}: see {base.__name__}"):
        type(base)("New", (base,), {"__annotations__": {"kind": Literal["new"]}, "kind": "new", "__module__": __name__})


def test_a_controller_that_forgets_whether_it_is_measured_is_refused() -> None:
    with pytest.raises(TypeError, match="method Forgetful does not declare measured, reads_length: see ExposureMethod"):

        class Forgetful(ExposureMethod):
            kind: Literal["forgetful"] = "forgetful"

            def describe(self) -> str:
                return "all"

            def build(self, run: RunFacts) -> None:
                return None

    class Mindful(ExposureMethod):
        kind: Literal["mindful"] = "mindful"
        measured: ClassVar[bool] = False
        reads_length: ClassVar[bool] = False

        def describe(self) -> str:
            return "all"

        def build(self, run: RunFacts) -> None:
            return None

    assert not Mindful().reads_lambda
    assert not Mindful().reads_rewards


def test_the_kind_of_a_reveal_is_segments_unless_it_says_otherwise() -> None:
    assert [kinds.reveal_kind(value) for value in ({}, {"kind": "overlap"}, Segments(), "line", {"kind": 3})] == [
        "segments", "overlap", "segments", "segments", "3",
    ]  # fmt: skip
