"""Whether a run will fit into this machine's memory: one line before it begins, instead of an error hours later."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import torch

from atesd.config import RunConfig
from atesd.train.plan import DEVICES, GIB, Device, Lengths, Plan, lower_until_it_fits, make_plan

MARGIN = 0.08
"""Share of a device's memory that is left to the allocator."""
_CGROUPS = Path("/sys/fs/cgroup")
_LIMITS = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))
"""Files of a container's limit and of what it uses: of version 2, and of version 1."""


def this_machine() -> Device:
    """Return the GPU that runs would use, or this machine's memory and the rate of a product tried for a moment."""
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        words = properties.name.lower().replace(" ", "")
        known = next((device for name, device in DEVICES.items() if name in words), DEVICES["a100"])
        return Device(properties.name, float(properties.total_memory), known.flops, known.bandwidth)
    left, right = torch.ones(512, 512), torch.ones(512, 512)
    taken = []
    for _ in range(4):
        begin = perf_counter()
        left @ right
        taken.append(perf_counter() - begin)
    memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    memory = min([memory, *(limit for limit, _ in _container())])
    return Device("this CPU", memory, 2 * 512**3 / min(taken), 1e10, is_gpu=False, share=0.7, context=0.5 * GIB)


def free_memory(device: Device) -> float:
    """Return the bytes that a run can still take, of the GPU or of this machine and its container."""
    if device.is_gpu:
        return float(torch.cuda.mem_get_info()[0])
    free = [limit - used for limit, used in _container()]
    for line in _lines(Path("/proc/meminfo")):
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            free.append(1024.0 * float(rest.split()[0]))
    return min(free, default=device.memory)


def memory_warning(config: RunConfig) -> str | None:
    """Say that a run will not fit into what is free, and what to lower; None where it will, or nobody can tell.

    An estimate, with the lengths that `atesd plan` assumes.
    """
    if not config.task.is_text:  # a flow's network is tiny
        return None
    device = this_machine()
    free = free_memory(device)
    if not device.is_gpu:
        device = replace(device, context=0.0)  # its libraries are loaded by now
    lengths = Lengths()
    try:
        plan = make_plan(config, device, lengths)
        if plan.peak <= free * (1 - MARGIN):
            return None
        said = shortfall(config, device, lengths, plan, free)
    except Exception:  # whatever is wrong with the model: loading it will say so
        return None
    return f"this run will probably not fit into memory: {said}; `atesd plan` tells what takes it"


def shortfall(config: RunConfig, device: Device, lengths: Lengths, plan: Plan, there: float) -> str:
    """Say how much is needed, how much is there, and with which overrides that is enough."""
    remedy = lower_until_it_fits(config, device, lengths, there * (1 - MARGIN))
    short = f"{plan.peak / GIB:.1f} GiB are needed, {there / GIB:.1f} are there"
    asked = " ".join(remedy.overrides)
    peak = f"{remedy.plan.peak / GIB:.1f} GiB"
    if remedy.fits:
        return f"{short}; {peak} are enough with: {asked}"
    return (
        f"{short}, and {peak} are needed even with {asked or 'any setting'}: take a smaller model, lower "
        "rollout.max_new_tokens, or choose a larger device"
    )


def _container() -> list[tuple[float, float]]:
    """Return limit and use of this process's container, in bytes; nothing where it has no limit."""
    found = []
    for limit, used in _LIMITS:
        first = [next(iter(_lines(_CGROUPS / name)), "") for name in (limit, used)]
        if all(text.strip().isdigit() for text in first):
            found.append((float(first[0]), float(first[1])))
    return found


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
