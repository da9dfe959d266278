"""Mismatch of teacher and student against exposure, without training: does it grow with every ratio?

    python repro/mismatch.py RECIPE OUT.json [problems=64] [KEY=VALUE ...]

The student of a recipe, as it is before the first update, samples one completion for each of the first problems that
the recipe holds out, without a hint. The same weights then score every token with a hint at each ratio. Per ratio: the
mean over problems of a completion's mean KL(teacher || student) in nats and of its share of tokens whose most probable
token differs, with 95 % intervals over problems; and the growth from each ratio to the next, paired by problem.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from atesd.config import RunConfig
from atesd.evaluate.metrics import bootstrap_interval
from atesd.files import dump_json, write_atomic
from atesd.losses.divergence import Use
from atesd.losses.target import Plain
from atesd.recipe import load_config
from atesd.seeds import derive_seed
from atesd.train.batch import Passage
from atesd.train.model import decide_dtype, disable_progress_bars
from atesd.train.setup import Parts, assemble, make_scorer

RATIOS = (0.0, 0.25, 0.5, 0.75, 1.0)
QUANTITIES = ("kl", "top1")
Table = dict[str, np.ndarray]
"""By quantity: [problems, ratios]."""


def main(arguments: Sequence[str]) -> None:
    """Measure, write and print."""
    recipe, out, *rest = arguments
    own = [word.partition("=")[2] for word in rest if word.startswith("problems=")]
    overrides = [word for word in rest if not word.startswith("problems=")]
    disable_progress_bars()
    config = decide_dtype(load_config(Path(recipe), overrides), print)
    parts = assemble(config)
    tables = measure(config, parts, int(own[0]) if own else 64)
    found = summary(tables) | {"model": config.model.path, "dtype": config.model.dtype}
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    write_atomic(Path(out), dump_json(found))
    print("| ratio | KL, nats a token | 95 % | top-1 disagreement | 95 % |\n|---|---|---|---|---|")
    for row in found["ratios"]:
        cells = [f"{row[name]:.4f} | {row[f'{name}_low']:.4f} to {row[f'{name}_high']:.4f}" for name in QUANTITIES]
        print(f"| {row['ratio']:g} | {' | '.join(cells)} |")
    for step in found["growth"]:
        shown = ", ".join(
            f"{name} {step[name]:+.4f} ({step[f'{name}_low']:+.4f} to {step[f'{name}_high']:+.4f})"
            for name in QUANTITIES
        )
        print(f"from {step['from']:g} to {step['to']:g}: {shown}")


def measure(config: RunConfig, parts: Parts, count: int) -> Table:
    """Return KL and top-1 disagreement of each completion at each ratio."""
    problems = parts.task.evaluation()[:count]
    sampling = config.rollout.model_copy(update={"group_size": 1})
    groups = parts.driver.rollout(problems, sampling, seed=derive_seed(config.seed, "mismatch"))
    turns = [group.trajectories[0].final for group in groups]
    passages = [Passage(turn.prompt_ids, turn.completion_ids) for turn in turns]
    hinted = [
        [Passage(parts.hints.teacher_ids(problem, ratio), turn.completion_ids) for ratio in RATIOS]
        for problem, turn in zip(problems, turns, strict=True)
    ]
    scorer = make_scorer(config, parts.model, parts.renderer)
    tables = {name: np.full((len(problems), len(RATIOS)), np.nan) for name in QUANTITIES}
    with torch.no_grad():
        for members in scorer.batches([each[-1] for each in hinted]):
            chosen = [passages[member] for member in members]
            student = scorer.hidden(chosen)
            for column in range(len(RATIOS)):
                view = scorer.view([hinted[member][column] for member in members], parts.teacher)
                streams = scorer.against(student, [view], chosen, Plain(), plain=True, use=Use(loss=False))
                scores = {"kl": streams.stats.divergence, "top1": 1.0 - streams.stats.top1_agree}
                for name, values_N in scores.items():
                    split = values_N.split_with_sizes([len(each.completion) for each in chosen])
                    tables[name][members, column] = [float(each.double().mean()) for each in split]
    return tables


def summary(tables: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return means with intervals over problems, by ratio and from each ratio to the next."""
    problems = len(next(iter(tables.values())))
    ratios = [
        {"ratio": ratio} | {key: value for name in QUANTITIES for key, value in named(name, tables[name][:, i]).items()}
        for i, ratio in enumerate(RATIOS)
    ]
    growth = [
        {"from": RATIOS[i], "to": RATIOS[i + 1]}
        | {
            key: value
            for name in QUANTITIES
            for key, value in named(name, tables[name][:, i + 1] - tables[name][:, i]).items()
        }
        for i in range(len(RATIOS) - 1)
    ]
    return {"problems": problems, "ratios": ratios, "growth": growth}


def named(name: str, values_P: np.ndarray) -> dict[str, float]:
    """Return a mean with its interval, by name."""
    low, high = bootstrap_interval(values_P)
    return {name: float(values_P.mean()), f"{name}_low": low, f"{name}_high": high}


if __name__ == "__main__":
    main(sys.argv[1:])
