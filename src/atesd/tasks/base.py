"""What a task is: problems in three disjoint sets, a default grader, and traits of completions to count."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from atesd.rewards.answer import extract_answer
from atesd.rewards.kinds import Grader, RewardFunction
from atesd.types import Method, Problem, UserError, reward_columns, shown

_CITES_HINT = re.compile(
    r"reference (solution|answer)|(provided|given|above|hinted) solution|solution (provided|given|above)"
    r"|according to the (solution|hint)|\bthe hint\b",
    re.IGNORECASE,
)


_MOST_PAIRS = 10
_MOST_DIGITS = 600  # Python refuses to read more than 4300, and can be told to refuse more than 640


class Task(Protocol):
    """Problems to train on, to probe and to evaluate on: disjoint by content."""

    @property
    def name(self) -> str:
        """Short name, part of metric keys."""
        ...

    @property
    def default_reward(self) -> Grader:
        """The grader where the recipe names none."""
        ...

    def train(self) -> list[Problem]:
        """Return the training problems."""
        ...

    def probe(self) -> list[Problem]:
        """Return the fixed problems on which progress is measured."""
        ...

    def evaluation(self) -> list[Problem]:
        """Return the held-out problems."""
        ...

    def traits(self, problem: Problem, completion: str) -> dict[str, bool]:
        """Return what to count in completions, by name."""
        ...


class TaskMethod(Method):
    """Base of tasks' sections."""

    declares: ClassVar[tuple[str, ...]] = ("build",)

    is_text: ClassVar[bool] = True
    """Whether a language model answers its problems: else they are points, made by a flow (tasks/flows.py)."""


def cites_hint(completion: str) -> bool:
    """Tell whether an unhinted completion speaks of a solution or hint that it cannot have seen."""
    return _CITES_HINT.search(completion) is not None


def content_of(problem: Problem) -> str:
    """Return what makes two problems the same: the text, white space aside."""
    return " ".join(problem.problem.split())


def check_problems(name: str, sets: Mapping[str, object]) -> None:
    """UserError unless each of a task's sets is a list of problems of text, with ids of their own and a solution."""
    for which, given in sets.items():
        what = f"the {which} problems of task {name!r}"
        if not isinstance(given, Sequence) or not all(isinstance(each, Problem) for each in given):
            raise UserError(f"{what} are {shown(given, 60)}: return a list of atesd.types.Problem, [] for none")
        seen: set[str] = set()
        for each in given:
            answer = "" if each.answer is None else each.answer
            texts = {"id": each.id, "problem": each.problem, "solution": each.solution, "answer": answer}
            odd = next((field for field, text in texts.items() if not isinstance(text, str)), None)
            if odd is not None:
                raise UserError(f"{what} hold one whose {odd} is {shown(getattr(each, odd), 60)}: make it a text")
            if each.id in seen:
                raise UserError(f"{what} hold two with the id {shown(each.id, 60)}: make ids unique")
            seen.add(each.id)


def check_disjoint(
    sets: Mapping[str, Sequence[Problem]], called: Callable[[Problem], str] = lambda problem: repr(problem.id)
) -> None:
    """UserError if a problem's text, white space aside, stands in two of the sets, or twice in one.

    It names at most ten such pairs, one a line, each problem as it is `called`.
    """
    seen: dict[str, tuple[str, Problem]] = {}
    found: list[str] = []
    for name, problems in sets.items():
        for problem in problems:
            other, same = seen.setdefault(content_of(problem), (name, problem))
            if same is not problem:
                what = f"problem {called(problem)} ({name}) has the same text as {called(same)} ({other})"
                found.append(f"{what}: remove one of them")
    if found:
        more = [f"and {len(found) - _MOST_PAIRS} more"] * (len(found) > _MOST_PAIRS)
        raise UserError("\n".join([*found[:_MOST_PAIRS], *more]))


@dataclass(slots=True)
class CheckReport:
    """What `check_gold` found, by problem id."""

    total: int = 0
    gradable: int = 0
    gold_wrong: list[str] = field(default_factory=list)
    corrupted_right: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether the grader accepts all gold and rejects all corrupted answers."""
        return not self.gold_wrong and not self.corrupted_right


def check_gold(problems: Sequence[Problem], reward: RewardFunction) -> CheckReport:
    """Grade every reference solution, which must score 1, and every solution with another answer, which must score 0.

    A solution that does not state its answer in a form that graders find has it appended as `\\boxed{...}`.
    """
    report = CheckReport(total=len(problems))
    graded = [problem for problem in problems if problem.answer is not None]
    report.gradable = len(graded)
    corrupted = [_closing(problem, corrupt(problem.answer or ""), replace=True) for problem in graded]
    report.gold_wrong = refused_gold(graded, reward)
    scores = _scores(reward, graded, corrupted)
    report.corrupted_right = [p.id for p, score in zip(graded, scores, strict=True) if score != 0.0]
    return report


def refused_gold(problems: Sequence[Problem], reward: RewardFunction) -> list[str]:
    """Return the ids of the problems with an answer whose own solution does not score 1, as `check_gold` grades it."""
    graded = [problem for problem in problems if problem.answer is not None]
    scores = _scores(reward, graded, [_closing(problem, problem.answer or "") for problem in graded])
    return [problem.id for problem, score in zip(graded, scores, strict=True) if score != 1.0]


def corrupt(answer: str) -> str:
    """Return an answer that is certainly another one: the first number plus 1, or a marked text.

    Of a number that is too long to be read as one, the last digit changes.
    """
    changed, count = re.subn(r"\d+", lambda number: _another(number.group()), answer, count=1)
    return changed if count else f"not {answer}"


def _another(number: str) -> str:
    if len(number) <= _MOST_DIGITS:
        return str(int(number) + 1)
    return f"{number[:-1]}{(int(number[-1]) + 1) % 10}"


def _closing(problem: Problem, answer: str, *, replace: bool = False) -> str:
    if not replace and extract_answer(problem.solution) is not None:
        return problem.solution
    return f"\\boxed{{{answer}}}"


def _scores(reward: RewardFunction, problems: Sequence[Problem], completions: Sequence[str]) -> list[float | None]:
    return reward(
        prompts=[problem.problem for problem in problems],
        completions=list(completions),
        **reward_columns(problems),
    )
