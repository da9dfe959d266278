"""Settings of a run in words, for readers who have not seen a recipe."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from atesd.report.checked import is_number
from atesd.report.study import Run, Study, setting

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
NEUTRAL = {"target": "plain", "selection": "all", "gate": "none", "routing": "distil", "curriculum": "random"}


def seen_in_words(run: Run) -> str:
    """End the sentence "The teacher sees ..."; a run that does not say it names its kind of exposure."""
    kind = f"exposure: {setting(run.config, 'exposure.kind') or 'not recorded'}"
    return str(run.about.get("exposure", kind if run.distils else "no teacher"))


def run_in_words(run: Run) -> str:
    """What the teacher sees and every control that is not neutral, in the run's own words or by their kinds."""
    if "exposure" in run.about:
        return ". ".join([f"the teacher sees {seen_in_words(run)}", *run.about.get("controls", [])])
    kinds = {name: setting(run.config, f"{name}.kind") or neutral for name, neutral in NEUTRAL.items()}
    named = [f"{name}: {kind}" for name, kind in kinds.items() if kind != NEUTRAL[name]]
    return ", ".join([seen_in_words(run), *named])


def settings_in_words(study: Study) -> list[tuple[str, str]]:
    """Return name and value of what all runs have in common; a setting that differs says so."""
    if study.right:
        return _flow_in_words(study)
    rows = {
        "Model": lambda run: _named(MODELS, setting(run.config, "model.path")),
        "Weights trained": _trained,
        "Task": lambda run: str(setting(run.config, "task.kind") or ""),
        "Teacher's weights": lambda run: _taught(TEACHERS, run, "teacher.weights"),
        "Divergence": lambda run: _taught(DIVERGENCES, run, "loss.divergence.kind"),
        "Loss": lambda run: _taught(CLIPS, run, "loss.clip"),
        "Reinforcement": _policy,
        "Steps": _amount,
        "Completion limit": lambda run: _unit(setting(run.config, "rollout.max_new_tokens"), "tokens"),
        "Learning rate": _rate,
    }
    found = [(name, _common([describe(run) for run in study.runs])) for name, describe in rows.items()]
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


def _policy(run: Run) -> str:
    """Put the policy loss of a run that reinforces into words."""
    policy = setting(run.config, "rl")
    if not (run.reinforces and policy and isinstance(policy, Mapping)):
        return ""

    def known(name: str, default: float) -> float:
        value = policy.get(name, default)
        return float(value) if is_number(value) else default

    scaled = "divided by their standard deviation" if policy.get("scale") == "std" else "not scaled"
    units = {"token": "tokens", "sequence": "completions", "constant": "the longest allowed length"}
    aggregate = str(policy.get("aggregate"))
    low, high = 1 - known("eps_low", 0.2), 1 + known("eps_high", 0.2)
    kl = f", KL to the step-0 weights times {known('kl_coef', 0.0):g}" if known("kl_coef", 0.0) else ""
    return (
        f"group-relative advantages {scaled}, mean over {units.get(aggregate, aggregate)}, "
        f"ratio of each {policy.get('ratio', 'token')} clipped to {low:g} to {high:g}{kl}"
    )


def _taught(names: Mapping[str, str], run: Run, path: str) -> str:
    return _named(names, setting(run.config, path)) if run.distils else ""


def _flow_in_words(study: Study) -> list[tuple[str, str]]:
    """Return the same of flows, which read other settings."""
    rows = {
        "Model": lambda run: (
            f"velocity network, {setting(run.config, 'flow.depth')} layers of {setting(run.config, 'flow.width')} units"
        ),
        "Warm start": lambda run: (
            f"{setting(run.config, 'flow.warm_steps')} steps of flow matching, a share of "
            f"{setting(run.config, 'flow.blind')} of the samples as the student sees them"
        ),
        "Task": lambda run: str(setting(run.config, "task.kind") or ""),
        "Rollouts": lambda run: (
            f"{setting(run.config, 'flow.steps')} transitions, eta {setting(run.config, 'flow.eta')}, begun between "
            f"times {setting(run.config, 'flow.start')}"
        ),
        "Teacher's weights": lambda run: _taught(TEACHERS, run, "teacher.weights"),
        "Divergence": lambda _: "KL between Gaussian transitions",
        "Steps": _amount,
        "Learning rate": _rate,
    }
    found = [(name, _common([describe(run) for run in study.runs])) for name, describe in rows.items()]
    return [(name, value) for name, value in found if value]


def _named(names: Mapping[str, str], value: Any) -> str:
    return "" if value is None else names.get(str(value), str(value))


def _trained(run: Run) -> str:
    if setting(run.config, "model.path") is None:
        return ""
    lora = setting(run.config, "model.lora")
    return "all" if lora is None else f"LoRA adapters of rank {setting(run.config, 'model.lora.r')}"


def _amount(run: Run) -> str:
    steps, problems, size = (
        setting(run.config, key) for key in ("step.num_steps", "step.problems", "rollout.group_size")
    )
    if steps is None:
        return ""
    batch = f", {problems} problems in each" if problems else ""
    return f"{steps}{batch}" + (f", {size} completions a problem" if is_number(size) and size > 1 else "")


def _rate(run: Run) -> str:
    rate, schedule = setting(run.config, "optim.lr"), setting(run.config, "optim.schedule")
    shapes = {"constant": "constant", "linear": "falling linearly to 0", "cosine": "falling as a cosine to 0"}
    shape = shapes.get(str(schedule), str(schedule))
    return f"{rate:g}" + (f", {shape}" if schedule else "") if is_number(rate) else ""


def _unit(value: Any, unit: str) -> str:
    return "" if value is None else f"{value} {unit}"


def _common(values: Sequence[str]) -> str:
    distinct = list(dict.fromkeys(value for value in values if value))
    return distinct[0] if len(distinct) == 1 else "differs: " + "; ".join(distinct) if distinct else ""
