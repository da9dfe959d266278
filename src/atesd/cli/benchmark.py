"""What is special in `atesd eval` about benchmarks: the paper's settings, progress, lm-eval's command."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from time import monotonic
from typing import TYPE_CHECKING

from rich.console import Console
from rich.status import Status

from atesd.cli.progress import Pace
from atesd.exposure.prompt import OPSD_STUDENT
from atesd.tasks.benchmarks import BENCHMARKS
from atesd.types import UserError

if TYPE_CHECKING:
    from atesd.config import RunConfig
    from atesd.evaluate.kept import Progress

_PLAIN_EVERY_S = 10.0
LONGEST = 38_912  # new tokens
# OPSD's evaluation, whose numbers ATESD compares with (2601.18734, released code); thinking is on, too.
PAPER = ("eval.k=12", "eval.temperature=1.0", "eval.top_p=0.95", "eval.top_k=0", f"eval.max_new_tokens={LONGEST}")


def settings_of(task: str, data: str | None) -> list[str]:
    """Return the overrides of a benchmark: its task, then the paper's settings, which those of the user follow."""
    section = {"kind": "benchmark", "name": task} | ({"data": data} if data else {})
    return [f"task={{{', '.join(f'{key}={json.dumps(value)}' for key, value in section.items())}}}", *PAPER]


def sets(overrides: Sequence[str], key: str) -> bool:
    """Tell whether overrides set a key, or the whole section around it."""
    names = {override.partition("=")[0].strip() for override in overrides}
    return key in names or key.rpartition(".")[0] in names


def with_official_prompt(config: RunConfig) -> RunConfig:
    """Return the recipe with OPSD's evaluation prompt, which lacks `Problem: `, where it has OPSD's own otherwise."""
    if config.prompt.evaluation is not None or config.prompt.student != OPSD_STUDENT:
        return config
    official = OPSD_STUDENT.removeprefix("Problem: ")
    return config.model_copy(update={"prompt": config.prompt.model_copy(update={"evaluation": official})})


def default_folder(name: str, task: str) -> Path:
    """Return where samples are kept if nobody says: `runs/eval/MODEL-TASK`."""
    return Path("runs") / "eval" / f"{name.strip('./').replace('/', '--')}-{task}"


def check_data(data: str | None, task: str | None) -> None:
    """UserError where `--data` belongs to no benchmark."""
    if data is not None and task not in BENCHMARKS:
        raise UserError(f"--data gives a benchmark's problems: name it by --task ({', '.join(BENCHMARKS)})")


class EvalProgress:
    """Shows how far an evaluation is: in the status line of a terminal, in plain lines elsewhere."""

    def __init__(self, console: Console, status: Status, task: str) -> None:
        self._console = console
        self._status = status
        self._task = task
        self._pace: Pace | None = None
        self._printed = monotonic()

    def __call__(self, progress: Progress) -> None:
        """Take in a part."""
        if self._pace is None:
            self._pace = Pace(progress.total)
        self._pace.see(progress.problems)
        right = "" if progress.correct is None else f", {progress.correct:.3f} correct so far"
        left = f", {self._pace.left()} left" if progress.problems < progress.total else ""
        kept = progress.problems - progress.sampled
        before = f" ({kept} kept from before)" if kept else ""
        line = f"{self._task}: {progress.problems}/{progress.total} problems{before}{right}{left}"
        self._status.update(line)
        is_due = monotonic() - self._printed >= _PLAIN_EVERY_S or progress.problems == progress.total
        if not self._console.is_terminal and is_due:
            self._printed = monotonic()
            self._console.print(line)


def lm_eval_line(task: str, folder: str, results: Path) -> str:
    """Return lm-eval's command for the same model and the settings of `results`, or say that it has no such task."""
    benchmark = BENCHMARKS[task]
    if benchmark.lm_eval is None:
        return f"lm-eval has no task of {benchmark.title}"
    adapter = Path(folder) / "adapter_config.json"
    told = json.loads(adapter.read_text(encoding="utf-8")) if adapter.is_file() else None
    model = f"pretrained={folder}" if told is None else f"pretrained={told['base_model_name_or_path']},peft={folder}"
    if told is not None and told.get("revision"):
        model += f",revision={told['revision']}"
    words = ["lm_eval", "--model", "hf", "--model_args", f"{model},dtype=auto", "--tasks", benchmark.lm_eval]
    used = json.loads((results / "settings.json").read_text(encoding="utf-8"))
    drawn = ",".join(f"{name}={used[name]:g}" for name in ("temperature", "top_p", "top_k"))
    how = f"do_sample=true,{drawn}" if used["temperature"] else "do_sample=false"
    words += ["--apply_chat_template", "--gen_kwargs", f"{how},max_gen_toks={used['max_new_tokens']}"]
    return f"the same with lm-eval, one sample a problem and its own prompt: {' '.join(map(quote, words))}"
