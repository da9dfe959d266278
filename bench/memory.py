"""Peak memory of one scoring pass, each in a process of its own.

    python -m bench.memory ARM CASE_JSON

prints the MiB by which the process's resident memory rises above its level once the model is loaded and has done one
tiny pass, so that libraries are warm. Gradients are counted; Linux only, where /proc can reset the high-water mark.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from bench.score import Case, Loss, Pair, all_arms, load_pair, one_pass, own_arms, random_batch, write_model

ARMS = ("atesd", "trl", "trl_tiles", "dense")
CASES = tuple(
    Case(name, 256, vocabulary, 8, 256, lora=lora)
    for name, vocabulary, lora in (("full", 151_936, False), ("half_vocabulary", 75_968, False), ("frozen_head", 151_936, True))
)  # fmt: skip
QUICK_CASES = tuple(replace(case, hidden=64, vocabulary=case.vocabulary // 4, sequences=2) for case in CASES)
REPEATS = 3


def resident(field: str) -> float:
    """Return a field of /proc/self/status in MiB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def peak(run: Any) -> float:
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


def main(name: str, case: Case, path: Path) -> None:
    """Print one measurement: the model is loaded once, with a tiny batch first."""
    tiny = replace(case, sequences=1, tokens=8)
    pair, loss = arm_of(name, case, path)
    one_pass(pair.student, own_arms(pair, random_batch(tiny))["atesd"])()
    print(json.dumps(peak(one_pass(pair.student, loss))))


def measure_all(folder: Path, *, quick: bool) -> dict[str, Any]:
    """Return every case's samples by arm, in MiB, the arms interleaved."""
    found: dict[str, Any] = {}
    for case in QUICK_CASES if quick else CASES:
        path = write_model(case, folder)
        samples: dict[str, list[float]] = {name: [] for name in ARMS}
        for name in _turns(quick):
            samples[name].append(_measure(name, case, path))
        found[case.name] = {"case": asdict(case), "mib": samples}
    return found


def _turns(quick: bool) -> Iterator[str]:
    for _ in range(1 if quick else REPEATS):
        yield from ARMS


def _measure(name: str, case: Case, path: Path) -> float:
    command = [sys.executable, "-m", "bench.memory", name, json.dumps(asdict(case)), str(path)]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | threads)
    return float(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as given:
        described = Case(**json.loads(sys.argv[2]))
        main(sys.argv[1], described, Path(sys.argv[3]) if len(sys.argv) > 3 else write_model(described, Path(given)))
