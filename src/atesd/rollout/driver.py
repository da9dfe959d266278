"""From problems to graded groups: render, sample, grade."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from atesd.envs.base import Environment
from atesd.rollout.render import Renderer
from atesd.rollout.sampler import Sampler, SamplingConfig
from atesd.types import Group, Message, Problem, StopReason, Trajectory, Turn, UserError

RewardFunction = Callable[..., list[float | None]]
"""TRL's signature: f(prompts, completions, **columns) -> one reward or None ("not gradable") a completion."""


@dataclass(frozen=True, slots=True)
class Driver:
    """Samples and grades completions of the student, who never sees a hint."""

    sampler: Sampler
    renderer: Renderer
    environment: Environment
    student_messages: Callable[[Problem], list[Message]]
    reward: RewardFunction

    def rollout(self, problems: Sequence[Problem], sampling: SamplingConfig, *, seed: int) -> list[Group]:
        """Return one graded group a problem. Completions that hit the length limit grade as wrong."""

        def sample(asked: Sequence[Problem]) -> list[Turn]:
            prompts = {problem: self._prompt(problem) for problem in dict.fromkeys(asked)}
            return self.sampler.sample([prompts[problem] for problem in asked], sampling, seed=seed)

        return self.grade(self.environment.play(problems, sampling.group_size, sample))

    def reference(self, problems: Sequence[Problem], limit: int) -> list[Group]:
        """Return the reference solutions, closed by the end token, in place of samples; they are graded alike."""
        return self.grade([Group(problem, (Trajectory((self._reference(problem, limit),)),)) for problem in problems])

    def grade(self, groups: Sequence[Group]) -> list[Group]:
        """Fill in the rewards, all in one call of the reward function. UserError unless it returns one a completion."""
        attempts = [(group.problem, trajectory) for group in groups for trajectory in group.trajectories]
        rewards = self.reward(
            prompts=[problem.problem for problem, _ in attempts],
            completions=[trajectory.turns[-1].text for _, trajectory in attempts],
            answer=[problem.answer for problem, _ in attempts],
            solution=[problem.solution for problem, _ in attempts],
            id=[problem.id for problem, _ in attempts],
        )
        _check_rewards(rewards, len(attempts))
        graded = iter([_graded(attempt, reward) for (_, attempt), reward in zip(attempts, rewards, strict=True)])
        return [replace(group, trajectories=tuple(next(graded) for _ in group.trajectories)) for group in groups]

    def _prompt(self, problem: Problem) -> list[int]:
        return self.renderer.student_ids(self.student_messages(problem))

    def _reference(self, problem: Problem, limit: int) -> Turn:
        ids = [*self.renderer.solution_ids(problem.solution), self.renderer.eos_ids[0]]
        stop = StopReason.EOS if len(ids) <= limit else StopReason.LENGTH
        return Turn(
            prompt_ids=tuple(self._prompt(problem)),
            completion_ids=tuple(ids[:limit]),
            logprobs=(),
            text=problem.solution,
            stop=stop,
            weights_version=0,
        )


def _graded(attempt: Trajectory, reward: float | None) -> Trajectory:
    cut_off = attempt.turns[-1].stop is StopReason.LENGTH
    return replace(attempt, reward=None if reward is None else 0.0 if cut_off else float(reward))


def _check_rewards(rewards: Sequence[float | None], completions: int) -> None:
    if len(rewards) != completions:
        raise UserError(
            f"the reward function returned {len(rewards)} rewards for {completions} completions: "
            "return one a completion, None where it cannot be graded"
        )
    strange = [reward for reward in rewards if reward is not None and not hasattr(reward, "__float__")]
    if strange:
        raise UserError(f"the reward function returned {strange[0]!r}: return a number, or None for no grade")
    broken = [reward for reward in rewards if reward is not None and not math.isfinite(reward)]
    if broken:
        raise UserError(f"the reward function returned {broken[0]}: return a finite number, or None for no grade")
