"""The import arrows: A -> B means that A may import B, and nothing else is allowed (CONTRIBUTING.md).

Imports under `if TYPE_CHECKING` and inside functions count like any other.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src" / "atesd"

METHODS = {
    "losses",
    "gates",
    "selection",
    "strength",
    "exposure",
    "routing",
    "gradients",
    "curriculum",
    "rewards",
    "tasks",
    "envs",
    "rollout",
}
BELOW_CONFIG = METHODS | {
    "codes",
    "types",
    "alignment",
    "seeds",
    "transfer",
    "cliff",
    "facts",
    "evaluate",
    "kinds",
    "own",
    "sections",
}
BELOW_TRAIN = BELOW_CONFIG | {
    "tree",
    "config",
    "packaged",
    "recipe",
    "runlog",
    "files",
    "seals",
    "metrics",
    "launch",
    "signals",
}
ARROWS: dict[str, set[str]] = {
    "types": set(),
    "metrics": set(),
    "transfer": set(),
    "codes": {"types", "transfer"},
    "seeds": set(),
    "launch": set(),
    "signals": set(),
    "__main__": {"cli"},
    "cliff": {"types"},
    "alignment": {"types"},
    "facts": {"types", "seeds", "cliff"},
    "losses": {"types"},
    "gates": {"types", "losses"},
    "selection": {"types", "losses", "transfer"},
    "strength": {"types", "facts", "cliff", "alignment"},
    "exposure": {"types", "facts", "cliff", "alignment"},
    "routing": {"types", "facts", "cliff", "alignment", "exposure.held"},
    "gradients": {"types", "facts", "seeds", "transfer"},
    "curriculum": {"types", "facts", "seeds"},
    "rewards": {"types", "facts"},
    "seals": set(),
    "files": {"types"},
    "provenance": set(),
    "runlog": {"types", "seals", "files", "provenance"},
    "tasks": {"types", "facts", "seeds", "rewards"},
    "envs": {"types", "facts"},
    "rollout": {"types", "seeds", "envs", "codes", "transfer"},
    "evaluate": {"types", "seeds", "rewards", "rollout", "runlog", "files"},
    "own": {"types"},
    "kinds": METHODS | {"own"},
    "sections": {"types"},
    "tree": BELOW_CONFIG,
    "config": {"tree"},
    "packaged": {"types"},
    "recipe": {"config", "tree", "own", "packaged", "types"},
    "train": BELOW_TRAIN,
    "flow": BELOW_TRAIN | {"train"},
    "trainers": BELOW_TRAIN | {"train", "flow"},
    "report": {"types", "seals", "runlog", "files", "evaluate.metrics"},
    "cli": BELOW_TRAIN | {"train", "trainers", "report"},
    "__init__": set(),
}
# Inside a part: a file may import those that stand before it.
ORDERS: dict[str, list[str]] = {
    "codes": ["config", "steer", "model"],
    "exposure": [
        "reveal",
        "prompt",
        "controller",
        "revealer",
        "segments",
        "overlap",
        "turns",
        "skills",
        "retention_gates",
        "retention",
        "window",
        "held",
        "schedules",
        "bandit",
        "closed_form",
        "aligned",
        "influence",
        "paired",
        "beta",
        "beta_config",
        "features",
        "beta_controller",
        "difficulty",
        "dlr",
    ],
    "train": [
        "world",
        "asked",
        "shard",
        "batch",
        "hub",
        "tokens",
        "heads",
        "smollm2",
        "attention",
        "lora",
        "compiled",
        "model",
        "optim",
        "teacher",
        "veils",
        "last",
        "scorer",
        "agree",
        "stats",
        "hints",
        "outcomes",
        "rows",
        "finite",
        "gap",
        "latent",
        "micro",
        "step",
        "probe",
        "contract",
        "directions",
        "credit",
        "retention",
        "measure",
        "ahead",
        "record",
        "card",
        "checkpoint",
        "memory",
        "traced",
        "plan",
        "fit",
        "export",
        "share",
        "admit",
        "setup",
        "resume",
        "inspect",
        "track",
        "stop",
        "loop",
        "supervised",
        "warmup",
        "warmup_doors",
    ],
    "flow": [
        "sde",
        "quality",
        "net",
        "judge",
        "rollout",
        "warm",
        "step",
        "probe",
        "measure",
        "setup",
        "loop",
    ],
}
# Heavy libraries and the places that may import them.
LIBRARIES: dict[str, tuple[str, ...]] = {
    "torch": (
        "transfer",
        "codes",
        "losses",
        "gates",
        "selection",
        "gradients",
        "rollout",
        "train",
        "flow",
        "exposure/beta.py",
        "exposure/retention_gates.py",
        "cli/plan.py",
    ),
    "transformers": ("rollout", "train"),
    "tokenizers": ("train",),
    "safetensors": ("codes", "train", "flow/net.py"),
    "accelerate": ("train",),
    "peft": ("train",),
    "math_verify": ("rewards/verifier.py",),
    "reasoning_gym": ("tasks/gym.py",),
    "datasets": ("tasks/tables.py",),
    "sklearn": ("tasks/flows.py",),
    "httpx2": ("rollout/server.py",),
    "plotly": ("report",),
    "scipy": ("cliff.py", "evaluate/metrics.py"),
    "typer": ("cli",),
    "rich": ("cli",),
    "textworld": ("tasks/textworld.py", "envs/textworld.py"),
    "textarena": ("envs/libraries.py",),
    "gymnasium": ("envs/libraries.py",),
    "vllm": (),
    "trl": (),
}
FILES = sorted(SRC.rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """Yield the modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield node.module or ""


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SRC)))
def test_imports_follow_the_arrows(path: Path) -> None:
    place = path.relative_to(SRC)
    part = place.parts[0].removesuffix(".py")
    for module in imported(path):
        library, _, rest = module.partition(".")
        if library == "atesd":
            target, _, file = rest.partition(".")
            allowed = target == part or target in ARROWS[part] or rest in ARROWS[part]
            assert allowed, f"{place} imports atesd.{rest}, which {part} may not"
            if target == part and part in ORDERS:
                order = ORDERS[part]
                assert order.index(file) < order.index(path.stem), f"{place} imports {file}, which stands above it"
        elif library in LIBRARIES:
            homes = LIBRARIES[library]
            assert part in homes or str(place) in homes, f"{place} imports {library}, allowed in {homes or 'nothing'}"


@pytest.mark.parametrize("part", ORDERS)
def test_every_file_of_an_ordered_part_has_its_place(part: str) -> None:
    files = {path.stem for path in (SRC / part).glob("*.py")} - {"__init__"}
    assert files == set(ORDERS[part])


def test_package_inits_are_empty() -> None:
    filled = [path for path in SRC.rglob("*/__init__.py") if path.parent != SRC and path.read_text().strip()]
    assert filled == []
