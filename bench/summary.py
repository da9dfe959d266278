"""From raw results to the numbers that documents quote."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from bench.phases import share
from bench.timing import ratio

KEYS = (
    "score_speedup_vs_trl",
    "score_speedup_vs_trl_frozen_head",
    "score_vs_dense",
    "score_memory_ratio_vs_trl",
    "step_speedup_vs_trl",
    "compiled_step_speedup_vs_trl",
    "smollm2_step_speedup_vs_trl",
    "smollm2_unwarmed_step_speedup_vs_trl",
    "smollm2_float32_step_speedup_vs_trl",
    "matmul_fraction",
    "compiled_matmul_fraction",
    "exposure_share",
    "rows_share",
    "probe_share",
    "smollm2_exposure_share",
    "smollm2_probe_share",
    "token_exponent",
)
"""Speed-ups are the peer's seconds over atesd's: above 1 atesd is the faster. Memory ratios are atesd's MiB over the
peer's: below 1 atesd is the smaller."""


@dataclass(frozen=True)
class Line:
    """One comparison: how many times as much the peer takes."""

    what: str
    peer: str
    middle: float
    low: float
    high: float
    own: float
    other: float
    unit: str

    def __str__(self) -> str:
        return (
            f"{self.what:<34} {self.peer:<10} {self.middle:>6.2f} x  ({self.low:.2f} to {self.high:.2f})"
            f"   atesd {self.amount(self.own)}, {self.peer} {self.amount(self.other)}"
        )

    def amount(self, value: float) -> str:
        """Return a value with its unit."""
        return f"{value:,.0f} MiB" if self.unit == "MiB" else f"{value:.3g} {self.unit}"


def lines(raw: Mapping[str, Any]) -> list[Line]:
    """Return every comparison of atesd with a peer."""
    found = []
    for name, result in raw["score"].items():
        case = result["case"]
        size = f"score {name} V {case['vocabulary']:,} N {case['sequences'] * case['tokens']}"
        found += _lines(size, result["seconds"], "atesd", "s")
    for name, result in raw["memory"].items():
        mib = {arm: [median(samples)] for arm, samples in result["mib"].items()}  # arms have samples of their own
        found += _lines(f"memory {name}", mib, "atesd", "MiB")
    for name, result in raw["step"].items():
        for own in sorted(result["seconds"].keys() - {"trl"}):
            arms = {own: result["seconds"][own], "trl": result["seconds"]["trl"]}
            found += _lines(f"step {name}{own.removeprefix('atesd').replace('_', ' with ')}", arms, own, "s")
    return found


def _lines(what: str, arms: Mapping[str, list[float]], own: str, unit: str) -> list[Line]:
    result = []
    for peer in arms.keys() - {own}:
        times = ratio(arms[peer], arms[own])
        result.append(
            Line(what, peer, times["median"], times["low"], times["high"], median(arms[own]), median(arms[peer]), unit)
        )
    return sorted(result, key=lambda line: line.peer)


def summarise(raw: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers by key; `memory_growth_*` is what twice the vocabulary costs, 1 is nothing."""
    score, memory, step, machine = (raw[name] for name in ("score", "memory", "step", "machine"))
    beta, real_beta = (step[name]["phases"]["atesd_beta"] for name in ("pico", "smollm2"))

    def speedup(result: Mapping[str, Any], peer: str, own: str = "atesd") -> float:
        return ratio(result["seconds"][peer], result["seconds"][own])["median"]

    mib = {name: {arm: median(found) for arm, found in result["mib"].items()} for name, result in memory.items()}
    numbers = {
        "score_speedup_vs_trl": speedup(score["full"], "trl"),
        "score_speedup_vs_trl_frozen_head": speedup(score["frozen_head"], "trl"),
        "score_vs_dense": speedup(score["full"], "dense"),
        "score_vs_trl_tiles": speedup(score["full"], "trl_tiles"),
        "score_memory_ratio_vs_trl": mib["full"]["atesd"] / mib["full"]["trl"],
        "score_memory_ratio_vs_trl_frozen_head": mib["frozen_head"]["atesd"] / mib["frozen_head"]["trl"],
        "step_speedup_vs_trl": speedup(step["pico"], "trl"),
        "compiled_step_speedup_vs_trl": speedup(step["pico"], "trl", "atesd_compiled"),
        "smollm2_step_speedup_vs_trl": speedup(step["smollm2"], "trl"),
        "smollm2_unwarmed_step_speedup_vs_trl": speedup(step["smollm2_unwarmed"], "trl"),
        "smollm2_float32_step_speedup_vs_trl": speedup(step["smollm2_float32"], "trl"),
        "matmul_fraction": machine["matmul"]["fraction"]["atesd"]["median"],
        "compiled_matmul_fraction": machine["matmul"]["fraction"]["atesd_compiled"]["median"],
        "exposure_share": share(beta, "exposure"),
        "rows_share": share(beta, "rows"),
        "probe_share": share(beta, "probe"),
        "smollm2_exposure_share": share(real_beta, "exposure"),
        "smollm2_probe_share": share(real_beta, "probe"),
        "token_exponent": machine["growth"]["exponent"]["median"],
    }
    growth = {f"memory_growth_{arm}": mib["full"][arm] / mib["half_vocabulary"][arm] for arm in ("atesd", "trl")}
    return numbers | growth
