"""Settings of a run in words, for readers who have not seen a recipe."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from atesd.report.load import Study

MODELS = {
    "pico": "pico: the packaged tiny Qwen3 with its warm-start weights",
    "smollm2": "SmolLM2-135M-Instruct",
}
TEACHERS = {
    "frozen": "frozen: the weights before training",
    "live": "live: the student's own current weights",
    "ema": "ema: a moving average of the student's weights",
}
DIVERGENCES = {
    "forward_kl": "forward KL (teacher to student)",
    "reverse_kl": "reverse KL (student to teacher)",
    "jsd": "Jensen-Shannon",
    "sampled": "sampled token",
}
CLIPS = {
    "none": "not clipped",
    "token": "clipped for each token",
    "pointwise": "clipped for each vocabulary entry",
}


def exposure_in_words(config: Mapping[str, Any]) -> str:
    """Say how much of the reference solution the teacher sees under a run's config."""
    if _get(config, "routing.kind") == "sft":
        return "nothing: no teacher, the student trains on the reference solutions themselves"
    exposure = config.get("exposure")
    exposure = exposure if isinstance(exposure, Mapping) else {}
    match exposure.get("kind"):
        case "fixed":
            words = _fixed(float(exposure.get("ratio", 1.0)))
        case "random":
            held = f", kept for {exposure['hold']} steps" if "hold" in exposure else ""
            words = f"a random share between {_percent(exposure['low'])} and {_percent(exposure['high'])}{held}"
        case "linear" | "cosine" as kind:
            words = f"a share moving from {_percent(exposure['start'])} to {_percent(exposure['end'])} ({kind})"
        case "steps":
            words = "shares set in advance: " + ", then ".join(_percent(value) for value in exposure["values"])
        case "beta":
            words = "a learned share: a Beta policy, rewarded for the student's progress (ATESD)"
        case kind:
            words = str(kind) if kind else "not recorded"
    return words


def settings_in_words(study: Study) -> list[tuple[str, str]]:
    """Return name and value of what all runs have in common; a setting that differs says so."""
    rows = {
        "Model": lambda config: _named(MODELS, _get(config, "model.path")),
        "Weights trained": _trained,
        "Task": lambda config: str(_get(config, "task.kind") or ""),
        "Teacher's weights": lambda config: _named(TEACHERS, _get(config, "teacher.weights")),
        "Divergence": lambda config: _named(DIVERGENCES, _get(config, "loss.divergence.kind")),
        "Loss": lambda config: _named(CLIPS, _get(config, "loss.clip")),
        "Steps": _amount,
        "Completion limit": lambda config: _unit(_get(config, "rollout.max_new_tokens"), "tokens"),
        "Learning rate": _rate,
    }
    found = [(name, _common([describe(run.config) for run in study.runs])) for name, describe in rows.items()]
    return [(name, value) for name, value in found if value]


def config_in_full(config: Mapping[str, Any]) -> str:
    """Return the resolved recipe as text."""
    return json.dumps(config, indent=2, ensure_ascii=False)


def duration(seconds: float) -> str:
    """Write seconds as a reader says them: 45 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def listed(words: Sequence[str]) -> str:
    """Join words as in a sentence."""
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def _fixed(ratio: float) -> str:
    if ratio == 1.0:
        return "the whole solution (OPSD)"
    return "the final answer only" if ratio == 0.0 else f"the first {_percent(ratio)} of the solution, always"


def _percent(ratio: float) -> str:
    return f"{100 * ratio:.3g} %"


def _get(config: Mapping[str, Any], path: str) -> Any:
    value: Any = config
    for name in path.split("."):
        if not isinstance(value, Mapping):
            return None
        value = value.get(name)
    return value


def _named(names: Mapping[str, str], value: Any) -> str:
    return "" if value is None else names.get(str(value), str(value))


def _trained(config: Mapping[str, Any]) -> str:
    if _get(config, "model.path") is None:
        return ""
    lora = _get(config, "model.lora")
    return "all" if lora is None else f"LoRA adapters of rank {_get(config, 'model.lora.r')}"


def _amount(config: Mapping[str, Any]) -> str:
    steps, problems, size = (_get(config, key) for key in ("step.num_steps", "step.problems", "rollout.group_size"))
    if steps is None:
        return ""
    batch = f", {problems} problems in each" if problems else ""
    return f"{steps}{batch}" + (f", {size} completions a problem" if (size or 1) > 1 else "")


def _rate(config: Mapping[str, Any]) -> str:
    rate, schedule = _get(config, "optim.lr"), _get(config, "optim.schedule")
    shapes = {"constant": "constant", "linear": "falling linearly to 0", "cosine": "falling as a cosine to 0"}
    return "" if rate is None else f"{rate:g}" + (f", {shapes.get(schedule, schedule)}" if schedule else "")


def _unit(value: Any, unit: str) -> str:
    return "" if value is None else f"{value} {unit}"


def _common(values: Sequence[str]) -> str:
    distinct = list(dict.fromkeys(value for value in values if value))
    return distinct[0] if len(distinct) == 1 else "differs: " + "; ".join(distinct) if distinct else ""
