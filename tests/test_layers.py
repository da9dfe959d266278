"""The import arrows: A -> B means that A may import B, and nothing else is allowed (CONTRIBUTING.md)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src" / "atesd"

PARTS = (  # noqa: SIM905
    "types seeds cliff losses gates selection exposure routing curriculum rewards runlog tasks envs rollout evaluate "
    "config recipe train"
).split()
BELOW_CONFIG = {
    "types",
    "cliff",
    "selection",
    "losses",
    "gates",
    "exposure",
    "routing",
    "curriculum",
    "rewards",
    "tasks",
    "envs",
} | {
    "rollout",
    "evaluate",
}
ARROWS: dict[str, set[str]] = {
    "types": set(),
    "seeds": set(),
    "losses": {"types"},
    "cliff": {"types"},
    "gates": {"types", "losses"},
    "selection": {"types"},
    "exposure": {"types", "cliff"},
    "routing": {"types", "cliff"},
    "curriculum": {"types", "seeds"},
    "rewards": {"types"},
    "runlog": {"types"},
    "tasks": {"types", "seeds", "rewards"},
    "envs": {"types", "rewards"},
    "rollout": {"types", "envs"},
    "evaluate": {"types", "rewards", "tasks", "envs", "rollout", "runlog"},
    "config": BELOW_CONFIG,
    "recipe": {"config", "types"},
    "train": BELOW_CONFIG | {"config", "recipe", "runlog", "seeds"},
    "report": {"types", "runlog", "evaluate.metrics"},
    "cli": {*PARTS, "report"},
    "__init__": set(),
}
# Heavy libraries and the places that may import them.
LIBRARIES: dict[str, tuple[str, ...]] = {
    "torch": ("losses", "gates", "selection", "rollout", "train", "exposure/beta.py"),
    "transformers": ("rollout", "train"),
    "tokenizers": ("train",),
    "safetensors": ("train",),
    "accelerate": ("train",),
    "peft": ("train",),
    "math_verify": ("rewards/math.py",),
    "reasoning_gym": ("tasks/gym.py",),
    "datasets": ("tasks/files.py",),
    "plotly": ("report",),
    "scipy": ("cliff.py",),
    "typer": ("cli",),
    "rich": ("cli",),
    "vllm": (),
    "trl": (),
}
FILES = sorted(SRC.rglob("*.py"))


def imported(node: ast.AST) -> Iterator[str]:
    """Yield the modules that a file imports, anywhere but under `if TYPE_CHECKING`."""
    if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
        return
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "relative import"
        yield node.module or ""
    for child in ast.iter_child_nodes(node):
        yield from imported(child)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SRC)))
def test_imports_follow_the_arrows(path: Path) -> None:
    place = path.relative_to(SRC)
    part = place.parts[0].removesuffix(".py")
    for module in imported(ast.parse(path.read_text(encoding="utf-8"))):
        library, _, rest = module.partition(".")
        if library == "atesd":
            target = rest.partition(".")[0]
            allowed = target == part or target in ARROWS[part] or rest in ARROWS[part]
            assert allowed, f"{place} imports atesd.{rest}, which {part} may not"
        elif library in LIBRARIES:
            homes = LIBRARIES[library]
            assert part in homes or str(place) in homes, f"{place} imports {library}, allowed in {homes or 'nothing'}"


def test_package_inits_are_empty() -> None:
    filled = [path for path in SRC.rglob("*/__init__.py") if path.parent != SRC and path.read_text().strip()]
    assert filled == []
