"""The model card of what a run gives: README.md with the front matter that the Hugging Face hub reads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from atesd.config import RunConfig

_TAGS = ("atesd", "on-policy-self-distillation", "reasoning")


def model_card(
    config: RunConfig,
    *,
    step: int,
    metrics: Mapping[str, float],
    start: Mapping[str, float],
    merged: bool = False,
    report: str | None = None,
) -> str:
    """Return the card of the model after `step` steps: method, results with intervals beside the start, data, recipe.

    `metrics` and `start` are those of evaluation; `report` is the file of the report, where it lies beside the card.
    """
    adapter = config.model.lora is not None and not merged
    data = ModelCardData(
        base_model=config.model.path if _on_hub(config.model.path) else None,
        datasets=[name] if (name := _data_set(config)) else None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=[*_TAGS, *(["lora"] if adapter else [])],
    )
    lines = [
        "---",
        data.to_yaml(),
        "---",
        "",
        f"# {Path(config.model.path).name}, {_method(config)}",
        "",
        f"Trained by on-policy self-distillation with atesd {version('atesd')} from `{_code(config.model.path)}`"
        + (f" at revision `{_code(config.model.revision)}`" if config.model.revision else "")
        + f", seed {config.seed}, {step} of {config.step.num_steps} steps of {config.step.problems} problems."
        + (" The adapters are merged into the weights." if merged else ""),
        "",
        "## Method",
        "",
        *_words(config),
        "",
        "## Results",
        "",
        *_results(config, metrics, start),
        "",
        "One seed: intervals are over problems alone, not over runs."
        + (f" Report: [{report}]({report})." if report else " Report: `atesd report RUN`."),
        "",
        "## Data",
        "",
        f"`{_code(json.dumps(_task(config)))}`",
        "",
        "## Recipe",
        "",
        "Settings that the recipe names; all others are the defaults of the version above.",
        "",
        "```json",
        json.dumps(config.model_dump(mode="json", exclude_unset=True, exclude={"arms"}), indent=2).replace(
            "```", "'''"
        ),
        "```",
    ]
    return "\n".join(lines) + "\n"


def _method(config: RunConfig) -> str:
    if not config.routing.distils:
        return "reinforced" if config.routing.reinforces else "supervised"
    return "learned exposure (ATESD)" if config.exposure.kind == "beta" else "self-distilled"


def _words(config: RunConfig) -> list[str]:
    about = config.about()
    if not about["distils"]:
        return [f"- {about['exposure']}.", *(f"- {words}." for words in about["controls"])]
    return [f"- The teacher sees {about['exposure']}.", *(f"- {words}." for words in about["controls"])]


def _results(config: RunConfig, metrics: Mapping[str, float], start: Mapping[str, float]) -> Sequence[str]:
    """Return a table of accuracies: before, after, 95 % interval."""
    rows = [key for key in metrics if key.startswith("eval/") and "@" in key and not key.endswith(("_low", "_high"))]
    if not rows:
        return ["None was graded."]
    lines = [
        f"On held-out problems, {config.eval.k} completions each, temperature {config.eval.temperature:g}.",
        "",
        "| metric | before | after | 95 % interval |",
        "|---|---|---|---|",
    ]
    for key in rows:
        low, high = metrics.get(f"{key}_low"), metrics.get(f"{key}_high")
        interval = "" if low is None or high is None else f"{low:.3f} to {high:.3f}"
        before = f"{start[key]:.3f}" if key in start else ""
        lines.append(f"| {key.removeprefix('eval/')} | {before} | {metrics[key]:.3f} | {interval} |")
    return lines


def _task(config: RunConfig) -> dict[str, Any]:
    return {"kind": config.task.kind, **config.task.model_dump(mode="json", exclude_defaults=True)}


def _data_set(config: RunConfig) -> str | None:
    path = str(getattr(config.task, "path", ""))
    return path if config.task.kind == "dataset" and _on_hub(path) else None


def _on_hub(path: str) -> bool:
    """Tell an id on the hub from a folder or a file here."""
    return path.count("/") == 1 and not path.startswith((".", "/")) and not Path(path).exists()


def _code(text: str) -> str:
    return text.replace("`", "'")
