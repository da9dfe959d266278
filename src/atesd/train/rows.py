"""From routed groups to rows: one a turn, with what every role reads and what the losses need of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Literal, NamedTuple

from atesd.losses.policy import PolicyConfig, group_advantages
from atesd.losses.target import View
from atesd.routing.route import Route
from atesd.train.batch import Row
from atesd.train.hints import Asked, Hint, Hints
from atesd.train.outcomes import Outcomes
from atesd.types import Group, NonFiniteError, Trajectory, Turn

OWN_RATIO: dict[View, float] = {"full": 1.0, "answer": 0.0}
"""Views with an exposure ratio of their own."""


class _Fed(NamedTuple):
    """An attempt and what it feeds."""

    place: int
    group: Group
    attempt: Trajectory
    components: tuple[str, ...]
    ratio: float
    advantage: float | None
    outcome: float | None


class Rows:
    """Builds the rows of a generation batch."""

    def __init__(
        self,
        hints: Hints,
        *,
        outcomes: Outcomes,
        policy: PolicyConfig,
        prompt_weight: Literal["none", "paced"] = "none",
        mask_truncated: bool = False,
    ) -> None:
        self.hints = hints
        self.outcomes = outcomes
        self._policy = policy
        self._paced = prompt_weight == "paced"
        self._mask_truncated = mask_truncated

    def build(
        self,
        groups: Sequence[Group],
        routes: Sequence[Route],
        ratios: Sequence[float],
        views: Sequence[View],
        *,
        trains: bool = False,
    ) -> list[Row]:
        """Return one row a turn, group by group and attempt by attempt, with what the given teacher views read.

        `trains`: an update follows, and is no measurement; a revealer that learns from what is heard is told so.
        """
        fed = [
            _Fed(index, group, attempt, self._components(attempt, route, reinforced=gain is not None), ratio, gain, won)
            for index, (group, route, ratio) in enumerate(zip(groups, routes, ratios, strict=True))
            for attempt, gain, won in zip(
                group.trajectories, self._advantages(group, route), self.outcomes.of(group), strict=True
            )
        ]
        asked = [self._asked(each, views) for each in fed]
        hints = iter(self.hints.hints([one for wanted in asked for one in wanted.values()]))
        read = [{view: next(hints) for view in wanted} for wanted in asked]
        for each in fed if trains else ():
            if "distil" in each.components:
                self.hints.heard(each.group.problem, each.attempt)
        return [row for each, told in zip(fed, read, strict=True) for row in self._rows(each, told)]

    def _asked(self, fed: _Fed, views: Sequence[View]) -> dict[View, Asked]:
        """Return what the teacher's views read first in an attempt; nothing where it is not distilled."""
        if "distil" not in fed.components:
            return {}
        problem, opening = fed.group.problem, fed.attempt.opening
        own = {view: Asked(problem, OWN_RATIO[view], opening=opening) for view in views if view in OWN_RATIO}
        return {"teacher": Asked(problem, fed.ratio, fed.attempt), **own}

    def _rows(self, fed: _Fed, read: Mapping[View, Hint]) -> list[Row]:
        """Return the rows of one attempt. All its turns share hint, advantage and weight.

        A teacher's prompt for a later turn is its prompt for the first one and, verbatim, what followed there.
        """
        hint, attempt = read.get("teacher"), fed.attempt
        return [
            Row(
                prompt=turn.prompt_ids,
                completion=turn.completion_ids,
                components=fed.components,
                group=fed.place,
                ratio=hint.ratio if hint else fed.ratio,
                hint=hint.text if hint else "",
                view_prompts={view: each.prompt_ids + attempt.told(turn) for view, each in read.items()},
                veils={"teacher": hint.veil} if hint is not None and hint.veil is not None else {},
                sampler_logprobs=turn.logprobs,
                advantage=fed.advantage or 0.0,
                weight=self._weight(fed.group),
                outcome=fed.outcome or 0.0,
            )
            for turn in attempt.turns
        ]

    def _components(self, attempt: Trajectory, route: Route, *, reinforced: bool) -> tuple[str, ...]:
        """Return the losses that an attempt feeds: none where the environment failed in it."""
        if attempt.ended.failed or (self._mask_truncated and attempt.truncated):
            return ()
        return tuple(name for name in route.components if name != "rl" or reinforced)

    def _advantages(self, group: Group, route: Route) -> list[float | None]:
        """Return each attempt's advantage; None where it is not reinforced: ungradable, or in a group left out."""
        dropped = self._policy.zero_variance == "drop" and len(set(group.rewards)) <= 1
        if "rl" not in route.components or dropped or not group.rewards:
            return [None] * len(group.trajectories)
        advantages = group_advantages(group.rewards, self._policy.scale)
        if not all(map(isfinite, advantages)):
            raise NonFiniteError(
                f"the advantages of problem {group.problem.id!r} are not finite (largest reward "
                f"{max(group.rewards, key=abs):g}): scale the rewards"
            )
        found = iter(advantages)
        return [None if attempt.reward is None else next(found) for attempt in group.trajectories]

    def _weight(self, group: Group) -> float:
        """Return the problem's weight: p (1 - p), p the pass rate (PACED 2603.11178), 1/2 where none is known; or 1."""
        if not self._paced:
            return 1.0
        rate = min(1.0, max(0.0, sum(group.rewards) / len(group.rewards))) if group.rewards else 0.5
        return rate * (1.0 - rate)


def turns_of(groups: Sequence[Group]) -> list[tuple[Group, Trajectory, Turn]]:
    """Return the turns of a generation batch in the order of its rows."""
    return [(group, attempt, turn) for group in groups for attempt in group.trajectories for turn in attempt.turns]
