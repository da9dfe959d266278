"""What sampling ahead gains: step times with rollout.ahead = 0 and 1, beside a server that takes a fixed time.

    python repro/overlap.py [--sample 4] [--update 2 4 8] [--steps 6]

The server of the tests answers after `--sample` seconds, and the update takes `--update` seconds more than it needs:
both only sleep, so that a machine of one core shows what two machines would. `--url` takes a real server instead, which
samples as fast as it does; then `--model` and `--tokens` say what is trained.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from atesd.recipe import build_config
from atesd.runlog import RunDir
from atesd.train.loop import Trainer

from support.fake_vllm import FakeVllm


def tree(args: argparse.Namespace, url: str, ahead: int) -> dict[str, Any]:
    engine = {"kind": "vllm", "url": url, "timeout_s": 3600.0}
    return {
        "threads": 1,
        "model": {"path": args.model, "lora": {"r": 8, "alpha": 16}},
        "task": {"kind": "pico", "train_size": 64, "probe_size": 1, "eval_size": 1},
        "prompt": {"student": "{problem}", "teacher": "{problem}\n>{hint}", "answer": "\n#{answer}"},
        "rollout": {
            "temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": args.tokens, "group_size": 4,
            "engine": engine, "ahead": ahead, "gap_limit": 1e9, "gap_warning": 1e9,
        },
        "loss": {"divergence": {"kind": "sampled"}},
        "step": {"num_steps": args.steps, "problems": args.problems},
        "eval": {"every": args.steps, "k": 1},
        "save": {"every": args.steps},
    }  # fmt: skip


class Sleeping(FakeVllm):
    """Answers requests for rollouts so many seconds after they came, always the same: it computes nothing."""

    seconds = 0.0

    def _completions(self, body: dict[str, Any]) -> Any:
        if "allowed_token_ids" in body or body["n"] == 1:
            return super()._completions(body)
        time.sleep(self.seconds)
        length = body["max_tokens"]
        choice = {
            "token_ids": [5] * length,
            "logprobs": {"token_logprobs": [-1.0] * length},
            "finish_reason": "length",
        }
        return {"model": body["model"], "choices": [choice | {"index": index} for index in range(body["n"])]}


def measured(args: argparse.Namespace, url: str, ahead: int, update: float) -> dict[str, float]:
    """Train and return mean seconds of the steps behind the second one."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer.start(build_config(tree(args, url, ahead)), Path(folder, "run"))
        optimize = trainer.parts.stepper.optimize

        def slow(*given: Any, **named: Any) -> Any:
            time.sleep(update)
            return optimize(*given, **named)

        trainer.parts.stepper.optimize = slow  # type: ignore[method-assign]
        trainer.train()
        rows = [row for row in RunDir(Path(folder, "run")).metrics() if 2 < row["step"] < args.steps]
    keys = ("time/step_s", "time/sample_s", "time/update_s", "rollout/ratio")
    return {key: sum(row[key] for row in rows) / len(rows) for key in keys if key in rows[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=float, default=4.0)
    parser.add_argument("--update", type=float, nargs="+", default=[2.0, 4.0, 8.0])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--problems", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--model", default="pico")
    parser.add_argument("--url")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    print("| sampling s | update s | step s, ahead = 0 | step s, ahead = 1 | of it waiting |\n|---|---|---|---|---|")
    for update in [0.0] if args.url else args.update:
        with Sleeping() as fake:
            fake.seconds = args.sample
            before, after = (measured(args, args.url or fake.url, ahead, update) for ahead in (0, 1))
        print(
            f"| {before['time/sample_s']:.1f} | {before['time/update_s']:.1f} | {before['time/step_s']:.1f} | "
            f"{after['time/step_s']:.1f} | {after['time/sample_s']:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
