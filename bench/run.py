"""atesd beside TRL on this machine, and what the machine leaves unused: `make bench`.

It takes some 15 minutes on two cores, 4 of them SmolLM2's warm-up.

    python -m bench.run [--quick] [--only score memory step machine] [--threads 2] [--out bench/results]

Everything is interleaved in one run: ratios are taken round by round, and reported as median and quartiles. Writes one
raw file a section with all samples, `summary.json` and `speed.svg`; sections left out keep the files of the last run.
`--quick` is a smoke test of two minutes at toy sizes, into runs/bench-quick: its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import tempfile
import warnings
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from atesd.train.model import disable_progress_bars
from bench import machine, memory, phases, score, step
from bench.figure import draw
from bench.summary import lines, summarise

ROOT = Path(__file__).parents[1]
SECTIONS = {
    "score": score.measure_all,
    "memory": memory.measure_all,
    "step": step.measure_all,
    "machine": machine.measure_all,
}


def run(sections: list[str], out: Path, *, quick: bool) -> None:
    """Measure the sections and write their raw files."""
    out.mkdir(parents=True, exist_ok=True)
    for name in sections:
        start = perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            found = SECTIONS[name](Path(folder), quick=quick)
        taken = perf_counter() - start
        raw = {"machine": machine.description(), "took_s": taken, "quick": quick, "results": found}
        (out / f"{name}.json").write_text(score.as_json(raw), encoding="utf-8")


def report(out: Path) -> None:
    """Write summary and figure from the raw files, and print the table."""
    raw: dict[str, Any] = {
        name: json.loads((out / f"{name}.json").read_text(encoding="utf-8"))["results"] for name in SECTIONS
    }
    summary = summarise(raw)
    (out / "summary.json").write_text(score.as_json(summary), encoding="utf-8")
    (out / "speed.svg").write_text(draw(lines(raw)), encoding="utf-8")
    for line in lines(raw):
        print(line)
    for name in ("matmul_fraction", "exposure_share", "rows_share", "probe_share", "token_exponent"):
        print(f"{name:<34} {summary[name]:.3f}")
    print(phases.table(raw["step"]["pico"]["phases"]["atesd_beta"]))


def main() -> None:
    """Measure, then report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="toy sizes, two minutes: does it run?")
    parser.add_argument("--only", nargs="*", choices=list(SECTIONS), default=list(SECTIONS), help="default: all")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch; the pico tier always takes one")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    disable_progress_bars()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    out = arguments.out or ROOT / ("runs/bench-quick" if arguments.quick else "bench/results")
    run(arguments.only, out, quick=arguments.quick)
    missing = [name for name in SECTIONS if not (out / f"{name}.json").is_file()]
    if missing:
        print(f"no summary yet: measure {', '.join(missing)} into {out}, too")
    else:
        report(out)


if __name__ == "__main__":
    main()
