"""Settings of a run in words, for readers who have not seen a recipe."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from atesd.report.load import Study, setting

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


REINFORCING = ("rl", "both", "hdpo", "retire", "cliff")
WITHOUT_TEACHER = {
    "sft": "nothing: no teacher, the student trains on the reference solutions themselves",
    "rl": "nothing: no teacher, the student is reinforced by the rewards of its own completions",
}
SELECTIONS = {
    "soft_or": "those of high entropy or high divergence",
    "entropy": "those of high student entropy",
    "q3": "those where the student is sure and the teacher disagrees",
    "multinomial": "drawn at random, more often at high entropy and divergence",
}
GATE_SCORES = {
    "gap": "the log-probability gap between teacher and student",
    "entropy": "the student's entropy",
    "soft_or": "the gap or the student's entropy",
}
GATE_TARGETS = {
    "surrogate": "log-probability gap",
    "divergence": "divergence",
}
ANCHORS = {"base": "the step-0 weights without a hint", "answer": "a teacher who sees the answer alone"}
ORDERS = {"reverse_ppl": "Hardest problems first", "forward_ppl": "Easiest problems first"}


def exposure_in_words(config: Mapping[str, Any]) -> str:
    """Say how much of the reference solution the teacher sees under a run's config."""
    router = setting(config, "routing.kind")
    if router in WITHOUT_TEACHER:
        return WITHOUT_TEACHER[router]
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
        case "difficulty":
            words = f"learned shares: a Beta policy for each of {exposure.get('bins', 3)} difficulties of problems"
        case "influence":
            words = "a learned share: candidates mixed by what their gradients would do to the probe (influence credit)"
        case "paired":
            words = "a learned share: moved to the better of two virtual steps, with more and with less (paired credit)"
        case "closed_form":
            words = "the largest share at which the target's λ is safe by the measured λ*"
        case "overlap":
            words = "each completion its own share: the solution up to where the completion still follows it (PAINT)"
        case kind:
            words = str(kind) if kind else "not recorded"
    return words


def controls_in_words(config: Mapping[str, Any]) -> list[str]:
    """Say in a sentence each, without its full stop, what target, tokens, router and order are where not neutral."""
    found = [
        _target(_section(config, "target")),
        _selection(_section(config, "selection")),
        _gate(_section(config, "gate")),
        _weighting(config),
        _routing(_section(config, "routing")),
        _curriculum(_section(config, "curriculum")),
    ]
    return [words for words in found if words]


def distils(config: Mapping[str, Any]) -> bool:
    """Tell whether a run has a teacher."""
    return setting(config, "routing.kind") not in WITHOUT_TEACHER


def reinforces(config: Mapping[str, Any]) -> bool:
    """Tell whether a run may reinforce."""
    return setting(config, "routing.kind") in REINFORCING


def settings_in_words(study: Study) -> list[tuple[str, str]]:
    """Return name and value of what all runs have in common; a setting that differs says so."""
    rows = {
        "Model": lambda config: _named(MODELS, setting(config, "model.path")),
        "Weights trained": _trained,
        "Task": lambda config: str(setting(config, "task.kind") or ""),
        "Teacher's weights": lambda config: _taught(TEACHERS, config, "teacher.weights"),
        "Divergence": lambda config: _taught(DIVERGENCES, config, "loss.divergence.kind"),
        "Loss": lambda config: _taught(CLIPS, config, "loss.clip"),
        "Reinforcement": _policy,
        "Steps": _amount,
        "Completion limit": lambda config: _unit(setting(config, "rollout.max_new_tokens"), "tokens"),
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


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = config.get(name)
    return section if isinstance(section, Mapping) else {}


def _target(target: Mapping[str, Any]) -> str:
    match target.get("kind", "plain"):
        case "plain":
            return ""
        case "extrapolate":
            strength = float(target.get("lambda_x", 1.25))
            if strength == 1:
                return ""
            where = "goes beyond the teacher" if strength > 1 else "stays between the step-0 weights and the teacher"
            return f"The target {where}: λ {strength:g}" + (
                ", capped by the measured λ*" if target.get("guard") else ""
            )
        case "anchor_mix":
            anchor = ANCHORS.get(str(target.get("anchor", "base")), str(target.get("anchor")))
            return f"The target mixes {_percent(target.get('weight', 0.5))} of the teacher with {anchor}"
        case "residual":
            added, bound = target.get("scale", 0.6), target.get("bound", 5.0)
            return f"The target adds {_percent(added)} of what full exposure would add, at most {bound:g} nats a token"
        case kind:
            return f"Target: {kind}"


def _selection(selection: Mapping[str, Any]) -> str:
    kind = selection.get("kind", "all")
    if kind == "all" or selection.get("ratio") == 1:
        return ""
    if kind != "tip":
        return f"Selection: {kind}"
    score = str(selection.get("score", "soft_or"))
    share = _percent(selection.get("ratio", 0.5))
    return f"Of the tokens {share} are distilled, {SELECTIONS.get(score, score)} (TIP)"


def _gate(gate: Mapping[str, Any]) -> str:
    kind = gate.get("kind", "none")
    if kind == "none":
        return ""
    if kind != "sdar":
        return f"Gate: {kind}"
    score, target = str(gate.get("score", "gap")), str(gate.get("target", "surrogate"))
    centred = ", less 1/2" if gate.get("centered") else ""
    return (
        f"Every token's {GATE_TARGETS.get(target, target)} is weighed by a gate: the sigmoid of "
        f"{gate.get('beta', 5.0):g} times {GATE_SCORES.get(score, score)}{centred} (SDAR)"
    )


def _weighting(config: Mapping[str, Any]) -> str:
    paced = setting(config, "loss.prompt_weight") == "paced"
    return "Problems weigh p (1 - p) by their pass rate p (PACED)" if paced else ""


def _routing(routing: Mapping[str, Any]) -> str:
    coef = f"{routing.get('coef', 1.0):g}"
    words = {
        "distil": "",
        "sft": "",  # exposure_in_words says it
        "rl": "",
        "both": f"Every group is reinforced and distilled, the distillation loss times {coef}",
        "hdpo": "Groups without any success are distilled, the others reinforced",
        "retire": f"Groups are reinforced and distilled (times {coef}) until the mismatch stops shrinking, "
        "then only reinforced",
        "cliff": "Groups are distilled while the target's λ is at most the measured λ*, else reinforced",
    }
    kind = str(routing.get("kind", "distil"))
    return words.get(kind, f"Router: {kind}")


def _curriculum(curriculum: Mapping[str, Any]) -> str:
    kind = str(curriculum.get("kind", "random"))
    if kind == "random":
        return ""
    if kind not in ORDERS:
        return f"Curriculum: {kind}"
    when = "before the first step" if curriculum.get("rescore") == "once" else "before every epoch"
    return f"{ORDERS[kind]}, by the perplexity of the reference, scored {when}"


def _policy(config: Mapping[str, Any]) -> str:
    """Put the policy loss of a run that reinforces into words."""
    policy = _section(config, "rl")
    if not (reinforces(config) and policy):
        return ""
    scaled = "divided by their standard deviation" if policy.get("scale") == "std" else "not scaled"
    units = {"token": "tokens", "sequence": "completions", "constant": "the longest allowed length"}
    aggregate = str(policy.get("aggregate"))
    low, high = 1 - float(policy.get("eps_low", 0.2)), 1 + float(policy.get("eps_high", 0.2))
    kl = f", KL to the step-0 weights times {policy['kl_coef']:g}" if policy.get("kl_coef") else ""
    return (
        f"group-relative advantages {scaled}, mean over {units.get(aggregate, aggregate)}, "
        f"ratio of each {policy.get('ratio', 'token')} clipped to {low:g} to {high:g}{kl}"
    )


def _taught(names: Mapping[str, str], config: Mapping[str, Any], path: str) -> str:
    return _named(names, setting(config, path)) if distils(config) else ""


def _named(names: Mapping[str, str], value: Any) -> str:
    return "" if value is None else names.get(str(value), str(value))


def _trained(config: Mapping[str, Any]) -> str:
    if setting(config, "model.path") is None:
        return ""
    lora = setting(config, "model.lora")
    return "all" if lora is None else f"LoRA adapters of rank {setting(config, 'model.lora.r')}"


def _amount(config: Mapping[str, Any]) -> str:
    steps, problems, size = (setting(config, key) for key in ("step.num_steps", "step.problems", "rollout.group_size"))
    if steps is None:
        return ""
    batch = f", {problems} problems in each" if problems else ""
    return f"{steps}{batch}" + (f", {size} completions a problem" if (size or 1) > 1 else "")


def _rate(config: Mapping[str, Any]) -> str:
    rate, schedule = setting(config, "optim.lr"), setting(config, "optim.schedule")
    shapes = {"constant": "constant", "linear": "falling linearly to 0", "cosine": "falling as a cosine to 0"}
    return "" if rate is None else f"{rate:g}" + (f", {shapes.get(schedule, schedule)}" if schedule else "")


def _unit(value: Any, unit: str) -> str:
    return "" if value is None else f"{value} {unit}"


def _common(values: Sequence[str]) -> str:
    distinct = list(dict.fromkeys(value for value in values if value))
    return distinct[0] if len(distinct) == 1 else "differs: " + "; ".join(distinct) if distinct else ""
