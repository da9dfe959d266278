"""The process behind `support.hub.Session`: reads a command a line, answers with what it printed and how it ended."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
import warnings
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from typing import Any

slept: list[float] = []
"""Seconds of each sleep since the command began: between tries, for there is nothing else to wait for."""
_sleep = time.sleep


def counted_sleep(seconds: float) -> None:
    slept.append(seconds)
    _sleep(seconds)


time.sleep = counted_sleep  # before any library takes it


def command(arguments: list[str], token: str | None) -> dict[str, Any]:
    """Run `atesd ARGUMENTS` with that token or none."""
    from atesd.cli.main import main

    if token is not None:
        os.environ["HF_TOKEN"] = token
    sys.argv = ["atesd", *arguments]
    out, err, code = StringIO(), StringIO(), 0
    slept.clear()
    with redirect_stdout(out), redirect_stderr(err), warnings.catch_warnings():
        try:
            main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except BaseException:
            code = 70
            traceback.print_exc()
        finally:
            os.environ.pop("HF_TOKEN", None)
    return {"code": code, "out": out.getvalue(), "err": err.getvalue(), "slept_s": sum(slept)}


def load(model: dict[str, Any]) -> dict[str, Any]:
    """Load a model as a run does."""
    from atesd.sections import ModelConfig
    from atesd.train.model import load as load_model

    loaded, tokenizer = load_model(ModelConfig(**model), 0)
    sums = {name: float(weight.detach().double().sum()) for name, weight in loaded.named_parameters()}
    adapter = getattr(loaded, "peft_config", {}).get("default")
    return {
        "sums": sums,
        "template": str(tokenizer.chat_template),
        "base": [adapter.base_model_name_or_path, adapter.revision] if adapter else None,
    }


def serve() -> None:
    """Answer until the input ends; what libraries print goes to stderr."""
    answers = sys.stdout
    sys.stdout = sys.stderr
    for line in sys.stdin:
        asked = json.loads(line)
        if "model" in asked:
            with redirect_stdout(StringIO()):
                answer = load(asked["model"])
        else:
            answer = command(**asked)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve()
