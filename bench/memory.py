"""Peak memory of one scoring pass, each in a process of its own.

Taken are the MiB by which the process's resident memory rises above its level once the model is loaded and has done one
tiny pass, so that libraries are warm. Gradients are counted. Linux only, where /proc can reset the high-water mark.
"""

from __future__ import annotations

import gc
import multiprocessing
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from atesd.train.model import disable_progress_bars
from bench.score import Case, Loss, Pair, all_arms, load_pair, one_pass, own_arms, random_batch, write_model
from bench.timing import progress

ARMS = {"atesd": 2, "trl": 1, "trl_tiles": 1, "dense": 1}
"""How often each is measured: peers' peaks repeat to a thousandth, atesd's are small enough to vary."""
GROWING = ("atesd", "trl")
"""The arms whose growth with the vocabulary is reported."""
CASES = (
    Case("full", 256, 151_936, 8, 256),
    Case("half_vocabulary", 256, 75_968, 8, 256),
    Case("frozen_head", 256, 151_936, 8, 256, lora=True),
)
QUICK_CASES = tuple(replace(case, hidden=64, vocabulary=case.vocabulary // 4, sequences=2) for case in CASES)


def resident(field: str) -> float:
    """Return a field of /proc/self/status in MiB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def peak(run: Callable[[], object]) -> float:
    """Return the MiB by which a call raises resident memory at its highest."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


def arm_of(name: str, case: Case, path: Path) -> tuple[Pair, Loss]:
    """Build one arm; those of the package load nothing of TRL."""
    if name.startswith("trl"):
        pair, arms = all_arms(case, path)
    else:
        pair = load_pair(case, path)
        arms = own_arms(pair, random_batch(case))
    return pair, arms[name]


def measure_one(name: str, case: Case, path: Path, threads: int) -> float:
    """Measure one arm in the calling process, which must be a fresh one."""
    disable_progress_bars()
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    tiny = replace(case, sequences=1, tokens=8)
    pair, loss = arm_of(name, case, path)
    one_pass(pair.student, own_arms(pair, random_batch(tiny))["atesd"])()
    return peak(one_pass(pair.student, loss))


def measure_all(folder: Path, *, quick: bool) -> dict[str, Any]:
    """Return every case's samples by arm, in MiB.

    Processes are forked from one that has loaded the libraries and nothing else, each for one measurement.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bench.peers", "bench.memory"])
    found: dict[str, Any] = {}
    with context.Pool(1, maxtasksperchild=1) as pool:
        for case in QUICK_CASES if quick else CASES:
            path = write_model(case, folder)
            samples: dict[str, list[float]] = {}
            for name, repeats in ARMS.items():
                if case.name != "half_vocabulary" or name in GROWING:
                    arguments = (name, case, path, torch.get_num_threads())
                    samples[name] = [pool.apply(measure_one, arguments) for _ in range(1 if quick else repeats)]
            found[case.name] = {"case": asdict(case), "mib": samples}
            progress(f"memory {case.name}")
        pool.close()
        pool.join()
    return found
