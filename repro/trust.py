"""Count what is believed that should not be: damaged run directories, killed runs, hostile completions, bad recipes.

    python repro/trust.py [--damages 200] [--kills 40] [--completions 300] [--recipes 250] [--out FILE.json]

Each part counts outcomes; `docs/trust.md` says which of them are promised never to happen.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from atesd.files import dump_json
from atesd.metrics import is_timing
from atesd.recipe import build_config
from atesd.report.html import write_report
from atesd.runlog import RunDir
from atesd.seals import folder_flaw
from atesd.train.loop import Interrupted, Trainer
from atesd.train.model import disable_progress_bars
from atesd.types import UserError

BASE: dict[str, Any] = {
    "threads": 1,
    "task": {"kind": "pico", "train_size": 16, "probe_size": 2, "eval_size": 2},
    "prompt": {"student": "{problem}", "teacher": "{problem}\n>{hint}", "answer": "\n#{answer}"},
    "cliff": {"contract": {"answer": "#", "equals": "="}, "min_hits": 1, "every": 2},
    "rollout": {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 40, "group_size": 2},
    "optim": {"lr": 1e-3},
    "step": {"num_steps": 6, "problems": 4},
    "eval": {"every": 2, "k": 1},
    "save": {"every": 2, "keep": 2, "rollouts_every": 2},
}
BETA = {"hold": 1, "look_ahead": 2, "decisions_per_update": 2}
CONTROLLERS: list[dict[str, Any]] = [
    {"kind": "fixed", "ratio": 0.5},
    {"kind": "linear"},
    {"kind": "cosine"},
    {"kind": "steps", "values": [1.0, 0.25], "boundaries": [2]},
    {"kind": "random", "hold": 2},
    {"kind": "beta", **BETA},
    {"kind": "closed_form", "hold": 2},
    {"kind": "paired", "hold": 2},
    {"kind": "difficulty", "by": "reference_ppl", "policy": BETA},
    {"kind": "influence", "hold": 2, "grid": [0.0, 1.0]},
]
EMA = {"teacher": {"weights": "ema", "ema_decay": 0.9}}
LORA = {"model": {"lora": {"r": 2, "alpha": 4}}}


def outcome(run: Path) -> dict[str, Any]:
    """Return everything reproducible that a finished run leaves."""
    opened = RunDir.open(run)
    return {
        "metrics": [{key: value for key, value in row.items() if not is_timing(key)} for row in opened.metrics()],
        "groups": opened.groups(),
        "rows": {
            path.name: path.read_bytes() for f in ("eval", "rollouts") for path in (run / f).glob("step_[0-9]*.jsonl")
        },
        "weights": tensors(run / "final"),
        "result": {key: value for key, value in (opened.result() or {}).items() if key != "seconds"},
    }


def tensors(folder: Path) -> dict[str, bytes]:
    """Return the weights of a model folder, or its adapters."""
    (path,) = folder.glob("*model.safetensors")
    return {name: value.numpy().tobytes() for name, value in load_file(path).items()}


@contextmanager
def quiet() -> Iterator[None]:
    """Leave out warnings: a checkpoint that is passed over is announced by one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# ---- damages ---------------------------------------------------------------------------------------------------------


def flip(path: Path, rng: random.Random) -> None:
    """Change one bit."""
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def halve(path: Path, rng: random.Random) -> None:  # noqa: ARG001
    """Lose the second half."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path, rng: random.Random) -> None:  # noqa: ARG001
    """Lose everything."""
    path.write_bytes(b"")


def delete(path: Path, rng: random.Random) -> None:  # noqa: ARG001
    """Lose the file."""
    path.unlink()


def garble(path: Path, rng: random.Random) -> None:
    """Put bytes that are no text somewhere."""
    content = path.read_bytes()
    place = rng.randrange(len(content) + 1)
    path.write_bytes(content[:place] + b"\xff\xfe{nan" + content[place:])


def forget(path: Path, rng: random.Random) -> None:
    """Lose a key of a JSON file, or a line of another text file."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        del tree[rng.choice(sorted(tree))]
        path.write_text(json.dumps(tree), encoding="utf-8")
    except (ValueError, TypeError, IndexError):
        lines = path.read_bytes().split(b"\n")
        del lines[rng.randrange(len(lines))]
        path.write_bytes(b"\n".join(lines))


def stray(path: Path, rng: random.Random) -> None:  # noqa: ARG001
    """Put a stranger's file beside it."""
    (path.parent / "step_of_another.jsonl").write_text("[1, 2")


DAMAGES: list[Callable[[Path, random.Random], None]] = [flip, flip, halve, empty, delete, garble, forget, stray]


def damaged_runs(count: int, folder: Path, seed: int = 0) -> Counter[str]:
    """Damage copies of a run that stands after step 4 of 6, continue them, and write a report of each.

    refused       one line says what is wrong
    continued     to the same end as the run that was never damaged
    silent        to another end: promised never to happen
    traceback     promised never to happen
    """
    config = build_config(BASE | EMA | {"exposure": {"kind": "beta", **BETA}})
    Trainer.start(config, folder / "whole").train()
    trainer = Trainer.start(config, folder / "cut")
    trainer.listener = lambda row: setattr(trainer, "_stop_asked", row["step"] == 4)
    try:
        trainer.train()
    except Interrupted:
        expected, best = outcome(folder / "whole"), tensors(folder / "whole" / "best")
    rng = random.Random(seed)
    found: Counter[str] = Counter()
    for number in range(count):
        copy = folder / f"damaged_{number}"
        shutil.copytree(folder / "cut", copy)
        path = rng.choice(sorted(path for path in copy.rglob("*") if path.is_file() and path.stat().st_size))
        damage = rng.choice(DAMAGES)
        damage(path, rng)
        label = f"{damage.__name__} {path.relative_to(copy)}"
        found[_reported(copy, label)] += 1
        found[_continued(copy, expected, best, label)] += 1
        shutil.rmtree(copy)
    return found


def _continued(run: Path, expected: dict[str, Any], best: dict[str, bytes], label: str) -> str:
    try:
        with quiet():
            Trainer.resume(run).train()
    except UserError:
        return "refused"
    except Exception as error:
        print(f"traceback after {label}: {type(error).__name__}: {error}", file=sys.stderr)
        return "traceback"
    told = folder_flaw(run / "best") is not None  # a damaged `best` is refused by `atesd eval`
    if outcome(run) == expected and (told or tensors(run / "best") == best):
        return "continued"
    print(f"silently another run after {label}", file=sys.stderr)
    return "silent"


def _reported(run: Path, label: str) -> str:
    try:
        with quiet():
            write_report([run], run.with_suffix(".html"))
    except UserError:
        return "report refused"
    except Exception as error:
        print(f"traceback of the report after {label}: {type(error).__name__}: {error}", file=sys.stderr)
        return "report traceback"
    return "report written"


# ---- kills -----------------------------------------------------------------------------------------------------------


def killed_runs(count: int, folder: Path, seed: int = 0) -> Counter[str]:
    """Kill runs of every controller kind, with EMA teachers and with adapters, at random moments, and continue them.

    same          the end of a run that was never killed
    different     promised never to happen
    """
    rng = random.Random(seed)
    settings = [(kind, extra) for kind in CONTROLLERS for extra in (EMA, LORA)]
    found: Counter[str] = Counter()
    kills = [count // len(settings) + (index < count % len(settings)) for index in range(len(settings))]
    for number, ((kind, extra), times) in enumerate(zip(settings, kills, strict=True)):
        if not times:
            continue
        target = {"target": {"kind": "extrapolate", "lambda_x": 1.1}} if kind["kind"] == "closed_form" else {}
        config = build_config(BASE | extra | target | {"exposure": kind})
        whole, cut = folder / f"whole_{number}", folder / f"cut_{number}"
        began = time.monotonic()
        Trainer.start(config, whole).train()
        seconds = time.monotonic() - began
        for attempt in range(times):
            _killed(partial(_train, config, cut, attempt == 0), rng.uniform(0.05, 0.9) * seconds)
            found["kills"] += 1
        _killed(partial(_train, config, cut, not cut.exists()), None)
        same = outcome(cut) == outcome(whole)
        found["same" if same else "different"] += 1
        if not same:
            print(f"another end: {kind['kind']} with {sorted(extra)}", file=sys.stderr)
    return found


def _train(config: Any, run: Path, first: bool) -> None:
    if first or not (run / "manifest.json").is_file():
        shutil.rmtree(run, ignore_errors=True)
        Trainer.start(config, run).train()
    else:
        Trainer.resume(run).train()


def _killed(action: Callable[[], None], after_s: float | None) -> None:
    """Run an action in a forked process and kill it after a while; without one, let it end."""
    with quiet():
        child = os.fork()
    if not child:
        try:
            with quiet():
                action()
        except BaseException as error:
            print(f"child: {error!r}", file=sys.stderr)
        finally:
            os._exit(0)
    if after_s is not None:
        time.sleep(after_s)
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def main() -> None:
    """Run all parts and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("damages", 200), ("kills", 40), ("completions", 300), ("recipes", 250)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    from trust_inputs import bad_recipes, hostile_completions

    disable_progress_bars()
    found: dict[str, dict[str, int]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, part in (("damages", damaged_runs), ("kills", killed_runs)):
            place = Path(folder) / name
            place.mkdir()
            found[name] = dict(part(getattr(asked, name), place))
            print(name, found[name], flush=True)
    found["completions"] = dict(hostile_completions(asked.completions))
    print("completions", found["completions"], flush=True)
    found["recipes"] = dict(bad_recipes(asked.recipes))
    print("recipes", found["recipes"], flush=True)
    if asked.out:
        asked.out.write_text(dump_json(found), encoding="utf-8")
    never = ("silent", "traceback", "report traceback", "different", "false 1", "hang")
    broken = {f"{name}: {what}": part[what] for name, part in found.items() for what in never if part.get(what)}
    if broken:
        sys.exit(f"promised never to happen: {broken}")


if __name__ == "__main__":
    main()
