"""`RunConfig`, a recipe whose sections go together: the tree of `tree.py`, and the rules that it must keep.

A rule reads the tree and raises what is at odds, and how to mend it. Rules ask methods what they declare of themselves,
never which ones they are. `recipe.py` reads TOML and overrides into the tree.
"""

from __future__ import annotations

from functools import reduce
from typing import Any, Self, cast

from pydantic import model_validator

from atesd.tree import RecipeTree

# Ranges that no sensible recipe leaves: beyond them logits, targets and losses overflow.
_SENSIBLE = {
    "loss.temperature_student": (1e-3, 1e3),
    "loss.temperature_teacher": (1e-3, 1e3),
    "target.lambda_x": (1e-6, 100.0),
    "target.scale": (1e-6, 100.0),
    "target.bound": (1e-6, 1e6),
    "gate.beta": (0.0, 1e6),
    "rl.kl_coef": (0.0, 1e6),
    "rl.dual_clip": (1.0, 1e6),
    "rl.eps_high": (0.0, 1e6),
    "rl.importance_clip": (1.0, 1e6),
    "loss.divergence.importance_clip": (1.0, 1e6),
}
# What of `loss` only the distillation loss reads.
_OF_DISTILLATION = ("divergence", "top_k", "tail", "clip", "clip_tau", "temperature_teacher")
# What a flow task reads of a recipe, besides the sections that it reads as a whole; and what no text task reads.
_OF_FLOWS = {
    "step": ("num_steps", "problems"),
    "eval": ("every", "k", "problems"),
    "probe": ("credit_problems", "log_every"),
    "save": ("every", "keep"),
}
_READ_BY_FLOWS = ("seed", "task", "exposure", "teacher", "curriculum", "optim", "flow", "track", "threads", "arms")


def _numbers_stay_finite(run: RecipeTree) -> None:
    """Refuse settings of losses that can only end in numbers beyond float32."""
    for place, (low, high) in _SENSIBLE.items():
        value = reduce(lambda section, name: getattr(section, name, None), place.split("."), cast("Any", run))
        if value is not None and not low <= value <= high:
            raise ValueError(f"{place} = {value:g} leads beyond the range of float32: choose {low:g} to {high:g}")


def _sections_are_read(run: RecipeTree) -> None:
    """Refuse what only a language model, or only a flow, would read."""
    kind = f'task.kind = "{run.task.kind}"'
    if run.task.is_text:
        if run.differs("flow"):
            raise ValueError(f"{kind} is answered in words, so flow would have no effect: remove it")
        return
    ignored = [name for name in type(run).model_fields if name not in {*_READ_BY_FLOWS, *_OF_FLOWS}]
    found = [name for name in ignored if run.differs(name)]
    for section, read in _OF_FLOWS.items():
        part = getattr(run, section)
        found += [f"{section}.{name}" for name in type(part).model_fields if name not in read and part.differs(name)]
    if found:
        raise ValueError(f"{kind} has no language model, so {found[0]} would have no effect: remove it")


def _warm_up_ends(run: RecipeTree) -> None:
    updates = run.step.num_steps * run.step.updates_per_batch
    if run.optim.warmup_steps > updates:
        raise ValueError(
            f"optim.warmup_steps = {run.optim.warmup_steps} outlasts the run's {updates} updates, so that "
            "optim.lr is never reached: lower it, or raise step.num_steps"
        )


def _contract_has_text(run: RecipeTree) -> None:
    empty = [name for name, pattern in run.cliff.contract.items() if not pattern.strip()]
    if empty:
        raise ValueError(
            f"cliff.contract.{empty[0]} is an empty pattern, which no token is part of: write the forced text, or "
            "remove it"
        )


def _training_samples(run: RecipeTree) -> None:
    if run.rollout.temperature == 0:
        raise ValueError("rollout.temperature = 0 cannot be trained with, as it divides the logits: raise it")


def _rewards_differ(run: RecipeTree) -> None:
    if run.reward is None:
        return
    if run.env.grades:
        raise ValueError(
            f'env.kind = "{run.env.kind}" grades attempts itself, so [reward] would have no effect: leave it out'
        )
    rewards = run.reward if isinstance(run.reward, tuple) else (run.reward,)
    if not any(reward.weight for reward in rewards):
        raise ValueError("reward has no entry with a weight, so every total is 0: give one, or leave reward out")
    names = [reward.called for reward in rewards]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"two rewards are called {twice!r}, under which they are logged: give one a name")


def _batch_divides(run: RecipeTree) -> None:
    if run.step.problems % run.step.updates_per_batch:
        raise ValueError(
            f"step.problems = {run.step.problems} cannot be split into step.updates_per_batch = "
            f"{run.step.updates_per_batch} equal parts: choose a divisor"
        )


def _routing_fits(run: RecipeTree) -> None:
    router = f'routing.kind = "{run.routing.kind}"'
    if run.routing.reinforces and run.rollout.group_size < 2:
        raise ValueError(
            f"{router} compares completions of a group, but rollout.group_size is {run.rollout.group_size}: "
            "set it to at least 2 (8 is usual)"
        )
    if run.routing.reinforces and run.loss.temperature_student not in (None, run.rollout.temperature):
        raise ValueError(
            f"{router} needs the probabilities that were sampled from: remove "
            f"loss.temperature_student = {run.loss.temperature_student} or set it to rollout.temperature"
        )
    if run.rl.teacher_credit is not None and not run.routing.teaches_reinforced:
        raise ValueError(
            f"rl.teacher_credit asks the teacher about reinforced completions, which {router} does not show it: "
            'set routing = {kind = "both", coef = 0}, or remove rl.teacher_credit'
        )
    if run.routing.asks_teacher and not run.rollout.engine.samples_in_place:
        raise ValueError(
            f"routing.teacher_share needs completions of the teacher, and "
            f'rollout.engine.kind = "{run.rollout.engine.kind}" samples from the student alone: set '
            'rollout.engine.kind = "hf", or remove routing.teacher_share'
        )
    if run.routing.shared and run.routing.reinforces and run.rl.aggregate != run.loss.aggregate:
        raise ValueError(
            f'{router} divides both losses by one count, but rl.aggregate = "{run.rl.aggregate}" and '
            f'loss.aggregate = "{run.loss.aggregate}" count differently: set them alike'
        )
    if not run.routing.distils:
        idle = [name for name in ("gate", "selection", "target") if run.differs(name)]
        idle += ["loss.prompt_weight"] * (run.loss.prompt_weight != "none")
        idle += [f"loss.{name}" for name in _OF_DISTILLATION if run.loss.differs(name)]
        idle += ["exposure"] * run.exposure.measured
        idle += ["reveal"] * (run.reveal.reads_rollout or run.reveal.masks)
        if idle:
            raise ValueError(f"{router} distils nothing: remove {idle[0]}, which has no effect")


def _codes_fit(run: RecipeTree) -> None:
    if run.codes is None:
        return
    if run.routing.reinforces or not run.routing.distils:
        raise ValueError(
            f'[codes] are chosen by how near they are to the teacher, and routing.kind = "{run.routing.kind}" '
            'trains groups otherwise: set routing = {kind = "distil"}, or remove codes'
        )
    if run.model.gradient_checkpointing:
        raise ValueError(
            "[codes] steer a pass as it is made, and model.gradient_checkpointing = true makes it once more later, "
            "without them: remove either"
        )
    if not run.rollout.engine.samples_in_place:
        raise ValueError(
            f'[codes] steer samples too, and rollout.engine.kind = "{run.rollout.engine.kind}" samples from a '
            'copy of the weights, without them: set rollout.engine.kind = "hf", or remove codes'
        )


def _nothing_watches_compiled_layers(run: RecipeTree) -> None:
    watching = [
        name
        for name, watches in (
            ("[codes]", run.codes is not None),
            (f'reveal.kind = "{run.reveal.kind}"', run.reveal.masks),
            (f'gradient.kind = "{run.gradient.kind}"', run.gradient.kind != "none"),
        )
        if watches
    ]
    if run.model.compile and watching:
        raise ValueError(
            f"model.compile = true compiles layers as they are, and {watching[0]} reads or changes what they make: "
            "remove either"
        )


def _ahead_fits(run: RecipeTree) -> None:
    if not run.rollout.ahead:
        return
    ahead = f"rollout.ahead = {run.rollout.ahead}"
    if not run.rollout.engine.samples_ahead:
        raise ValueError(
            f'{ahead} samples while the trainer updates, and rollout.engine.kind = "{run.rollout.engine.kind}" '
            'can only do one after the other: set rollout.engine.kind = "vllm", or rollout.ahead = 0'
        )
    if run.env.limit > 1 or run.env.grades:
        raise ValueError(
            f'{ahead} asks for single replies, and env.kind = "{run.env.kind}" answers them: set rollout.ahead = 0'
        )
    if run.routing.source == "reference":
        raise ValueError(f'{ahead} has no effect, as routing.kind = "{run.routing.kind}" samples nothing: remove it')
    own = run.loss.temperature_student not in (None, run.rollout.temperature)
    if own and run.loss.divergence.kind == "sampled":
        raise ValueError(
            f"{ahead} needs the probabilities that were sampled from to weigh sampled tokens: remove "
            f"loss.temperature_student = {run.loss.temperature_student} or set it to rollout.temperature"
        )


def _weights_fit(run: RecipeTree) -> None:
    if run.loss.prompt_weight == "none":
        return
    paced = f'loss.prompt_weight = "{run.loss.prompt_weight}"'
    if run.routing.distils_uniform:
        raise ValueError(
            f'{paced} gives weight 0 to problems of equal rewards, and router "{run.routing.kind}" distils what '
            "has no other use: remove either"
        )
    if run.rollout.group_size < 2:
        raise ValueError(
            f"{paced} needs pass rates, but rollout.group_size is {run.rollout.group_size}, so every weight would "
            "be 0: set it to at least 2"
        )


def _target_fits(run: RecipeTree) -> None:
    if run.target.strength <= 1:
        for name, method in (("routing", run.routing), ("exposure", run.exposure)):
            if method.reads_lambda:
                raise ValueError(
                    f'{name}.kind = "{method.kind}" weighs how far the target is extrapolated, but here it is not: '
                    'set target = {kind = "extrapolate", lambda_x = 1.25}'
                )
    if run.target.capped and run.routing.reads_lambda:
        raise ValueError(f'routing.kind = "{run.routing.kind}" caps lambda itself where it must: remove target.guard')
    if run.target.asks_rewards and (run.routing.reads_lambda or run.exposure.reads_lambda):
        name, method = ("routing", run.routing) if run.routing.reads_lambda else ("exposure", run.exposure)
        raise ValueError(
            f'{name}.kind = "{method.kind}" weighs how far the target is extrapolated, which target.aligned = true '
            "moves: remove target.aligned"
        )


def _loss_is_listened_to(run: RecipeTree) -> None:
    if run.gate.reads_divergence:
        return
    gate = f'gate.kind = "{run.gate.kind}" looks at the sampled token alone here, not at the divergence'
    remedy = 'or set gate.target = "divergence"'
    if run.differs("target"):
        raise ValueError(
            f'{gate}, and has the same gradient whatever the target, so target.kind = "{run.target.kind}" would '
            f'have no effect: set target.kind = "plain", {remedy}'
        )
    ignored = [name for name in ("clip", "top_k") if getattr(run.loss, name) not in ("none", None)]
    ignored += ["divergence"] * (run.loss.divergence.kind == "sampled")
    if ignored:
        raise ValueError(f"{gate}, so loss.{ignored[0]} would have no effect: remove it, {remedy}")


def _exposure_fits(run: RecipeTree) -> None:
    exposure = f'exposure.kind = "{run.exposure.kind}"'
    if run.prompt.hint == "none" and run.exposure.measured:
        raise ValueError(
            f'prompt.hint = "none" shows nothing at any ratio, so {exposure} steers nothing: '
            'set exposure = {kind = "fixed"}'
        )
    if run.exposure.reads_rewards and run.rollout.group_size < 2:
        raise ValueError(
            f"{exposure} tells problems apart by their pass rates, but with rollout.group_size = 1 these know two "
            f"difficulties, right and wrong: raise the group size, or {run.exposure.without_rewards}"
        )
    if run.exposure.reads_rewards and run.routing.distils_failures_only:
        raise ValueError(
            f'{exposure} tells problems apart by their pass rates, and routing.kind = "{run.routing.kind}", which '
            f"distils failed groups alone, leaves one bin: {run.exposure.without_rewards}"
        )


def _masks_fit(run: RecipeTree) -> None:
    if not run.reveal.masks:
        return
    reveal = f'reveal.kind = "{run.reveal.kind}"'
    if run.routing.asks_teacher:
        raise ValueError(
            f"routing.teacher_share needs completions of the teacher, from whom {reveal} hides tokens only where "
            "it scores: remove routing.teacher_share"
        )
    if run.exposure.reads_hidden:
        raise ValueError(
            f'{reveal} hides tokens, not segments that could be asked for: set exposure.gt_target = "solution"'
        )


def _reveal_fits(run: RecipeTree) -> None:
    reveal = f'reveal.kind = "{run.reveal.kind}"'
    if run.prompt.hint == "none" and (run.reveal.reads_rollout or run.reveal.masks):
        raise ValueError(
            f'prompt.hint = "none" shows nothing at any ratio, so {reveal} has no effect: remove reveal.kind'
        )
    if not run.reveal.reads_rollout:
        return
    if run.prompt.hint == "wrong_problem":
        raise ValueError(
            f'{reveal} compares with the own solution, but prompt.hint = "wrong_problem" shows another: '
            'set reveal.kind = "segments"'
        )
    if run.routing.reads_lambda or run.target.capped:
        raise ValueError(
            f"{reveal} settles the exposure only after the rollout, but lambda* needs it before: "
            'set reveal.kind = "segments", or remove target.guard and the cliff router'
        )


RULES = (
    _numbers_stay_finite,
    _sections_are_read,
    _warm_up_ends,
    _contract_has_text,
    _training_samples,
    _rewards_differ,
    _batch_divides,
    _routing_fits,
    _codes_fit,
    _nothing_watches_compiled_layers,
    _ahead_fits,
    _weights_fit,
    _target_fits,
    _loss_is_listened_to,
    _exposure_fits,
    _masks_fit,
    _reveal_fits,
)


class RunConfig(RecipeTree):
    """One run: everything that a number depends on."""

    @model_validator(mode="after")
    def _sections_go_together(self) -> Self:
        for rule in RULES:
            rule(self)
        return self
