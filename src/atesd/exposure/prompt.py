"""The messages of both roles: OPSD's prompts, with a hint that shows as much as the exposure ratio says.

    ratio 1   hint = the reference solution, so the teacher prompt is OPSD's, byte for byte
    ratio < 1 hint = the revealed part, then the final answer, unless the revealed part already states it
    ratio 0   hint = the final answer

Texts: OPSD v3 (github siyan-zhao/OPSD); partial exposure: ATESD, arXiv 2605.11458. Ours, where the
paper is silent: the wording of the answer, and OPSD's transition at every ratio.

Joining, for ratios below 1: white space at the end of the revealed part is dropped, then comes the answer text as its
template spells it; where nothing is revealed the answer text loses its leading white space. So no hint begins or ends
with an empty line, and a line-by-line template such as "\\n#{answer}" gives one line more in every case.
"""

from __future__ import annotations

import difflib
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from atesd.exposure.reveal import Reveal
from atesd.types import Config, Message, Problem, UserError

_BOXED_SENTENCE = "Please reason step by step, and put your final answer within \\boxed{}."
_TRANSITION = (
    "\n\nAfter reading the reference solution above, make sure you truly understand the reasoning behind each step "
    "\u2014 do not copy or paraphrase it. Now, using your own words and independent reasoning, derive the same final "
    "answer to the problem above. Think step by step, explore different approaches, and don't be afraid to backtrack "
    "or reconsider if something doesn't work out:\n"
)
OPSD_STUDENT = "Problem: {problem}\n\n" + _BOXED_SENTENCE
OPSD_TEACHER = (
    "Problem: {problem}\n\nHere is a reference solution to this problem:\n=== Reference Solution Begin ===\n{hint}\n"
    "=== Reference Solution End ===\n" + _TRANSITION + "\n" + _BOXED_SENTENCE
)


class PromptConfig(Config):
    """Prompts of both roles: a user turn each, and what stands around it. Defaults are OPSD v3's texts.

    `{problem}`, `{hint}` and `{answer}` are filled literally and in one pass; all other braces are plain text. A word
    in braces that nearly is one, such as `{hnt}`, is refused.
    """

    student: str = OPSD_STUDENT
    """The student's prompt; must contain `{problem}`."""
    teacher: str = OPSD_TEACHER
    """The teacher's prompt; must contain `{problem}` and `{hint}`."""
    answer: str = "\n\nFinal answer: \\boxed{{answer}}"
    """What follows the revealed part at ratios below 1; must contain `{answer}`, or be empty to leave it out."""
    evaluation: str | None = None
    """The student's prompt in evaluation; unset, that of training. OPSD's official evaluation lacks `Problem: `."""
    hint: Literal["solution", "none", "wrong_problem"] = "solution"
    """What the teacher is told: the solution, nothing (reference-free control), or another problem's solution and
    answer (control)."""
    hint_none: str | None = None
    """The teacher's prompt with `hint = "none"`; unset, it is the student's."""
    enable_thinking_student: bool | None = None
    """Passed to the chat template of the student where set. OPSD v3: false."""
    enable_thinking_teacher: bool | None = None
    """Passed to the chat template of the teacher where set. OPSD v3: true."""
    system: str = ""
    """System message of both roles; none where empty. Where the model's chat template knows no system role, or leaves
    such a message out, it stands before the user's text, with an empty line between."""
    system_student: str | None = None
    """The student's own, in evaluation too; unset, that of both."""
    system_teacher: str | None = None
    """The teacher's own; unset, that of both."""
    chat_template: Annotated[str, Field(min_length=1)] | None = None
    """Chat template instead of the tokenizer's: `plain` (texts without roles, for base models), a file with a Jinja
    template, or the template itself. Saved models keep it."""
    teacher_prefill: str = ""
    """Text after the teacher's assistant header, for instance an opening think tag."""

    @model_validator(mode="after")
    def _check_placeholders(self) -> Self:
        needed = {
            "student": ("problem",),
            "teacher": ("problem", "hint"),
            "hint_none": ("problem",),
            "evaluation": ("problem",),
        }
        if self.answer:
            needed["answer"] = ("answer",)
        for field, names in needed.items():
            template = getattr(self, field)
            if template is None:
                continue
            for name in names:
                if f"{{{name}}}" not in template:
                    raise ValueError(f"template {field!r} lacks the placeholder {{{name}}}; add it where it belongs")
            for word, meant in _misspelt(template, names):
                raise ValueError(
                    f"template {field!r} contains {{{word}}}, which nothing is filled in for: did you mean {{{meant}}}?"
                )
        for field in ("student", "hint_none", "evaluation"):
            if "{hint}" in (getattr(self, field) or ""):
                raise ValueError(f"template {field!r} contains {{hint}}, which only the teacher may see; remove it")
        return self


def _misspelt(template: str, names: Sequence[str]) -> Iterator[tuple[str, str]]:
    r"""Yield words in braces that are nearly a placeholder, and which. The argument of a command is text."""
    for command, word in re.findall(r"(\\\w+)?\{(\w+)\}", template):
        near = difflib.get_close_matches(word.lower(), names, n=1, cutoff=0.7)
        if near and word not in names and not command:
            yield word, near[0]


def student_messages(problem: Problem, config: PromptConfig) -> list[Message]:
    """Return the student's prompt: the problem and no hint."""
    return _messages(_fill(config.student, problem=problem.problem), config.system, config.system_student)


def evaluation_messages(problem: Problem, config: PromptConfig) -> list[Message]:
    """Return the student's prompt in evaluation."""
    text = _fill(config.evaluation or config.student, problem=problem.problem)
    return _messages(text, config.system, config.system_student)


def teacher_messages(problem: Problem, hint: str | None, prompt: PromptConfig) -> list[Message]:
    """Return the teacher's prompt: the problem and its hint; without a hint, or with `hint = "none"`, that of none."""
    if hint is None or prompt.hint == "none":
        template = prompt.student if prompt.hint_none is None else prompt.hint_none
        text = _fill(template, problem=problem.problem)
    else:
        text = _fill(prompt.teacher, problem=problem.problem, hint=hint)
    return _messages(text, prompt.system, prompt.system_teacher)


def with_opening(messages: Sequence[Message], opening: str) -> list[Message]:
    """Return a prompt with what an environment said first behind its last message, as the student read it."""
    *before, last = messages
    return [*before, Message(role=last["role"], content=last["content"] + opening)]


def hint_text(source: Problem, shown: Reveal, prompt: PromptConfig) -> str:
    """Return what `{hint}` stands for: the revealed part and the final answer, joined as the module text says.

    `source` is the problem whose solution is `shown`: with `hint = "wrong_problem"` the donor, see `donors`. A problem
    without an answer gets the revealed part alone. Empty with `hint = "none"`. A masked solution is whole, and followed
    by the answer unless it ends by stating it, in a part that is never hidden (`maskable`).
    """
    if prompt.hint == "none":
        return ""
    if shown.complete and not shown.foreign:
        return source.solution
    if shown.masked and maskable(source, prompt) != source.solution:
        return source.solution
    visible = shown.text.rstrip()
    if not source.answer or not prompt.answer:
        return visible
    answer = _fill(prompt.answer, answer=source.answer)
    if not shown.masked and states_answer(visible, answer, source.answer):
        return visible
    return visible + answer if visible else answer.lstrip()


def before_hint(problem: Problem, prompt: PromptConfig) -> str:
    """Return what stands before the hint in the teacher's prompt. UserError where the template shows it twice."""
    before, _, behind = prompt.teacher.partition("{hint}")
    if "{hint}" in behind:
        raise UserError(
            "prompt.teacher shows {hint} more than once, of which tokens could not be hidden: show it once, or set "
            'reveal.kind = "segments"'
        )
    return _fill(before, problem=problem.problem)


def maskable(source: Problem, prompt: PromptConfig) -> str:
    """Return a solution without the statement of its answer at the end: all of it where it ends otherwise.

    Only signs and white space may follow the statement.
    """
    if not source.answer or not prompt.answer:
        return source.solution
    pattern = _statement(_fill(prompt.answer, answer=source.answer), source.answer)
    last = next(reversed(list(pattern.finditer(source.solution))), None)
    if last is None or any(letter.isalnum() for letter in source.solution[last.end() :]):
        return source.solution
    return source.solution[: last.start()]


def states_answer(visible: str, answer_text: str, answer: str) -> bool:
    r"""Tell whether the revealed part already states the answer.

    Sought is `\boxed{answer}` if the answer text contains that box, else the answer text itself, white space at the
    ends and inside the box aside. Digits and letters must stand alone: `#7` is in `so #7.`, not in `#72`, `#7.5` or
    `#7/2`; a box is exact by itself.
    """
    return _statement(answer_text, answer).search(visible) is not None


def _statement(answer_text: str, answer: str) -> re.Pattern[str]:
    """Return what matches a statement of the answer."""
    stated = answer_text.strip()
    if f"\\boxed{{{answer}}}" in answer_text:
        return re.compile(rf"\\boxed\s*\{{\s*{re.escape(answer.strip())}\s*\}}")
    before = r"(?<!\w)(?<!\d[.,])" if stated[0].isalnum() or stated[0] in "+-." else ""
    after = r"(?!\w)(?![.,/]\d)" if stated[-1].isalnum() else ""
    return re.compile(before + re.escape(stated) + after)


def donors(problems: Sequence[Problem], seed: int) -> dict[str, Problem]:
    """Give every problem another one's solution: a derangement, one random cycle through all problems, by seed.

    UserError with fewer than two problems or with repeated ids.
    """
    if len({problem.id for problem in problems}) != len(problems):
        raise UserError("hint 'wrong_problem' needs problems with different ids; make the ids unique")
    if len(problems) < 2:
        raise UserError("hint 'wrong_problem' needs at least 2 problems, so that each can show another's solution")
    cycle = sorted(problems, key=lambda problem: problem.id)
    random.Random(seed).shuffle(cycle)
    return {problem.id: cycle[index - 1] for index, problem in enumerate(cycle)}


def _messages(content: str, system: str, own_system: str | None) -> list[Message]:
    """Return a user's turn behind the system message of both roles, or the role's own."""
    said = system if own_system is None else own_system
    before: list[Message] = [{"role": "system", "content": said}] if said else []
    return [*before, {"role": "user", "content": content}]


def _fill(template: str, **values: str) -> str:
    """Replace the named placeholders in one pass, so that braces inside the values are never looked at."""
    names: Mapping[str, str] = values
    return re.sub(r"\{(" + "|".join(names) + r")\}", lambda match: names[match[1]], template)
