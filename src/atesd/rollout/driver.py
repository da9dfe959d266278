"""From problems to graded groups: render, sample turn by turn, grade.

All attempts of a step advance together, one engine call a turn; those that are over leave the batch. The prompt of a
later turn is, in ids, the prompt and the completion of the turn before as sampled, then what the environment said:
nothing that was sampled is ever rendered or tokenised again.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import cast

from atesd.envs.base import Environment
from atesd.rollout.attempt import Attempt, episode_of
from atesd.rollout.grading import Composite, RewardFunction, penalised, plain_rewards, with_parts, with_rewards
from atesd.rollout.render import Renderer
from atesd.rollout.sampler import AheadSampler, Sampler, SamplingConfig, refuse_odd_turns
from atesd.seeds import derive_seed
from atesd.types import (
    Ending,
    Group,
    Message,
    Problem,
    StopReason,
    Trajectory,
    Turn,
    UserError,
    reward_columns,
)


@dataclass(frozen=True, slots=True)
class Underway:
    """Groups whose completions are being sampled."""

    groups: Callable[[], list[Group]]
    """Waits for them, grades them and returns them; called once."""
    drop: Callable[[], None]
    """Gives them up without waiting."""
    seconds: Callable[[], float]
    """How long completions were under way so far."""


@dataclass(frozen=True, slots=True)
class Driver:
    """Samples and grades attempts of the student, who never sees a hint; with `of_teacher`, of the teacher."""

    sampler: Sampler
    renderer: Renderer
    environment: Environment
    student_messages: Callable[[Problem], list[Message]]
    """The prompt of whoever makes the attempts."""
    reward: RewardFunction
    vocabulary: int | None = None
    """How many tokens the model knows; None where nobody says."""
    room: int | None = None
    """Most tokens of a conversation and the reply that follows it; an attempt that would need more is over."""
    reserved: int = 0
    """Those of them that a teacher's prompt has more than the student's."""
    of_teacher: bool = False
    """Whether prompts are rendered as the teacher's."""
    guesses: bool = False
    """Whether the sampler takes references."""
    warned: list[str] = field(default_factory=list, repr=False)
    """What the user was told already; a copy of the driver shares it."""

    def rollout(self, problems: Sequence[Problem], sampling: SamplingConfig, *, seed: int) -> list[Group]:
        """Return one graded group a problem. Attempts cut off by the length limit grade as wrong.

        UserError where the environment fails in every attempt.
        """

        asked = [problem for problem in problems for _ in range(sampling.group_size)]
        attempts = self._opened(asked, seed, sampling.max_new_tokens)
        active, turn = attempts, 0
        while active:
            sampled = self.sampler.sample(
                [attempt.prompt for attempt in active],
                sampling,
                seed=derive_seed(seed, "turn", turn) if turn else seed,
                **self._known(active),
            )
            self._begin(active, sampled)
            longest = sampling.max_new_tokens
            active = [
                attempt for attempt, new in zip(active, sampled, strict=True) if self._goes_on(attempt, new, longest)
            ]
            turn += 1
        return self._grouped(problems, attempts)

    def ahead(self, problems: Sequence[Problem], sampling: SamplingConfig, *, seed: int) -> Underway:
        """Ask for the groups that `rollout` would return now, without waiting: single turns, of an `AheadSampler`."""
        attempts = self._opened([each for each in problems for _ in range(sampling.group_size)], seed, 0)
        sampler = cast("AheadSampler", self.sampler)
        submitted = sampler.submit([attempt.prompt for attempt in attempts], sampling, seed=seed)

        def groups() -> list[Group]:
            turns = submitted.result()
            self._begin(attempts, turns)
            for attempt, turn in zip(attempts, turns, strict=True):
                goes_on = self._goes_on(attempt, turn, 0)
                assert not goes_on, "environments of several turns are refused"
            return self._grouped(problems, attempts)

        return Underway(groups, submitted.drop, submitted.seconds)

    def replay(self, problems: Sequence[Problem]) -> list[Group]:
        """Play the expert's replies, closed by the end token, in place of samples; they are graded alike.

        An expert that has nothing more to say before the environment is over has reached its limit.
        """
        attempts = self._opened(problems, derive_seed(0, "replay"), 0)
        for attempt, problem in zip(attempts, problems, strict=True):
            assert problem.expert, "only an expert's trajectory can be replayed"
            if all(self._goes_on(attempt, self._spoken(attempt.prompt, turn.reply), 0) for turn in problem.expert):
                attempt.ended = Ending.LIMIT
        groups = self._grouped(problems, attempts)
        self._report_missed(groups)
        return groups

    def _report_missed(self, groups: Sequence[Group]) -> None:
        """Say once that an expert does not reach the goal."""
        missed = [group.problem.id for group in groups if group.trajectories[0].verdict != 1.0]
        if self.environment.grades and missed and "experts" not in self.warned:
            self.warned.append("experts")
            warnings.warn(
                f"the expert of problem {missed[0]!r} does not reach the goal in this environment, so that its hint "
                "misleads: atesd check RECIPE replays all experts and says why",
                stacklevel=2,
            )

    def _opened(
        self, asked: Sequence[Problem], seed: int, longest: int, places: Sequence[int] | None = None
    ) -> list[Attempt]:
        """Open an episode for each problem and render what its student reads first.

        An episode's seed is that of its place among all that are opened; `places` names those of a part of them. An
        environment fails that says more than fits the context before a reply of the longest kind.
        """
        prompts = {problem: self.student_messages(problem) for problem in dict.fromkeys(asked)}
        batch = self.renderer.teacher_batch if self.of_teacher else self.renderer.student_batch
        episodes = (
            episode_of(self.environment, problem, derive_seed(seed, "episode", place))
            for place, problem in zip(range(len(asked)) if places is None else places, asked, strict=True)
        )
        known = {problem: self._reference_ids(problem) if self.guesses else () for problem in prompts}
        attempts = [Attempt(episode) for episode in episodes]
        for attempt in attempts:
            attempt.begin(None)
        said = [attempt.reset(prompts[problem]) for attempt, problem in zip(attempts, asked, strict=True)]
        for attempt, problem, ids in zip(attempts, asked, batch(said), strict=True):
            attempt.prompt, attempt.reference = ids, known[problem]
            if attempt.opening and not self._fits(attempt.prompt, longest):
                attempt.fail(
                    Ending.ERROR,
                    f"what it says first makes a prompt of {len(attempt.prompt)} tokens, which with a reply of "
                    f"{longest} does not fit the model's context of {self.room}"
                    + (f", of which a teacher's hint takes {self.reserved}" if self.reserved else ""),
                )
                attempt.opening, attempt.prompt = "", self.renderer.student_ids(prompts[problem])
        return attempts

    def _known(self, attempts: Sequence[Attempt | None]) -> dict[str, list[Sequence[int]]]:
        """Return what a sampler that guesses is told; nothing of attempts that another process plays."""
        if not self.guesses:
            return {}
        return {"references": [() if attempt is None else attempt.reference for attempt in attempts]}

    def _reference_ids(self, problem: Problem) -> Sequence[int]:
        """Return the solution's ids, or those of an expert's replies; nothing where they cannot be read as text."""
        replies = [turn.reply for turn in problem.expert] or [problem.solution]
        try:
            return [each for text in replies for each in (*self.renderer.solution_ids(text), self.renderer.eos_ids[0])]
        except UserError:
            return ()

    def _begin(self, attempts: Sequence[Attempt], turns: Sequence[Turn]) -> None:
        """Let attempts know what was sampled for them. UserError unless that is one turn each, of known tokens."""
        refuse_odd_turns(self.sampler, turns, [attempt.prompt for attempt in attempts], self.vocabulary)
        for attempt, turn in zip(attempts, turns, strict=True):
            attempt.begin(turn)

    def _goes_on(self, attempt: Attempt, turn: Turn, longest: int) -> bool:
        """Take in a sampled turn; tell whether another one follows."""
        said = attempt.step(turn, self.environment.limit)
        if not said:
            return False
        attempt.prompt = [*turn.prompt_ids, *turn.completion_ids, *self.renderer.continuation_ids(said)]
        if not self._fits(attempt.prompt, longest):
            attempt.ended = Ending.CONTEXT
        return attempt.ended is None

    def _fits(self, prompt: Sequence[int], longest: int) -> bool:
        """Tell whether a reply of the longest kind fits the context behind a prompt."""
        return self.room is None or len(prompt) + longest + self.reserved <= self.room

    def _grouped(
        self, problems: Sequence[Problem], attempts: Sequence[Attempt], among: Sequence[Problem] = ()
    ) -> list[Group]:
        """Put attempts back under their problems, graded by the environment or by the reward function.

        `among`: all problems of the round, where these are a part of them.
        """
        size = len(attempts) // max(1, len(problems))
        rewards = [attempt.reward() for attempt in attempts] if self.environment.grades else []
        closed = [attempt.close() for attempt in attempts]
        self._report_failures([(attempt.ended, attempt.why) for attempt in attempts])
        parts = [closed[start : start + size] for start in range(0, len(closed), size or 1)]
        groups = [Group(problem, tuple(part)) for problem, part in zip(problems, parts, strict=True)]
        if not self.environment.grades:
            return self.grade(groups, among)
        return penalised(self._rewarded(groups, rewards), getattr(self.environment, "invalid_penalty", 0.0))

    def _report_failures(self, ends: Sequence[tuple[Ending | None, str]]) -> None:
        """Say once that the environment fails: how each attempt ended, and why. UserError where it does in all."""
        failed = [(ended, why) for ended, why in ends if ended is not None and ended.failed]
        if not failed:
            return
        first, why = failed[0]
        what = f"the environment failed in {len(failed)} of {len(ends)} attempts; in the first {why}"
        if len(failed) == len(ends):
            slow = first is Ending.HANG
            raise UserError(f"{what}: mend it{', or give it more time with env.timeout_s' if slow else ''}")
        if "failed" not in self.warned:
            self.warned.append("failed")
            warnings.warn(f"{what}. Such attempts are counted (env/ended), not graded, and train nothing", stacklevel=2)

    def reference(self, problems: Sequence[Problem], limit: int) -> list[Group]:
        """Return the reference solutions, closed by the end token, in place of samples; they are graded alike.

        In an environment they are the expert's turns.
        """
        if any(problem.expert for problem in problems):
            return self.replay(problems)
        prompts = self.renderer.student_batch([self.student_messages(problem) for problem in problems])
        turns = [self._spoken(ids, each.solution, limit) for ids, each in zip(prompts, problems, strict=True)]
        return self.grade([Group(each, (Trajectory((turn,)),)) for each, turn in zip(problems, turns, strict=True)])

    def grade(self, groups: Sequence[Group], among: Sequence[Problem] = ()) -> list[Group]:
        """Fill in the rewards, all in one call of the reward function, and none where there is nothing to grade.

        UserError unless it returns one a completion, each None or a finite number of at most a thousand million.
        """
        attempts = [(group.problem, trajectory) for group in groups for trajectory in group.trajectories]
        if not attempts:
            return list(groups)
        columns = {
            "prompts": [problem.problem for problem, _ in attempts],
            "completions": [trajectory.final.text for _, trajectory in attempts],
            **reward_columns([problem for problem, _ in attempts], among),
        }
        if not isinstance(self.reward, Composite):
            return self._rewarded(groups, self.reward(**columns))
        parts = self.reward.parts(**columns)
        named = [dict(zip(parts, given, strict=True)) for given in zip(*parts.values(), strict=True)]
        return with_parts(self._rewarded(groups, self.reward.total(parts)), named)

    def _rewarded(self, groups: Sequence[Group], returned: object) -> list[Group]:
        """Fill in what the grader returned; say once where it could grade nothing at all."""
        graded = with_rewards(groups, plain_rewards(returned, sum(len(group.trajectories) for group in groups)))
        self.tell_ungradable([attempt.reward for group in graded for attempt in group.trajectories])
        return graded

    def tell_ungradable(self, rewards: Sequence[float | None]) -> None:
        """Say once where a whole round of completions has no reward."""
        if rewards and "ungradable" not in self.warned and all(reward is None for reward in rewards):
            self.warned.append("ungradable")
            warnings.warn(
                f"no completion could be graded: all {len(rewards)} rewards of a round are None, which counts as "
                "ungradable, never as wrong; check that problems have answers that the grader can read",
                stacklevel=2,
            )

    def _spoken(self, prompt: Sequence[int], text: str, limit: int | None = None) -> Turn:
        """Return a text, closed by the end token, as if it had been sampled."""
        ids = [*self.renderer.solution_ids(text), self.renderer.eos_ids[0]]
        stop = StopReason.EOS if limit is None or len(ids) <= limit else StopReason.LENGTH
        return Turn(
            prompt_ids=tuple(prompt),
            completion_ids=tuple(ids[:limit]),
            logprobs=(),
            text=text,
            stop=stop,
            weights_version=0,
        )
