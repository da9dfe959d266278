"""`atesd compare`: paired runs of several arms, a few at a time, resumable."""

from __future__ import annotations

import difflib
import fcntl
import os
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from atesd.cli.jobs import Job, Runner
from atesd.cli.nursery import Nursery
from atesd.cli.progress import clock, make_console, number
from atesd.files import dump_json, refuse_unwritable, write_atomic
from atesd.own import places_in
from atesd.packaged import find_recipe, recipe_text
from atesd.types import UserError

if TYPE_CHECKING:
    from atesd.config import RunConfig

BUILT_IN_ARMS: dict[str, tuple[str, ...]] = {
    "none": ('exposure={kind="fixed", ratio=0.0}',),
    "quarter": ('exposure={kind="fixed", ratio=0.25}',),
    "half": ('exposure={kind="fixed", ratio=0.5}',),
    "three_quarters": ('exposure={kind="fixed", ratio=0.75}',),
    "full": ('exposure={kind="fixed", ratio=1.0}',),
    "random": ('exposure={kind="random"}',),
    "learned": ('exposure={kind="beta"}',),
    "aligned": (
        'exposure={kind="influence", reference="reward", by="level", hold=7}',
        'routing={kind="aligned", otherwise="skip", every=7}',
    ),
    "sft": ('exposure={kind="fixed"}', 'routing={kind="sft"}'),
}
DEFAULT_ARMS = ("full", "half", "learned", "aligned")
"""What is compared where neither the recipe nor `--arms` names any."""


def run_compare(
    recipe: Path,
    overrides: Sequence[str],
    *,
    arms: Sequence[str] | None,
    seeds: int,
    first_seed: int,
    jobs: int,
    out: Path | None,
) -> None:
    """Run what is missing of every arm and seed, then summarise. SystemExit 130 when stopped, 1 when a run failed."""
    recipe = find_recipe(recipe)
    with prepared() as nursery:  # which loads while the recipe is read
        plan = make_plan(recipe, overrides, arms, range(first_seed, first_seed + seeds))
        run_plan(plan, out or Path("runs") / f"{recipe.stem}-compare", jobs, nursery)


def run_plan(plan: Plan, folder: Path, jobs: int, nursery: Nursery | None) -> None:
    """Run a plan; `jobs` runs at a time, 0 for as many as the machine has room for."""
    from atesd.train.model import has_accelerator

    on_accelerator = has_accelerator()
    console = make_console(lasting=True)
    with locked(folder) as lock:
        header = plan.write(folder)
        chosen = decide_once(plan, header, console)
        write_atomic(folder / "compare.json", dump_json(header))
        console.print(f"{len(plan.arms)} arms x {len(plan.seeds)} seeds in {folder}: {', '.join(plan.arms)}")
        todo = plan.jobs(folder, chosen)
        at_once = jobs or (1 if on_accelerator else room(max(plan.threads.values())))
        runner = Runner(todo, min(at_once, len(todo)), lock, console, None if on_accelerator else nursery)
        begin = monotonic()
        try:
            runner.run()
        finally:
            header["seconds"] += monotonic() - begin
            write_atomic(folder / "compare.json", dump_json(header))
        if runner.was_stopped:
            console.print(f"stopped; continue with the same command: atesd {shlex.join(sys.argv[1:])}")
            raise SystemExit(130)
        if len(runner.failures) < len(todo):
            finish(folder, console)
    for job in runner.failures:
        print(f"error: {job.name} failed: {job.failed} (log: {job.log})", file=sys.stderr)
    if runner.failures:
        raise SystemExit(1)


@contextmanager
def prepared() -> Iterator[Nursery | None]:
    """Give a process that runs can be forked from, where that is possible."""
    if sys.platform != "linux":
        yield None
        return
    nursery = Nursery()
    try:
        yield nursery
    finally:
        nursery.close()


def decide_once(plan: Plan, header: dict[str, Any], console: Console) -> str | None:
    """Return what `model.dtype = "auto"` means in all runs of the comparison, of earlier calls, too; None if unused.

    Decided run by run, it could make two arms differ by more than their overrides.
    """
    if plan.automatic and header["auto_dtype"] is None:
        from atesd.train.model import decide_dtype

        header["auto_dtype"] = decide_dtype(next(iter(plan.automatic.values())), console.print).model.dtype
    return header["auto_dtype"] if plan.automatic else None


def room(threads: int) -> int:
    """Return how many runs of so many threads have cores of their own, at least one."""
    return max(1, len(os.sched_getaffinity(0)) // threads)


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be run: every arm with every seed."""

    recipe: Path
    text: str
    overrides: tuple[str, ...]
    arms: Mapping[str, tuple[str, ...]]
    num_steps: Mapping[str, int]
    threads: Mapping[str, int]
    """Threads of a run: the recipe's, or 1 where it leaves them open, so that no number depends on what runs beside."""
    seeds: range
    config: RunConfig
    automatic: Mapping[str, RunConfig]
    """Recipes of arms that train adapters in the precision that suits the machine; all weights train in float32."""

    def jobs(self, folder: Path, auto_dtype: str | None = None) -> list[Job]:
        """Return the runs, all arms of a seed before the next seed; `auto_dtype` is what automatic arms take."""
        return [
            self._job(folder / arm / f"seed_{seed}", arm, seed, auto_dtype) for seed in self.seeds for arm in self.arms
        ]

    def _job(self, path: Path, arm: str, seed: int, auto_dtype: str | None) -> Job:
        own: tuple[str, ...] = (f"threads={self.threads[arm]}", f"seed={seed}")
        if auto_dtype is not None and arm in self.automatic:
            own += (f"model.dtype={auto_dtype}",)
        train = (str(self.recipe), *self.overrides, *self.arms[arm], *own, "--out", str(path))
        return Job(arm, seed, path, train, self.num_steps[arm])

    @property
    def own(self) -> list[str]:
        """Import paths of the user's own methods that the recipe names."""
        return places_in(self.config.model_dump(mode="json", exclude_unset=True))

    def write(self, folder: Path) -> dict[str, Any]:
        """Write `compare.json`, or extend that of an earlier call; UserError if it compared something else."""
        path = folder / "compare.json"
        before = read_before(path)
        if before and _base(before["recipe_text"], before["overrides"], self.own) != _base(self.text, self.overrides):
            raise UserError(f"{folder} compares another recipe or other overrides: choose another folder with --out")
        for arm, overrides in self.arms.items():
            if list(overrides) != before.get("arms", {}).get(arm, list(overrides)):
                raise UserError(f"{folder} already holds an arm {arm!r} with other overrides: choose another --out")
        header = {
            "recipe": str(self.recipe),
            "recipe_text": self.text,
            "overrides": list(self.overrides),
            "arms": before.get("arms", {}) | {arm: list(overrides) for arm, overrides in self.arms.items()},
            "seeds": sorted({*before.get("seeds", []), *self.seeds}),
            "k": self.config.eval.k,
            "task": self.config.task.kind,
            "seconds": before.get("seconds", 0.0),
            "auto_dtype": before.get("auto_dtype"),
        }
        write_atomic(path, dump_json(header))
        return header


def make_plan(recipe: Path, overrides: Sequence[str], arms: Sequence[str] | None, seeds: range) -> Plan:
    """Check that every arm is known and its recipe valid, before anything is run. None: the recipe's own arms."""
    from atesd.recipe import load_config, with_overrides

    if any(override.partition("=")[0].strip() == "seed" for override in overrides):
        raise UserError("compare sets the seed of every run: give --first-seed and --seeds in place of seed=...")
    config = load_config(recipe, overrides)
    known = BUILT_IN_ARMS | config.arms
    chosen: dict[str, tuple[str, ...]] = {}
    num_steps: dict[str, int] = {}
    threads: dict[str, int] = {}
    automatic: dict[str, RunConfig] = {}
    for arm in filter(None, (name.strip() for name in arms or tuple(config.arms) or DEFAULT_ARMS)):
        if arm not in known:
            near = difflib.get_close_matches(arm[:100], known, n=1)
            meant = f"did you mean {near[0]!r}? " if near else ""
            raise UserError(f"unknown arm {arm!r}: {meant}the recipe and the built-in arms are {', '.join(known)}")
        if not re.fullmatch(r"\w[\w.+-]*", arm):
            raise UserError(f"arm {arm!r} cannot name a folder: use letters, digits, and any of _ . + -")
        if arm == "start":
            raise UserError("no arm can be called 'start', as results call what was there before training: rename it")
        chosen[arm] = known[arm]
        armed = with_overrides(config, known[arm], source=f"{recipe}: arm {arm!r}")
        refuse_own(arm, armed, config)
        num_steps[arm], threads[arm] = armed.step.num_steps, armed.threads or 1
        if armed.model.dtype == "auto" and armed.model.lora is not None:
            automatic[arm] = armed
    if not chosen:
        raise UserError(f"--arms names no arm: the recipe and the built-in arms are {', '.join(known)}")
    return Plan(recipe, recipe_text(recipe), tuple(overrides), chosen, num_steps, threads, seeds, config, automatic)


def refuse_own(arm: str, armed: RunConfig, config: RunConfig) -> None:
    """UserError for an arm that sets what a comparison has one of for all."""
    if armed.seed != config.seed:
        raise UserError(
            f"arm {arm!r} sets seed = {armed.seed}, but compare sets the seed of every run: remove it, and give "
            "--first-seed and --seeds"
        )
    if armed.eval.k != config.eval.k:
        raise UserError(
            f"arm {arm!r} sets eval.k = {armed.eval.k} where others have {config.eval.k}, but arms are compared by one "
            "Average@k: set it for all, in the recipe or on the command line"
        )


def read_before(path: Path) -> dict[str, Any]:
    """Return what an earlier call wrote; {} where there was none. UserError where it is damaged."""
    from atesd.report.checked import is_amount, is_text, list_of, read_object, refuse_damaged
    from atesd.report.load import COMPARISON

    before = read_object(path)
    if before:
        own = {"recipe_text": is_text, "overrides": list_of(is_text), "seconds": is_amount}
        refuse_damaged(path, before, COMPARISON | own)
        kinds = {"auto_dtype": lambda value: value in (None, "float32", "bfloat16")}
        refuse_damaged(path, {"auto_dtype": None, **before}, kinds)
    return before


@contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Hold the folder for one comparison; its runs inherit the lock, so that none is continued while it still runs."""
    if folder.exists() and not (folder / "compare.json").is_file() and any(folder.iterdir()):
        raise UserError(f"{folder} already exists and holds no comparison: choose another folder with --out")
    refuse_unwritable(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"runs of {folder} are still going on: wait for them, or stop them first") from None
        yield file.fileno()


def finish(folder: Path, console: Console) -> None:
    """Write summary and report from what is there, and print the tables."""
    from atesd.report.compare import caution, summarise
    from atesd.report.html import write_report
    from atesd.report.load import load_comparison
    from atesd.report.quality import qualities

    summary = summarise(folder)
    study = load_comparison(folder)
    arms = [arm.name for arm in study.arms]
    if found := qualities(study):
        summary["quality"] = found
    write_atomic(folder / "summary.json", dump_json(summary))
    console.print(summary_table(summary))
    if summary["paired"]:
        console.print(paired_table(summary, arms))
    console.print(leaders_line(summary["leaders"]))
    for name, found in summary.get("quality", {}).items():
        console.print(quality_table(name, found, arms))
    if warning := caution(each["seeds"] for part in ("arms", "paired") for each in summary[part].values()):
        console.print(warning)
    report = write_report([folder], folder / "report.html")
    console.print(f"{clock(summary['seconds'])}; summary: {folder}/summary.json\nreport: {report}")


def summary_table(summary: Mapping[str, Any]) -> Table:
    """Return accuracy per arm."""
    num_seeds = len(summary["seeds"])
    title = f"Average@{summary['k']} over {num_seeds} seed{'s' if num_seeds > 1 else ''}"
    table = Table(title=title, title_justify="left")
    rows = {"start": summary["start"], **summary["arms"]}
    few = any("t_low" in arm for arm in rows.values())
    for name in ("arm", "accuracy", "95 % interval", *(["t over seeds"] if few else []), "time a run"):
        table.add_column(name, justify="left" if name == "arm" else "right")
    for name, arm in rows.items():
        seconds = clock(arm["seconds"]) if "seconds" in arm else ""
        over_seeds = [interval(arm, over="t_")] if few else []
        table.add_row(name, number(arm["average_at_k"]), interval(arm), *over_seeds, seconds)
    return table


def paired_table(summary: Mapping[str, Any], arms: Sequence[str]) -> Table:
    """Return paired differences; `arms` are all of the comparison, in order."""
    from atesd.evaluate.metrics import Difference
    from atesd.report.compare import pairs_by_key
    from atesd.report.tables import verdict

    table = Table(title="paired differences", title_justify="left")
    few = any(pair["t_low"] is not None for pair in summary["paired"].values())
    for name in ("pair", "difference", "95 % interval", *(["t over seeds"] if few else []), "reading"):
        table.add_column(name, justify="left" if name in {"pair", "reading"} else "right")
    for key, names in pairs_by_key(arms).items():
        if key not in summary["paired"]:
            continue
        pair = summary["paired"][key]
        row = [" - ".join(names), f"{pair['difference']:+.3f}", interval(pair, sign="+")]
        row += [interval(pair, sign="+", over="t_")] if few else []
        table.add_row(*row, verdict(Difference(**pair).sign))
    return table


def quality_table(name: str, found: Mapping[str, Any], arms: Sequence[str]) -> Table:
    """Return one number about all samples: means over seeds and paired differences of the comparison's arms."""
    from atesd.report.compare import pairs_by_key
    from atesd.report.quality import reading, said

    table = Table(title=f"{name.replace('_', ' ')}, mean over seeds (t interval, 95 %)", title_justify="left")
    for column in ("arm or pair", "value", "reading"):
        table.add_column(column, justify="right" if column == "value" else "left")
    table.add_row("start", said(found["start"]), "")
    for arm, entry in found["arms"].items():
        table.add_row(arm, said(entry), "")
    for key, pair in pairs_by_key(arms).items():
        if entry := found["paired"].get(key):
            table.add_row(" - ".join(pair), said(entry, "+"), reading(entry))
    return table


def leaders_line(leaders: Sequence[str]) -> str:
    """Say which arm came out highest, or which ones are not told apart from the highest."""
    if len(leaders) < 2:
        return f"highest accuracy: {''.join(leaders) or 'no run is complete'}"
    return f"not told apart from the highest: {', '.join(leaders)} (no pair has all its 95 % intervals above 0)"


def interval(entry: Mapping[str, float | None], sign: str = "", over: str = "") -> str:
    """Format an interval, that of resampling or (`over="t_"`) that over seeds; nothing where it is not given."""
    low, high = entry.get(f"{over}low"), entry.get(f"{over}high")
    return "" if low is None or high is None else f"{low:{sign}.3f} to {high:{sign}.3f}"


def _base(text: str, overrides: Sequence[str], known: Sequence[str] | None = None) -> dict[str, Any]:
    """Return what all runs of a comparison share: the resolved recipe but for its seed and its table of arms.

    {} for one that names methods of a user's own other than `known`: a comparison found on disk imports no others.
    """
    from atesd.recipe import apply_overrides, build_config

    tree = apply_overrides(tomllib.loads(text), overrides)
    if known is not None and not set(places_in(tree)) <= set(known):
        return {}
    config = build_config(tree, source="compare.json")
    return config.model_dump(mode="json", exclude={"seed", "arms"})
