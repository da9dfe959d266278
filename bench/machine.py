"""What the machine can do, and how much of it a scoring pass reaches.

`matmul_fraction`: floating-point operations that the pass needs, over its seconds, over the rate of a large matrix
product measured in the same round. Counted are products only, and only the needed ones (a pass that computes logits
twice to save memory gets no credit for it): each weight 2 operations a position forward, 4 more backward; causal
attention half of its square; the head for the scored positions. At a size dominated by the decoder, which is as wide as
Qwen3-0.6B.

`token_exponent`: slope of log seconds over log tokens, for four numbers of sequences; 1 is linear.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from atesd.train.compiled import compile_layers
from bench.score import HEAD_SIZE, Case, load_pair, one_pass, own_arms, random_batch, write_model
from bench.timing import interleaved, spread

BODY = Case("body", 1_024, 8_192, 8, 128, layers=3, prompt=64, hint=128)
GROWING = Case("growing", 256, 49_152, 2, 64)
SEQUENCES = (2, 4, 8, 16)
PRECISIONS = ("float32", "bfloat16")
SIDE = 1536
"""Of the square matrices whose product sets the rate: it must take longer than threads take to wake up."""


def description() -> dict[str, Any]:
    """Describe the machine without naming it."""
    packages = ("torch", "transformers", "trl", "peft", "accelerate")
    versions = {name: metadata.version(name) for name in packages if _installed(name)}
    return {
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processor": platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "versions": versions,
    }


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def matmul(dtype: torch.dtype, side: int) -> Callable[[], object]:
    """Return a square matrix product of 2 side^3 operations."""
    left, right = (torch.randn(side, side).to(dtype) for _ in range(2))
    return lambda: left @ right


def operations(case: Case) -> float:
    """Count the floating-point operations of a scoring pass that trains everything."""
    heads = max(1, case.hidden // HEAD_SIZE)
    width, narrow = heads * HEAD_SIZE, max(1, heads // 2) * HEAD_SIZE
    weights = case.layers * (case.hidden * (2 * width + 2 * narrow) + 3 * case.hidden * 3 * case.hidden)

    def forward(length: int) -> float:
        scores = 2 * case.layers * length * width  # two products of `length` each, halved by the causal mask
        return case.sequences * length * (2 * weights + scores)

    head = 2.0 * case.hidden * case.vocabulary * case.sequences * case.tokens
    student, teacher = forward(case.prompt + case.tokens - 1), forward(case.hint + case.tokens - 1)
    return 3 * (student + head) + teacher + head


def fraction(folder: Path, *, quick: bool) -> dict[str, Any]:
    """Return rates and the fraction that atesd's scoring pass reaches, also with `model.compile`, and the dense one."""
    case = replace(BODY, hidden=128, layers=2, sequences=2) if quick else BODY
    side = 512 if quick else SIDE
    pair = load_pair(case, write_model(case, folder))
    arms = {name: one_pass(pair.student, loss) for name, loss in own_arms(pair, random_batch(case)).items()}
    compiled = load_pair(case, folder / case.name)
    for model in (compiled.student, compiled.teacher):
        compile_layers(model)
    arms["atesd_compiled"] = one_pass(compiled.student, own_arms(compiled, random_batch(case))["atesd"])
    products = {name: matmul(getattr(torch, name), side) for name in PRECISIONS}
    seconds = interleaved(products | arms, 3 if quick else 7)
    rates = {name: [2 * side**3 / taken for taken in seconds[name]] for name in PRECISIONS}
    needed = operations(case)
    fractions = {
        name: spread([needed / taken / rate for taken, rate in zip(seconds[name], rates["float32"], strict=True)])
        for name in arms
    }
    return {
        "case": asdict(case),
        "operations": needed,
        "seconds": seconds,
        "gflops": {name: spread([rate / 1e9 for rate in found]) for name, found in rates.items()},
        "fraction": fractions,
    }


def growth(folder: Path, *, quick: bool) -> dict[str, Any]:
    """Return the seconds of a pass for growing numbers of sequences, and the exponent round by round."""
    base = replace(GROWING, hidden=64, vocabulary=4_096, tokens=32) if quick else GROWING
    pair = load_pair(base, write_model(base, folder))
    cases = [replace(base, sequences=count) for count in SEQUENCES]
    arms = {
        str(case.sequences * case.tokens): one_pass(pair.student, own_arms(pair, random_batch(case))["atesd"])
        for case in cases
    }
    seconds = interleaved(arms, 3 if quick else 7)
    sizes = np.log([float(name) for name in seconds])
    exponents = [float(np.polyfit(sizes, np.log(taken), 1)[0]) for taken in zip(*seconds.values(), strict=True)]
    return {"case": asdict(base), "seconds": seconds, "exponent": spread(exponents)}


def measure_all(folder: Path, *, quick: bool) -> dict[str, Any]:
    """Return everything of this module."""
    return {
        "machine": description(),
        "matmul": fraction(folder, quick=quick),
        "growth": growth(folder, quick=quick),
    }
