"""From routed groups to rows: what the teacher is shown, and both roles' prompts in ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from atesd.config import RunConfig
from atesd.exposure.overlap import Overlap
from atesd.exposure.prompt import hint_text, student_messages, teacher_messages
from atesd.losses.policy import group_advantages
from atesd.losses.target import View
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

    def rows(
        self, groups: Sequence[Group], routes: Sequence[Route], ratios: Sequence[float], views: Sequence[View]
    ) -> list[Row]:
        """Return one row a completion, in order, with what the given teacher views read.

        Every completion has at least one token. A completion without a reward is not reinforced.
        """
        rows = []
        for index, (group, route, ratio) in enumerate(zip(groups, routes, ratios, strict=True)):
            advantages = iter(self._advantages(group, route))
            weight = self._weight(group)
            dropped = self._config.rl.zero_variance == "drop" and len(set(group.rewards)) <= 1
            for trajectory in group.trajectories:
                advantage = next(advantages) if trajectory.reward is not None else None
                components = self._components(trajectory, route, barred=advantage is None or dropped)
                shown = self._ratio(group.problem, trajectory, ratio)
                distils = "distil" in components
                rows.append(
                    Row(
                        student_prompt=trajectory.turns[-1].prompt_ids,
                        teacher_prompt=self.teacher_ids(group.problem, shown) if distils else (),
                        completion=trajectory.turns[-1].completion_ids,
                        sampler_logprobs=trajectory.turns[-1].logprobs,
                        components=components,
                        ratio=shown,
                        group=index,
                        other_prompts=self._other_prompts(group.problem, views) if distils else {},
                        advantage=advantage or 0.0,
                        weight=weight,
                    )
                )
        return rows

    def _components(self, trajectory: Trajectory, route: Route, *, barred: bool) -> tuple[str, ...]:
        """Return the losses that a completion feeds; one that is barred is not reinforced."""
        if self._masked(trajectory):
            return ()
        return tuple(name for name in route.components if not (name == "rl" and barred))

    def _advantages(self, group: Group, route: Route) -> list[float]:
        """Return the advantages of the gradable completions."""
        if "rl" not in route.components or not group.rewards:
            return [0.0] * len(group.rewards)
        return group_advantages(group.rewards, self._config.rl.scale)

    def _weight(self, group: Group) -> float:
        """Return the problem's weight: p (1 - p), p the pass rate (PACED 2603.11178), 1/2 where none is known; or 1."""
        if self._config.loss.prompt_weight == "none":
            return 1.0
        rate = min(1.0, max(0.0, sum(group.rewards) / len(group.rewards))) if group.rewards else 0.5
        return rate * (1.0 - rate)

    def _ratio(self, problem: Problem, trajectory: Trajectory, ratio: float) -> float:
        """Return the exposure of one completion: the controller's, or a rule's that looks at the rollout."""
        exposure = self._config.exposure
        if not isinstance(exposure, Overlap):
            return ratio
        return exposure.ratio(problem.solution, trajectory.turns[-1].text, self._config.reveal)

    def _other_prompts(self, problem: Problem, views: Sequence[View]) -> dict[View, tuple[int, ...]]:
        """Return the prompts of the views with a ratio of their own."""
        fixed: dict[View, float] = {"full": 1.0, "answer": 0.0}
        return {view: self.teacher_ids(problem, fixed[view]) for view in views if view in fixed}

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
