"""`atesd plan`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from atesd.cli.progress import clock, make_console, silence_libraries
from atesd.tasks.flows import refuse_points
from atesd.types import UserError

if TYPE_CHECKING:
    from atesd.config import RunConfig
    from atesd.train.plan import Device, Lengths, Plan


def run_plan(
    recipe: Path,
    overrides: Sequence[str],
    *,
    device: str | None,
    memory: float | None,
    flops: float | None,
    bandwidth: float | None,
    prompt: int,
    solution: int,
) -> None:
    """Print memory and time of a recipe, and what to lower where it does not fit. Loads no weight."""
    silence_libraries()
    from atesd.recipe import load_config
    from atesd.train.fit import MARGIN, shortfall
    from atesd.train.plan import GIB, Lengths, make_plan

    config = load_config(recipe, overrides)
    refuse_points(config.task)
    chosen = device_of(device, memory, flops, bandwidth)
    lengths = Lengths(prompt, solution)
    plan = make_plan(config, chosen, lengths)
    console = make_console()
    console.print(memory_table(plan, chosen))
    console.print(time_line(plan, config))
    console.print(assumptions(config, chosen, lengths, plan))
    if plan.peak <= chosen.memory * (1 - MARGIN):
        console.print(f"it fits: {plan.peak / GIB:.1f} of {chosen.memory / GIB:.1f} GiB at the worst moment")
        return
    console.print(f"warning: it does not fit: {shortfall(config, chosen, lengths, plan, chosen.memory)}")


def device_of(name: str | None, memory: float | None, flops: float | None, bandwidth: float | None) -> Device:
    """Return a known device, or this machine, with what the options say of it."""
    from dataclasses import replace

    from atesd.train.fit import this_machine
    from atesd.train.plan import DEVICES, GIB

    if name is None or name == "this":
        found = this_machine()
    elif name.lower() in DEVICES:
        found = DEVICES[name.lower()]
    else:
        raise UserError(
            f"device {name!r} is not known: give one of this, {', '.join(DEVICES)}, and --device-memory (GiB), --flops "
            "(10^12 a second) and --bandwidth (10^9 bytes a second) for what it is not"
        )
    return replace(
        found,
        memory=memory * GIB if memory else found.memory,
        flops=flops * 1e12 if flops else found.flops,
        bandwidth=bandwidth * 1e9 if bandwidth else found.bandwidth,
    )


def memory_table(plan: Plan, device: Device) -> Table:
    """Return bytes by part: a column for each phase."""
    from atesd.train.plan import GIB

    table = Table(title=f"memory on {device.name}, GiB", title_justify="left")
    table.add_column("part")
    for phase in plan.phases:
        table.add_column(phase, justify="right")
    for part, size in plan.always.items():
        if size:
            table.add_row(part, *[_gib(size / GIB)] * len(plan.phases))
    for part in dict.fromkeys(part for parts in plan.phases.values() for part in parts):
        table.add_row(part, *[_gib(parts[part] / GIB) if part in parts else "" for parts in plan.phases.values()])
    table.add_row("all", *[_gib(plan.total(phase) / GIB) for phase in plan.phases])
    return table


def _gib(size: float) -> str:
    return "< 0.01" if 0 < size < 0.005 else f"{size:.2f}"


def time_line(plan: Plan, config: RunConfig) -> str:
    """Say what a step and the run take."""
    parts = ", ".join(f"{name} {_seconds(seconds)}" for name, seconds in plan.seconds.items())
    return (
        f"a step: {_seconds(plan.step_s)} ({parts}); {config.step.num_steps} steps: "
        f"{clock(plan.step_s * config.step.num_steps)}, without evaluation, probe and graders"
    )


def assumptions(config: RunConfig, device: Device, asked: Lengths, plan: Plan) -> str:
    """Say what the numbers rest on; `asked` are lengths that the model's context may not hold."""
    lengths = plan.lengths
    cut = "" if lengths == asked else f" (cut from {asked.prompt} and {asked.solution}: the model reads no more)"
    return (
        f"{plan.parameters / 1e6:,.1f} million weights, {plan.trained / 1e6:,.1f} train; assumed: prompts of "
        f"{lengths.prompt} tokens, solutions of {lengths.solution}{cut}, completions of full length "
        f"({config.rollout.max_new_tokens}), {plan.rows} rows a micro-batch; {device.flops / 1e12:,.3g} x 10^12 "
        f"operations and {device.bandwidth / 1e9:,.0f} x 10^9 bytes a second, of which {device.share:.0%} are reached"
        + "".join(f"; {each}" for each in _unreckoned(config, device))
    )


def _unreckoned(config: RunConfig, device: Device) -> Iterator[str]:
    """Say what of the recipe the numbers do not know."""
    if config.model.compile:
        yield "model.compile is left out: its first steps take longer, the others less"
    if device.is_gpu and config.model.dtype == "float32":
        yield "the rate is bfloat16's: give that of float32 with --flops"


def _seconds(seconds: float) -> str:
    return clock(seconds) if seconds >= 10 else f"{seconds:.2g} s"
