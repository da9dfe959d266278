"""What both roles read: the student's prompt, and the teacher's at an exposure ratio, in ids.

Of a masked hint (`Reveal.masked`) the tokens are found in the prompt: all that overlap the solution, or what stands in
it before a statement of the answer at its end; but for one that reaches into visible text behind that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple, cast

from atesd.exposure.prompt import (
    PromptConfig,
    before_hint,
    hint_text,
    maskable,
    student_messages,
    teacher_messages,
    with_opening,
)
from atesd.exposure.reveal import Reveal
from atesd.exposure.revealer import Crediting, Masker, Revealer
from atesd.exposure.segments import Cut
from atesd.rollout.render import KEPT, Renderer
from atesd.train.asked import revealed
from atesd.train.batch import Veil
from atesd.types import Message, Problem, Trajectory, UserError


@dataclass(frozen=True, slots=True)
class Hint:
    """What the teacher is told: the text of the hint, the share in force, and the prompt that holds it."""

    text: str
    ratio: float
    prompt_ids: tuple[int, ...]
    veil: Veil | None = None
    """Which of its tokens are hidden from attention; None for none."""


class Asked(NamedTuple):
    """What a hint is for: a problem at a ratio, and the rollout that the teacher is about to score, if any."""

    problem: Problem
    ratio: float
    rollout: Trajectory | None = None
    opening: str | None = None
    """What an environment said first, behind the prompt; unset, the rollout's."""

    @property
    def first_said(self) -> str:
        """Return what an environment said first."""
        if self.opening is None:
            return self.rollout.opening if self.rollout is not None else ""
        return self.opening


class Hints:
    """Builds prompts. `donors` gives a problem the one whose solution its teacher is shown, where that is another."""

    def __init__(
        self, prompt: PromptConfig, revealer: Revealer, renderer: Renderer, donors: Mapping[str, Problem]
    ) -> None:
        self._prompt = prompt
        self.revealer = revealer
        self._renderer = renderer
        self._donors = donors
        self._texts = lru_cache(KEPT)(renderer.token_texts)

    def hint(
        self, problem: Problem, ratio: float, rollout: Trajectory | None = None, *, opening: str | None = None
    ) -> Hint:
        """Return the hint at a ratio, for a rollout where there is one."""
        return self.hints([Asked(problem, ratio, rollout, opening)])[0]

    def hints(self, asked: Sequence[Asked]) -> list[Hint]:
        """Return hints, all their prompts rendered in one batch."""
        told = [self._text(each.problem, each.ratio, each.rollout) for each in asked]
        prompts = [
            with_opening(teacher_messages(each.problem, text, self._prompt), each.first_said)
            for each, (text, _) in zip(asked, told, strict=True)
        ]
        read = map(tuple, self._renderer.teacher_batch(prompts))
        return [
            Hint(text, shown.ratio, ids, self._veil(each.problem, shown, ids) if shown.masked else None)
            for each, (text, shown), ids in zip(asked, told, read, strict=True)
        ]

    def heard(self, problem: Problem, rollout: Trajectory) -> None:
        """Tell a revealer that learns from it of an attempt that is distilled."""
        if isinstance(self.revealer, Crediting):
            self.revealer.heard(problem, rollout)

    def teacher_messages(self, problem: Problem, ratio: float) -> list[Message]:
        """Return the teacher's prompt at a ratio as messages, whatever the rollout."""
        text, _ = self._text(problem, ratio, None)
        return teacher_messages(problem, text, self._prompt)

    def _text(self, problem: Problem, ratio: float, rollout: Trajectory | None) -> tuple[str, Reveal]:
        """Return the hint's text and what it shows of the solution."""
        source = self._donors.get(problem.id, problem)
        shown = revealed(self.revealer, source, ratio, rollout)
        return "" if self._prompt.hint == "none" else hint_text(source, shown, self._prompt), shown

    def _veil(self, problem: Problem, shown: Reveal, ids: tuple[int, ...]) -> Veil | None:
        """Return what of a masked hint is hidden; None where its budget holds it all."""
        source = self._donors.get(problem.id, problem)
        hint = maskable(source, self._prompt).rstrip()
        if not hint:
            return None
        texts = self._texts(ids)
        place = places(texts, before_hint(problem, self._prompt), hint)
        if place is None:
            raise UserError(
                f"the solution of problem {problem.id!r} is not found in the teacher's prompt as its tokens spell it, "
                "as the chat template or the tokenizer rewrites text, so that none of them can be hidden: set "
                'reveal.kind = "segments"'
            )
        start, stop = place
        budget = cast("Masker", self.revealer).kept(source, shown.ratio, texts[start:stop])
        return None if budget.keep >= stop - start else Veil(start, stop, *budget)

    def shown(self, problem: Problem, ratio: float) -> Reveal:
        """Return what of the problem's own solution is visible at a ratio."""
        return revealed(self.revealer, problem, ratio)

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

        The teacher's longest prompt is the one at ratio 1, or one with the answer behind all but the last segment; no
        longer than that with all markers.
        """
        if context is None:
            return list(problems), []
        fitting, overlong = [], []
        for problem in problems:
            room = context - completion
            if self._surely_fits(problem, room) or self.longest(problem) <= room:
                fitting.append(problem)
            else:
                overlong.append(problem.id)
        return fitting, overlong

    def _surely_fits(self, problem: Problem, room: int) -> bool:
        """Tell from texts alone that prompts fit: a tokenizer takes minutes for tens of thousands of long solutions.

        Never of texts that spell control tokens, which rendering may refuse: better now than in the middle of a run.
        """
        renderer = self._renderer
        student, teacher = student_messages(problem, self._prompt), self.teacher_messages(problem, 1.0)
        if any(renderer.controls(message["content"]) for message in (*student, *teacher)):
            return False
        most = renderer.most_tokens(renderer.teacher_text(teacher)) + self._beside(problem, renderer.most_tokens)
        return max(most, renderer.most_tokens(renderer.student_text(student))) <= room

    def longest(self, problem: Problem) -> int:
        """Return a bound on the length of a problem's prompts, the student's and the teacher's at any ratio."""
        return max(self._longest_of_teacher(problem), len(self.student_ids(problem)))

    def surplus(self, problems: Sequence[Problem]) -> int:
        """Return by how many tokens a teacher's prompt exceeds the student's at most: what every turn has less room."""
        return max(
            (max(0, self._longest_of_teacher(each) - len(self.student_ids(each))) for each in problems), default=0
        )

    def _longest_of_teacher(self, problem: Problem) -> int:
        """Return a bound on the length of a problem's teacher prompt at any ratio."""
        return len(self.teacher_ids(problem, 1.0)) + self._beside(
            problem, lambda text: len(self._renderer.text_ids(text))
        )

    def _beside(self, problem: Problem, tokens: Callable[[str], int]) -> int:
        """Return how many tokens a hint has besides the solution's at most: its answer's statement, and markers."""
        source, revealer = self._donors.get(problem.id, problem), self.revealer
        stated = tokens(self._prompt.answer) + tokens(source.answer or "")
        if not isinstance(revealer, Cut) or not revealer.hidden_marker:
            return stated
        return stated + revealer.marked(source) * tokens(revealer.hidden_marker)


def places(texts: Sequence[str], before: str, solution: str) -> tuple[int, int] | None:
    """Return where the tokens of a solution begin and end in a prompt, from the text of each; None where they do not.

    `before` is what the prompt's template says before it; a chat template may drop white space at the beginning. A
    token without a text of its own, as a part of a letter, belongs where it stands.
    """
    whole = "".join(texts)
    found = whole.find(before + solution)
    if found < 0:
        before = before.lstrip()
        found = whole.find(before + solution)
    if found < 0:
        return None
    begin, end = found + len(before), found + len(before) + len(solution)
    limit = end + len(whole[end:]) - len(whole[end:].lstrip())
    ends = list(accumulate(map(len, texts)))
    inside = [
        place
        for place, (text, stop) in enumerate(zip(texts, ends, strict=True))
        if (begin < stop <= limit and stop - len(text) < end) or (not text and begin <= stop < end)
    ]
    return inside[0], inside[-1] + 1


def refuse_overlong(overlong: Sequence[str], context: int | None) -> None:
    """UserError naming the problems whose prompts do not fit."""
    if overlong:
        named = ", ".join(overlong[:5]) + (", ..." if len(overlong) > 5 else "")
        raise UserError(
            f"{len(overlong)} problems ({named}) do not fit the model's context of {context} tokens with the whole "
            "solution and a full completion: shorten rollout.max_new_tokens where completions are too long, or leave "
            'them out with step.overlong = "drop"'
        )
