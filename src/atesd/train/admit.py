"""Which problems a run takes: what is refused, what is left out because it does not fit, and what is warned of."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

from atesd.config import RunConfig
from atesd.evaluate.runner import refuse_none
from atesd.exposure.prompt import donors, evaluation_messages, student_messages
from atesd.rewards.exact import exact_reward
from atesd.rewards.kinds import ExactConfig
from atesd.rollout.render import Renderer
from atesd.rollout.sampler import refuse_beyond
from atesd.tasks.base import Task, check_disjoint, check_problems, refused_gold
from atesd.tasks.texts import fences, refuse_texts, unread
from atesd.train.hints import Hints, refuse_overlong
from atesd.types import Problem, UserError


def sets_of(config: RunConfig, task: Task) -> dict[str, list[Problem]]:
    """Return a task's training, probe and evaluation problems.

    UserError where a set is empty that the run asks for, or where sets are not what a task promises: disjoint, above
    all, for what is trained on would be evaluated.
    """
    every = {"train": task.train(), "probe": task.probe(), "evaluation": task.evaluation()}
    check_problems(task.name, every)
    check_disjoint(every)
    sets = every | {"evaluation": every["evaluation"][: config.eval.problems]}
    refuse_none(task.name, sets["evaluation"])
    if config.routing.asks_teacher and not sets["probe"]:
        raise UserError(
            "routing.teacher_share compares successes on probe problems, of which the task has none: give it some "
            "(probe_size), or remove routing.teacher_share"
        )
    return sets


def refuse_hostile(
    config: RunConfig, renderer: Renderer, task: Task | None, sets: Mapping[str, Sequence[Problem]]
) -> None:
    """UserError naming the row whose text could be taken for the prompt's own: a control token, or a hint's fence.

    `task` is the one that the problems are from; where it is not known, set and problem are named.
    """
    refuse_texts(task, sets, renderer.flaw, () if config.prompt.hint == "none" else fences(config.prompt.teacher))


def shown_instead(
    config: RunConfig, problems: Sequence[Problem], probing: Sequence[Problem] = ()
) -> dict[str, Problem]:
    """Return whose solution a problem's teacher is shown, where the recipe asks for another problem's.

    Probe problems exchange solutions among themselves, so that no training problem is shown one of theirs; a single one
    is shown the first training problem's.
    """
    if config.prompt.hint != "wrong_problem":
        return {}
    shown = donors(problems, config.seed)
    if len(probing) == 1:
        return shown | {probing[0].id: problems[0]}
    return shown | (donors(probing, config.seed) if probing else {})


def fitting(
    config: RunConfig,
    hints: Hints,
    renderer: Renderer,
    sets: Mapping[str, Sequence[Problem]],
    context: int | None,
) -> tuple[list[Problem], dict[str, list[Problem]], list[str]]:
    """Return the training problems and the other sets without what does not fit, and the training problems left out."""
    problems, overlong = hints.fitting(sets["train"], context, config.rollout.max_new_tokens)
    probing, overlong_probe = hints.fitting(sets["probe"], context, config.rollout.max_new_tokens)
    if config.step.overlong == "error":
        refuse_overlong([*overlong, *overlong_probe], context)
    if overlong and not problems:
        raise UserError(
            f"none of the {len(overlong)} training problems fits the model's context of {context} tokens with the "
            "whole solution and a full completion: shorten rollout.max_new_tokens, or take a model with a longer one"
        )
    if not problems:
        raise UserError("the task has no training problem: give it some, or lower its probe and evaluation sizes")
    for what, names in (("", overlong), ("probe ", overlong_probe)):
        if names:
            warnings.warn(f"dropped {len(names)} overlong {what}problems: {', '.join(names[:20])}", stacklevel=2)
    evaluation = answerable(config, renderer, sets["evaluation"], context)
    return problems, {"probe": probing, "evaluation": evaluation}, overlong


def answerable(
    config: RunConfig, renderer: Renderer, problems: Sequence[Problem], context: int | None
) -> list[Problem]:
    """Return the evaluation problems whose prompts leave room for a full completion.

    UserError for others, or a warning where the recipe drops what is overlong.
    """
    if context is None:
        return list(problems)
    longest = config.eval.sampling(config.rollout).max_new_tokens
    prompts = renderer.student_batch([evaluation_messages(each, config.prompt) for each in problems])
    fits = [len(ids) + longest <= context for ids in prompts]
    kept = [each for each, fitting in zip(problems, fits, strict=True) if fitting]
    overlong = [each.id for each, fitting in zip(problems, fits, strict=True) if not fitting]
    if not overlong:
        return kept
    named = ", ".join(overlong[:5]) + (", ..." if len(overlong) > 5 else "")
    what = f"{len(overlong)} evaluation problems ({named}) do not fit the model's context of {context} tokens"
    if config.step.overlong == "error":
        raise UserError(
            f"{what} with a completion of {longest}: shorten eval.max_new_tokens where that is too long, or leave them "
            'out with step.overlong = "drop"'
        )
    if not kept:
        raise UserError(f"{what}, and no others are left: take shorter ones, or a model with a longer context")
    warnings.warn(f"dropped {what.replace('do not', 'which do not')}", stacklevel=2)
    return kept


def refuse_lengths(
    config: RunConfig,
    room: int | None,
    context: int | None,
    renderer: Renderer,
    problems: Sequence[Problem],
    evaluation: Sequence[Problem],
) -> None:
    """UserError where an engine of less room than the model's has none for a prompt, before a step asks for it.

    What an environment adds to a prompt is not known here.
    """
    if room is None or (context is not None and context <= room):
        return
    sampled = [
        (problems, student_messages, config.rollout),
        (evaluation, evaluation_messages, config.eval.sampling(config.rollout)),
    ]
    for asked, messages, sampling in sampled:
        prompts = renderer.student_batch([messages(each, config.prompt) for each in asked])
        refuse_beyond(room, max(map(len, prompts), default=0), sampling.max_new_tokens)


def warn_of_problems(config: RunConfig, problems: Sequence[Problem], renderer: Renderer, task: Task) -> None:
    """Warn of what a run can be made with, and is mostly not meant."""
    if config.step.problems > len(problems):
        warnings.warn(
            f"step.problems = {config.step.problems}, and there are {len(problems)} training problems: every step "
            "samples some of them several times over",
            stacklevel=2,
        )
    graders = config.reward if isinstance(config.reward, tuple) else (config.reward or task.default_reward,)
    refused = refused_gold(problems, exact_reward) if any(isinstance(each, ExactConfig) for each in graders) else []
    if refused:
        named = ", ".join(refused[:5]) + (", ..." if len(refused) > 5 else "")
        warnings.warn(
            f"{len(refused)} of {len(problems)} training problems ({named}) have an answer that is not written as "
            'their own solutions state it, and reward.kind = "exact" compares texts: it grades these solutions 0; '
            'write the answers alike, or set reward = {kind = "math"}',
            stacklevel=2,
        )
    if config.env.limit > 1 and renderer.rewrites_history():
        warnings.warn(
            "the chat template drops the thinking of earlier replies from a conversation; here every reply stays as it "
            "was sampled, in training and evaluation: a server that renders the template anew will not do so",
            stacklevel=2,
        )
    for warning in (
        config.reveal.warning([problem.solution for problem in problems]),
        config.gate.warning(),
        unread(problems, renderer.unknown),
    ):
        if warning:
            warnings.warn(warning, stacklevel=2)
    unanswered = sum(problem.answer is None for problem in problems)
    if unanswered:
        warnings.warn(
            f"{unanswered} of {len(problems)} training problems have no recognisable answer: their hints below ratio 1 "
            "show the revealed part alone; add an `answer` column to show it",
            stacklevel=2,
        )
