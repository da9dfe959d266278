"""What both roles read: the student's prompt, and the teacher's at an exposure ratio, in ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from atesd.exposure.prompt import PromptConfig, hint_text, student_messages, teacher_messages, with_opening
from atesd.exposure.reveal import Reveal
from atesd.exposure.revealer import Revealer
from atesd.rollout.render import Renderer
from atesd.types import Message, Problem, Trajectory, UserError


@dataclass(frozen=True, slots=True)
class Hint:
    """What the teacher is told: the text of the hint, the share in force, and the prompt that holds it."""

    text: str
    ratio: float
    prompt_ids: tuple[int, ...]


class Hints:
    """Builds prompts. `donors` gives a problem the one whose solution its teacher is shown, where that is another."""

    def __init__(
        self, prompt: PromptConfig, revealer: Revealer, renderer: Renderer, donors: Mapping[str, Problem]
    ) -> None:
        self._prompt = prompt
        self._revealer = revealer
        self._renderer = renderer
        self._donors = donors

    def hint(
        self, problem: Problem, ratio: float, rollout: Trajectory | None = None, *, opening: str | None = None
    ) -> Hint:
        """Return the hint at a ratio, for a rollout where there is one.

        `opening` is what an environment said first, behind the prompt: unset, the rollout's.
        """
        text, shown_ratio = self._text(problem, ratio, rollout)
        if opening is None:
            opening = rollout.opening if rollout is not None else ""
        messages = with_opening(teacher_messages(problem, text, self._prompt), opening)
        return Hint(text, shown_ratio, tuple(self._renderer.teacher_ids(messages)))

    def teacher_messages(self, problem: Problem, ratio: float) -> list[Message]:
        """Return the teacher's prompt at a ratio as messages, whatever the rollout."""
        text, _ = self._text(problem, ratio, None)
        return teacher_messages(problem, text, self._prompt)

    def _text(self, problem: Problem, ratio: float, rollout: Trajectory | None) -> tuple[str, float]:
        """Return the hint's text and the share that it really shows."""
        source = self._donors.get(problem.id, problem)
        shown = self._revealer.reveal(source, ratio, rollout)
        return "" if self._prompt.hint == "none" else hint_text(source, shown, self._prompt), shown.ratio

    def shown(self, problem: Problem, ratio: float) -> Reveal:
        """Return what of the problem's own solution is visible at a ratio."""
        return self._revealer.reveal(problem, ratio)

    def teacher_ids(self, problem: Problem, ratio: float, opening: str = "") -> tuple[int, ...]:
        """Return the teacher's prompt at a ratio, whatever the rollout but for what the environment said first."""
        return self.hint(problem, ratio, opening=opening).prompt_ids

    def student_ids(self, problem: Problem) -> tuple[int, ...]:
        """Return the student's prompt."""
        return tuple(self._renderer.student_ids(student_messages(problem, self._prompt)))

    def solution_ids(self, problem: Problem) -> tuple[int, ...]:
        """Return the reference solution as the assistant would write it, without an end token."""
        return tuple(self._renderer.solution_ids(problem.solution))

    def fitting(
        self, problems: Sequence[Problem], context: int | None, completion: int
    ) -> tuple[list[Problem], list[str]]:
        """Split problems into those whose longer prompt and a full completion fit the context, and the others' ids.

        The teacher's longest prompt is the one at ratio 1, or one with the answer behind all but the last segment.
        """
        if context is None:
            return list(problems), []
        fitting, overlong = [], []
        for problem in problems:
            longest = max(self._longest(problem), len(self.student_ids(problem)))
            if longest + completion <= context:
                fitting.append(problem)
            else:
                overlong.append(problem.id)
        return fitting, overlong

    def surplus(self, problems: Sequence[Problem]) -> int:
        """Return by how many tokens a teacher's prompt exceeds the student's at most: what every turn has less room."""
        return max((max(0, self._longest(each) - len(self.student_ids(each))) for each in problems), default=0)

    def _longest(self, problem: Problem) -> int:
        """Return a bound on the length of a problem's teacher prompt at any ratio."""
        answer = len(self._renderer.text_ids(self._prompt.answer))
        return len(self.teacher_ids(problem, 1.0)) + answer + len(self._renderer.text_ids(problem.answer or ""))


def refuse_overlong(overlong: Sequence[str], context: int | None) -> None:
    """UserError naming the problems whose prompts do not fit."""
    if overlong:
        named = ", ".join(overlong[:5]) + (", ..." if len(overlong) > 5 else "")
        raise UserError(
            f"{len(overlong)} problems ({named}) do not fit the model's context of {context} tokens with the whole "
            "solution and a full completion: shorten rollout.max_new_tokens, or leave them out with "
            'step.overlong = "drop"'
        )
