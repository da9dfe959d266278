"""Retrieved skills as privileged context: SDAR's (2605.15155), alone or with an expert's first turns.

A skill bank is a folder of Markdown files, a skill a file. For a problem one skill is retrieved, or all are:

    keyword   the skill that shares the most words with the problem, each word weighed by how few skills have it
    ucb       argmax of  mean reward + c sqrt(ln N / n)  over skills: n attempts with the skill, N in all; untried first
    full      every skill
    random    one, drawn by problem and seed

The ratio shows the first floor(ratio m + 1e-9) of the m paragraphs of what was retrieved. With `turns = true` the skill
is shown whole and the ratio counts the expert's turns.

Deviations: 1. the paper names the retrievers, not keyword's score: inverse document frequency is ours; 2. UCB's reward
is that of the attempts on whose tokens the teacher with the skill was heard, since the student never reads a skill: a
skill is credited at the end of the step; 3. skills are text in the user's turn (the paper), never cut off (the code
cuts them where prompts are long): what does not fit the context is refused before step 0.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from math import floor, inf, log, sqrt
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import Field

from atesd.exposure.reveal import Reveal, check_ratio, split_segments
from atesd.exposure.revealer import Revealer, RevealMethod
from atesd.exposure.turns import first_turns
from atesd.facts import RunFacts
from atesd.types import Measurement, Observation, Problem, Trajectory, UserError

_WORD = re.compile(r"\w+")


class Skill(NamedTuple):
    """One file of a skill bank."""

    name: str
    text: str


class Skills(RevealMethod):
    """Skills from a folder of Markdown files, retrieved for each problem (SDAR 2605.15155)."""

    kind: Literal["skills"] = "skills"
    folder: str = Field(min_length=1)
    """Folder of the skill bank: every file in it that ends in `.md` is a skill."""
    retriever: Literal["keyword", "ucb", "full", "random"] = "keyword"
    """How skills are chosen; SDAR's default is keyword."""
    ucb: Annotated[float, Field(ge=0, le=1e6)] = 1.0
    """c of the retriever `ucb`; our choice, the paper names none."""
    turns: bool = False
    """Show the expert's first turns behind the skill; then these are what the ratio counts."""

    reads_rollout: ClassVar[bool] = False

    def describe(self) -> str:
        """Say what is shown besides what the exposure counts."""
        which = {"full": "every skill", "random": "a random skill", "ucb": "the skill of the best bound on its reward"}
        named = which.get(self.retriever, "the skill that shares most words with the problem")
        return f"{named} of a skill bank" + (", and the expert's first turns" if self.turns else "")

    def build(self, run: RunFacts) -> Revealer:
        """Return the revealer. UserError where the folder has no skill."""
        return Retrieval(self, bank(self.folder), run.seed_for("skills"))


def bank(folder: str) -> list[Skill]:
    """Read a skill bank in the order of its files' names. UserError where there is none, or nothing in it."""
    place = Path(folder)
    if not place.is_dir():
        raise UserError(f"reveal.folder = {folder!r} is no folder: name the folder that holds the skills' .md files")
    files = sorted(path for path in place.iterdir() if path.suffix == ".md" and path.is_file())
    try:
        skills = [Skill(path.stem, path.read_text(encoding="utf-8").strip()) for path in files]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"a skill in {folder} cannot be read ({error}): write it as UTF-8 text") from error
    if not any(skill.text for skill in skills):
        raise UserError(f"reveal.folder = {folder!r} holds no skill: put at least one .md file with text into it")
    return [skill for skill in skills if skill.text]


class Retrieval:
    """Retrieves skills. Its state, for `ucb`, is how often each was used and what that earned."""

    def __init__(self, section: Skills, skills: Sequence[Skill], seed: int) -> None:
        self._section = section
        self._skills = {skill.name: skill for skill in skills}
        self._seed = seed
        self._words = {skill.name: set(words(skill.text)) for skill in skills}
        self._uses: Counter[str] = Counter()
        self._earned: dict[str, float] = {}
        self._pending: list[tuple[str, float]] = []

    def reveal(self, problem: Problem, ratio: float, rollout: Trajectory | None = None) -> Reveal:  # noqa: ARG002
        """Return the skill, or a part of it, and with `turns` the expert's first ones."""
        check_ratio(ratio)
        names = self.retrieve(problem)
        text = "\n\n".join(self._skills[name].text for name in names)
        if self._section.turns:
            shown = first_turns(problem, ratio)
            return Reveal(f"{text}\n\n{shown.text}".rstrip(), ratio, shown.shown, shown.total, shown.hidden_spans, True)
        parts = split_segments(text, "paragraph")
        count = floor(ratio * len(parts) + 1e-9)
        hidden = ((0, len(problem.solution)),)
        return Reveal("".join(parts[:count]), ratio, count, len(parts), hidden, foreign=True)

    def heard(self, problem: Problem, rollout: Trajectory) -> None:
        """Remember what the attempt earned, for the end of the step."""
        if rollout.reward is not None and self._section.retriever == "ucb":
            self._pending.append((self.retrieve(problem)[0], rollout.reward))

    def retrieve(self, problem: Problem) -> list[str]:
        """Return the names of the skills for a problem."""
        names = list(self._skills)
        match self._section.retriever:
            case "full":
                return names
            case "random":
                return [random.Random(f"{self._seed} {problem.id}").choice(names)]
            case "ucb":
                return [max(names, key=self._bound)]
            case "keyword":
                asked = set(words(problem.problem))
                return [max(names, key=lambda name: self._overlap(name, asked))]

    def _overlap(self, name: str, asked: set[str]) -> float:
        """Return sum over shared words of log(1 + skills / skills with the word)."""
        shared = sorted(asked & self._words[name])
        return sum(log(1 + len(self._words) / sum(word in own for own in self._words.values())) for word in shared)

    def _bound(self, name: str) -> float:
        used = self._uses[name]
        if not used:
            return inf
        return self._earned[name] / used + self._section.ucb * sqrt(log(self._uses.total()) / used)

    def wants(self, step: int) -> Sequence[Measurement]:  # noqa: ARG002
        """Want nothing."""
        return ()

    def observe(self, observation: Observation) -> None:  # noqa: ARG002
        """Credit the skills of the step that is over."""
        for name, reward in self._pending:
            self._uses[name] += 1
            self._earned[name] = self._earned.get(name, 0.0) + reward
        self._pending.clear()

    def metrics(self) -> Mapping[str, float]:
        """Return how often each skill was used so far, with `ucb`."""
        return {f"skill/{name}/uses": float(used) for name, used in sorted(self._uses.items())}

    def state_dict(self) -> dict[str, Any]:
        """Return uses and rewards by skill."""
        return {"uses": dict(self._uses), "earned": dict(self._earned)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._uses, self._earned = Counter(state["uses"]), dict(state["earned"])


def words(text: str) -> list[str]:
    """Return the words of a text, in small letters."""
    return _WORD.findall(text.lower())
