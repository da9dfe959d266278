"""The run directory: its files, the table of metric names, a writer and a reader.

    RUN/config.json             the resolved recipe
    RUN/about.json              what the run is, in words: format, exposure, controls, distils, reinforces
    RUN/env.json                versions, device, commit
    RUN/metrics.jsonl           one object a step: {"step": n, KEY: number, ...}
    RUN/groups.jsonl            one object a group and step: problem, route, exposure, lambda, rewards
    RUN/rollouts/step_*.jsonl   sampled completions with the hint that the teacher saw and per-token streams
    RUN/eval/step_*.jsonl       every evaluated sample
    RUN/checkpoints/step_*/     whole states (train/checkpoint.py)
    RUN/final/  RUN/best/       models that load with `from_pretrained`
    RUN/result.json             written once, when the run is complete

`exposure` in about.json ends the sentence "The teacher sees ..."; `controls` are sentences without a full stop, neutral
controls left out; `distils` and `reinforces` tell which losses the run may take. Run directories of version 1 have no
about.json.

Reports read only these files. Keys under `time/` and `memory/` differ between two runs of one recipe; all others are
reproducible.
"""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from time import perf_counter
from typing import Any

from atesd.types import UserError

FORMAT = 2  # of the run directory

# Every metric key with its meaning and unit; `{}` stands for a name. Plots, tests and docs read this table.
METRICS: dict[str, str] = {
    "loss/total": "the scalar that was back-propagated, after global normalisation",
    "loss/distil": "weighted mean over selected tokens of what is distilled (divergence, sampled-token loss or "
    "surrogate), its coefficient included",
    "loss/rl": "clipped policy loss of reinforced groups, KL term included",
    "loss/nll": "mean negative log-likelihood of reference solutions (supervised route), nats a token",
    "loss/first_token": "mean divergence at the first completion token: a large value means mismatched prompts",
    "loss/clip_frac": "share of vocabulary entries (pointwise) or tokens (token, importance weight of the sampled "
    "loss) that the clip holds",
    "loss/clipped_mass": "teacher probability on clipped entries, mean over tokens",
    "loss/reversed_frac": "share of tokens whose top teacher entry is pushed down by the clipped gradient",
    "divergence/mean": "unclipped divergence, mean over valid tokens, nats",
    "divergence/p99": "99th percentile of the unclipped divergence over valid tokens, nats",
    "mismatch/top1": "share of valid tokens where student and teacher have different argmax",
    "student/entropy": "mean entropy of the student over valid tokens, nats",
    "student/confidence": "mean of the student's largest probability over valid tokens",
    "teacher/entropy": "mean entropy of the teacher over valid tokens, nats",
    "bin/{}/divergence": "divergence/mean of the tokens whose exposure ratio lies in the bin (0.00-0.25, ...)",
    "bin/{}/p99": "divergence/p99 in the bin",
    "bin/{}/mismatch": "mismatch/top1 in the bin",
    "bin/{}/clip_frac": "loss/clip_frac in the bin",
    "exposure/ratio": "mean exposure ratio of the step",
    "exposure/ratio_min": "smallest exposure ratio of the step",
    "exposure/ratio_max": "largest exposure ratio of the step",
    "exposure/ka": "first Beta parameter at the open decision",
    "exposure/kb": "second Beta parameter at the open decision",
    "exposure/mean": "mean of the Beta policy at the open decision",
    "exposure/entropy": "entropy of the Beta policy at the open decision, nats",
    "exposure/feature/{}": "state feature of the open decision",
    "exposure/reward": "reward of the decision that matured at this step",
    "exposure/reward_lp": "learning-progress term of that reward, before its coefficient and normalisation",
    "exposure/reward_gt": "teacher-grounded term of that reward, before its coefficient and normalisation",
    "exposure/open": "decisions whose look-ahead is still running",
    "exposure/matured": "decisions scored so far",
    "exposure/discarded": "decisions discarded so far because a measurement or a distilled group was missing; for "
    "influence and paired: 1 in a step whose credit was",
    "exposure/updates": "controller updates so far",
    "exposure/loss": "controller loss at its latest update",
    "exposure/credit/{}": "averaged influence credit of a candidate ratio",
    "exposure/paired_credit": "fall of the probe NLL per unit of exposure, by two virtual steps, nats",
    "exposure/{}/{}": "a number of one difficulty bin's own policy (bin0 is the easiest)",
    "exposure/{}/feature/{}": "state feature of a bin's open decision",
    "curriculum/reference_nll": "mean NLL that the student gave to the references of the step's problems before its "
    "update, nats a token (probe.log_references)",
    "measure/{}": "a measurement taken for a policy, by its key (probe_nll, gt_solution@0.5, ...)",
    "rollout/length_mean": "mean length of an attempt, sampled tokens of all its turns",
    "rollout/turns_mean": "mean number of turns of an attempt",
    "rollout/eos_frac": "share of attempts that ended with EOS",
    "rollout/truncated": "number of attempts cut off by the length limit",
    "rollout/logprob_gap": "mean |sampler log-prob - trainer log-prob| of sampled tokens, nats",
    "rollout/trait/{}": "share of sampled completions with a trait (cites_hint, ...)",
    "reward/mean": "mean reward over gradable completions",
    "reward/ungradable": "number of completions without a reward",
    "reward/timeouts": "answers graded 0 because the verifier missed its time limit, since the process began",
    "reward/ungradable_groups": "groups without any reward: they cannot be reinforced",
    "reward/uniform_groups": "groups whose rewards are all equal: their advantage is 0",
    "route/distil_groups": "groups distilled in the step",
    "route/rl_groups": "groups reinforced in the step",
    "route/both_groups": "groups that feed both losses; counted under route/distil_groups and route/rl_groups too",
    "route/nll_groups": "groups trained on their reference in the step",
    "route/skip_groups": "groups that no loss was taken on in the step",
    "route/idle": "1 where no distillation loss was taken in the step, whatever the routes",
    "route/paused": "1 where the step does not count in the exposure's hold window: nothing was distilled",
    "route/retired": "1 once the teacher has retired (router `retire`)",
    "route/mismatch_ema": "moving average of mismatch/top1 that the retirement follows",
    "cliff/lambda_star": "lambda* at the exposure in force, least over contract classes; absent where it is infinite",
    "cliff/lambda": "lambda that the step's target was built with",
    "cliff/reinforcing": "1 where the cliff router reinforces",
    "cliff/classes": "contract classes that are known, now or from an earlier measurement",
    "cliff/stale_classes": "those of them that the latest measurement could not renew",
    "cliff/thin_classes": "contract classes with too few positions to count",
    "cliff/p/{}": "teacher's probability of the forced token of a contract class at the exposure in force",
    "cliff/b/{}": "the base's probability of it",
    "cliff/teacher_not_above_base/{}": "1 where p <= b, so that lambda* of the class is infinite",
    "gate/kept_frac": "share of distilled tokens that are selected",
    "gate/mean": "mean of selection times gate over distilled tokens",
    "gate/open_frac": "share of distilled tokens whose gate is above 1/2",
    "gate/gap": "mean log p_T(y_t) - log p_S(y_t) over distilled tokens, nats",
    "gate/gap_negative": "share of distilled tokens with a negative gap",
    "rl/ratio": "mean importance ratio p_S / p_old over reinforced tokens",
    "rl/clip_frac": "share of reinforced tokens whose policy term a clip holds",
    "rl/sampler_weight": "mean weight min(p_old / p_sampler, clip) of reinforced tokens",
    "rl/kl": "mean k3 estimate of KL(student || step-0 weights) over reinforced tokens, nats; 0 without kl_coef",
    "optim/lr": "learning rate of the update",
    "optim/grad_norm": "gradient norm before clipping",
    "optim/tokens": "completion tokens scored in the step",
    "optim/micro_batches": "micro-batches of the step",
    "optim/empty_updates": "updates of the step that were left out because no loss could move the weights",
    "task/dropped": "training problems left out before step 0 because their prompts do not fit the context",
    "eval/{}/avg@{}": "mean accuracy of k samples a problem, and its interval `_low`, `_high`",
    "eval/{}/pass@{}": "unbiased pass@k",
    "eval/{}/maj@{}": "accuracy of the majority answer of k samples",
    "eval/{}/length_mean": "mean completion length in evaluation, tokens",
    "eval/{}/truncated_frac": "share of evaluated completions that hit the length limit (graded as wrong)",
    "eval/{}/ungradable": "evaluated completions without a reward",
    "eval/{}/trait/{}": "share of evaluated completions with a trait (cites_hint, ...)",
    "eval/{}/level/{}": "avg@k of one level",
    "time/{}_s": "seconds spent in a phase of the step (credit: measuring influence or paired credit)",
    "time/tokens_per_s": "sampled tokens a second",
    "memory/peak_mib": "peak memory of the process or device, MiB",
}


def is_timing(key: str) -> bool:
    """Tell whether a metric legitimately differs between two runs of one recipe."""
    return key.startswith(("time/", "memory/"))


def write_atomic(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old or the new content, never a part."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def dump_json(value: object) -> str:
    """Serialise readably, refusing NaN and infinities, which JSON lacks."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Read the objects of a JSON Lines file written by this module; a torn last line (a crash) is left out."""
    if not path.exists():
        return
    *lines, _ = path.read_text(encoding="utf-8").split("\n")  # a text may hold separators that splitlines would cut at
    yield from (json.loads(line) for line in lines if line.strip())


def step_name(step: int) -> str:
    """Return the name of a step's file or folder: `step_000042`."""
    return f"step_{step:06d}"


class RunDir:
    """One run's folder. Creating refuses a folder that already holds a run; opening refuses one that holds none."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics_path = path / "metrics.jsonl"
        self.groups_path = path / "groups.jsonl"
        self.checkpoints = path / "checkpoints"

    @classmethod
    def create(cls, path: Path, config: Mapping[str, Any], about: Mapping[str, Any] | None = None) -> RunDir:
        """Make the folder and write `config.json`, `about.json` and `env.json`."""
        if path.exists() and any(path.iterdir()):
            raise UserError(
                f"run directory {path} already exists and is not empty: "
                f"continue it with --resume {path}, or choose another with --out"
            )
        for folder in ("rollouts", "eval", "checkpoints"):
            (path / folder).mkdir(parents=True, exist_ok=True)
        write_atomic(path / "env.json", dump_json(environment()))
        write_atomic(path / "about.json", dump_json({"format": FORMAT, **(about or {})}))
        write_atomic(path / "config.json", dump_json(config))
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> RunDir:
        """Open an existing run."""
        if not (path / "config.json").is_file():
            raise UserError(f"{path} is not a run directory: it has no config.json; give the folder that `train` wrote")
        return cls(path)

    def config(self) -> dict[str, Any]:
        """Return the resolved recipe."""
        loaded: dict[str, Any] = json.loads((self.path / "config.json").read_text(encoding="utf-8"))
        return loaded

    def about(self) -> dict[str, Any]:
        """Return what the run said of itself; {} for a run directory of version 1."""
        return self._json("about.json") or {}

    def metrics(self) -> list[dict[str, Any]]:
        """Return the logged steps in order."""
        return list(read_jsonl(self.metrics_path))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one step. Non-finite numbers are left out: a missing key says "not measured"."""
        finite = {key: value for key, value in metrics.items() if math.isfinite(value)}
        line = json.dumps({"step": step, **finite}, allow_nan=False)
        with self.metrics_path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def groups(self) -> list[dict[str, Any]]:
        """Return what was logged of every group, in order."""
        return list(read_jsonl(self.groups_path))

    def log_groups(self, step: int, groups: Iterable[Mapping[str, Any]]) -> None:
        """Append the groups of one step."""
        with self.groups_path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps({"step": step, **group}, allow_nan=False) + "\n" for group in groups)

    def rewind(self, step: int) -> None:
        """Forget what was logged after `step` updates, so that a resumed run writes it again."""
        for path, rows in ((self.metrics_path, self.metrics()), (self.groups_path, self.groups())):
            write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows if row["step"] <= step))
        for folder in ("rollouts", "eval"):
            for path in (self.path / folder).glob("step_*.jsonl"):
                if int(path.stem.removeprefix("step_")) > step:
                    path.unlink()

    def write_rows(self, folder: str, step: int, rows: Iterable[Mapping[str, Any]]) -> Path:
        """Write `folder`/step_N.jsonl at once."""
        path = self.path / folder / f"{step_name(step)}.jsonl"
        path.parent.mkdir(exist_ok=True)
        write_atomic(path, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))
        return path

    def finish(self, result: Mapping[str, Any]) -> None:
        """Mark the run as complete."""
        write_atomic(self.path / "result.json", dump_json(result))

    def result(self) -> dict[str, Any] | None:
        """Return what `finish` wrote, or None while the run is not complete."""
        return self._json("result.json")

    def _json(self, name: str) -> dict[str, Any] | None:
        path = self.path / name
        if not path.is_file():
            return None
        loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return loaded


class Phases:
    """Seconds spent in named phases since the last `take`."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a block."""
        start = perf_counter()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + perf_counter() - start

    def take(self) -> dict[str, float]:
        """Return `time/NAME_s` for every phase and start again."""
        taken = {f"time/{name}_s": seconds for name, seconds in self._seconds.items()}
        self._seconds = {}
        return taken


def environment() -> dict[str, Any]:
    """Record what a number depends on: versions, platform, commit."""
    packages = ("atesd", "torch", "transformers", "accelerate", "peft", "numpy", "safetensors", "math-verify")
    versions = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "packages": versions,
        "commit": _git("rev-parse", "HEAD"),
        "changed_files": _git("status", "--porcelain", "--untracked-files=no").splitlines(),
    }


def _git(*arguments: str) -> str:
    """Ask git about the package's own checkout; empty where there is none."""
    here = Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", "-C", str(here), *arguments], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
