"""From routed groups to rows: what the teacher is shown, and both roles' prompts in ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from atesd.config import RunConfig
from atesd.exposure.prompt import hint_text, student_messages, teacher_messages
from atesd.rollout.render import Renderer
from atesd.routing import Route
from atesd.train.batch import Row
from atesd.types import Group, Problem, StopReason, Trajectory, UserError


class Hints:
    """Builds the teacher's prompts at given exposure ratios."""

    def __init__(self, config: RunConfig, renderer: Renderer, donors: Mapping[str, Problem]) -> None:
        self._config = config
        self._renderer = renderer
        self._donors = donors

    def text(self, problem: Problem, ratio: float) -> str:
        """Return the hint as the teacher reads it."""
        return hint_text(problem, ratio, self._config.prompt, self._config.reveal, donor=self._donors.get(problem.id))

    def teacher_ids(self, problem: Problem, ratio: float) -> tuple[int, ...]:
        """Return the teacher's prompt at a ratio."""
        donor = self._donors.get(problem.id)
        messages = teacher_messages(problem, ratio, self._config.prompt, self._config.reveal, donor=donor)
        return tuple(self._renderer.teacher_ids(messages))

    def student_ids(self, problem: Problem) -> tuple[int, ...]:
        """Return the student's prompt."""
        return tuple(self._renderer.student_ids(student_messages(problem, self._config.prompt)))

    def rows(self, groups: Sequence[Group], routes: Sequence[Route], ratios: Sequence[float]) -> list[Row]:
        """Return one row a completion, in order. Every completion has at least one token."""
        rows = []
        for index, (group, route, ratio) in enumerate(zip(groups, routes, ratios, strict=True)):
            teacher_prompt = self.teacher_ids(group.problem, ratio) if route is Route.DISTIL else ()
            for trajectory in group.trajectories:
                turn = trajectory.turns[-1]
                rows.append(
                    Row(
                        student_prompt=turn.prompt_ids,
                        teacher_prompt=teacher_prompt,
                        completion=turn.completion_ids,
                        sampler_logprobs=turn.logprobs,
                        component="" if self._masked(trajectory) or route is Route.SKIP else route.value,
                        ratio=ratio,
                        group=index,
                    )
                )
        return rows

    def fitting(self, problems: Sequence[Problem], context: int | None) -> tuple[list[Problem], list[str]]:
        """Split problems into those whose longer prompt and a full completion fit the context, and the others' ids.

        The teacher's longest prompt is the one at ratio 1, or one with the answer behind all but the last segment.
        """
        if context is None:
            return list(problems), []
        answer = len(self._renderer.text_ids(self._config.prompt.answer))
        room = context - self._config.rollout.max_new_tokens
        fitting, overlong = [], []
        for problem in problems:
            extra = answer + len(self._renderer.text_ids(problem.answer or ""))
            longest = max(len(self.teacher_ids(problem, 1.0)) + extra, len(self.student_ids(problem)))
            if longest <= room:
                fitting.append(problem)
            else:
                overlong.append(problem.id)
        return fitting, overlong

    def _masked(self, trajectory: Trajectory) -> bool:
        return self._config.step.truncated == "mask" and trajectory.turns[-1].stop is StopReason.LENGTH


def refuse_overlong(overlong: Sequence[str], context: int | None) -> None:
    """UserError naming the problems whose prompts do not fit."""
    if overlong:
        named = ", ".join(overlong[:5]) + (", ..." if len(overlong) > 5 else "")
        raise UserError(
            f"{len(overlong)} problems ({named}) do not fit the model's context of {context} tokens with the whole "
            "solution and a full completion: shorten rollout.max_new_tokens, or leave them out with "
            'step.overlong = "drop"'
        )
