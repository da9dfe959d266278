"""`atesd check`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from atesd.cli.progress import make_console, silence_libraries
from atesd.envs.base import Environment, missed
from atesd.envs.doors import Doors
from atesd.envs.textworld import TextWorld
from atesd.exposure.prompt import PromptConfig
from atesd.exposure.reveal import segmentation_warning
from atesd.facts import RunFacts
from atesd.packaged import packaged_recipes
from atesd.rewards.kinds import ExactConfig, MathConfig
from atesd.tasks.base import Task, check_disjoint, check_gold
from atesd.tasks.benchmarks import BENCHMARKS, BenchmarkConfig
from atesd.tasks.files import DatasetConfig, JsonlConfig
from atesd.tasks.gym import GymConfig
from atesd.tasks.kinds import DoorsConfig, PicoConfig
from atesd.tasks.texts import control_look, fences, flaws, overlong, unread
from atesd.tasks.textworld import TextWorldConfig
from atesd.types import Problem, UserError

if TYPE_CHECKING:
    from atesd.kinds import TaskSection

_GRADERS = {"exact": ExactConfig, "math": MathConfig}
_PLAYED: dict[str, type[Doors | TextWorld]] = {"doors": Doors, "textworld": TextWorld}
"""Environments of the tasks of the same name."""
_Section = PicoConfig | DoorsConfig | TextWorldConfig | GymConfig | JsonlConfig | DatasetConfig | BenchmarkConfig
_KINDS: dict[str, type[_Section]] = {
    "benchmark": BenchmarkConfig,
    "pico": PicoConfig,
    "doors": DoorsConfig,
    "textworld": TextWorldConfig,
    "gym": GymConfig,
    "jsonl": JsonlConfig,
    "dataset": DatasetConfig,
}
_MOST_NAMED = 10
_REFUSED_UNANSWERED = 'training refuses them unless task.on_missing_answer = "keep"'


def run_check(task: str, overrides: Sequence[str], grader: str | None, model: str | None = None) -> None:
    """Validate a task and print what was found.

    UserError where the grader disagrees with the gold answers, or where the model cannot read a text as text.
    """
    chosen, environment = task_of(task, overrides), environment_of(task, overrides)
    reward = (_GRADERS[grader]() if grader else chosen.default_reward).build(RunFacts())
    sets = {"train": chosen.train(), "probe": chosen.probe(), "evaluation": chosen.evaluation()}
    check_disjoint(sets)
    console = make_console()
    if environment is not None:
        check_experts(console, environment, sets, task)
        return
    table = Table("set", "problems", "gradable", "gold not 1", "corrupted not 0", title=task, title_justify="left")
    passed = True
    for name, problems in sets.items():
        report = check_gold(problems, reward)
        passed &= report.passed
        counts = (report.total, report.gradable, len(report.gold_wrong), len(report.corrupted_right))
        table.add_row(name, *map(str, counts))
        for label, ids in (("gold not 1", report.gold_wrong), ("corrupted not 0", report.corrupted_right)):
            if ids:
                console.print(f"{name}, {label}: {', '.join(ids[:10])}{' ...' if len(ids) > 10 else ''}")
    console.print(table)
    every, keeps = [problem for problems in sets.values() for problem in problems], _keeps_unanswered(task, overrides)
    for warning in warnings_of(every, keeps_unanswered=keeps):
        console.print(f"warning: {warning}")
    if show_texts(console, chosen, sets, model):
        raise UserError(f"{model} cannot read the texts named above as text: take the control tokens out of them")
    if not passed:
        raise UserError("the grader and the gold answers disagree on the problems named above: mend them")


def check_experts(
    console: Console, environment: Environment, sets: Mapping[str, Sequence[Problem]], title: str
) -> None:
    """Replay every expert's trajectory and print what was found. UserError where one does not reach the goal."""
    table = Table("set", "problems", "experts", "goal not reached", title=title, title_justify="left")
    failed = 0
    for name, problems in sets.items():
        experts = [problem for problem in problems if problem.expert]
        why = {problem.id: missed(environment, problem) for problem in experts}
        lost = {identity: reason for identity, reason in why.items() if reason is not None}
        for identity, reason in list(lost.items())[:_MOST_NAMED]:
            console.print(f"{name}, {identity}: {reason}")
        if len(lost) > _MOST_NAMED:
            console.print(f"{name}: and {len(lost) - _MOST_NAMED} more")
        failed += len(lost)
        table.add_row(name, *map(str, (len(problems), len(experts), len(lost))))
    console.print(table)
    if failed:
        raise UserError(f"{failed} experts do not reach the goal, the first of them named above: mend or remove them")


def _is_recipe(task: str) -> bool:
    """Tell a recipe, by path or packaged name, from what `section_of` reads; `pico` is a task before it is a recipe."""
    return task.endswith(".toml") or (task not in _KINDS and task in packaged_recipes() and not Path(task).exists())


def environment_of(task: str, overrides: Sequence[str]) -> Environment | None:
    """Return the environment that a task is played in; None where its problems are answered in one turn."""
    if task in _PLAYED:
        return _PLAYED[task]().build(RunFacts())
    if not _is_recipe(task):
        return None
    from atesd.recipe import load_config

    config = load_config(Path(task), overrides)
    return config.env.build(config.facts()) if config.env.limit > 1 else None


def show_texts(console: Console, task: Task, sets: Mapping[str, Sequence[Problem]], model: str | None) -> int:
    """Name texts that spell control tokens or the default fences of a hint; return how many the model cannot read.

    Without a model, spellings of well-known models are looked for.
    """
    fenced = list(flaws(task, sets, lambda _: None, fences(PromptConfig().teacher)))
    _show(console, "warning: fences of the default teacher prompt, which training with it refuses", fenced)
    if model is None:
        spelt = list(flaws(task, sets, control_look))
        hint = (
            "warning: these look like control tokens; --model MODEL tells whether a model's tokenizer keeps them text"
        )
        _show(console, hint, spelt)
        return 0
    silence_libraries()
    from atesd.rollout.render import Renderer
    from atesd.sections import ModelConfig
    from atesd.train.model import context_length, resolve
    from atesd.train.tokens import load_tokenizer
    from atesd.train.traced import skeleton

    renderer = Renderer(load_tokenizer(resolve(model)))
    refused = list(flaws(task, sets, renderer.flaw))

    def kept(text: str) -> str | None:
        found = renderer.controls(text)
        return f"spells {', '.join(map(repr, found))}" if found and renderer.flaw(text) is None else None

    _show(console, f"control tokens of {model}, spelt in these texts and kept text", list(flaws(task, sets, kept)))
    _show(console, f"control tokens of {model} that cannot be kept text", refused)

    def tokens(text: str) -> Sequence[int]:
        return [] if renderer.flaw(text) else renderer.text_ids(text)

    if beyond := overlong(sets, tokens, context_length(skeleton(ModelConfig(path=model)))):
        console.print(f"warning: {beyond}")
    missing = unread([problem for problems in sets.values() for problem in problems], renderer.unknown)
    if missing:
        console.print(f"warning: {missing}")
    return len(refused)


def _show(console: Console, title: str, lines: Sequence[str]) -> None:
    if lines:
        console.print(f"{title}:")
        for line in lines[:_MOST_NAMED]:
            console.print(f"  {line}")
        if len(lines) > _MOST_NAMED:
            console.print(f"  and {len(lines) - _MOST_NAMED} more")


def task_of(task: str, overrides: Sequence[str] = ()) -> Task:
    """Turn a recipe, or what `section_of` reads, into a task; only a recipe's task holds problems out."""
    if _is_recipe(task):
        from atesd.recipe import load_config

        config = load_config(Path(task), overrides)
        return config.task.build(config.facts())
    section = {**section_of(task), **_ALL_ROWS.get(section_of(task)["kind"], {})}
    if not overrides:
        return _KINDS[section["kind"]].model_validate(section).build(RunFacts())
    return _section_with(section, overrides).build(RunFacts())


def whole_task_of(task: str, overrides: Sequence[str] = ()) -> Task:
    """Turn what `section_of` reads into a task that trains on all its problems, none of them held out."""
    section = section_of(task)
    held_out = {"probe_size": 0, "eval_size": 0} if section["kind"] in (*_ALL_ROWS, "gym") else {}
    return _section_with({**section, **held_out}, overrides).build(RunFacts())


# Every row is checked, those too whose answer cannot be recognised, and none is held out.
_ROWS: dict[str, Any] = {"on_missing_answer": "keep", "probe_size": 0, "eval_size": 0}
_ALL_ROWS: dict[str, dict[str, Any]] = {"jsonl": _ROWS, "dataset": _ROWS, "gym": {"train_size": 64}}


def section_of(task: str) -> dict[str, Any]:
    """Turn `pico`, `doors`, `gym:NAME`, a benchmark, a file, a folder or a name on the hub into a `[task]` section."""
    if task in ("pico", *_PLAYED):
        return {"kind": task}
    if task in BENCHMARKS:
        return {"kind": "benchmark", "name": task}
    if task.startswith("gym:"):
        return {"kind": "gym", "dataset": task.removeprefix("gym:")}
    if task.endswith((".jsonl", ".json")):
        return {"kind": "jsonl", "path": task}
    if (Path(task) / "config.json").is_file():
        raise UserError(f"task {task!r} is a folder of a model or a run: give a recipe, or a file of problems")
    if task.endswith((".parquet", ".csv", ".tsv")) or Path(task).is_dir() or "/" in task or Path(task).is_file():
        return {"kind": "dataset", "path": task}
    raise UserError(
        f"task {task!r} is not known: give pico, doors, textworld, gym:NAME, a benchmark ({', '.join(BENCHMARKS)}), a "
        "file ending in .jsonl, .parquet, .csv or .tsv, a folder that save_to_disk wrote, or a data set of the hub as "
        "OWNER/NAME"
    )


def _section_with(section: Mapping[str, Any], overrides: Sequence[str]) -> TaskSection:
    """Return a section with dotted overrides, all of which begin with `task.`."""
    from atesd.recipe import apply_overrides, build_config

    others = [override for override in overrides if not override.strip().startswith("task.")]
    if others:
        raise UserError(f"override {others[0]!r} is none of the task's: without a recipe, write task.KEY=VALUE")
    tree = apply_overrides({"task": section}, overrides)
    return build_config(tree, source="override").task


def _keeps_unanswered(task: str, overrides: Sequence[str]) -> bool:
    """Whether the user's own settings keep problems without an answer, as checking a file by itself always does."""
    if not task.endswith(".toml"):
        return any(override.partition("=")[0].strip() == "task.on_missing_answer" for override in overrides)
    from atesd.recipe import load_config

    return getattr(load_config(Path(task), overrides).task, "on_missing_answer", "") == "keep"


def warnings_of(problems: Sequence[Problem], *, keeps_unanswered: bool = False) -> list[str]:
    """Return what is allowed but probably not meant."""
    found = []
    missing = [problem.id for problem in problems if problem.answer is None]
    if missing:
        found.append(
            f"{len(missing)} solutions state no answer that can be recognised ({', '.join(missing[:5])}): "
            + ("no reward can grade them" if keeps_unanswered else _REFUSED_UNANSWERED)
        )
    segments = segmentation_warning([problem.solution for problem in problems])
    return [*found, segments] if segments else found
