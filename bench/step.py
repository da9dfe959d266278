"""A whole step with rollouts: atesd's Trainer against TRL's, on the same model, problems, prompts and settings.

The step alone has full exposure and no probe (arm `atesd`); `atesd_beta` is the same with ATESD's learned exposure,
its probe, its controller and, below full exposure, the answer; `atesd_compiled` the step alone with `model.compile`,
whose compiling falls into the steps before those that are timed. The learning rate is tiny, so that completions keep
their length. Rounds are interleaved: TRL's loop gives the others their turn before each of its steps. Both compute in
the precision that the recipe has, or finds to be the faster here.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import greenlet
import torch

from atesd.config import RunConfig
from atesd.exposure.prompt import student_messages, teacher_messages
from atesd.recipe import load_config
from atesd.runlog import RunDir
from atesd.train.loop import Trainer
from atesd.train.model import decide_dtype, resolve
from atesd.types import Problem
from bench.timing import Samples, progress, ratio

ROOT = Path(__file__).parents[1]
TASK_SIZE = 256
QUIET = (
    "optim.lr=1e-7",
    "optim.schedule=constant",
    "loss.aggregate=sequence",
    "save.every=1000000",
    "save.rollouts_every=1000000",
    "eval.every=1000000",
    "eval.problems=1",
    "eval.k=1",
)
FULL_EXPOSURE = 'exposure={kind="fixed", ratio=1.0}'
ATESD = 'exposure={kind="beta"}'
SMOLLM2_ATESD = (
    'exposure={kind="beta", hold=2, look_ahead=4, probe_every=2, decisions_per_update=2, '
    "gt_grid=[0.0, 0.25, 0.5, 0.75, 1.0]}",
    "task.probe_size=16",
    'prompt.answer="\\n#### {answer}"',
)
"""As smollm2-cpu-atesd.toml has it."""
DISTIL = 'routing={kind="distil"}'
SMOLLM2_PROMPTS = ('prompt.student="{problem}"', 'prompt.teacher="{problem}\\n\\n{hint}"')


@dataclass(frozen=True)
class Setting:
    """A model and a recipe, and how often they are timed."""

    name: str
    recipe: str
    overrides: tuple[str, ...]
    template: str
    """The teacher's prompt as TRL writes it; must render what the recipe's does."""
    rounds: int
    quick_rounds: int
    threads: int = 0
    """Of torch; 0 leaves what is set."""
    lora: bool = False
    learned: tuple[str, ...] = ()
    """Overrides of an arm with ATESD's learned exposure; none for no such arm."""
    compiled: bool = False
    """Whether there is an arm with `model.compile`."""
    warmed_up: bool = False
    """Whether the model is warmed up for the recipe's task first, as docs/models.md has it."""
    sums: bool = False
    """Whether it answers word problems written here, not the recipe's own task."""


UNWARMED = Setting(
    "smollm2_unwarmed",
    "smollm2-gsm.toml",
    ("step.problems=2", "rollout.max_new_tokens=32", "task.probe_size=0", *SMOLLM2_PROMPTS),
    "{prompt}\n\n{privileged_context}",
    5,
    2,
    lora=True,
    sums=True,
)
HINTED = "{prompt}\n\nReference solution:\n{privileged_context}\n\nNow solve the problem."
SETTINGS = (
    Setting(
        "pico", "pico.toml", (), "{prompt}\n>{privileged_context}", 30, 4, threads=1, learned=(ATESD,), compiled=True
    ),
    Setting(
        "smollm2",
        "smollm2-cpu-opsd.toml",
        ("task.train_size=256", "task.eval_size=1", "task.probe_size=0", 'prompt.answer=""'),
        HINTED,
        4,
        1,
        lora=True,
        learned=SMOLLM2_ATESD,
        warmed_up=True,
    ),
    UNWARMED,
    replace(UNWARMED, name="smollm2_float32", overrides=(*UNWARMED.overrides, "model.dtype=float32")),
)


class Stepped:
    """A run of atesd that moves on when asked to, as a coroutine.

    Not as a thread: OpenMP gives each thread that computes workers of its own, and once there are more of them than
    cores, every arm waits for them.
    """

    def __init__(self, config: RunConfig, folder: Path) -> None:
        self.seconds: list[float] = []
        self.metrics: list[dict[str, Any]] = []
        self.trainer = Trainer.start(config, folder, listener=greenlet.getcurrent().switch)
        self._run = greenlet.greenlet(self.trainer.train)
        self._run.switch()  # up to the evaluation of the start

    def step(self) -> None:
        """Do one step."""
        start = perf_counter()
        self.metrics.append(self._run.switch())
        self.seconds.append(perf_counter() - start)

    def finish(self) -> None:
        """Do the last step, which evaluates and saves, without timing it."""
        while not self._run.dead:
            self._run.switch()


def warmed_up(setting: Setting, folder: Path) -> Path:
    """Return the recipe's start: what `runs/` has of it, or else what is made now, in some four minutes."""
    made = ROOT / "runs" / "smollm2-warm"
    if not made.is_dir():
        made = folder / "warm"
        command = ["warmup", "--model", "smollm2", "--data", ROOT / "recipes" / setting.recipe, "--out", made]
        subprocess.run([sys.executable, "-m", "atesd", *command, "task.data_seed=1"], check=True, stdout=sys.stderr)
    return made


def write_sums(path: Path) -> Path:
    """Write word problems for a real model: nothing is learned from them, they only have a plausible length."""
    rng = random.Random(0)
    rows = []
    for number in range(40):
        first, second, price = (rng.randint(11, 89) for _ in range(3))
        total = first + second
        rows.append(
            {
                "id": str(number),
                "problem": f"A shop sells {first} pears on Monday and {second} on Tuesday, at {price} cents each. "
                "How many cents does it take in? Explain every step.",
                "solution": f"It sells {first} + {second} = {total} pears.\nThat makes {total} * {price} = "
                f"{total * price} cents.\nThe answer is \\boxed{{{total * price}}}.",
            }
        )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def configs(setting: Setting, folder: Path, steps: int) -> dict[str, RunConfig]:
    """Return the recipes of atesd's arms; one more step than is timed, since the last one evaluates."""
    overrides = [*setting.overrides, *QUIET, f"step.num_steps={steps + 1}", f"threads={torch.get_num_threads()}"]
    if setting.sums:
        sums = write_sums(folder / "sums.jsonl")
        overrides += [f'task.path="{sums}"', "task.eval_size=1", "rollout.top_p=1.0", "rollout.top_k=0"]
    elif setting.warmed_up:
        overrides += [f'model.path="{warmed_up(setting, folder)}"']
    else:
        overrides += [f"task.train_size={TASK_SIZE}"]
    recipe = ROOT / "recipes" / setting.recipe
    plain = decide_dtype(load_config(recipe, [*overrides, FULL_EXPOSURE, DISTIL]))
    arms = {"atesd": plain}
    fixed = [*overrides, f"model.dtype={plain.model.dtype}", DISTIL]
    if setting.learned:
        arms["atesd_beta"] = load_config(recipe, [*fixed, *setting.learned])
    if setting.compiled:
        arms["atesd_compiled"] = load_config(recipe, [*fixed, FULL_EXPOSURE, "model.compile=true"])
    return arms


def as_rows(problems: Sequence[Problem], config: RunConfig) -> list[dict[str, Any]]:
    """Return problems as TRL's data set holds them."""
    return [
        {"prompt": list(student_messages(each, config.prompt)), "privileged_context": each.solution}
        for each in problems
    ]


def _same_prompts(peer: Any, rows: Sequence[Mapping[str, Any]], problems: Sequence[Problem], config: RunConfig) -> None:
    """AssertionError unless both teachers read the same messages."""
    builder = peer.teacher_context_builder
    theirs = builder.select_generation_prompts(
        [row["prompt"] for row in rows], [row["privileged_context"] for row in rows]
    )
    ours = [list(teacher_messages(each, each.solution, config.prompt)) for each in problems]
    assert theirs == ours, f"TRL's teacher reads {theirs[0]}, ours {ours[0]}"


def measure(setting: Setting, folder: Path, rounds: int, warm_up: int = 2) -> dict[str, Any]:
    """Return samples and ratios of one setting."""
    from bench import peers

    threads = torch.get_num_threads()
    torch.set_num_threads(setting.threads or threads)
    steps = warm_up + rounds
    recipes = configs(setting, folder, steps)
    runs = {name: Stepped(config, folder / f"{setting.name}_{name}") for name, config in recipes.items()}
    config, problems = recipes["atesd"], runs["atesd"].trainer.parts.problems
    turns = peers.Turns(lambda: [run.step() for run in runs.values()])
    rows = as_rows(problems, config)
    peer = peers.step_trainer(
        Path(resolve(config.model.path)),
        rows,
        turns,
        batch=config.step.problems * config.rollout.group_size,
        template=setting.template,
        lora=setting.lora,
        dtype=config.model.dtype,
        max_steps=steps,
        num_generations=config.rollout.group_size,
        max_completion_length=config.rollout.max_new_tokens,
        temperature=config.rollout.temperature,
        top_p=config.rollout.top_p,
        top_k=config.rollout.top_k,
        learning_rate=config.optim.lr,
        max_grad_norm=config.optim.max_grad_norm,
    )
    _same_prompts(peer, rows, problems, config)
    peer.train()
    for run in runs.values():
        run.finish()
    torch.set_num_threads(threads)
    seconds: Samples = {name: run.seconds[warm_up:] for name, run in runs.items()} | {"trl": turns.seconds[warm_up:]}
    tokens = {name: [row["optim/tokens"] for row in run.metrics[warm_up:]] for name, run in runs.items()}
    return {
        "dtype": config.model.dtype,
        "seconds": seconds,
        "tokens": tokens | {"trl": peer.sampled[warm_up:]},
        "ratios": {f"trl_over_{name}": ratio(seconds["trl"], seconds[name]) for name in runs},
        "phases": {
            name: [
                row
                for row in RunDir.open(folder / f"{setting.name}_{name}").metrics()
                if warm_up < row["step"] <= steps
            ]
            for name in runs
        },
    }


def measure_all(folder: Path, *, quick: bool) -> dict[str, Any]:
    """Return every setting's results by name; of the runs' metrics only the seconds by phase."""
    found = {}
    for each in SETTINGS:
        if quick and each.warmed_up:  # takes minutes, and quick numbers mean nothing
            small = ("model.path=smollm2", "step.problems=2", "rollout.max_new_tokens=16")
            each = replace(each, warmed_up=False, overrides=(*each.overrides, *small))  # noqa: PLW2901
        found[each.name] = measure(each, folder, each.quick_rounds if quick else each.rounds)
        progress(f"step {each.name}")
    for result in found.values():
        result["phases"] = {name: _times(rows) for name, rows in result["phases"].items()}
    return found


def _times(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    return [{key: value for key, value in row.items() if key.startswith("time/")} for row in rows]
